"""Run a plan: every row of a table, in every setting, with an equal search on validation and several seeds.

A plan is a YAML file::

    fixed: {dataset: ml-100k, embedding_size: 64}     # keys of every run
    settings:                                         # one table each
      retrieved: {protocol: retrieved, split: user}
    search: {learning_rate: [0.0005, 0.002]}          # tried for every row on the first seed, chosen on validation
    seeds: [2020, 2021, 2022]
    rows:
      PRM + score: {model: PRM, score_fusion: concat}

Every finished run is one line of the output file, and a run that stands there is not repeated, so an interrupted plan
goes on where it stopped. Test numbers play no part in any choice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from typing import Any, Dict, Iterator, List, Tuple

import torch
import yaml

from dnr_recbole.config import Config
from dnr_recbole.data.candidates import PROTOCOL_KEYS
from dnr_recbole.data.dataset import RerankData
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.logs import restored, start_logger
from dnr_recbole.paths import check_paths
from dnr_recbole.quick_start import prepare_data, train_and_evaluate
from dnr_recbole.trainer.checkpoint import load_reranker

_PARTS = {"fixed", "settings", "search", "seeds", "rows"}
# What a run writes into its line, from the result row.
_KEPT = ("best_valid_score", "test", "probes", "seconds_per_epoch", "epochs", "peak_memory_mib", "retriever", "seed",
         "git_commit", "versions", "cpu")  # fmt: skip
# A row that changes one of these gets data of its own; the caches on disk keep that cheap.
_DATA_KEYS = (*PROTOCOL_KEYS, "dataset", "retriever", "retriever_args", "retriever_fraction", "score_normalization",
              "max_requests_per_user", "keep_empty_requests", "max_feature_vocabulary", "seed")  # fmt: skip
_TIMED_REQUESTS, _TIMED_BATCH = 1024, 256


@restored()
def compare(plan_file: str, output: str) -> None:
    """Run what is missing of a plan and append it to ``output`` (JSON lines).

    Raises:
        ConfigError: the plan or one of its keys cannot be used; checked for all rows before the first run.
    """
    plan = read_plan(plan_file)
    finished = [line for line in read_rows(output) if "error" not in line]
    done = {place(**line): line for line in finished}
    for setting, row in itertools.product(plan["settings"], plan["rows"]):
        config = Config(config_dict=_keys(plan, setting, row, {}, plan["seeds"][0]))
        check_paths(config, outputs={"results": output})
    for setting, seed_index in itertools.product(plan["settings"], range(len(plan["seeds"]))):
        seed, data, data_key = plan["seeds"][seed_index], None, None
        for row in plan["rows"]:
            trials = list(trials_of(plan, setting, row))
            if seed_index > 0:
                trials = [chosen(plan, done, setting, row)]
            for searched in trials:
                if searched is None or place(setting, row, seed, searched) in done:
                    continue
                config = Config(config_dict=_keys(plan, setting, row, searched, seed))
                if data_key != _key({k: config[k] for k in _DATA_KEYS}):
                    start_logger(config, quiet=True)
                    data, data_key = prepare_data(config), _key({k: config[k] for k in _DATA_KEYS})
                result = _run(config, *data)
                line = {"setting": setting, "row": row, "seed": seed, "searched": searched, **result}
                _append(output, line)
                done[place(**line)] = line
                shown = result.get("error") or f"valid {result['best_valid_score']:.4f}, test ndcg {_ndcg(result):.4f}"
                print(f"{setting} | {row} | seed {seed} | {searched}: {shown}", flush=True)


def read_plan(path: str) -> Dict[str, Any]:
    """The plan with every part present.

    Raises:
        ConfigError: it is missing, no YAML, or has unknown parts.
    """
    try:
        with open(path) as f:
            plan = yaml.safe_load(f) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"plan {path} cannot be read: {error}") from error
    unknown = set(plan) - _PARTS
    if unknown or not plan.get("rows"):
        known = ", ".join(sorted(_PARTS))
        raise ConfigError(f"plan {path}: needs `rows`, and knows only {known}; found {sorted(plan)}")
    defaults: Dict[str, Any] = {"fixed": {}, "settings": {"default": {}}, "search": {}, "seeds": [2020]}
    plan = {**defaults, **{part: content for part, content in plan.items() if content}}
    for part, content in plan.items():
        wanted = list if part == "seeds" else dict
        if not isinstance(content, wanted):
            raise ConfigError(f"plan {path}: `{part}` must be a {'list' if wanted is list else 'mapping'}")
    return plan


def read_rows(path: str) -> List[Dict[str, Any]]:
    """Lines of a result file; none if it does not exist."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path) as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):  # a run was killed while it wrote its line
                rows.append(json.loads(line))
    return rows


def place(setting: str, row: str, seed: int, searched: Dict[str, Any], **_: Any) -> Tuple:
    """Which run of the plan a line is: ``place(**line)``."""
    return setting, row, seed, _key(searched)


def chosen(plan: Dict[str, Any], done: Dict[Tuple, Dict], setting: str, row: str):
    """The searched keys with the best validation score on the first seed; None if no run of the row succeeded."""
    lines = [done.get(place(setting, row, plan["seeds"][0], t)) for t in trials_of(plan, setting, row)]
    lines = [line for line in lines if line and "error" not in line]
    if not lines:
        return None
    best = max if lines[0].get("valid_score_bigger", True) else min
    return best(lines, key=lambda line: line["best_valid_score"])["searched"]


def trials_of(plan, setting: str, row: str) -> Iterator[Dict[str, Any]]:
    """The search grid of a row: what the row or the setting fixes is not searched."""
    own = {**plan["settings"][setting], **plan["rows"][row]}
    free = {name: values for name, values in plan["search"].items() if name not in own}
    for values in itertools.product(*free.values()):
        yield dict(zip(free, values))


def _run(config: Config, data: RerankData, retriever_metrics: Dict[str, float]) -> Dict[str, Any]:
    started = time.time()
    try:
        row = train_and_evaluate(config, data, retriever_metrics)["row"]
    except DnrError as error:
        return {"error": str(error)}
    kept = {key: row[key] for key in _KEPT}
    kept["valid_score_bigger"] = config["valid_metric_bigger"]
    kept["ms_per_request"] = _milliseconds(row["checkpoint"], config, data)
    for path in (row["checkpoint"], row["checkpoint"].replace(".pth", "-last.pth")):
        if os.path.exists(path):
            os.remove(path)
    return {**kept, "seconds": time.time() - started}


@torch.no_grad()
def _milliseconds(path: str, config: Config, data: RerankData) -> float:
    """Prediction time per request in batches, after a warm-up; the median of three passes."""
    model, _ = load_reranker(path, config["device"])
    rows = torch.arange(min(_TIMED_REQUESTS, len(data.test)))
    slates = [data.test.slate(part).without_labels().to(config["device"]) for part in rows.split(_TIMED_BATCH)]
    model.predict(slates[0])
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for slate in slates:
            model.predict(slate)
        times.append(time.perf_counter() - started)
    return sorted(times)[1] / len(rows) * 1000


def _keys(plan, setting: str, row: str, searched: Dict[str, Any], seed: int) -> Dict[str, Any]:
    """All keys of a run."""
    own = {**plan["settings"][setting], **plan["rows"][row]}
    return {**plan["fixed"], **searched, **own, "seed": seed, "show_progress": False}


def _key(searched: Dict[str, Any]) -> str:
    return json.dumps(searched, sort_keys=True)


def _ndcg(result: Dict[str, Any]) -> float:
    return next((v for k, v in reversed(list(result["test"].items())) if k.startswith("ndcg")), float("nan"))


def _append(path: str, line: Dict[str, Any]) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+b") as f:
        if f.tell() > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":  # keep a half-written line apart
                f.write(b"\n")
        f.write(json.dumps(line).encode() + b"\n")
