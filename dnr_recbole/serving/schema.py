"""What the server reads and answers."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from typing_extensions import Annotated

_BIGGEST = 2**63 - 1


class _OneMessage:
    """A union that says what is wanted in one message at the field, and not one for each of its members."""

    def __init__(self, text: str):
        self.text = text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "custom_error_type": "value", "custom_error_message": self.text}


Text = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Whole = Annotated[StrictInt, Field(ge=-_BIGGEST, le=_BIGGEST)]
Id = Annotated[
    Union[Text, Whole], _OneMessage("Input should be an id: a text of 1 to 256 characters or an integer of 64 bits")
]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_SINGLE = Union[StrictBool, Number, Annotated[StrictStr, Field(max_length=1024)]]
Scalar = Optional[
    Annotated[
        _SINGLE, _OneMessage("Input should be a finite number, true, false, null or a text of at most 1024 characters")
    ]
]
_Values = Annotated[List[Scalar], Field(max_length=4096, fail_fast=True)]
Value = Optional[
    Annotated[
        Union[_SINGLE, _Values],
        _OneMessage(
            "Input should be a finite number, true, false, null, a text of at most 1024 characters, or a list of "
            "at most 4096 of these"
        ),
    ]
]
Ids = Annotated[List[Id], Field(max_length=10_000, fail_fast=True)]
MOST_REQUESTS, MOST_CANDIDATES = 10_000, 100_000  # that any server takes; a server's own limits are lower
_FIELDS = 1000


def _few(content: Any) -> Any:
    """A client's million fields end here, before each of them becomes a message."""
    if isinstance(content, dict) and len(content) > _FIELDS:
        raise ValueError(f"{len(content)} fields, at most {_FIELDS} are taken")
    return content


class _Body(BaseModel):
    """Part of a body."""

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, content: Any) -> Any:
        return _few(content)


class Candidate(_Body):
    """One candidate: its id, the scores and the features that the model reads, by their names in the training log."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: Dict[str, Value] = Field(init=False)

    item_id: Id
    category: Scalar = Field(None, description="for `at_most`, and a feature where the model reads one of this name")

    @property
    def given(self) -> Dict[str, Any]:
        """Scores and features by name."""
        category = {} if self.category is None else {"category": self.category}
        return {**(self.__pydantic_extra__ or {}), **category}

    def score(self, name: str) -> Optional[float]:
        """A score; None where it is missing or no number."""
        value = (self.__pydantic_extra__ or {}).get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class RankRequest(_Body):
    """The candidates of one request in the order of the retriever's scores or in any other."""

    model_config = ConfigDict(extra="forbid")

    request_id: Optional[Id] = None
    user_id: Optional[Id] = None
    history: Optional[Ids] = Field(
        None, description="item ids, oldest first; without it the stored history of the user"
    )
    items: List[Candidate] = Field(min_length=1, max_length=MOST_CANDIDATES, fail_fast=True)
    k: Optional[Annotated[StrictInt, Field(ge=1, le=_BIGGEST)]] = Field(None, description="items to return; null = all")
    exclude: Ids = Field(default_factory=list, description="items not to return")
    pins: Annotated[Dict[Text, Annotated[StrictInt, Field(ge=0, le=_BIGGEST)]], BeforeValidator(_few)] = Field(
        default_factory=dict, max_length=_FIELDS, description="item id → place from 0 at which it has to stand"
    )
    at_most: Optional[Annotated[StrictInt, Field(ge=1, le=_BIGGEST)]] = Field(
        None, description="of each category at most so many among the first k"
    )

    @field_validator("items")
    @classmethod
    def _distinct(cls, items: List[Candidate]) -> List[Candidate]:
        seen = set()
        for item in items:
            name = str(item.item_id)
            if name in seen:
                raise ValueError(f"item '{name}' stands twice")
            seen.add(name)
        return items

    @model_validator(mode="after")
    def _pinned(self) -> RankRequest:
        names = {str(item.item_id) for item in self.items}
        for name in self.pins:
            if name not in names:
                raise ValueError(f"pins: '{name}' is not among the items")
        if len(set(self.pins.values())) < len(self.pins):
            raise ValueError("pins: two items at one place")
        return self


class RankBody(_Body):
    """One request or many."""

    model_config = ConfigDict(extra="forbid")

    requests: List[RankRequest] = Field(min_length=1, max_length=MOST_REQUESTS, fail_fast=True)
    model: Optional[Text] = Field(None, description="a model's name; null = the split of the traffic decides")


class RankedItem(BaseModel):
    """One item of an answer."""

    item_id: Id
    rank: int = Field(description="from 0")
    score: Optional[float] = Field(description="higher is better; null behind the longest list that the model reads")
    incoming_rank: int
    explanation: Optional[Dict[str, int]] = Field(
        None, description="rank without the scores, without the history, and by itself without the other candidates"
    )


class Answer(BaseModel):
    """A ranked request."""

    request_id: Id
    model: str
    version: str
    items: List[RankedItem]


class Answers(BaseModel):
    """What /rank returns, in the order of the requests."""

    answers: List[Answer]


class Health(BaseModel):
    """Whether requests are answered, and the version of each model."""

    ready: bool
    models: Dict[str, str]


class Problem(BaseModel):
    """What is wrong with a field, and its path in the body."""

    loc: List[Union[str, int]]
    msg: str


class Refusal(BaseModel):
    """Why there is no result."""

    detail: Union[str, List[Problem]]


class Feedback(_Body):
    """What a user did with an answer."""

    model_config = ConfigDict(extra="forbid")

    request_id: Id
    clicked: Ids
    exposed: Optional[Ids] = Field(None, description="items that were shown; null = all that were returned")


class MetarankField(_Body):
    """A named value."""

    model_config = ConfigDict(extra="ignore")

    name: Text
    value: Value = None


class MetarankItem(_Body):
    """An item to rank."""

    model_config = ConfigDict(extra="ignore")

    id: Id
    fields: List[MetarankField] = Field(default_factory=list, max_length=_FIELDS, fail_fast=True)
    relevancy: Optional[Number] = None


class MetarankBody(_Body):
    """metarank's ranking event."""

    model_config = ConfigDict(extra="ignore")

    id: Optional[Id] = None
    user: Optional[Id] = None
    session: Optional[Id] = None
    timestamp: Optional[Union[StrictStr, StrictInt]] = None
    fields: List[MetarankField] = Field(default_factory=list, max_length=_FIELDS, fail_fast=True)
    items: List[MetarankItem] = Field(min_length=1, max_length=MOST_CANDIDATES, fail_fast=True)

    def request(self, scores: List[str]) -> Dict[str, Any]:
        """The same as a body of :class:`RankRequest`; `relevancy` stands for the first score where that is missing."""
        items = []
        for item in self.items:
            values = {field.name: field.value for field in [*self.fields, *item.fields]}
            relevancy = values.pop("relevancy", item.relevancy)
            if relevancy is not None:
                values.setdefault(scores[0], relevancy)
            items.append({**values, "item_id": item.id})
        return {"request_id": self.id, "user_id": self.user, "items": items}


class MetarankScore(BaseModel):
    """An item in its place."""

    item: Id
    score: Optional[float]


class MetarankAnswer(BaseModel):
    """metarank's answer to a ranking event."""

    took: int = Field(description="milliseconds")
    state: None
    items: List[MetarankScore]
