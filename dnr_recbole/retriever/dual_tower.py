"""Two-tower retriever: a user tower over the id and the pooled history, an item tower, cosine similarity."""

from __future__ import annotations

import math

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from dnr_recbole.registry import register_retriever


@register_retriever
class DualTower(GeneralRecommender):
    """logit = cos(user tower, item tower) / tau, trained by in-batch softmax corrected for popularity.

    In-batch negatives come in proportion to popularity; subtracting log q(i) from the logits undoes that. The
    softmax leaves bias and scale of the logit free, so they are fitted afterwards by binary cross-entropy on
    held-out data (the logistic calibration of :mod:`dnr_recbole.retriever.calibration`):
    x = sigmoid(a * cos / tau + b).
    """

    input_type = InputType.POINTWISE
    emits_probabilities = False
    family = "retriever"
    paper = "Yi et al., RecSys 2019: Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size = config["embedding_size"]
        self.user_embedding = nn.Embedding(self.n_users, size, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, size, padding_idx=0)
        self.user_tower = nn.Sequential(nn.Linear(2 * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.item_tower = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        self.dropout = nn.Dropout(config["dropout_prob"])
        self.log_tau = nn.Parameter(torch.tensor(math.log(config["temperature"])))
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=size**-0.5)
            nn.init.zeros_(table.weight[0].detach())

        # Buffers: part of the state, so that a restored model scores exactly as the trained one.
        history, _, _ = dataset.history_item_matrix(max_history_len=config["retriever_history_length"])
        self.register_buffer("history", history)
        count = torch.bincount(dataset.inter_feat[self.ITEM_ID], minlength=self.n_items).float()
        self.register_buffer("log_frequency", torch.log(count.clamp_min(1.0) / count.sum().clamp_min(1.0)))
        self._vectors = None  # item vectors, computed once per evaluation

    def train(self, mode=True):
        self._vectors = None
        return super().train(mode)

    def encode_users(self, user, target=None):
        """user [B] -> unit vectors [B, d]. ``target`` [B] is left out of the history, as it will be later."""
        history = self.history[user]
        weight = (history != 0).to(self.item_embedding.weight.dtype)
        if target is not None:
            weight = weight * (history != target.unsqueeze(1))
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1.0)
        pooled = F.embedding_bag(history, self.item_embedding.weight, per_sample_weights=weight, mode="sum")
        state = self.dropout(torch.cat([self.user_embedding(user), pooled], dim=1))
        return F.normalize(self.user_tower(state), dim=1)

    def encode_items(self, item):
        """item [...] -> unit vectors [..., d]."""
        return F.normalize(self.item_tower(self.dropout(self.item_embedding(item))), dim=-1)

    @property
    def temperature(self):
        return self.log_tau.exp().clamp(0.01, 1.0)

    def calculate_loss(self, interaction):
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        logits = self.encode_users(user, target=item) @ self.encode_items(item).T / self.temperature  # [B, B]
        logits = logits - self.log_frequency[item]
        # The same item, or another item of the same user, is no negative.
        same = (item.unsqueeze(1) == item) | (user.unsqueeze(1) == user)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, torch.arange(len(user), device=logits.device))

    def predict(self, interaction):
        """-> cos / tau [B]."""
        user = self.encode_users(interaction[self.USER_ID])
        return (user * self.encode_items(interaction[self.ITEM_ID])).sum(-1) / self.temperature

    def full_sort_predict(self, interaction):
        """-> cos / tau [B * n_items]."""
        if self._vectors is None:
            self._vectors = self.encode_items(torch.arange(self.n_items, device=self.item_embedding.weight.device))
        return (self.encode_users(interaction[self.USER_ID]) @ self._vectors.T / self.temperature).view(-1)

    @torch.no_grad()
    def user_factors(self):
        """float32 [n_users, d]."""
        ids = torch.arange(self.n_users, device=self.history.device)
        return torch.cat([self.encode_users(chunk) for chunk in ids.split(8192)])

    @torch.no_grad()
    def item_factors(self):
        """float32 [n_items, d]."""
        return self.encode_items(torch.arange(self.n_items, device=self.history.device))
