"""What a reranker makes of a request batch before it reads the scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Type, TypeVar

from torch import Tensor

C = TypeVar("C", bound="Context")


@dataclass(frozen=True)
class Context:
    """A request batch, encoded without its retriever scores. A model with more to keep has a subclass of its own.

    Fields of subclasses are tensors with leading dimension B, None, other contexts, or dictionaries of these.

    Attributes:
        candidates: ``[B, n, d]`` candidate vectors.
        history: ``[B, H, d]`` history item vectors.
        user: ``[B, d]`` state of the user; DNR's noise generator reads it.
    """

    candidates: Tensor
    history: Tensor
    user: Tensor

    @classmethod
    def of(cls: Type[C], context: Context, **own: Any) -> C:
        """The fields of ``context`` and those of the subclass; one of the former may be replaced."""
        return cls(**{**{field.name: getattr(context, field.name) for field in dataclasses.fields(Context)}, **own})

    def map(self: C, fn: Callable[[Tensor], Tensor]) -> C:
        """``fn`` applied to every tensor."""
        return dataclasses.replace(
            self, **{field.name: _mapped(getattr(self, field.name), fn) for field in dataclasses.fields(self)}
        )

    def select(self: C, rows: Tensor) -> C:
        """The requests ``rows`` of the batch."""
        return self.map(lambda t: t[rows])


@dataclass(frozen=True)
class TokenContext(Context):
    """Of models that fuse the scores into a token per candidate.

    Attributes:
        tokens: ``[B, n, d]``, what the candidate and the user are together.
    """

    tokens: Tensor


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Context):
        return value.map(fn)
    if isinstance(value, dict):
        return {name: _mapped(each, fn) for name, each in value.items()}
    return fn(value)
