"""Where configuration comes from: command lines, plugin modules, and the property files of models."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from recbole.model.abstract_recommender import GeneralRecommender

from dnr_recbole import registry
from dnr_recbole.config_schema import (
    Key,
    KeyInfo,
    infer_key,
    load_properties,
    parse_text,
    properties_dir,
    recbole_keys,
    recbole_properties_dir,
)
from dnr_recbole.errors import ConfigError


def describe_keys(
    model: Union[str, type, None] = None, retriever: Union[str, type, None] = None
) -> List[KeyInfo]:
    """Every documented key, sorted: those of all runs plus, if given, those of a model and of a retriever."""
    files = [properties_dir() / "overall.yaml"]
    if model is not None:
        files.append(property_file(resolve_model(model)[1]))
    if retriever is not None:
        cls = registry.get_retriever(retriever) if isinstance(retriever, str) else retriever
        files += [properties_dir() / "retriever_overall.yaml", property_file(cls)]
    keys: Dict[str, Key] = dict(recbole_keys())
    defaults = dict(load_properties(recbole_properties_dir() / "dataset" / "sample.yaml").defaults)
    defaults.update(load_properties(recbole_properties_dir() / "overall.yaml").defaults)
    for file in filter(None, files):
        properties = load_properties(file)
        keys.update(properties.keys)
        defaults.update(properties.defaults)
        for name in properties.defaults:
            keys.setdefault(name, infer_key(name, properties.defaults[name]))
    return [
        KeyInfo(name, defaults.get(name), key.type, key.range, key.help)
        for name, key in sorted(keys.items(), key=lambda item: item[0].lower())
    ]


def split_argv(argv: Sequence[str]) -> Dict[str, Any]:
    """`--key=value`, `--key value` and bare `--flag` (True) -> {key: text or True}."""
    values: Dict[str, Any] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or len(token) == 2:
            raise ConfigError(f"unexpected argument '{token}': write --key=value")
        name, equals, value = token[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        if name in values and values[name] != value:
            raise ConfigError(f"--{name} is given twice: {values[name]} and {value}")
        values[name] = value
    return values


def with_entry(mapping: Any, path: str, value: Any, what: str) -> Dict[str, Any]:
    """A copy of `mapping` in which the entry at the dotted `path` is `value`."""
    if not isinstance(mapping, dict):
        raise ConfigError(f"{what}: the key before the dot is no mapping")
    name, _, inner = path.partition(".")
    if inner:
        value = with_entry(mapping.get(name) or {}, inner, value, what)
    elif isinstance(value, str):
        value = parse_text(value)
    return {**mapping, name: value}


def resolve_model(model: Union[str, type]) -> Tuple[str, type]:
    cls = registry.get_reranker(model) if isinstance(model, str) else model
    if not inspect.isclass(cls) or not hasattr(cls, "type"):
        raise ConfigError(f"model={model!r}: must be the name or the class of a model")
    return cls.__name__, cls


def property_file(cls: type) -> Optional[Path]:
    """Where a model's keys are defined: its own `properties_file`, ours, or RecBole's; None if nowhere."""
    own = getattr(cls, "properties_file", None)
    if own is not None:
        path = Path(inspect.getfile(cls)).parent / own
        if not path.is_file():
            raise ConfigError(f"{cls.__name__}.properties_file: '{path}' does not exist")
        return path
    if issubclass(cls, GeneralRecommender):
        folders = [properties_dir() / "retriever", recbole_properties_dir() / "model"]
    else:  # RecBole has unrelated models of the same names (SASRec, Caser, ...)
        folders = [properties_dir() / "model"]
    return next((f / f"{cls.__name__}.yaml" for f in folders if (f / f"{cls.__name__}.yaml").is_file()), None)


def import_plugins(plugins: Union[str, Iterable[str], None]) -> None:
    """Import the user's modules, which register their models; the working directory is searched as well."""
    names = plugins.strip("[] ").split(",") if isinstance(plugins, str) else list(plugins or [])
    for name in filter(None, (str(n).strip(" '\"") for n in names)):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"plugins: module '{name}' cannot be imported: {error}") from error
