"""The keys of a run, each defined once, merged from property files in order."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

from pydantic import ValidationError

from dnr_recbole.config_schema.files import properties_dir, read_yaml
from dnr_recbole.config_schema.key import Key
from dnr_recbole.errors import ConfigError

# Names of the commands' own options (`tune --search=…`): as keys they could not be given on that command line.
RESERVED = frozenset(
    "help command tool params_file search algo max_evals output_file cpus_per_trial gpus_per_trial ray format".split()
)
_REFINEMENT = {"default", "search", "help"}


class Properties(NamedTuple):
    """The content of a property file.

    Attributes:
        keys: definitions.
        defaults: key → default, of definitions, refinements and plain lines alike.
        refinements: key → new `default`, `search`, `help` of a key that is defined elsewhere.
    """

    keys: Dict[str, Key]
    defaults: Dict[str, Any]
    refinements: Dict[str, Dict[str, Any]]


class Definitions:
    """The keys that a run may have, each defined once, and their defaults, merged from property files in order."""

    def __init__(self) -> None:
        self.keys: Dict[str, Key] = dict(recbole_keys())
        self.defaults: Dict[str, Any] = {}

    def add(self, path: Union[str, Path], scope: Optional[str] = None) -> Properties:
        """Merge a file; ``scope`` is that of its definitions that state none.

        Raises:
            ConfigError: a key is defined a second time, or a default does not fit its definition.
        """
        properties = load_properties(path, scope)
        for name, key in properties.keys.items():
            if name in self.keys and self.keys[name] != key:
                raise ConfigError(
                    f"{path}: '{name}' is defined already; give nothing but {', '.join(sorted(_REFINEMENT))} here"
                )
            self.keys[name] = key
        for name, default in properties.defaults.items():
            if name not in self.keys:
                self.keys[name] = infer_key(name, default, scope, path)
            self.defaults[name] = self.keys[name].check(default, str(path))
        for name, changes in properties.refinements.items():
            self.keys[name] = self.keys[name].model_copy(update=changes)
        return properties


def implied(keys: Dict[str, Key], values: Dict[str, Any]) -> Dict[str, Any]:
    """The values that ``values`` of keys with ``sets`` stand for, e.g. a model's size for its widths.

    Raises:
        ConfigError: a set names a key that the model has not, or a value that is none of it.
    """
    out: Dict[str, Any] = {}
    for name, value in values.items():
        for other, chosen in (keys[name].sets.get(value, {}) if name in keys and keys[name].sets else {}).items():
            if other not in keys:
                raise ConfigError(f"{name}={value} sets '{other}', which is no key here")
            out[other] = keys[other].check(chosen, f"{name}={value}")
    return out


def load_properties(path: Union[str, Path], scope: Optional[str] = None) -> Properties:
    """Read a property file; the result is a copy that the caller may change."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise ConfigError(f"property file '{path}' cannot be read: {error.strerror}") from None
    return copy.deepcopy(_load_properties(str(path), scope, (state.st_mtime_ns, state.st_size)))


@functools.lru_cache(maxsize=None)
def _load_properties(path: str, scope: Optional[str], state: Tuple[int, int]) -> Properties:
    out = Properties({}, {}, {})
    for name, value in read_yaml(path).items():
        if name in RESERVED:
            raise ConfigError(f"{path}: '{name}' is an option of the commands and cannot be a key: rename it")
        if isinstance(value, dict) and {"default", "type"} <= set(value):
            out.keys[name] = _define(name, value, path, scope)
            out.defaults[name] = out.keys[name].check(value["default"], path)
        elif isinstance(value, dict) and "default" in value and set(value) <= _REFINEMENT:
            out.refinements[name] = value
            out.defaults[name] = value["default"]
        else:
            out.defaults[name] = value
    return out


@functools.lru_cache(maxsize=None)
def recbole_keys() -> Dict[str, Key]:
    """Definitions of RecBole's own keys (without defaults)."""
    path = properties_dir() / "recbole.yaml"
    return {name: _define(name, value, path) for name, value in read_yaml(path).items()}


def _define(name: str, value: Dict[str, Any], path: Union[str, Path], scope: Optional[str] = None) -> Key:
    try:
        key = Key(name=name, **{"scope": scope, **value})
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{path}: wrong definition of '{name}': {' '.join(str(error).split())}") from None
    if key.type == "choice" and not key.choices:
        raise ConfigError(f"{path}: wrong definition of '{name}': type choice needs choices")
    if key.open and (key.type != "choice" or key.join):
        raise ConfigError(f"{path}: wrong definition of '{name}': open needs type choice, without join")
    if set(key.sets) - set(key.choices or []):
        raise ConfigError(f"{path}: wrong definition of '{name}': sets is a mapping from some of its choices")
    if key.join and (key.type != "choice" or any(key.join in str(choice) for choice in key.choices or [])):
        raise ConfigError(f"{path}: wrong definition of '{name}': join needs type choice, and choices without it")
    return key


def infer_key(name: str, default: Any, scope: Optional[str], path: Union[str, Path]) -> Key:
    """A definition for a plain key: numbers stay numbers, switches switches, the rest is up to RecBole."""
    kind = "bool" if isinstance(default, bool) else "number" if isinstance(default, (int, float)) else "any"
    return _define(name, {"type": kind, "default": default, "nullable": True}, path, scope)
