"""The configuration of a run: RecBole's Config with checked keys, our property files, and no `eval` of text.

Later wins: RecBole's overall and dataset files, our overall.yaml and dataset file, the backbone's model
file (models that wrap one), the model file, config files in order, `config_dict`, the command line.
"""

from __future__ import annotations

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

import copy
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union
from urllib.parse import urlsplit

import torch
from recbole.config import Config as RecBoleConfig
from recbole.evaluator.register import metric_information, metrics_dict
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

import dnr_recbole.metrics  # noqa: F401  (adds this project's metrics to RecBole's register)
from dnr_recbole import compat, registry
from dnr_recbole.config_schema import (
    Definitions,
    Key,
    Loader,
    implied,
    load_properties,
    properties_dir,
    read_yaml,
)
from dnr_recbole.config_sources import (
    define_for_all,
    define_model,
    resolve_model,
    split_argv,
    with_entry,
)
from dnr_recbole.errors import ConfigError, closest
from dnr_recbole.names import import_plugins

__all__ = ["Config"]

compat.apply_recbole()

Layer = Tuple[str, Dict[str, Any]]  # where the keys come from, in words, and the keys

# Where a text may stand for another type: "0.1", "[1, 2]". In a file, YAML has already decided.
_TEXT_SOURCES = ("the command line", "config_dict", "retriever_args")
# What stage 1 inherits of the keys given at the top level; the other scopes mean the reranker there.
_INHERITED = ("process", "files", "source", "retriever", "candidates")


class Config(RecBoleConfig):
    """Configuration of a reranker and, through :meth:`retriever_config`, of its retriever.

    Args:
        model: name of a registered reranker, or a reranker or retriever class; default: the key `model`.
        dataset: name of a dataset; default: the key `dataset`.
        config_file_list: YAML files, later ones win.
        config_dict: keys and values; left unchanged.
        argv: command line such as ``["--epochs=3", "--topk", "1,6", "--resume"]``; `sys.argv` is never read.
    """

    def __init__(
        self,
        model: Union[str, type, None] = None,
        dataset: Optional[str] = None,
        config_file_list: Union[str, Sequence[str], None] = None,
        config_dict: Optional[Dict[str, Any]] = None,
        argv: Optional[Sequence[str]] = None,
    ):
        command_line = split_argv(argv or [])
        files = [config_file_list] if isinstance(config_file_list, (str, os.PathLike)) else config_file_list
        files = [str(file) for file in files or []]
        if "config_files" in command_line:
            files += str(command_line.pop("config_files")).replace(",", " ").split()
        layers = [(file, read_yaml(file)) for file in files]
        layers.append(("config_dict", copy.deepcopy(dict(config_dict or {}))))
        layers.append(("the command line", command_line))
        self._build(model, dataset, layers)

    # ------------------------------------------------------------------ public

    def __getitem__(self, name: str) -> Any:
        """The value of a key; None for a defined key that has none, e.g. of a launcher that is not used.

        Raises:
            ConfigError: nobody defines such a key.
        """
        values = self.final_config_dict
        if name in values:
            return values[name]
        if name in self.schema or name in compat.OPTIONAL_KEYS:
            return None
        raise ConfigError(f"key '{name}' is read, but no property file of {self.model} defines it")

    def retriever_config(self) -> Config:
        """The configuration of stage 1.

        Its model is the retriever. It inherits the keys about data, files and devices and those that only the
        retriever's property file knows; `retriever_args` come on top.
        """
        if self.is_retriever:
            return self
        arguments = dict(self["retriever_args"] or {})
        n = self["n_candidates"]
        inherited = {
            name: value
            for name, value in self.external_config_dict.items()
            if name != "retriever_args" and (key := self.definition(name)) and key.scope in _INHERITED
        }
        inherited["retriever"] = self["retriever"]
        layers = [("stage 1", {"topk": [n], "valid_metric": f"Recall@{n}"}), ("stage 1", inherited)]
        config = Config.__new__(Config)
        layers.append(("retriever_args", arguments))
        config._build(registry.get_retriever(self["retriever"]), self.dataset, layers)
        return config

    def definition(self, name: str) -> Optional[Key]:
        """How a key is defined that may be given here: one of the run, or one that is handed on to stage 1."""
        return self.schema.get(name) or self._retriever_keys.get(name)

    def search_space(self) -> Dict[str, Any]:
        """Key -> search specification (list of choices, {loguniform: [a, b]} or {uniform: [a, b]})."""
        return {name: copy.deepcopy(key.search) for name, key in self.schema.items() if key.search}

    def as_dict(self) -> Dict[str, Any]:
        """All keys as plain JSON-able values; ``Config(config_dict=config.as_dict())`` is the same again."""
        values = {k: compat.plain(v) for k, v in self.final_config_dict.items() if self.schema[k].origin == "user"}
        values["data_path"] = self._data_root
        sampling = values.get("train_neg_sample_args")
        if isinstance(sampling, dict) and sampling.get("distribution") == "none":
            values["train_neg_sample_args"] = None  # RecBole refuses what it writes there itself
        return values

    def of_scope(self, *scopes: str) -> Dict[str, Any]:
        """The keys of these scopes, as plain JSON-able values."""
        return {name: value for name, value in self.as_dict().items() if self.schema[name].scope in scopes}

    # ------------------------------------------------------------------ assembly

    def _build(self, model: Union[str, type, None], dataset: Optional[str], layers: List[Layer]) -> None:
        self._init_parameters_category()
        self.yaml_loader = Loader
        raw = {key: value for _, layer in layers for key, value in layer.items()}
        defaults = load_properties(properties_dir() / "overall.yaml").defaults
        self._plugins = import_plugins(raw.get("plugins"))
        self.model, self.model_class = resolve_model(model or raw.get("model") or defaults["model"])
        of_log = raw.get("requests") or raw.get("source") == "log"
        self.dataset = str(dataset or raw.get("dataset") or ("log" if of_log else defaults["dataset"]))
        if not self.dataset or set(self.dataset) & {"/", os.sep}:
            raise ConfigError(f"dataset='{self.dataset}': give a name; the folder that holds it is the key data_path")
        self.is_retriever = issubclass(self.model_class, GeneralRecommender)

        self._load_internal(raw, defaults)
        self.external_config_dict, self._sources = self._read_layers(layers)
        if self.external_config_dict.get("requests"):
            self.external_config_dict.setdefault("source", "log")
        chosen = {**self.internal_config_dict, **self.external_config_dict}
        self.final_config_dict = {**chosen, **implied(self.schema, chosen), **self.external_config_dict}
        for name in ("retriever", "backbone"):
            look_up = registry.get_retriever if name == "retriever" else registry.get_reranker
            if not self.is_retriever and (name == "retriever" or self.model_class.wraps_backbone):
                self.final_config_dict[name] = look_up(self.final_config_dict[name]).__name__
        self._check()
        self._derive()
        if not self.is_retriever:
            self.retriever_config()  # a wrong retriever_args key must fail here, not after the data was read

    def _init_parameters_category(self) -> None:
        # Copies: RecBole appends to these module-level lists.
        groups = (general_arguments, training_arguments, evaluation_arguments, dataset_arguments)
        self.parameters = dict(zip(("General", "Training", "Evaluation", "Dataset"), map(list, groups)))

    def _load_internal(self, raw: Dict[str, Any], defaults: Dict[str, Any]) -> None:
        """Defaults and definitions of every key that this run may have."""
        definitions = Definitions()
        define_for_all(definitions, self.dataset, self._plugins)
        # Keys that only the retriever knows may be given at the top level and are handed on; those that both
        # know mean the reranker there.
        self._retriever_keys: Dict[str, Key] = {}
        self.own_keys = define_model(definitions, self.model_class, raw.get("backbone"))
        self.schema: Dict[str, Key] = definitions.keys
        self.internal_config_dict: Dict[str, Any] = definitions.defaults
        if not self.is_retriever:
            retriever = registry.get_retriever(str(raw.get("retriever") or defaults["retriever"]))
            theirs = Definitions()
            define_for_all(theirs, self.dataset, self._plugins)
            known = define_model(theirs, retriever)
            self._retriever_keys = {name: theirs.keys[name] for name in known if name not in self.schema}
        self.internal_config_dict["MODEL_TYPE"] = self.model_class.type

    def _read_layers(self, layers: List[Layer]) -> Tuple[Dict[str, Any], Dict[str, str]]:
        """Merge what the user gave: known keys only, text parsed, values checked; and the source of each."""
        values: Dict[str, Any] = {}
        sources: Dict[str, str] = {}
        self._given: Dict[str, Any] = {}  # for derived keys: checked against what is derived
        for source, layer in layers:
            for name, value in layer.items():
                name, _, inner = name.partition(".")
                key = self.definition(name)
                if key is None:
                    raise ConfigError(self._unknown_key(name, source))
                if key.origin == "derived":
                    self._given[name] = value
                    continue
                if inner:  # a.b.c=1 changes one entry of the mapping a
                    base = values.get(name, self.internal_config_dict.get(name)) or {}
                    value = with_entry(base, inner, value, f"{name}.{inner} (from {source})")
                elif isinstance(value, str) and source in _TEXT_SOURCES:
                    value = key.parse(value)
                elif value is True and key.type != "bool" and source == "the command line":
                    raise ConfigError(f"--{name} needs a value: {key.range}")
                if name not in ("model", "dataset") or isinstance(value, str):  # `model` may be a class
                    value = key.check(value, source)
                values[name], sources[name] = value, source
        return values, sources

    def _unknown_key(self, name: str, source: str) -> str:
        prefix = "retriever_args." if source == "retriever_args" else ""
        where = "" if prefix else f" (from {source})"
        hint = closest(name, [*self.schema, *self._retriever_keys])
        return f"unknown key '{prefix}{name}'{where}: {hint or 'see --help for the keys of ' + self.model}"

    # ------------------------------------------------------------------ checks between keys

    def _check(self) -> None:
        self._check_given()
        self._check_sizes()
        self._check_metrics()
        self._check_secrets()

    def _check_secrets(self) -> None:
        """Keys stand in logs, checkpoints, artefacts and results, so none may hold a password."""
        address = self.final_config_dict["mlflow_tracking_uri"]
        if address and urlsplit(address).password:
            raise ConfigError(
                "mlflow_tracking_uri holds a password, which logs, checkpoints and artefacts would keep: leave the key "
                "out and set the environment variable MLFLOW_TRACKING_URI"
            )

    def _check_given(self) -> None:
        """What the user set differs from the default only where it can be honoured."""
        values = self.final_config_dict
        for name, value in self.external_config_dict.items():
            key = self.schema.get(name)
            if key is None or value == self.internal_config_dict.get(name):
                continue
            if key.instead and not (key.stage1 and self.is_retriever):
                self._refuse(name, f"cannot be honoured here: {key.instead}")
            if key.sources and values.get("source", key.sources[0]) not in key.sources:
                where = " or ".join(key.sources)
                self._refuse(name, f"means something with source={where} only, and here source={values['source']}")
            if key.stage1 and not self.is_retriever:
                self._refuse(name, f"is a key of the retriever alone: set retriever_args.{name}")

    def _check_sizes(self) -> None:
        """The lengths of lists fit each other: topk and slate_size lie within the candidates."""
        values = self.final_config_dict
        if not values["metrics"]:
            self._refuse("metrics", "must name at least one metric")
        if not values["topk"] or min(values["topk"]) < 1:
            self._refuse("topk", "must be a list of integers >= 1")
        n = values["n_candidates"]
        if not self.is_retriever:
            if values["slate_size"] > n:
                self._refuse("slate_size", f"must be at most n_candidates={n}")
            if max(values["topk"]) > n:
                self._refuse("topk", f"must be at most n_candidates={n}")

    def _check_metrics(self) -> None:
        values = self.final_config_dict
        for metric in values["metrics"]:
            if metric.lower() not in metric_information:
                names = sorted(cls.__name__ for cls in metrics_dict.values())
                self._refuse("metrics", f"no metric '{metric}': {closest(metric, names) or ', '.join(names)}")
        name, _, k = values["valid_metric"].partition("@")
        chosen = {metric.lower(): metric for metric in values["metrics"]}
        if name.lower() not in chosen:
            self._refuse("valid_metric", f"must be one of metrics={values['metrics']}")
        # Metrics over whole lists (GAUC, ...) need ranks or scores only and have no cut-off.
        needs_k = not set(metric_information[name.lower()]) <= {"rec.meanrank", "rec.score", "data.label"}
        if k and not needs_k:
            self._refuse("valid_metric", f"{name} has no cut-off: write {name}")
        if (k or needs_k) and k not in map(str, values["topk"]):
            example = f"{name}@{max(values['topk'])}"
            self._refuse("valid_metric", f"must end in @k with k in topk={values['topk']}, e.g. {example}")

    def _refuse(self, name: str, reason: str) -> None:
        source = self._sources.get(name)
        where = f" (from {source})" if source else ""
        raise ConfigError(f"{name}={self.final_config_dict.get(name)!r}{where}: {reason}")

    # ------------------------------------------------------------------ what RecBole derives from the keys

    def _derive(self) -> None:
        self.final_config_dict = copy.deepcopy(self.final_config_dict)
        self._data_root = self.final_config_dict["data_path"]
        try:
            self._set_default_parameters()
            self._init_device()
            self._set_train_neg_sample_args()
            self._set_eval_neg_sample_args("valid")
            self._set_eval_neg_sample_args("test")
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise ConfigError(f"RecBole refuses the configuration: {error}") from error
        except RuntimeError as error:
            if "metrics" not in str(error):
                raise
            raise ConfigError(f"metrics={self['metrics']}: {error}") from error
        for name, value in self._given.items():
            if str(compat.plain(value)) != str(compat.plain(self[name])):
                self._refuse(name, f"is derived from other keys and cannot be {value!r}")

    def _set_default_parameters(self) -> None:
        super()._set_default_parameters()
        # RecBole always takes ml-100k from its own wheel; a copy under data_path is what the user means.
        own = os.path.join(self._data_root, self.dataset)
        if os.path.isfile(os.path.join(own, f"{self.dataset}.inter")):
            self.final_config_dict["data_path"] = own

    def _init_device(self) -> None:
        """RecBole's, which knows GPUs only, plus `use_gpu: False` and data-parallel training on CPU."""
        values = self.final_config_dict
        with_gpu = values["use_gpu"] and torch.cuda.is_available() and str(values["gpu_id"]) != ""
        if "local_rank" not in values:
            super()._init_device()
            values.update(rank=0, world_size=1)
            if not with_gpu:
                values["device"] = torch.device("cpu")
            return
        values.setdefault("offset", 0)
        values["rank"] = values["local_rank"] + values["offset"]
        if torch.distributed.is_initialized():  # stage 1 shares the process group of the run
            values["single_spec"] = False
            values["device"] = torch.device("cuda", values["local_rank"]) if with_gpu else torch.device("cpu")
        elif with_gpu:
            n_gpus = len(str(values["gpu_id"]).strip("()[]").split(","))
            if n_gpus < values["nproc"]:
                self._refuse("nproc", f"needs as many GPUs, gpu_id={values['gpu_id']} names {n_gpus}")
            super()._init_device()
        else:
            torch.distributed.init_process_group(
                backend="gloo",
                rank=values["rank"],
                world_size=values.setdefault("world_size", values["nproc"]),
                init_method=f"tcp://{values.get('ip', 'localhost')}:{values.get('port', 5678)}",
            )
            values.update(device=torch.device("cpu"), single_spec=False)
        if values["rank"] != 0:
            values.update(state="error", show_progress=False, verbose=False)
