"""Import paths of earlier versions: they lead to what they named, with a DeprecationWarning that says the new path.

A path stays for one minor version after the one that moved it. Modules with an underscore never had a promise.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Tuple, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

# Former module → the modules that share its names now, those that others import from first: a name is looked up in
# each, and the first that has it is where it stands.
MOVED: Dict[str, Tuple[str, ...]] = {
    # Moved in 0.2.0.
    "dnr_recbole.evaluator.metrics": ("dnr_recbole.metrics",),
    "dnr_recbole.model.affinity": ("dnr_recbole.model.inputs.affinity",),
    "dnr_recbole.model.interaction": ("dnr_recbole.model.inputs.interaction",),
    "dnr_recbole.model.layers": (
        "dnr_recbole.model.blocks.dropout",
        "dnr_recbole.model.blocks.nets",
        "dnr_recbole.model.blocks.attention",
        "dnr_recbole.model.blocks.tables",
    ),
    "dnr_recbole.model.list_evaluator": ("dnr_recbole.lists", "dnr_recbole.model.blocks.list_evaluator"),
    "dnr_recbole.model.list_layers": (
        "dnr_recbole.lists",
        "dnr_recbole.model.blocks.nets",
        "dnr_recbole.model.blocks.attention",
    ),
    "dnr_recbole.model.normalise": ("dnr_recbole.lists",),
    "dnr_recbole.model.position_input": ("dnr_recbole.model.inputs.position_input",),
    "dnr_recbole.model.residual_slope": ("dnr_recbole.model.inputs.residual_slope",),
    "dnr_recbole.model.score_fusion": ("dnr_recbole.lists", "dnr_recbole.model.inputs.score_fusion"),
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds the modules of :data:`MOVED`, whose names are looked up when they are asked for."""

    def find_spec(self, fullname: str, path: Any, target: Optional[ModuleType] = None) -> Optional[ModuleSpec]:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = functools.partial(_look_up, module.__name__)


def _look_up(former: str, name: str) -> Any:
    if not name.startswith("__"):  # what the import system asks a module for
        for home in map(importlib.import_module, MOVED[former]):
            if hasattr(home, name):
                _warn(f"{former}.{name}", f"{home.__name__}.{name}")
                return getattr(home, name)
    raise AttributeError(f"module {former!r}, of an earlier version, has no attribute {name!r}")


def renamed(function: Function, former: str) -> Function:
    """``function`` under its former full name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _warn(former, f"{function.__module__}.{function.__qualname__}")
        return function(*args, **kwargs)

    return cast(Function, call)


def _warn(former: str, now: str) -> None:
    warnings.warn(f"{former} is {now} now; the former name will be removed", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Make the modules of :data:`MOVED` importable."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
