"""One registry: name -> class. The command line, the documentation, the tests and tuning list models from it.

A model registers itself with a decorator; the modules that hold models are imported at the first look-up, so
adding a model means adding a file. Models outside this package register the same way, from a module that the
key `plugins` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Type

from dnr_recbole.errors import UnknownNameError, closest

# Packages whose modules may register models.
_PACKAGES = ("dnr_recbole.retriever", "dnr_recbole.model.reranker", "dnr_recbole.dnr")

_rerankers: Dict[str, type] = {}
_retrievers: Dict[str, type] = {}
_broken: Dict[str, str] = {}  # module -> why it could not be imported
_loaded = False


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a registered model without building it."""

    name: str
    kind: str  # "reranker" or "retriever"
    family: str
    paper: str
    cls: type


def register_reranker(cls: type) -> type:
    """Class decorator: make a reranker known by its class name."""
    return _register(_rerankers, cls)


def register_retriever(cls: type) -> type:
    """Class decorator: make a retriever known by its class name."""
    return _register(_retrievers, cls)


def get_reranker(name: str) -> Type[Any]:
    """The reranker class of that name (any case)."""
    _load()
    found = _find(_rerankers, name)
    if found is None:
        hint = ""
        if _find(_retrievers, name) or _find_recbole(name):
            hint = f"'{name}' is a retriever, set it with the key 'retriever'"
        raise UnknownNameError(_unknown("reranker", name, _rerankers, hint))
    return found


def get_retriever(name: str) -> Type[Any]:
    """The retriever class of that name (any case): ours first, then RecBole's general recommenders."""
    _load()
    found = _find(_retrievers, name) or _find_recbole(name)
    if found is None:
        hint = f"'{name}' is a reranker, set it with the key 'model'" if _find(_rerankers, name) else ""
        raise UnknownNameError(_unknown("retriever", name, [*_retrievers, *_recbole_names()], hint))
    return found


def list_models(kind: Optional[str] = None) -> List[ModelInfo]:
    """Registered models sorted by kind and name; RecBole's own recommenders are not among them."""
    if kind not in (None, "reranker", "retriever"):
        raise ValueError(f"kind must be 'reranker' or 'retriever', not {kind!r}")
    _load()
    tables = {"reranker": _rerankers, "retriever": _retrievers}
    return [
        ModelInfo(name, table, getattr(cls, "family", ""), getattr(cls, "paper", ""), cls)
        for table, classes in tables.items()
        if kind in (None, table)
        for name, cls in sorted(classes.items(), key=lambda item: item[0].lower())
    ]


def missing_package(cls: type) -> str:
    """What has to be installed before a model can be used, in words; "" if nothing."""
    package, wish = getattr(cls, "needs", None) or ("", "")
    missing = package and importlib.util.find_spec(package) is None
    return f" (needs {package}: pip install '{wish}')" if missing else ""


def recbole_retrievers() -> List[str]:
    """Module names (lower case) of RecBole's general recommenders, found without importing any of them."""
    spec = importlib.util.find_spec("recbole.model.general_recommender")
    return sorted(m.name for m in pkgutil.iter_modules((spec and spec.submodule_search_locations) or []))


def _recbole_names() -> List[str]:
    """The same as people write them: RecBole names its property files after the classes."""
    spec = importlib.util.find_spec("recbole.properties")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file.stem for folder in folders for file in Path(folder, "model").glob("*.yaml")]
    written = {name.lower(): name for name in files}
    return [written.get(module, module) for module in recbole_retrievers()]


def _register(table: Dict[str, type], cls: type) -> type:
    known = _find(table, cls.__name__)
    # The same class again is a module reload (notebooks); another class of that name is a mistake.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the name '{cls.__name__}' of {cls.__module__} is taken by one of {known.__module__}")
    table[cls.__name__] = cls
    return cls


def _load() -> None:
    """Import every module that may register a model; once per process.

    One that fails (an optional dependency is missing, say) must not take the other models with it.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    for package_name in _PACKAGES:
        if importlib.util.find_spec(package_name) is None:
            continue
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("_"):
                continue
            name = f"{package_name}.{module.name}"
            try:
                importlib.import_module(name)
            except Exception as error:
                _broken[name] = f"{type(error).__name__}: {error}"
                warnings.warn(f"models of {name} are not available: {_broken[name]}", stacklevel=3)


def _find(table: Dict[str, type], name: str) -> Optional[type]:
    if name in table:
        return table[name]
    return next((cls for key, cls in table.items() if key.lower() == name.lower()), None)


def _find_recbole(name: str) -> Optional[type]:
    """RecBole keeps one general recommender per module, named as the class in lower case."""
    module_name = name.lower()
    if module_name not in recbole_retrievers():
        return None
    module = importlib.import_module(f"recbole.model.general_recommender.{module_name}")
    for key, cls in inspect.getmembers(module, inspect.isclass):
        if key.lower() == module_name and cls.__module__ == module.__name__:
            return cls
    return None


def _unknown(kind: str, name: str, known: Iterable[str], hint: str) -> str:
    known = sorted(known, key=str.lower)
    hint = hint or closest(name, known) or f"known: {', '.join(known) or 'none'}"
    if _broken:
        hint += " (not importable: " + "; ".join(f"{module}: {why}" for module, why in _broken.items()) + ")"
    return f"unknown {kind} '{name}': {hint}"
