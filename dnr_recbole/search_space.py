"""What `tune` searches: key → list of choices, or {uniform | quniform | loguniform: [low, high(, step)]}.

Every value that a search may draw is checked against its key's definition before the first trial, so that no trial can
fail by a value out of range after an hour of others.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Dict, List, Optional

import yaml

from dnr_recbole.config import Config
from dnr_recbole.config_schema import Key, Loader
from dnr_recbole.errors import ConfigError, closest

_FORMS = {
    "choice": "choice [a,b]",
    "uniform": "uniform low,high",
    "quniform": "quniform low,high,step",
    "loguniform": "loguniform ln(low),ln(high)",
}
Space = Dict[str, Any]


def read_params_file(path: str) -> Space:
    """RecBole's parameter file: a line ``name type values`` per key; ``#`` begins a comment.

    A byte order mark and any line ends are read. ``loguniform`` gives logarithms of the bounds there, bounds here.

    Raises:
        ConfigError: the file cannot be read, or a line is none of these; the message has its number.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"params_file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"params_file {path}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    space: Space = {}
    for number, line in enumerate(lines, 1):
        parts = line.split("#")[0].split(None, 2)
        if not parts:
            continue
        try:
            if parts[0] in space:
                raise ValueError(f"'{parts[0]}' is given twice")
            space[parts[0]] = _specification(*parts[1:])
        except ValueError as error:
            raise ConfigError(f"params_file {path}, line {number}: {error}") from None
    return space


def _specification(kind: str = "", values: str = "") -> Any:
    if kind not in _FORMS:
        wrong = f"'{kind}' is no type of search" if kind else "there is a name only"
        raise ValueError(f"{wrong}: write `name {'` or `name '.join(_FORMS.values())}`")
    text = values if kind == "choice" else f"[{values.strip('[]() ')}]"
    try:
        parsed = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        parsed = None
    if kind == "choice":
        if not isinstance(parsed, list) or not parsed:
            raise ValueError(f"'{values}' is no list of choices: write `name {_FORMS[kind]}`")
        return parsed
    wanted = 3 if kind == "quniform" else 2
    if not isinstance(parsed, list) or len(parsed) != wanted or not all(map(_is_number, parsed)):
        raise ValueError(f"'{values}' is not {wanted} numbers: write `name {_FORMS[kind]}`")
    if kind != "loguniform":
        return {kind: [float(value) for value in parsed]}
    if max(parsed) > math.log(sys.float_info.max):
        raise ValueError(f"'{values}': loguniform takes the logarithms of the bounds, and these are too large")
    return {kind: [math.exp(value) for value in parsed]}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_space(space: Space, config: Config, tool: str = "hyperopt", algo: str = "random") -> None:
    """Refuse what could not be tried.

    Args:
        space: what to search.
        config: of the runs to come.
        tool, algo: as in :func:`dnr_recbole.hyper.tune`.

    Raises:
        ConfigError: a name is no key that changes results, a bound or choice is out of its range, or bounds are no
            interval.
    """
    for name, wanted in space.items():
        key = config.definition(name.partition(".")[0])
        if key is None:
            known = [*config.schema, *config.retriever_config().own_keys]
            raise ConfigError(f"search: unknown key '{name}': {closest(name, known) or 'see `dnr-recbole keys`'}")
        if key.origin != "user" or key.scope in ("process", "files") or key.name in ("model", "dataset"):
            raise ConfigError(f"search: {name} cannot be searched: it is no setting of a model")
        if tool == "hyperopt" and algo == "exhaustive" and isinstance(wanted, dict):
            raise ConfigError(f"search: --algo=exhaustive tries all choices, and {name} has a range: use --algo=random")
        if tool == "ray" and isinstance(wanted, dict) and "quniform" in wanted:
            raise ConfigError(f"search: Ray's search knows choices, uniform and loguniform; {name} has quniform")
        for value in _values(name, wanted, key):
            if "." not in name:
                key.check(_whole(value, key), "the search")


def _values(name: str, wanted: Any, key: Key) -> List[Any]:
    """All choices, or the ends of what a range may give."""
    if not isinstance(wanted, dict):
        return list(wanted)
    ((kind, numbers),) = wanted.items()
    low, high = numbers[:2]
    if not low < high or (kind == "loguniform" and low <= 0) or (kind == "quniform" and numbers[2] <= 0):
        raise ConfigError(f"search: {name} {kind} {', '.join(f'{n:g}' for n in numbers)}: the bounds are no interval")
    if key.type == "int" and kind != "quniform":
        raise ConfigError(f"search: {name} is an integer: search it by choice, or by quniform with a whole step")
    return [low, high] if kind != "quniform" else [round(end / numbers[2]) * numbers[2] for end in (low, high)]


def drawn(params: Dict[str, Any], config: Config) -> Dict[str, Any]:
    """Values as a search drew them, as their keys want them: quniform gives 4.0 for 4."""
    return {name: _whole(value, config.definition(name.partition(".")[0])) for name, value in params.items()}


def _whole(value: Any, key: Optional[Key]) -> Any:
    is_int = key is not None and key.type == "int" and isinstance(value, float) and value.is_integer()
    return int(value) if is_int else value
