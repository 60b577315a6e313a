"""Where configuration comes from: command lines, plugin modules, and the property files of models."""

from __future__ import annotations

import dnr_recbole.compat  # noqa: F401  isort: skip  (repairs numpy and scipy before recbole is imported)

import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

from recbole.model.abstract_recommender import GeneralRecommender

from dnr_recbole import registry
from dnr_recbole.config_schema import Definitions, parse_text, properties_dir, recbole_properties_dir
from dnr_recbole.errors import ConfigError


def define_for_all(definitions: Definitions, dataset: str, plugins: Sequence[ModuleType] = ()) -> None:
    """Add the keys of every run on a dataset: RecBole's, this package's, the dataset's, those of the user's modules.

    Raises:
        ConfigError: a module names a ``properties_file`` that is not there, or that defines a key anew.
    """
    theirs, ours = recbole_properties_dir(), properties_dir()
    dataset = os.path.basename(dataset)  # a name leads nowhere else, whoever wrote it
    for file in (
        theirs / "overall.yaml",
        theirs / "dataset" / "sample.yaml",
        theirs / "dataset" / f"{dataset}.yaml",
        ours / "overall.yaml",
        ours / "dataset" / f"{dataset}.yaml",
    ):
        if file.is_file():
            definitions.add(file, "source" if file.parent.name == "dataset" else None)
    for module in plugins:
        if getattr(module, "properties_file", None):
            definitions.add(Path(str(module.__file__)).parent / module.properties_file)


def define_model(definitions: Definitions, cls: Type[Any], backbone: Optional[str] = None) -> Set[str]:
    """Add the keys of a model, and under them those of the backbone that it wraps.

    Returns:
        the keys that its own files know, defined or given another default there.
    """
    if issubclass(cls, GeneralRecommender):
        scope, files = "retriever", [properties_dir() / "retriever_overall.yaml"]
    else:
        scope, files = "reranker", []
        if cls.wraps_backbone:
            files += property_files(registry.get_reranker(str(backbone or definitions.defaults["backbone"])))
    known: Set[str] = set()
    for file in [*files, *property_files(cls)]:
        known |= set(definitions.add(file, scope).defaults)
    return known


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


def resolve_model(model: Union[str, type]) -> Tuple[str, Type[Any]]:
    cls = registry.get_reranker(model) if isinstance(model, str) else model
    if not inspect.isclass(cls) or not hasattr(cls, "type"):
        raise ConfigError(f"model={model!r}: must be the name or the class of a model")
    return cls.__name__, cls


def property_files(cls: type) -> List[Path]:
    """Where a model's keys are defined: `properties_file`, ours, or RecBole's; classes that it extends come first."""
    if issubclass(cls, GeneralRecommender):
        folders = [properties_dir() / "retriever", recbole_properties_dir() / "model"]
    else:  # RecBole has unrelated models of the same names (SASRec, Caser, ...)
        folders = [properties_dir() / "model"]
    files: List[Path] = []
    for base in reversed(cls.__mro__):
        own = vars(base).get("properties_file")
        if own is not None:
            path = Path(inspect.getfile(base)).parent / own
            if not path.is_file():
                raise ConfigError(f"{base.__name__}.properties_file: '{path}' does not exist")
            files.append(path)
            continue
        files += [path for folder in folders if (path := folder / f"{base.__name__}.yaml").is_file()][:1]
    return files
