"""What the server reads and answers."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator
from typing_extensions import Annotated

_BIGGEST = 2**63 - 1
Text = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Whole = Annotated[StrictInt, Field(ge=-_BIGGEST, le=_BIGGEST)]
Id = Union[Text, Whole]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Value = Union[StrictBool, Number, Annotated[StrictStr, Field(max_length=1024)], None]


class Candidate(BaseModel):
    """One candidate: its id, the scores and the features that the model reads, by their names in the training log."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: Dict[str, Value] = Field(init=False)

    item_id: Id
    category: Optional[Text] = Field(None, description="for `at_most`; read by no model")

    @property
    def given(self) -> Dict[str, Any]:
        """Scores and features by name."""
        return self.__pydantic_extra__ or {}


class RankRequest(BaseModel):
    """The candidates of one request in the order of the retriever's scores or in any other."""

    model_config = ConfigDict(extra="forbid")

    request_id: Optional[Id] = None
    user_id: Optional[Id] = None
    history: Optional[Annotated[List[Id], Field(max_length=10_000)]] = Field(
        None, description="item ids, oldest first; without it the stored history of the user"
    )
    items: List[Candidate] = Field(min_length=1)
    k: Optional[Annotated[StrictInt, Field(ge=1, le=_BIGGEST)]] = Field(None, description="items to return; null = all")
    exclude: List[Id] = Field(default_factory=list, description="items not to return")
    pins: Dict[str, Annotated[StrictInt, Field(ge=0, le=_BIGGEST)]] = Field(
        default_factory=dict, description="item id → place from 0 at which it has to stand"
    )
    at_most: Optional[Annotated[StrictInt, Field(ge=1, le=_BIGGEST)]] = Field(
        None, description="of each category at most so many among the first k"
    )

    @field_validator("items")
    @classmethod
    def _distinct(cls, items: List[Candidate]) -> List[Candidate]:
        ids = [str(item.item_id) for item in items]
        if len(set(ids)) < len(ids):
            twice = next(name for number, name in enumerate(ids) if name in ids[:number])
            raise ValueError(f"item '{twice}' stands twice")
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


class RankBody(BaseModel):
    """One request or many."""

    model_config = ConfigDict(extra="forbid")

    requests: List[RankRequest] = Field(min_length=1)
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


class Feedback(BaseModel):
    """What a user did with an answer."""

    model_config = ConfigDict(extra="forbid")

    request_id: Id
    clicked: Annotated[List[Id], Field(max_length=10_000)]
    exposed: Optional[Annotated[List[Id], Field(max_length=10_000)]] = Field(
        None, description="items that were shown; null = all that were returned"
    )


class MetarankField(BaseModel):
    """A named value."""

    model_config = ConfigDict(extra="ignore")

    name: Text
    value: Union[Value, List[Value]] = None


class MetarankItem(BaseModel):
    """An item to rank."""

    model_config = ConfigDict(extra="ignore")

    id: Id
    fields: List[MetarankField] = Field(default_factory=list)
    relevancy: Optional[Number] = None


class MetarankBody(BaseModel):
    """metarank's ranking event."""

    model_config = ConfigDict(extra="ignore")

    id: Optional[Id] = None
    user: Optional[Id] = None
    session: Optional[Id] = None
    timestamp: Optional[Union[StrictStr, StrictInt]] = None
    fields: List[MetarankField] = Field(default_factory=list)
    items: List[MetarankItem] = Field(min_length=1)

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
