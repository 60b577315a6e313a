"""Hyper-parameter search with RecBole's HyperTuning (hyperopt) or Ray Tune.

Trials are compared on **validation**; test numbers are only reported for the winner. The retriever and the candidates
are made once, before the first trial, and every trial reads them from the cache.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from logging import getLogger
from typing import Any, Dict, List, Optional, Sequence

from dnr_recbole import compat
from dnr_recbole.cluster import LOCAL, REMEDY, check_shares, connected, device_keys, must_have
from dnr_recbole.config import Config
from dnr_recbole.errors import ConfigError
from dnr_recbole.files import write_json
from dnr_recbole.logs import restored, start_logger
from dnr_recbole.paths import check_paths
from dnr_recbole.quick_start import objective_function, prepare, run_dnr
from dnr_recbole.search_space import check_space, drawn, read_params_file
from dnr_recbole.signals import kept_handlers

_PATHS = ("data_path", "cache_dir", "checkpoint_dir", "log_dir", "tensorboard_dir", "requests", "users_file",
          "items_file", "item_vectors")  # fmt: skip
# What a tool imports, and where the version that works with RecBole 1.2.1 comes from.
_NEEDS = {
    "hyperopt": ("hyperopt", "pip install hyperopt==0.2.5"),
    "ray": ("ray.tune", f"{REMEDY}, or use --tool=hyperopt"),
}


@restored()
def tune(
    argv: Sequence[str] = (),
    tool: str = "hyperopt",
    params_file: Optional[str] = None,
    search: Optional[Sequence[str]] = None,
    algo: str = "random",
    max_evals: int = 20,
    output_file: str = "hyper_result.json",
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
    ray: Optional[str] = None,
) -> Dict[str, Any]:
    """Search and write all trials to ``output_file``.

    Args:
        argv: fixed keys as on the command line of ``run``.
        tool: "hyperopt" or "ray".
        params_file: RecBole's format, a line ``name type values`` per key; default: the ranges in the model's YAML.
        search: of these ranges, the keys to search; default all.
        algo: "exhaustive", "random" or "bayes" (hyperopt); Ray samples at random and prunes with ASHA.
        max_evals: number of trials; exhaustive search tries all.
        cpus_per_trial, gpus_per_trial: Ray's resources of a trial.
        ray: address of the cluster, see :func:`~dnr_recbole.cluster.connected`; default: this machine alone.

    Returns:
        {"best_params", "best_valid_score", "best_valid", "test", "trials"}.

    Raises:
        ConfigError: the search is ill-defined, or its tool is not installed.
    """
    if tool not in _NEEDS:
        raise ConfigError(f"tool={tool!r}: choose {' or '.join(_NEEDS)}")
    if ray is not None and tool != "ray":
        raise ConfigError(f"--ray={ray}: means something with --tool=ray only")
    check_shares("trial", cpus_per_trial, gpus_per_trial, tool == "ray")
    with kept_handlers():
        compat.require(_NEEDS[tool][0], f"tune --tool={tool}", _NEEDS[tool][1])
    config = Config(argv=argv)
    space = read_params_file(params_file) if params_file else config.search_space()
    for name in search or ():
        if name not in space:
            raise ConfigError(f"search={name}: no range is known for it; known: {', '.join(sorted(space))}")
    space = {name: spec for name, spec in space.items() if not search or name in search}
    if not space:
        raise ConfigError("nothing to search: give --params_file, or ranges (`search:`) in the model's YAML")
    check_space(space, config, tool, algo)
    fixed = {k: v for k, v in config.as_dict().items() if k not in space}
    for key in _PATHS:  # Ray runs each trial in a folder of its own
        fixed[key] = fixed[key] and os.path.abspath(fixed[key])
    fixed.update(show_progress=False, result_file=None, resume=False)
    check_paths(Config(config_dict=fixed), outputs={"output_file": output_file})
    start_logger(config)
    getLogger(__name__).info(f"search space: {json.dumps(space)}")
    prepare(Config(config_dict=fixed))

    if tool == "ray":
        result = _ray(config, fixed, space, max_evals, cpus_per_trial, gpus_per_trial, ray or LOCAL)
    else:
        result = _hyperopt(config, fixed, space, algo, max_evals)
    write_json(output_file, result, "output_file")
    print(f"best validation {config['valid_metric']}: {result['best_valid_score']:.4f} with {result['best_params']}")
    print(f"its test result: {result['test']}")
    print(f"all {len(result['trials'])} trials: {output_file}")
    return result


# ---------------------------------------------------------------------- hyperopt


def _hyperopt(
    config: Config, fixed: Dict[str, Any], space: Dict[str, Any], algo: str, max_evals: int
) -> Dict[str, Any]:
    from recbole.trainer import HyperTuning

    trials: List[Dict[str, Any]] = []

    def objective(params, config_file_list):
        params = drawn(params, config)
        outcome = objective_function({**fixed, **params}, config_file_list)
        trials.append({"params": params, **_summary(outcome)})
        return outcome

    # Patience in trials would end a small search by chance: max_evals is the budget.
    search = HyperTuning(objective, params_dict=_recbole_space(space), algo=algo, max_evals=max_evals, early_stop=10**6)
    search.run()
    return _best(trials, outcome_bigger=config["valid_metric_bigger"])


def _recbole_space(space: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Our search specifications in the form that RecBole's HyperTuning reads: type → name → values."""
    out: Dict[str, Dict[str, Any]] = {}
    for name, spec in space.items():
        if isinstance(spec, dict):
            ((kind, bounds),) = spec.items()
            # hyperopt's loguniform takes the logarithms of the bounds.
            values = [math.log(b) for b in bounds] if kind == "loguniform" else list(bounds)
        else:
            kind, values = "choice", list(spec)
        out.setdefault(kind, {})[name] = values
    return out


# ---------------------------------------------------------------------- Ray Tune


def _ray(config, fixed, space, max_evals: int, cpus: float, gpus: float, address: str) -> Dict[str, Any]:
    from ray import tune as ray_tune
    from ray.air import RunConfig
    from ray.tune.schedulers import ASHAScheduler

    samplers = {"uniform": ray_tune.uniform, "loguniform": ray_tune.loguniform}
    param_space = {}
    for name, spec in space.items():
        if isinstance(spec, dict):
            ((kind, bounds),) = spec.items()
            param_space[name] = samplers[kind](*bounds)
        else:
            param_space[name] = ray_tune.choice(list(spec))

    def trial(params):
        from ray.air import session

        def report(epoch, score):
            session.report({"valid_score": float(score), "epoch": epoch + 1})

        # Trials that drew the same keys run side by side and must not share checkpoint files.
        own = os.path.join(folder, session.get_trial_id())
        outcome = run_dnr(config_dict={**fixed, **params, **device_keys(), "checkpoint_dir": own}, callback_fn=report)
        write_json(os.path.join(own, "outcome.json"), _summary(outcome))

    # Absolute: a trial runs in a folder that Ray chooses. Our own: another search may go on beside this one.
    name = f"ray-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = os.path.join(fixed["checkpoint_dir"], f"{name}-trials")
    mode = "max" if config["valid_metric_bigger"] else "min"
    with connected(address, "tune --tool=ray"):
        must_have("trial", cpus, gpus)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trial, {"cpu": cpus, "gpu": gpus}),
            param_space=param_space,
            tune_config=ray_tune.TuneConfig(
                metric="valid_score",
                mode=mode,
                num_samples=max_evals,
                # A trial that reaches max_t is stopped at once, before it could be tested: hence one more.
                scheduler=ASHAScheduler(time_attr="epoch", max_t=config["epochs"] + 1, grace_period=1),
            ),
            run_config=RunConfig(storage_path=os.path.abspath(fixed["checkpoint_dir"]), name=name, verbose=1),
        )
        grid = tuner.fit()
    trials = []
    for outcome in (grid[number] for number in range(len(grid))):
        drawn = outcome.config or {}
        params = {k: drawn[k] for k in space}
        row: Dict[str, Any] = {"params": params, "error": str(outcome.error) if outcome.error else None}
        trial_id = str((outcome.metrics or {}).get("trial_id"))
        with contextlib.suppress(OSError), open(os.path.join(folder, trial_id, "outcome.json")) as f:
            row.update(json.load(f))
        if "best_valid_score" not in row and outcome.metrics_dataframe is not None and len(outcome.metrics_dataframe):
            scores = outcome.metrics_dataframe["valid_score"]  # pruned: no test numbers, and none are needed
            row.update(best_valid_score=float(scores.max() if mode == "max" else scores.min()), pruned=True)
        trials.append(row)
    return _best(trials, outcome_bigger=mode == "max")


# ---------------------------------------------------------------------- both


def _summary(outcome: Dict[str, Any]) -> Dict[str, Any]:
    return {
        "best_valid_score": float(outcome["best_valid_score"]),
        "best_valid": {k: float(v) for k, v in (outcome["best_valid_result"] or {}).items()},
        "test": {k: float(v) for k, v in outcome["test_result"].items()},
    }


def _best(trials: List[Dict[str, Any]], outcome_bigger: bool) -> Dict[str, Any]:
    """The trial with the best validation score among those that ran to their end."""
    finished = [t for t in trials if "test" in t]
    if not finished:
        raise ConfigError(f"no trial finished; the first failure: {next((t.get('error') for t in trials), 'none ran')}")
    best = (max if outcome_bigger else min)(finished, key=lambda t: t["best_valid_score"])
    return {
        "best_params": best["params"],
        "best_valid_score": best["best_valid_score"],
        "best_valid": best["best_valid"],
        "test": best["test"],
        "trials": [{key: value for key, value in trial.items() if key != "test"} for trial in trials],
    }
