"""What tests are made of: random requests, a catalogue, and models of test size, the same on every device."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Dict, Iterator, Optional, Union

import pandas as pd
import torch

from dnr_recbole.artefact import Artefact
from dnr_recbole.config import Config
from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import MISSING, Slate
from dnr_recbole.model.abstract_reranker import AbstractReranker, Step
from dnr_recbole.registry import get_reranker
from dnr_recbole.requestlog.decoding import Columns
from dnr_recbole.requestlog.preprocessor import Preprocessor, Vocabulary
from dnr_recbole.retriever.calibration import Calibration
from dnr_recbole.trainer.steps import as_step, take_step

N_USERS, N_ITEMS = 12, 60
DEVICE = torch.device(os.environ.get("DNR_TEST_DEVICE", "cpu"))


def random_catalogue(seed: int = 0, n_users: int = N_USERS, n_items: int = N_ITEMS, factors: int = 6) -> Catalogue:
    """A catalogue of random side tables with zero padding rows."""
    g = torch.Generator().manual_seed(seed)
    table = lambda n, f: torch.randn(n, f, generator=g) * (torch.arange(n) > 0).unsqueeze(1)  # noqa: E731
    unit = lambda t: torch.nn.functional.normalize(t, dim=-1)  # noqa: E731
    return Catalogue(
        n_users=n_users,
        n_items=n_items,
        item_popularity=torch.rand(n_items, generator=g) * (torch.arange(n_items) > 0),
        item_features=table(n_items, 3),
        user_features=table(n_users, 2),
        item_factors=table(n_items, factors),
        user_factors=table(n_users, factors),
        spaces={  # one with a table for each role and two folds, as in training within the retriever's part
            "factors": unit(table(n_items, factors)).view(1, 1, n_items, factors).repeat(1, 3, 1, 1),
            "covisit": torch.stack([unit(table(n_items, 4)) for _ in range(6)]).view(2, 3, n_items, 4),
        },
    )


def random_slate(
    seed: int = 0,
    batch: int = 8,
    n: int = 12,
    history: int = 7,
    ragged: bool = True,
    n_items: int = N_ITEMS,
    short: bool = False,
) -> Slate:
    """Random requests with distinct candidates and distinct scores.

    If ``ragged``, requests have between n / 2 and n candidates and the first one no history; if ``short`` as well, the
    last two have 1 and 2 candidates. The same numbers on every device.
    """
    g = torch.Generator().manual_seed(seed)
    candidates = torch.stack([torch.randperm(n_items - 1, generator=g)[:n] + 1 for _ in range(batch)])
    mask = torch.ones(batch, n, dtype=torch.bool)
    lengths = torch.randint(1, history + 1, (batch,), generator=g)
    if ragged:
        keep = torch.randint(max(2, n // 2), n + 1, (batch,), generator=g)
        if short:
            keep[-2:] = torch.tensor([1, 2])
        mask = torch.arange(n) < keep.unsqueeze(1)
        lengths[0] = 0
    history_mask = torch.arange(history) < lengths.unsqueeze(1)
    labels = (torch.rand(batch, n, generator=g) < 0.3).float() * mask
    labels[:, 0] = 1.0
    scores = torch.stack([(torch.randperm(n, generator=g) + 0.5) / n for _ in range(batch)])
    order = torch.stack([torch.randperm(n, generator=g) for _ in range(batch)])
    return (
        Slate(
            users=torch.randint(1, N_USERS, (batch,), generator=g),
            history=torch.randint(1, n_items, (batch, history), generator=g) * history_mask,
            history_mask=history_mask,
            candidates=candidates * mask,
            mask=mask,
            scores=scores * mask,
            labels=labels,
        )
        .shuffled(order)
        .to(DEVICE)
    )


def two_scores(slate: Slate) -> Slate:
    """The slate with a second score; some candidates lack the first, others the second."""
    second = seeded(11, *slate.mask.shape)
    scores = torch.stack([slate.scores, second], dim=-1)
    lacking = seeded(12, *scores.shape) < 0.2
    lacking[..., 1] &= ~lacking[..., 0]
    scores = torch.where(lacking, torch.full_like(scores, MISSING), scores)
    return dataclasses.replace(slate, scores=scores * slate.mask.unsqueeze(-1))


def as_artefact(model: AbstractReranker) -> Artefact:
    """A model of :func:`build` as what ranks tables of ids u1, u2 … and i1, i2 …."""
    config = model_config(type(model))
    preprocessor = Preprocessor(
        columns=Columns(["score"], []),
        users=Vocabulary([f"u{number}" for number in range(1, N_USERS - 1)]),
        items=Vocabulary([f"i{number}" for number in range(1, N_ITEMS - 1)]),
        calibrations=[Calibration()],
        normalization="none",
        n_candidates=12,
        history_length=7,
    )
    return Artefact(model, config, random_catalogue().shapes(), preprocessor)


def as_table(slate: Slate) -> pd.DataFrame:
    """Requests in the list form, as a user would write them."""
    rows = []
    for row in range(len(slate)):
        valid, known = slate.mask[row].cpu(), slate.history_mask[row].cpu()
        rows.append({
            "request_id": f"r{row}",
            "user_id": f"u{int(slate.users[row])}",
            "history": [f"i{item}" for item in slate.history[row].cpu()[known].tolist()],
            "item_id": [f"i{item}" for item in slate.candidates[row].cpu()[valid].tolist()],
            "score": slate.scores[row].cpu()[valid].double().tolist(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def model_config(model: Union[str, type], **overrides: Any) -> Config:
    """The config that a model would get by default, shrunk to test size (d = 16, K = 3), with ``overrides`` on top."""
    small: Dict[str, Any] = dict(
        embedding_size=16, slate_size=3, n_candidates=12, history_length=7, use_gpu=False, precision="fp32",
        topk=[1, 3], valid_metric="NDCG@3", train_batch_size=8, show_progress=False,
    )  # fmt: skip
    return Config(model=model, dataset="ml-100k", config_dict={**small, **overrides})


def build(
    model: Union[str, type],
    config: Optional[Config] = None,
    catalogue: Optional[Catalogue] = None,
    seed: int = 0,
    **overrides: Any,
) -> AbstractReranker:
    """A freshly initialised reranker of test size in eval mode, with the same weights on every device."""
    cls = get_reranker(model) if isinstance(model, str) else model
    torch.manual_seed(seed)
    return cls(config or model_config(model, **overrides), catalogue or random_catalogue()).to(DEVICE).eval()


def seeded(seed: int, *shape: int) -> torch.Tensor:
    """Uniform numbers that are the same on every device."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def training_steps(model: AbstractReranker, slate: Slate) -> Iterator[Step]:
    """The model's training steps as :class:`Step`, whatever it yields."""
    return map(as_step, model.training_steps(slate))


def train_one_batch(model: AbstractReranker, slate: Slate, optimizers: Dict[str, torch.optim.Optimizer]) -> None:
    """All optimiser steps of one batch, as the trainer takes them."""
    groups = model.parameter_groups()
    for step in training_steps(model, slate):
        take_step(step, groups, optimizers)
