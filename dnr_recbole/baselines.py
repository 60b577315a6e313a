"""Rerankers that are trained beside a run's own on the same requests: what a user would pick instead."""

from __future__ import annotations

from collections import OrderedDict
from logging import getLogger
from typing import Any, Dict, Mapping, Type

from dnr_recbole.config import Config
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.errors import DnrError
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.registry import get_reranker, missing_package
from dnr_recbole.trackers import TRACKERS
from dnr_recbole.trainer import RerankTrainer

# What belongs to the run itself: a baseline leaves nothing behind but its numbers.
_NO_FILES: Dict[str, Any] = {
    "baselines": [], "resume": False, "tensorboard_dir": None, "result_file": None, "per_request_file": None,
    **{key: False for key in TRACKERS},
}  # fmt: skip


def baseline_results(config: Config, data: RerankData) -> Dict[str, Mapping[str, float]]:
    """Test metrics of the rerankers that the key `baselines` names, by name; the run's own model is left out.

    One that cannot be trained, for want of its package or of an input, is named in the log and left out.
    """
    results: Dict[str, Mapping[str, float]] = OrderedDict()
    for name in config["baselines"]:
        cls = get_reranker(name)
        if cls.__name__ == config["model"]:
            continue
        missing = missing_package(cls)
        try:
            if not missing:
                results[cls.__name__] = _trained(baseline_config(config, cls), data)
        except DnrError as error:
            missing = f": {error}"
        if missing:
            getLogger(__name__).warning(f"baseline {cls.__name__} is left out{missing}")
    return results


def baseline_config(config: Config, cls: Type[AbstractReranker]) -> Config:
    """The run's keys for another reranker: what both have, but for the keys whose defaults the baseline sets itself."""
    theirs = Config(cls, config["dataset"], config_dict={"plugins": config["plugins"]})
    keys = {k: v for k, v in config.as_dict().items() if k in theirs.schema and k not in theirs.own_keys}
    if config["history_interaction"] not in cls.interactions:
        keys["history_interaction"] = "affinity" if config["history_interaction"] == "both" else "none"
    if config["nproc"] > 1:
        keys.update({k: config[k] for k in ("local_rank", "world_size", "offset")})
    return Config(cls, config_dict={**keys, **_NO_FILES, "model": cls.__name__})


def _trained(config: Config, data: RerankData) -> Mapping[str, float]:
    model = get_reranker(config["model"])(config, data.catalogue).to(config["device"])
    trainer = RerankTrainer(config, model, data.catalogue, data.catalogue.item_counts)
    shard = {"rank": config["rank"], "world_size": trainer.world_size}
    batch_size = max(1, config["train_batch_size"] // trainer.world_size)
    train = SlateLoader(data.train, batch_size, shuffle=True, seed=config["seed"] or 0, **shard)
    valid, test = (SlateLoader(part, config["eval_batch_size"], **shard) for part in (data.valid, data.test))
    trainer.fit(train, valid, saved=False)
    return trainer.evaluate(test, load_best_model=False)
