"""A world whose truth is known: how well could the best reranker do, and how close does a model come.

Users and items have latent factors, and a user clicks an item with p(z = 1 | u, i) = sigmoid(a · u·v + b).
The retriever's score is a noisy view of that click with known densities p(x | z), Beta distributions here. So
the Bayes-optimal ranking p(z = 1 | u, i, x) is computable for every candidate, and so are the two halves of
it: what x alone can tell, and what knowing users and items can tell.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Beta

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.candidate_table import CandidateTable, shuffle_candidates
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.dataset import RerankData, RerankDataset, assemble
from dnr_recbole.data.exposure import biased_log
from dnr_recbole.data.features import popularity
from dnr_recbole.data.spaces import USING, Known, build_spaces
from dnr_recbole.data.splits import split_last_lists, split_users
from dnr_recbole.errors import ConfigError, DataError

RANKINGS = ("optimal", "scores", "content")


@dataclass(frozen=True)
class SyntheticTruth:
    """The world behind a synthetic :class:`RerankData`.

    Attributes:
        user_factors: FloatTensor [U, f], item_factors: FloatTensor [I, f]; row 0 is zero.
        slope, intercept: a and b of p(z = 1 | u, i).
        click_rate: mean of p(z = 1 | u, i) over the candidates.
        positive, negative: (alpha, beta) of p(x | z = 1) and p(x | z = 0); a zero among them means x = z.
        raw: the table with the scores as generated (those of the datasets may be normalised).
        item_bias: FloatTensor [I], by how much the log-odds of an item's scores are shifted; None = not at all.
    """

    user_factors: Tensor = field(repr=False)
    item_factors: Tensor = field(repr=False)
    slope: float
    intercept: float
    click_rate: float
    positive: Tuple[float, float]
    negative: Tuple[float, float]
    raw: CandidateTable = field(repr=False)
    item_bias: Optional[Tensor] = field(default=None, repr=False)

    @property
    def noiseless(self) -> bool:
        """Whether x = z."""
        return not (_proper(self.positive) and _proper(self.negative))

    def density(self, x: Tensor, z: int) -> Tensor:
        """p(x | z), the shape of x. Without noise there is no density."""
        if self.noiseless:
            raise ValueError("scores equal labels (synthetic_noise = 0): p(x | z) has no density")
        return torch.exp(self._log_density(x, self.positive if z else self.negative))

    def click_logit(self, users: Tensor, items: Tensor) -> Tensor:
        """Log-odds of p(z = 1 | u, i): users [B], items [B, n] → [B, n]."""
        return _logit(self.user_factors, self.item_factors, users, items, self.slope, self.intercept)

    def posterior(self, users: Tensor, items: Tensor, x: Tensor) -> Tensor:
        """p(z = 1 | u, i, x) by Bayes' rule; x are scores as generated: [B, n]."""
        return torch.sigmoid(self._logit("optimal", users, items, x))

    def probabilities(self, data: RerankDataset, ranking: str = "optimal") -> Tensor:
        """The best possible estimate of each label of a split, FloatTensor [R', n], 0 at padding.

        ``optimal``: p(z=1|u,i,x); ``scores``: p(z=1|x), users and items unknown; ``content``: p(z=1|u,i), x
        unknown.
        """
        raw, rows = self.raw, data.rows
        logit = self._logit(ranking, raw.users[rows].long(), raw.candidates[rows].long(), raw.scores[rows])
        return torch.sigmoid(logit) * raw.mask[rows]

    def expected_metrics(
        self, data: RerankDataset, k: int = 6, draws: int = 8, seed: int = 0
    ) -> Dict[str, Dict[str, float]]:
        """Expected NDCG@k and AUC per request of each ranking: {ranking: {"ndcg", "auc"}}.

        Labels and scores are drawn anew ``draws`` times for the split's candidates, so this is a property of
        the world, not of one sample. Requests without a positive (AUC: or without a negative) are left out.
        """
        generator = torch.Generator().manual_seed(seed)
        users, items = self.raw.users[data.rows].long(), self.raw.candidates[data.rows].long()
        chance = torch.sigmoid(self.click_logit(users, items))
        totals = {ranking: torch.zeros(2, dtype=torch.float64) for ranking in RANKINGS}
        for _ in range(draws):
            z = torch.rand(chance.shape, generator=generator) < chance
            x = self._shifted(sample_scores(z, self.positive, self.negative, generator), items)
            for ranking in RANKINGS:
                totals[ranking] += torch.tensor(ranking_quality(self._logit(ranking, users, items, x), z, k))
        return {name: {"ndcg": float(t[0] / draws), "auc": float(t[1] / draws)} for name, t in totals.items()}

    def _logit(self, ranking: str, users: Tensor, items: Tensor, x: Tensor) -> Tensor:
        if ranking == "content":
            return self.click_logit(users, items)
        if ranking == "scores" and self.item_bias is not None:
            return x  # whoever knows no item cannot undo its shift
        x = self._shifted(x, items, -1)
        if self.noiseless:
            ratio = torch.where(x > 0.5, torch.inf, -torch.inf)
        else:
            ratio = self._log_density(x, self.positive) - self._log_density(x, self.negative)
        if ranking == "scores":
            return ratio + math.log(self.click_rate / (1 - self.click_rate))
        if ranking == "optimal":
            return ratio + self.click_logit(users, items)
        raise ValueError(f"ranking '{ranking}' is unknown; choose one of {', '.join(RANKINGS)}")

    def _shifted(self, x: Tensor, items: Tensor, sign: int = 1) -> Tensor:
        return x if self.item_bias is None else shift_scores(x, sign * self.item_bias[items])

    @staticmethod
    def _log_density(x: Tensor, shape: Tuple[float, float]) -> Tensor:
        return Beta(*shape).log_prob(x.double().clamp(1e-12, 1 - 1e-12)).float()


def synthetic_rerank_data(config: Keys) -> RerankData:
    """A world and its requests from the ``synthetic_*`` keys; no files, no retriever. ``truth`` tells all."""
    n_users, n_items, per_user = (config[f"synthetic_{k}"] for k in ("users", "items", "requests_per_user"))
    n, dim = config["n_candidates"], config["synthetic_dim"]
    slope, intercept = float(config["synthetic_slope"]), float(config["synthetic_intercept"])
    if n > n_items:
        raise DataError(f"n_candidates {n} is larger than synthetic_items {n_items}; lower it")
    positive, negative = score_shapes(config)
    generator = torch.Generator().manual_seed(config["seed"])
    user_factors, item_factors = _factors(n_users, dim, generator), _factors(n_items, dim, generator)

    def clicks(users: Tensor, items: Tensor) -> Tuple[Tensor, Tensor]:
        chance = torch.sigmoid(_logit(user_factors, item_factors, users, items, slope, intercept))
        return torch.rand(items.shape, generator=generator) < chance, chance

    # History: what each user clicked among items met earlier.
    people = torch.arange(1, n_users + 1)
    met = _distinct_items(n_users, min(config["synthetic_browsed"], n_items), n_items, generator)
    history = clicks(people, met)[0]
    ends = torch.cat([torch.zeros(1, dtype=torch.long), history.sum(1).cumsum(0)])
    history_items = torch.cat([met[history], torch.zeros(1, dtype=torch.long)])

    users = people.repeat_interleave(per_user)
    candidates = _distinct_items(len(users), n, n_items, generator)
    labels, chance = clicks(users, candidates)
    numbers = users.numpy()
    split = (
        split_last_lists(numbers)
        if config["split"] == "last"
        else split_users(numbers, config["split"], config["seed"])
    )
    raw = CandidateTable(
        users=users.int(),
        candidates=candidates.int(),
        mask=torch.ones_like(labels),
        scores=sample_scores(labels, positive, negative, generator),
        labels=labels,
        split=torch.from_numpy(split),
        n_positives=labels.sum(1).int(),
        history_items=history_items.int(),
        history_begin=ends[users - 1],
        history_end=ends[users],
        history_length=config["history_length"],
    )
    bias = None
    if config["synthetic_item_bias"]:
        bias = float(config["synthetic_item_bias"]) * torch.randn(n_items + 1, generator=generator)
        raw = dataclasses.replace(raw, scores=shift_scores(raw.scores, bias[raw.candidates.long()]))
    raw = shuffle_candidates(raw, config["seed"])
    known = bool(config["synthetic_factors"])
    counts = torch.bincount(history_items, minlength=n_items + 1)
    counts[0] = 0
    catalogue = Catalogue(
        n_users=n_users + 1,
        n_items=n_items + 1,
        item_popularity=popularity(counts),
        item_features=torch.zeros(n_items + 1, 0),
        user_features=torch.zeros(n_users + 1, 0),
        item_factors=_noisy(item_factors, config, generator) if known else None,
        user_factors=_noisy(user_factors, config, generator) if known else None,
        item_counts=counts,
        user_ids_known=config["split"] == "last",
    )
    catalogue = dataclasses.replace(catalogue, spaces=_spaces(config, history, met, catalogue))
    truth = SyntheticTruth(
        user_factors, item_factors, slope, intercept, float(chance.mean()), positive, negative, raw, bias
    )
    if config["synthetic_clicks"] == "none":
        return assemble(config, raw, catalogue, truth=truth)
    liked = truth.posterior(raw.users.long(), raw.candidates.long(), raw.scores)  # the order shown knows the scores
    return assemble(config, biased_log(config, raw, liked, generator), catalogue, truth=truth)


def _spaces(config: Keys, clicked: Tensor, met: Tensor, catalogue: Catalogue) -> Dict[str, Tensor]:
    """Item spaces of what users clicked (bool [U, m]) of the items ``met`` [U, m] before any request."""
    if config["history_interaction"] not in USING:
        return {}
    user, position = torch.nonzero(clicked, as_tuple=True)
    known = Known(
        user=user.numpy() + 1,
        item=met[user, position].numpy(),
        n_users=catalogue.n_users,
        n_items=catalogue.n_items,
        dim=config["affinity_dim"],
        factors=catalogue.item_factors,
    )
    return build_spaces(config["affinity_spaces"], known)


def score_shapes(config: Keys) -> Tuple[Tuple[float, float], Tuple[float, float]]:
    """(alpha, beta) of p(x | z = 1) and p(x | z = 0).

    With m = synthetic_noise / 2, the means are 1 − m and m: noise 1 makes both densities the same, noise 0
    makes x = z. ``synthetic_positive_scores`` and ``synthetic_negative_scores`` replace them by any Beta
    distribution.
    """
    concentration, middle = float(config["synthetic_concentration"]), float(config["synthetic_noise"]) / 2
    shapes = []
    for key, mean in (("positive", 1 - middle), ("negative", middle)):
        given = config[f"synthetic_{key}_scores"]
        if given and (len(given) != 2 or min(given) <= 0):
            raise ConfigError(f"synthetic_{key}_scores must be two positive numbers (alpha, beta), got {given}")
        shapes.append(
            (float(given[0]), float(given[1])) if given else (concentration * mean, concentration * (1 - mean))
        )
    if _proper(shapes[0]) != _proper(shapes[1]):
        raise ConfigError("synthetic_noise 0 (x = z) cannot be combined with one given density; give both or none")
    return shapes[0], shapes[1]


def sample_scores(
    z: Tensor, positive: Tuple[float, float], negative: Tuple[float, float], generator: torch.Generator
) -> Tensor:
    """x ~ p(x | z), float32 in [0, 1] of z's shape."""
    if not (_proper(positive) and _proper(negative)):
        return z.float()
    # numpy's Beta sampler, seeded from the torch generator: torch's own takes no generator.
    seed = int(torch.randint(2**62, (1,), generator=generator))
    flags = z.numpy()
    alpha = np.where(flags, positive[0], negative[0])
    beta = np.where(flags, positive[1], negative[1])
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, beta).astype(np.float32)).clamp(0.0, 1.0)


def shift_scores(x: Tensor, shift: Tensor) -> Tensor:
    """Scores in [0, 1] whose log-odds are moved by ``shift``; 0 and 1 stay."""
    return torch.sigmoid(torch.logit(x.double(), eps=1e-9) + shift).float()


def ranking_quality(scores: Tensor, labels: Tensor, k: int) -> Tuple[float, float]:
    """Mean NDCG@k and mean AUC over the requests that have them: scores and labels [R, n], no padding."""
    labels = labels > 0
    positives = labels.sum(1)
    n = labels.shape[1]
    order = scores.argsort(1, descending=True)
    hits = labels.gather(1, order).double()
    discount = 1 / torch.log2(torch.arange(n, dtype=torch.float64) + 2)
    ideal = torch.cat([torch.zeros(1, dtype=torch.float64), discount[:k].cumsum(0)])[positives.clamp(max=min(k, n))]
    ndcg = ((hits * discount)[:, :k].sum(1) / ideal)[positives > 0]
    # AUC by the rank sum of the positives, ties by mean rank.
    below = torch.searchsorted(scores.sort(1).values, scores.contiguous())
    up_to = torch.searchsorted(scores.sort(1).values, scores.contiguous(), right=True)
    rank_sum = ((below + up_to + 1).double() / 2 * labels).sum(1)
    pairs = positives * (n - positives)
    auc = ((rank_sum - positives * (positives + 1) / 2) / pairs)[pairs > 0]
    return float(ndcg.mean()), float(auc.mean())


def _proper(shape: Tuple[float, float]) -> bool:
    return min(shape) > 0


def _logit(
    user_factors: Tensor, item_factors: Tensor, users: Tensor, items: Tensor, slope: float, intercept: float
) -> Tensor:
    """a · u·v + b for users [B] and items [B, n] → [B, n], in blocks: never a whole [B, n, f] tensor."""
    block = max(1, (1 << 24) // (items.shape[1] * item_factors.shape[1]))
    dots = [
        torch.einsum("bf,bnf->bn", user_factors[u], item_factors[i])
        for u, i in zip(users.split(block), items.split(block))
    ]
    return slope * torch.cat(dots) + intercept


def _factors(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """[n + 1, dim], such that u·v has variance 1; row 0 is zero."""
    table = torch.randn(n + 1, dim, generator=generator) / dim**0.25
    table[0] = 0.0
    return table


def _noisy(factors: Tensor, config: Keys, generator: torch.Generator) -> Tensor:
    """What a retriever may know of the factors: unit variance, plus noise."""
    real = factors[1:] / factors[1:].std()
    noise = float(config["synthetic_factor_noise"]) * torch.randn(real.shape, generator=generator)
    return torch.cat([torch.zeros(1, factors.shape[1]), real + noise])


def _distinct_items(n_rows: int, n: int, n_items: int, generator: torch.Generator) -> Tensor:
    """n distinct items per row, LongTensor [n_rows, n], in O(n_rows · n) whatever the size of the catalogue.

    One item from each of n equal strata of the catalogue: ids carry no meaning in this world, so this is a
        fair draw.
    """
    edges = torch.div(torch.arange(n + 1) * n_items, n, rounding_mode="floor")
    place = torch.rand(n_rows, n, generator=generator)
    return edges[:-1] + (place * edges.diff()).long() + 1
