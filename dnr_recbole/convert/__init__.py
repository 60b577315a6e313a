"""Other formats → the canonical request log: ``dnr-recbole convert FORMAT IN… OUT.parquet``.

A converter is a generator of :class:`Request`, registered by name with its options; reading streams, and the output is
written under a temporary name and renamed. One of your own stands in a module that ``--plugins`` names::

    @converter("mine", "FILE…", [Option("threshold", 1.0, "grades from this on are positive")])
    def mine(inputs, options, counts):
        "Shown above the options by --help."
        for number, line in read_lines(inputs[0], counts):
            yield Request(…)
"""

from __future__ import annotations

import inspect
import os
from typing import Any, Dict, List, Optional

import pyarrow as pa

from dnr_recbole.convert import (  # noqa: F401  each registers its format
    kuairand,
    lenskit,
    letor,
    librerank,
    metarank,
    mind,
    obd,
    recflow,
    rectools,
    served,
    trec,
)
from dnr_recbole.convert.registry import (
    CONVERTERS,
    Converter,
    Counts,
    Option,
    Request,
    converter,
    get_converter,
    get_option,
    options_of,
)
from dnr_recbole.convert.writing import Writer
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.files import atomic_write
from dnr_recbole.names import import_plugins

__all__ = [
    "CONVERTERS", "Converter", "Counts", "Option", "Request", "convert", "convert_command", "converter",
    "get_converter", "options_of",
]  # fmt: skip


def convert(name: str, inputs: List[str], output: str, **options: Any) -> Counts:
    """Convert files into a canonical request log in parquet.

    Raises:
        ConfigError: an unknown format or option, or paths that cannot be meant.
        DataError: an input is damaged; the message names file and line. No output is left then, and an older one stays.
    """
    found = get_converter(name)
    given = {key: get_option(found, key).check(value) for key, value in options.items()}
    values = {key: given.get(key, option.default) for key, option in found.options.items()}
    _check_paths(found, inputs, output)
    counts = Counts()
    try:
        with atomic_write(output) as file, Writer(file, output, counts) as writer:
            for request in found.read(list(inputs), values, counts):
                writer.add(request)
            if not counts.requests:
                raise DataError(f"{', '.join(inputs)}: no request was found in the format {name} ({counts})")
            writer.close()
    except OSError as error:
        raise DataError(f"'{output}' cannot be written: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise DataError(f"{name}: {' '.join(str(error).split())[:300]}") from error
    return counts


def _check_paths(found: Converter, inputs: List[str], output: str) -> None:
    if not output.endswith(".parquet"):
        raise ConfigError(f"'{output}': the output's name must end in .parquet")
    if len(inputs) < found.least or (found.most is not None and len(inputs) > found.most):
        raise ConfigError(f"{found.name} needs {found.inputs}, not {len(inputs)} file{'s' * (len(inputs) != 1)}")
    if os.path.realpath(output) in {os.path.realpath(path) for path in inputs}:
        raise ConfigError(f"'{output}' is an input: give the output another name")


def convert_command(argv: List[str]) -> str:
    """What ``dnr-recbole convert`` does with its arguments; returns what it prints.

    Raises:
        ConfigError, DataError: as :func:`convert`, and for arguments that cannot be understood.
    """
    plugins = [token.partition("=")[2] for token in argv if token.startswith("--plugins=")]
    import_plugins(",".join(plugins))
    flags = [token for token in argv if token.startswith("-") and token != "-" and not token.startswith("--plugins=")]
    words = [token for token in argv if not token.startswith("-") or token == "-"]
    if not words or {"--help", "-h"} & set(flags):
        return _help(words[0] if words else None)
    found = get_converter(words[0])
    options: Dict[str, Any] = {}
    for flag in flags:
        name, equals, text = flag.lstrip("-").partition("=")
        option = get_option(found, name)
        if not equals:
            raise ConfigError(f"{flag} needs a value: --{name}=…")
        if name in options:
            raise ConfigError(f"--{name} is given twice")
        options[name] = option.parse(text)
    if len(words) < 3:
        raise ConfigError(f"convert {found.name} needs {found.inputs} and an output")
    counts = convert(words[0], words[1:-1], words[-1], **options)
    return f"{counts} -> {words[-1]}"


def _help(name: Optional[str]) -> str:
    if name is None:
        rows = [f"  {each.name:<10} {each.inputs}" for each in sorted(CONVERTERS.values(), key=lambda each: each.name)]
        return "\n".join(["dnr-recbole convert FORMAT IN… OUT.parquet [--option=value]", "", *rows])
    found = get_converter(name)
    rows = [f"  --{option.name}={option.default}  {option.help}" for option in found.options.values()]
    about = [inspect.cleandoc(found.read.__doc__), ""] if found.read.__doc__ else []
    return "\n".join([f"dnr-recbole convert {found.name} {found.inputs} OUT.parquet", "", *about, *rows]).rstrip()
