"""What a configuration key is: its one definition, its check, and how text becomes its value.

A key is defined in one property file, as `{default, type, range, scope, search, help}`: RecBole's keys in
`properties/recbole.yaml` (without defaults), those of every run in `overall.yaml`, those of a model in its own file.
A file that comes later may give another default, plainly or as `{default, search, help}`, and nothing else. The keys of
RecBole's own models have no definition: it is inferred from their default.
"""

from dnr_recbole.config_schema.definitions import (
    RESERVED,
    Definitions,
    Properties,
    implied,
    infer_key,
    load_properties,
    recbole_keys,
)
from dnr_recbole.config_schema.files import Loader, properties_dir, read_yaml, recbole_properties_dir
from dnr_recbole.config_schema.key import STAGES, Key, Keys, Number, Scope, parse_text
from dnr_recbole.errors import closest  # where it was in 0.2.0

__all__ = [
    "RESERVED",
    "STAGES",
    "Definitions",
    "Key",
    "Keys",
    "Loader",
    "Number",
    "Properties",
    "Scope",
    "closest",
    "implied",
    "infer_key",
    "load_properties",
    "parse_text",
    "properties_dir",
    "read_yaml",
    "recbole_keys",
    "recbole_properties_dir",
]
