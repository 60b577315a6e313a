"""A trained model with more rows in its tables: for ids that came later, and for what stands for unknown ones."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.blocks.tables import SideTable

Sizes = Tuple[Tuple[int, int], Tuple[int, int]]


def grown(
    model: AbstractReranker, config, catalogue: Dict[str, Any], n_users: int, n_items: int
) -> Tuple[AbstractReranker, Dict[str, Any]]:
    """The same model for ``n_users`` and ``n_items`` rows, padding included; old rows keep their values.

    New rows of learned embeddings start as the vector of the unknown id, or, in a model that has none, as the mean of
    all; whatever the model knows of items beside that (spaces, popularity, features) is zero for them.

    Args:
        config: the model's keys.
        catalogue: shapes of its tables, as :meth:`~dnr_recbole.data.catalogue.Catalogue.shapes` gives them.

    Returns:
        the model, in eval mode, and the new shapes.
    """
    old = catalogue["n_users"], catalogue["n_items"]
    new = max(n_users, old[0]), max(n_items, old[1])
    shapes = _resized(catalogue, {"user": (old[0], new[0]), "item": (old[1], new[1])})
    shapes.update(n_users=new[0], n_items=new[1])
    other = type(model)(config, Catalogue.blank(shapes))
    other.load_state_dict(grown_state(model, other, ((old[0], new[0]), (old[1], new[1]))))
    return other.to(next(iter(model.state_dict().values())).device).eval(), shapes


def grown_state(
    model: AbstractReranker, other: AbstractReranker, sizes: Sizes, known: Optional[Catalogue] = None
) -> Dict[str, Tensor]:
    """The state of ``model`` for ``other``, which was built alike for as many or more users and items.

    Where a table of ``other`` is larger, its further rows are its own, but for learned embeddings, which start as the
    unknown id, and flags of training, which are off.

    Args:
        sizes: (old, new) numbers of rows of users and of items; nothing else of a model may differ in size.
        known: the catalogue that ``other`` was built from, if that says what is known now: tables that are not learned
            (spaces, popularity, features) are then ``other``'s. None keeps those of ``model``.
    """
    state, target = model.state_dict(), other.state_dict()
    learned = {name for name, _ in other.named_parameters()}
    rows = {new for _, new in sizes} if known is not None else set()
    tables = {f"{name}." if name else "": part for name, part in model.named_modules() if isinstance(part, SideTable)}
    out: Dict[str, Tensor] = {}
    for name, value in state.items():
        wanted = target.get(name)
        if wanted is not None and name not in learned and any(size in rows for size in wanted.shape):
            out[name] = wanted
            if name.endswith("trained"):
                out[name] = wanted.clone()
                out[name][: len(value)] = torch.maximum(wanted[: len(value)], value)
            continue
        if (
            wanted is None
            or wanted.shape == value.shape
            or wanted.dim() != value.dim()
            or not _grows(value, wanted, sizes)
        ):
            out[name] = value
            continue
        merged = wanted.clone()
        merged[tuple(slice(0, size) for size in value.shape)] = value
        for prefix, table in tables.items():
            if name == f"{prefix}embedding.weight":
                start = value[1:].mean(0) if table.unknown is None else table.unknown.detach()
                merged[len(value) :] = start
            elif name == f"{prefix}trained":
                merged[len(value) :] = 0
        out[name] = merged
    return out


def _grows(value: Tensor, wanted: Tensor, sizes: Sizes) -> bool:
    return all(pair[0] == pair[1] or pair in sizes for pair in zip(value.shape, wanted.shape))


def _resized(shapes: Any, sizes: Dict[str, Tuple[int, int]]) -> Dict[str, Any]:
    """Shapes of a catalogue's tables for other numbers of users and items."""
    out = dict(shapes)
    for name, side, place in (
        ("item_popularity", "item", 0), ("item_features", "item", 0), ("user_features", "user", 0),
        ("item_factors", "item", 0), ("user_factors", "user", 0), ("item_counts", "item", 0),
        ("items_trained", "item", 0), ("users_trained", "user", 0),
    ):  # fmt: skip
        if isinstance(out.get(name), list):
            out[name] = [sizes[side][1] if i == place else size for i, size in enumerate(out[name])]
    spaces = out.get("spaces") or {}
    out["spaces"] = {name: [*shape[:2], sizes["item"][1], shape[3]] for name, shape in spaces.items()}
    return out
