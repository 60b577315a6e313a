"""What a key of the configuration may name: registries of noises, losses, protocols and the like, all of one shape.

A registry belongs to the keys whose values are its names. Modules of a user's own, which the key ``plugins`` names, add
to it with the same decorators as this package: a key whose definition says ``open`` takes what they add, and what was
added is part of a run's identity by the content of its file.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, List, TypeVar, Union

from dnr_recbole.errors import ConfigError, UnknownNameError

Thing = TypeVar("Thing")
_OURS = ("dnr_recbole", "recbole")
_all: List[Names[Any]] = []
_of_key: Dict[str, List[Names[Any]]] = {}  # key -> the registries that its values are looked up in


class Names(Dict[str, Thing]):
    """A registry: name -> function or class.

    Args:
        what: what its things are, for messages.
        keys: keys of the configuration that name them; none if they are not chosen by a key.
    """

    def __init__(self, what: str, *keys: str):
        super().__init__()
        self.what = what
        _all.append(self)
        for key in keys:
            _of_key.setdefault(key, []).append(self)

    def register(self, name: str) -> Callable[[Thing], Thing]:
        """Decorator: what it stands on gets this name.

        Raises:
            ValueError: another module has taken the name.
        """

        def add(thing: Thing) -> Thing:
            taken = self.get(name)
            if taken is not None and module_of(taken) != module_of(thing):  # the same module again is a reload
                raise ValueError(f"{self.what} '{name}' of {module_of(thing)} is taken by one of {module_of(taken)}")
            self[name] = thing
            return thing

        return add

    def find(self, name: str) -> Thing:
        """Raises:
        UnknownNameError: nobody registered the name.
        """
        if name not in self:
            raise UnknownNameError(
                f"{self.what} '{name}' is unknown; choose one of {', '.join(self)}, or name the module that "
                "registers it in plugins"
            )
        return self[name]


def registries() -> List[Names[Any]]:
    """All there are, in no order."""
    return _all


def added(key: str) -> List[str]:
    """Names that modules of the user's own registered for a key."""
    return [name for names in _of_key.get(key, []) for name, thing in names.items() if is_foreign(thing)]


def foreign(key: str, value: Any) -> Dict[str, Any]:
    """What the value of a key (a name or several) names of the user's own: name -> thing."""
    chosen = [str(name).lower() for name in (value if isinstance(value, (list, tuple)) else [value])]
    return {
        name: thing
        for names in _of_key.get(key, [])
        for name, thing in names.items()
        if name.lower() in chosen and is_foreign(thing)
    }


def module_of(thing: Any) -> str:
    """The module that defines a function or a class."""
    return str(getattr(thing, "__module__", type(thing).__module__))


def is_foreign(thing: Any) -> bool:
    """Whether something is the user's own: its code has no version here."""
    return module_of(thing).partition(".")[0] not in _OURS


def import_plugins(plugins: Union[str, Iterable[str], None]) -> List[ModuleType]:
    """Import the user's modules, which register what is theirs; the working directory is searched as well.

    Raises:
        ConfigError: one cannot be imported.
    """
    names = plugins.strip("[] ").split(",") if isinstance(plugins, str) else list(plugins or [])
    modules = []
    for name in filter(None, (str(n).strip(" '\"") for n in names)):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise ConfigError(f"plugins: module '{name}' cannot be imported: {error}") from error
    return modules
