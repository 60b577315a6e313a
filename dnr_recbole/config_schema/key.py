"""One key: its definition, its check, and how text becomes its value."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Dict, List, Literal, Optional, Protocol, Tuple, Union, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
)

from dnr_recbole.config_schema.files import Loader
from dnr_recbole.errors import ConfigError
from dnr_recbole.names import added

Number = Union[StrictInt, StrictFloat]
# What a key can change, in the order of the data flow. The first two change how a run goes and where its files lie, and
# no number; each of the others changes the numbers of its own stage and of all later ones.
Scope = Literal["process", "files", "source", "retriever", "candidates", "reranker", "training", "evaluation"]
# The stages, in the order of the data flow: the keys of its scope and of those before determine the result of one.
STAGES = ("source", "retriever", "candidates", "reranker", "training", "evaluation")
_NULLS = ("null", "~", "none", "")


class Keys(Protocol):
    """What a stage reads of the configuration: the value of a key by its name."""

    def __getitem__(self, name: str, /) -> Any: ...

    def __contains__(self, name: object, /) -> bool: ...


class Key(BaseModel):
    """The definition of one key."""

    model_config = ConfigDict(extra="forbid")

    name: str
    type: Literal["int", "float", "number", "bool", "str", "choice", "list", "dict", "any"]
    default: Any = None
    min: Optional[Number] = None  # inclusive
    max: Optional[Number] = None
    gt: Optional[Number] = None  # exclusive
    lt: Optional[Number] = None
    choices: Optional[List[Any]] = None
    open: bool = False  # whether the names that plugins registered for the key are choices, too
    join: str = ""  # what may stand between several choices, e.g. "+" for `rank+concat`
    alone: List[Any] = Field(default_factory=list)  # choices that cannot be joined
    items: Optional[Literal["int", "float", "str"]] = None  # element type of a list
    nullable: bool = False
    form: str = ""  # an example, of a text that has a form
    search: Optional[Union[List[Any], Dict[Literal["uniform", "loguniform"], Tuple[float, float]]]] = None
    sets: Dict[str, Dict[str, Any]] = Field(default_factory=dict)  # of a choice: defaults that it gives other keys
    help: str = ""
    scope: Scope
    # "derived": computed from other keys; "launcher": set per process by whoever starts several. Neither is stored.
    origin: Literal["user", "derived", "launcher"] = "user"
    was: List[str] = Field(default_factory=list)  # former names, for checkpoints made under them
    earlier: Any = None  # the value that runs had before the key existed, where that is not its default
    # Values under which results are what they were before the key existed: identities leave the key out then, so that a
    # new key makes no finished result another one.
    neutral: List[Any] = Field(default_factory=list)
    sources: List[str] = Field(default_factory=list)  # values of `source` under which the key means something; [] = all
    instead: str = ""  # a key of RecBole that cannot be honoured: what to use in its place; other values are refused
    stage1: bool = False  # honoured in `retriever_args` only

    @functools.cached_property
    def _adapter(self) -> TypeAdapter:
        given = {"ge": self.min, "le": self.max, "gt": self.gt, "lt": self.lt}
        bounds: Dict[str, Any] = {name: bound for name, bound in given.items() if bound is not None}
        plain = {"int": StrictInt, "str": Annotated[str, Field(strict=True)]}
        one_of, a_list = cast(Any, Literal), cast(Any, List)  # of what is known at run time only
        kind: Any = {
            **plain,
            "int": Annotated[int, Field(strict=True, **bounds)],
            "float": Annotated[float, Field(strict=True, allow_inf_nan=False, **bounds)],
            "number": Number,
            "bool": StrictBool,
            "choice": one_of[tuple(self.choices or [""])],
            "list": a_list[{**plain, "float": Number}.get(self.items or "", Any)],
            "dict": Dict[str, Any],
            "any": Any,
        }[self.type]
        return TypeAdapter(Optional[kind] if self.nullable else kind)

    def __getstate__(self) -> Dict[Any, Any]:
        """Without the compiled check, which older pydantic cannot pickle; it is compiled again when needed."""
        state = super().__getstate__()
        return {**state, "__dict__": {k: v for k, v in state["__dict__"].items() if k != "_adapter"}}

    def __deepcopy__(self, memo: Any = None) -> Key:
        """Nobody changes a definition, they are replaced; and a compiled check of older pydantic cannot be copied."""
        return self.model_copy()

    def check(self, value: Any, source: str = "") -> Any:
        """`value` in the key's own type, or a ConfigError of one line."""
        if self.type == "choice" and isinstance(value, str):
            if self.join and self.join in value:
                return self._joined(value, source)
            value = self._spelt(value)
            if self.open and value in added(self.name):
                return value
        if self.type == "list" and isinstance(value, (tuple, str, int)) and not isinstance(value, bool):
            value = list(value) if isinstance(value, tuple) else [value]
        try:
            return self._adapter.validate_python(value)
        except ValidationError:
            where = f" (from {source})" if source else ""
            raise ConfigError(f"{self.name}={_show(value)}{where}: must be {self.range}") from None

    @property
    def known(self) -> List[Any]:
        """The choices; of an open key, those that plugins added as well."""
        return [*(self.choices or []), *(added(self.name) if self.open else [])]

    def _spelt(self, text: str) -> Any:
        """The choice that `text` means in any case; the text itself if it means none."""
        return next((c for c in self.known if str(c).lower() == text.lower()), text)

    def _joined(self, text: str, source: str) -> str:
        """Several choices in the order of `choices`, whatever the order in `text`: equal settings are spelt alike."""
        parts = [self._spelt(part.strip()) for part in text.split(self.join)]
        wrong = [
            f"'{part}' is none of {', '.join(map(str, self.choices or []))}" if part not in (self.choices or []) else
            f"'{part}' cannot be joined with others" if part in self.alone else f"'{part}' stands there twice"
            for number, part in enumerate(parts)
            if part not in (self.choices or []) or part in self.alone or part in parts[:number]
        ]  # fmt: skip
        if wrong:
            where = f" (from {source})" if source else ""
            raise ConfigError(f"{self.name}={_show(text)}{where}: {'; '.join(dict.fromkeys(wrong))}")
        return self.join.join(str(choice) for choice in self.choices or [] if choice in parts)

    @property
    def range(self) -> str:
        """The allowed values in words."""
        words = {"int": "an integer", "float": "a number", "number": "a number", "bool": "true or false",
                 "str": "text", "list": "a list", "dict": "a mapping", "any": "any value"}  # fmt: skip
        if self.type == "choice":
            text = "one of " + ", ".join(map(str, self.known))
            if self.join:
                alone = f" (but {', '.join(map(str, self.alone))})" if self.alone else ""
                text += f", or several joined by {self.join}{alone}"
        else:
            text = words[self.type]
        if self.form:
            text += f" such as {self.form}"
        if self.items:
            text += {"int": " of integers", "float": " of numbers", "str": " of names"}[self.items]
        signs = ((">=", self.min), (">", self.gt), ("<=", self.max), ("<", self.lt))
        bounds = [f"{sign} {bound}" for sign, bound in signs if bound is not None]
        return text + (" " + " and ".join(bounds) if bounds else "") + (" or null" if self.nullable else "")

    def parse(self, text: str) -> Any:
        """The value that `text`, typed on a command line, means for this key; never evaluated as code."""
        if (self.nullable or self.type in ("any", "number")) and text.strip().lower() in _NULLS:
            return None
        if self.type == "choice":
            return self._spelt(text)
        try:
            value = yaml.load(text, Loader=Loader)
        except yaml.YAMLError:
            return text
        if self.type == "str":
            return value if isinstance(value, str) and text[:1] in "\"'" else text
        if self.type == "list" and isinstance(value, str) and value == text:
            return [parse_text(part) for part in value.split(",")]
        return value


def parse_text(text: str) -> Any:
    """The YAML value of a text of unknown key; the text itself if it is no YAML."""
    return Key(name="", type="any", scope="process").parse(text)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
