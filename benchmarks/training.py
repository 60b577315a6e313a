"""A training of a benchmark, which leaves no files."""

from __future__ import annotations

import numpy as np
import torch

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.registry import get_reranker
from dnr_recbole.trainer import RerankTrainer


def trained(config: Config, data, seed: int, best_epoch: bool = True) -> RerankTrainer:
    """The trainer of ``config["model"]`` on ``data``, initialised by ``seed``; its model has the weights of the epoch
    that validates best, or those of the last one."""
    torch.manual_seed(seed)
    model = get_reranker(config["model"])(config, data.catalogue)
    trainer = RerankTrainer(config, model, data.catalogue, data.catalogue.item_counts)
    best, state = -np.inf, None

    def keep(epoch, score):
        nonlocal best, state
        if score > best:
            best, state = score, {name: value.clone() for name, value in model.state_dict().items()}

    train = SlateLoader(data.train, config["train_batch_size"], shuffle=True, seed=seed)
    trainer.fit(train, SlateLoader(data.valid, 2048), verbose=False, saved=False, callback_fn=keep)
    if best_epoch:
        model.load_state_dict(state)
    return trainer
