"""YAML files, and the folders in which the definitions of keys lie."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Dict, Union

import yaml

from dnr_recbole.errors import ConfigError

_Yaml: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_Yaml):
    """Safe YAML (no python objects) that reads 1e-3 as a number (YAML 1.1 does not) and refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        seen = set()
        for name_node, _ in node.value:
            name = self.construct_object(name_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is given twice", name_node.start_mark)
            seen.add(str(name))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def properties_dir() -> Path:
    """The folder of the property files: inside an installed package, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "overall.yaml").is_file():
            return folder
    raise ConfigError(f"the property files are missing beside {package}: reinstall dnr_recbole")


def recbole_properties_dir() -> Path:
    """The folder of RecBole's own property files."""
    return Path(str(sys.modules["recbole"].__file__)).parent / "properties"


def read_yaml(path: Union[str, Path], what: str = "config file") -> Dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: it cannot be read, is no YAML, no mapping, or names a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=Loader)
    except OSError as error:
        raise ConfigError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{what} '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{what} '{path}' must hold 'key: value' lines, not a {type(content).__name__}")
    return content
