"""Stage 1: fit a retriever on its part of every user, validate, calibrate, measure, cache.

Where that part ends, `data.cut` decides; its last tenth is kept for validation. In the plainest case::

    |------------- 72 % -------------|--- 8 % ---|------ 20 % ------|
      0: the model is fitted on these  1: early     2: stage 2; the retriever never sees them
                                          stopping,
                                          calibration

RecBole does the training itself: its datasets (copies that hold only the rows of one part), samplers,
loaders and trainer, so that each of its general recommenders works by name.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import time
from logging import getLogger
from typing import Optional, Tuple

import numpy as np
import torch
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import ModelType, get_trainer, init_seed

from dnr_recbole.data.cut import retriever_end
from dnr_recbole.data.interactions import PART_FIELD, Interactions, earlier_count
from dnr_recbole.data.ranges import count_within
from dnr_recbole.data.requests import retriever_part
from dnr_recbole.errors import CacheError, ConfigError, DataError
from dnr_recbole.identity import FileDigests, identity
from dnr_recbole.logs import shows_progress
from dnr_recbole.retriever.cache import Cache
from dnr_recbole.retriever.calibration import Calibration, calibration_from_dict, fit_calibration
from dnr_recbole.retriever.metrics import (
    MAX_USERS,
    contains,
    evaluate_retrieval,
    pair_keys,
    sample_unseen,
    sample_users,
)
from dnr_recbole.retriever.retrieval import Retrieval, extract_factors
from dnr_recbole.trackers import Trackers

FIT, VALID, LATER = 0, 1, 2
_VALID_SHARE = 0.1  # of the retriever's part
_CALIBRATION_NEGATIVES = 4  # per positive, the ratio MF is trained with
# RecBole counts one user as n_items when it fills an evaluation batch: its default of 4096 would be one user
# per batch.
_EVAL_SCORES = 2**20


def train_retriever(
    config, dataset, interactions: Optional[Interactions] = None, files: Optional[FileDigests] = None
) -> Retrieval:
    """Fit (or load from the cache) the retriever that ``config`` names.

    Args:
        config: the run's Config; ``config.retriever_config()`` holds the keys of stage 1.
        dataset: a RecBole dataset right after ``create_dataset``; it is not changed.
        interactions: ``Interactions.from_recbole(dataset, config)`` if the caller has it already.
        files: digests of the files that the dataset was read from.

    The global random state is left as it was found, so stage 2 is the same whether stage 1 was trained or
    loaded.
    """
    start = time.time()
    if interactions is None:
        interactions = Interactions.from_recbole(dataset, config)
    settings = config.retriever_config()
    name = settings["model"]
    if settings["MODEL_TYPE"] not in (ModelType.GENERAL, ModelType.TRADITIONAL):
        raise ConfigError(f"retriever '{name}' is no general recommender; choose one such as MF, BPR, LightGCN or EASE")
    # Data-parallel processes do not share this stage: with the same seed each fits the same model by itself.
    settings["single_spec"] = True
    n_candidates = min(int(config["n_candidates"]), interactions.n_items - 1)
    split = split_codes(config, interactions)
    key = retriever_key(config, interactions, split, files)
    cache = Cache(config["cache_dir"]) if config["use_cache"] else None

    with _private_random_state(settings), cache.making(key) if cache else contextlib.nullcontext():
        fit_data, valid_data = _recbole_parts(settings, dataset, interactions, split)
        retrieval = Retrieval(
            name=name,
            model=settings.model_class(settings, fit_data).to(settings["device"]),
            calibration=Calibration(),
            uid_field=dataset.uid_field,
            iid_field=dataset.iid_field,
            n_users=interactions.n_users,
            n_items=interactions.n_items,
            split=split,
            train_count=torch.from_numpy(
                np.bincount(interactions.item[split != LATER], minlength=interactions.n_items)
            ),
            key=key,
        )
        cached = cache is not None and _restore(cache, retrieval)
        if not cached:
            _fit(settings, retrieval.model, fit_data, valid_data)
            retrieval.model.eval()
            if not getattr(retrieval.model, "emits_probabilities", False):
                retrieval.calibration = _calibrate(settings, retrieval, interactions, config["repeatable"])
            retrieval.metrics = evaluate_retrieval(
                retrieval, interactions, n_candidates, config["seed"], config["repeatable"]
            )
            if cache is not None:
                _store(cache, retrieval)
        retrieval.user_factors, retrieval.item_factors = extract_factors(
            retrieval.model, retrieval.n_users, retrieval.n_items
        )
    numbers = ", ".join(f"{k} {v:.4f}" for k, v in retrieval.metrics.items())
    origin = "loaded from the cache" if cached else "fitted"
    getLogger(__name__).info(f"retriever {name} {origin} in {time.time() - start:.1f} s: {numbers}")
    return retrieval


def split_codes(config, interactions: Interactions) -> np.ndarray:
    """int8 [N]: FIT or VALID for every interaction of the retriever's part, LATER for all others.

    A user without a part (see :func:`retriever_end`) is unknown to the retriever.
    """
    lines = np.flatnonzero(retriever_part(interactions, retriever_end(config, interactions)))
    user = interactions.user[lines]
    length = np.bincount(user, minlength=interactions.n_users)
    codes = np.full(len(interactions), LATER, dtype=np.int8)
    codes[lines] = np.where(count_within(length) < earlier_count(length, 1.0 - _VALID_SHARE)[user], FIT, VALID)
    return codes


def retriever_key(config, interactions: Interactions, split: np.ndarray, files: Optional[FileDigests] = None) -> dict:
    """Everything that determines the fitted retriever, as a JSON-able dict.

    The interactions and their division are in it by content: they catch what a caller changed in memory, and let
    settings that divide the data alike share a retriever.
    """
    return {
        "kind": "retriever",
        "identity": identity(config, "retriever", files),
        "interactions": interactions.digest(),
        "split": hashlib.sha256(split.tobytes()).hexdigest(),
    }


def _recbole_parts(settings, dataset, interactions: Interactions, split: np.ndarray) -> Tuple:
    """-> RecBole datasets of the parts FIT and VALID; the latter is None if no user is long enough."""
    positive = np.ones(len(interactions), dtype=bool)
    if settings["positive"] == "click":
        positive = interactions.click
    if not (split == FIT).any():
        raise DataError(
            "nothing is left for the retriever: under protocol 'exposed' its part of a user ends where his validation "
            "list begins, and here that is his first list; lower slate_size or use users with more interactions"
        )
    parts = []
    for code in (FIT, VALID):
        rows = interactions.row[(split == code) & positive]
        parts.append(_subset(settings, dataset, rows) if len(rows) else None)
    if parts[0] is None:
        raise DataError(f"no interaction reaches label_threshold {settings['label_threshold']}: nothing to learn from")
    return tuple(parts)


def _subset(settings, dataset, rows: np.ndarray):
    """A RecBole dataset with these rows only, in tensor form. The original is left alone, its shared dicts
    too."""
    if not hasattr(dataset.inter_feat, "iloc"):
        raise DataError("the dataset was already built by RecBole; pass it right after create_dataset()")
    frame = dataset.inter_feat.iloc[rows].drop(columns=PART_FIELD, errors="ignore")  # no field of RecBole's
    part = dataset.copy(frame.reset_index(drop=True))
    part.config = settings
    for name in ("field2type", "field2source", "field2seqlen"):
        setattr(part, name, copy.copy(getattr(dataset, name)))
    if not getattr(settings.model_class, "uses_features", False):
        # General recommenders read ids only, but RecBole's loader would join all features to every sampled
        # row.
        part.user_feat = part.item_feat = None
        part.feat_name_list = ["inter_feat"]
    part._change_feat_format()
    return part


def _fit(settings, model, fit_data, valid_data) -> None:
    """Train with RecBole's loaders and trainer; the model ends with the weights of its best validation."""
    model_name, n_items = settings["model"], fit_data.item_num
    settings["eval_batch_size"] = max(settings["eval_batch_size"], _EVAL_SCORES)
    if max(settings["topk"]) >= n_items:
        getLogger(__name__).warning(f"only {n_items - 1} items: early stopping by Recall@{min(10, n_items - 1)}")
        settings["topk"] = [min(10, n_items - 1)]
        settings["metrics"], settings["valid_metric"] = ["Recall"], f"Recall@{min(10, n_items - 1)}"
    try:
        # RecBole asks for three phases; there is no test phase here, so it gets the validation part again.
        samplers = create_samplers(settings, fit_data, [fit_data, valid_data or fit_data, valid_data or fit_data])
    except ValueError as error:  # somebody has seen every item
        raise DataError(f"cannot sample negatives for retriever '{model_name}': {error}") from error
    train_loader = get_dataloader(settings, "train")(settings, fit_data, samplers[0], shuffle=settings["shuffle"])
    valid_loader = None
    if valid_data is not None:
        valid_loader = get_dataloader(settings, "valid")(settings, valid_data, samplers[1], shuffle=False)

    trainer_class = get_trainer(settings["MODEL_TYPE"], model_name)
    trainer = type(f"InMemory{trainer_class.__name__}", (_KeepBest, trainer_class), {})(settings, model)
    with trainer.wandblogger:
        trainer.fit(
            train_loader,
            valid_loader,
            verbose=True,
            saved=True,
            show_progress=shows_progress(settings),
        )
    trainer.finish()


class _KeepBest:
    """Mixin for RecBole's trainers: the best weights stay in memory, no checkpoint file is written."""

    best = None

    def __init__(self, config, model):
        super().__init__(config, model)
        self.wandblogger = Trackers(config)  # RecBole's name of what it reports to
        self.tensorboard = self.wandblogger.tensorboard

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        self.best = copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.model.other_parameter())

    def finish(self):
        self.tensorboard.close()
        if self.best is not None:
            self.model.load_state_dict(self.best[0])
            self.model.load_other_parameter(self.best[1])


def _calibrate(settings, retrieval: Retrieval, interactions: Interactions, repeatable: bool) -> Calibration:
    """Fit the map raw score -> x on the validation part against items the user has not had before part
    LATER; if ``repeatable``, on all of it against items that he has not had in it."""
    rng = np.random.default_rng(settings["seed"])
    n_items = interactions.n_items
    positive = interactions.click if settings["positive"] == "click" else np.ones(len(interactions), dtype=bool)
    fitted = pair_keys(interactions, retrieval.split == FIT)
    held_out = pair_keys(interactions, (retrieval.split == VALID) & positive)
    if not repeatable:
        held_out = held_out[~contains(fitted, held_out)]
    if len(held_out) == 0:
        getLogger(__name__).warning(
            "no held-out interaction to calibrate on: x is calibrated on the fitted ones, too optimistic"
        )
        held_out = pair_keys(interactions, (retrieval.split == FIT) & positive)
    held_out = held_out[np.isin(held_out // n_items, sample_users(held_out // n_items, MAX_USERS, rng))]
    users, items = held_out // n_items, held_out % n_items
    seen = pair_keys(interactions, (retrieval.split == VALID) if repeatable else (retrieval.split != LATER))
    negative_users, negative_items = sample_unseen(users, _CALIBRATION_NEGATIVES, seen, n_items, rng)
    if len(negative_users) == 0:
        raise DataError("every user has interacted with every item: there is nothing left to retrieve")
    return fit_calibration(
        settings["calibration"] or "logistic",
        retrieval.raw_pairs(users, items),
        retrieval.raw_pairs(negative_users, negative_items),
    )


def _store(cache: Cache, retrieval: Retrieval) -> None:
    """Models that keep their fit outside tensors (EASE, ItemKNN) are not cached: fitting them is one pass."""
    other = retrieval.model.other_parameter()
    if any(not (value is None or torch.is_tensor(value)) for value in other.values()):
        return
    tensors = {f"state.{k}": v for k, v in retrieval.model.state_dict().items()}
    tensors.update({f"other.{k}": v for k, v in other.items() if v is not None})
    meta = {
        "calibration": retrieval.calibration.to_dict(),
        "metrics": retrieval.metrics,
        "other": sorted(other),
    }
    cache.store(retrieval.key, tensors, meta)


def _restore(cache: Cache, retrieval: Retrieval) -> bool:
    entry = cache.load_entry(retrieval.key)
    if entry is None:
        return False
    tensors, meta = entry
    model = retrieval.model
    try:
        model.load_state_dict({k[len("state.") :]: v for k, v in tensors.items() if k.startswith("state.")})
        other = {k: tensors.get(f"other.{k}") for k in meta["other"]}
        model.load_other_parameter({k: v if v is None else v.to(model.device) for k, v in other.items()})
        retrieval.calibration = calibration_from_dict(meta["calibration"])
        retrieval.metrics = {name: float(value) for name, value in meta["metrics"].items()}
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CacheError(
            f"cache entry {cache.path(retrieval.key)} holds no {retrieval.name} ({reason}); "
            "delete it or run with --use_cache=False"
        ) from error
    model.eval()
    return True


@contextlib.contextmanager
def _private_random_state(settings):
    """Seed Python, numpy and torch for stage 1 and put their states back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        init_seed(settings["seed"], settings["reproducibility"])
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
