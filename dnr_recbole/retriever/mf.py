"""Matrix factorisation with biases, trained by binary cross-entropy: the default retriever."""

from __future__ import annotations

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from dnr_recbole.registry import register_retriever


@register_retriever
class MF(GeneralRecommender):
    """s = p_u . q_i + b_u + b_i + mu, x = sigmoid(s); positives against uniformly sampled negatives."""

    input_type = InputType.POINTWISE
    emits_probabilities = True
    family = "retriever"
    paper = "Koren et al., Computer 2009: Matrix Factorization Techniques for Recommender Systems"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.LABEL = config["LABEL_FIELD"]
        size = config["embedding_size"]
        self.user_embedding = nn.Embedding(self.n_users, size, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, size, padding_idx=0)
        self.user_bias = nn.Embedding(self.n_users, 1, padding_idx=0)
        self.item_bias = nn.Embedding(self.n_items, 1, padding_idx=0)
        self.global_bias = nn.Parameter(torch.zeros(1))
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=config["init_std"])
            nn.init.zeros_(table.weight[0].detach())  # the padding row
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, user, item):
        """user [B], item [B] -> logits [B]."""
        dot = (self.user_embedding(user) * self.item_embedding(item)).sum(-1)
        return dot + self.user_bias(user).squeeze(-1) + self.item_bias(item).squeeze(-1) + self.global_bias

    def calculate_loss(self, interaction):
        logits = self.forward(interaction[self.USER_ID], interaction[self.ITEM_ID])
        return F.binary_cross_entropy_with_logits(logits, interaction[self.LABEL].float())

    def predict(self, interaction):
        """-> x [B] in [0, 1]."""
        return torch.sigmoid(self.forward(interaction[self.USER_ID], interaction[self.ITEM_ID]))

    def full_sort_predict(self, interaction):
        """-> x [B * n_items] in [0, 1]."""
        user = interaction[self.USER_ID]
        logits = self.user_embedding(user) @ self.item_embedding.weight.T
        logits += self.user_bias(user) + self.item_bias.weight.T + self.global_bias
        return torch.sigmoid(logits).view(-1)

    def user_factors(self):
        """float32 [n_users, d]."""
        return self.user_embedding.weight.detach()

    def item_factors(self):
        """float32 [n_items, d]."""
        return self.item_embedding.weight.detach()
