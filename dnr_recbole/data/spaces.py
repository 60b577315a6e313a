"""Item spaces: vectors whose cosine says how alike two items are, learned from the retriever's part of the log.

A reranker compares each candidate with the history in these spaces (:mod:`dnr_recbole.model.inputs.affinity`). A space
is a function, registered by name, of the interactions that it may know; one from outside is registered in a module that
the key ``plugins`` names::

    @register_space("my_space")
    def my_space(known: Known) -> Optional[Tensor]: ...

Nothing else is handed to it, so no space knows what comes after the retriever's part. Where training requests lie
inside that part (protocol `exposed`), a space is built once per fold of users as well, without them: a training request
reads the table that its own user had no share in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.errors import UnknownNameError
from dnr_recbole.identity import foreign_code
from dnr_recbole.names import Names
from dnr_recbole.retriever.cache import Cache

if TYPE_CHECKING:
    from dnr_recbole.retriever.retrieval import Retrieval

FACTORS = "factors"
USING = ("affinity", "both")  # values of `history_interaction` that read them
_KEYS = ("affinity_spaces", "affinity_dim", "affinity_folds")
_NEXT, _SHRINK = 5, 2.0  # of `covisit`
_LEAST, _NOISE = 1e-12, 1e-6
_POWERS = 7  # power iterations of the truncated SVD


@dataclass(frozen=True)
class Known:
    """What a space may know: M interactions in each user's time order.

    Attributes:
        user, item: int64 [M], sorted by (user, time).
        n_users, n_items: sizes, padding row 0 included.
        dim: wanted width of the vectors, the key ``affinity_dim``.
        factors: FloatTensor [I, f], the retriever's item vectors, or None where it has none or where they would know
            the labels of training requests.
    """

    user: np.ndarray
    item: np.ndarray
    n_users: int
    n_items: int
    dim: int
    factors: Optional[Tensor] = None

    def without(self, users: np.ndarray) -> Known:
        """The same without some users (bool [U]); the retriever's vectors knew them, so they are gone, too."""
        keep = ~users[self.user]
        return dataclasses.replace(self, user=self.user[keep], item=self.item[keep], factors=None)


# -> [I, f], the same vector for an item as a candidate and in a history, or [2, I, f], one for each role; None where
# the space cannot be built. Lengths do not matter; a zero row is an item that the space does not know.
Space = Callable[[Known], Optional[Tensor]]
SPACES: Names[Space] = Names("item space", "affinity_spaces")


def register_space(name: str) -> Callable[[Space], Space]:
    """Decorator: the function becomes one of the names that ``affinity_spaces`` takes."""
    return SPACES.register(name)


@register_space(FACTORS)
def retriever_factors(known: Known) -> Optional[Tensor]:
    """The retriever's own item vectors."""
    return known.factors


@register_space("svd")
def truncated_svd(known: Known) -> Optional[Tensor]:
    """Right singular vectors, times the singular values, of the user-item matrix.

    Rows are divided by the root of their length and columns by that of theirs: else a few busy users and popular items
    make the first dimensions.
    """
    matrix = _counts(known.user, known.item, known.n_users, known.n_items)
    matrix.data[:] = 1.0
    factors = _svd(_balanced(matrix), known.dim)
    return None if factors is None else factors[1]


@register_space("covisit")
def covisitation(known: Known) -> Optional[Tensor]:
    """Which item comes next: how often candidate i followed item h within :data:`_NEXT` steps, near steps more.

    Counts are shrunk, count · count / (count + :data:`_SHRINK`), so that one coincidence is no evidence, and divided by
    the roots of both items' totals; the two sides of their truncated SVD are the vectors of histories and candidates.
    """
    rows, columns, weights = [], [], []
    for step in range(1, _NEXT + 1):
        if len(known.user) <= step:
            break
        same = known.user[step:] == known.user[:-step]
        rows.append(known.item[:-step][same])
        columns.append(known.item[step:][same])
        weights.append(np.full(int(same.sum()), 1.0 / step))
    if not rows:
        return None
    pairs = (np.concatenate(rows), np.concatenate(columns))
    counts = _counts(*pairs, known.n_items, known.n_items, np.concatenate(weights))
    counts.setdiag(0)
    counts.data *= counts.data / (counts.data + _SHRINK)
    sides = _svd(_balanced(counts), known.dim)
    return None if sides is None else torch.stack([sides[1], sides[0]])


def load_spaces(config: Keys, interactions: Interactions, retrieval: Retrieval) -> Dict[str, Tensor]:
    """The tables of ``affinity_spaces`` over the retriever's part of the log, from the cache if they are there.

    They are kept not for speed alone: rounding differs between machines, and a run that is continued elsewhere must
    find the inputs that it began with.
    """
    if config["history_interaction"] not in USING:
        return {}
    if not config["use_cache"]:
        return _of_log(config, interactions, retrieval)
    cache = Cache(config["cache_dir"])
    names = [*_KEYS, "protocol"]
    keys = {name: config[name] for name in names}
    key = {"kind": "spaces", "retrieval": retrieval.key, "keys": keys, "version": 1}
    code = foreign_code(keys)
    if code:
        key["code"] = code
    with cache.making(key):
        stored = cache.load(key)
        if stored is None:
            stored = _of_log(config, interactions, retrieval)
            cache.store(key, stored)
    return stored


def _of_log(config: Keys, interactions: Interactions, retrieval: Retrieval) -> Dict[str, Tensor]:
    lines = np.flatnonzero(retrieval.split < 2)  # what the retriever was fitted or calibrated on
    inside = config["protocol"] == "exposed"
    known = Known(
        user=interactions.user[lines],
        item=interactions.item[lines],
        n_users=interactions.n_users,
        n_items=interactions.n_items,
        dim=config["affinity_dim"],
        # Under `exposed` they know the labels of training requests, and to fit a retriever once per fold is too dear.
        factors=None if inside else retrieval.item_factors,
    )
    return build_spaces(config["affinity_spaces"], known, config["affinity_folds"] if inside else 0)


def build_spaces(names: Sequence[str], known: Known, n_folds: int = 0) -> Dict[str, Tensor]:
    """Tables by name, see :attr:`~dnr_recbole.data.catalogue.Catalogue.spaces`.

    One that cannot be built, as `factors` of a retriever without vectors, is left out, and the log says so.

    Raises:
        UnknownNameError: nobody registered such a space.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in SPACES]
    if unknown:
        raise UnknownNameError(
            f"affinity_spaces: '{unknown[0]}' is unknown; choose from {', '.join(SPACES)}, or name the module that "
            "registers it in plugins"
        )
    folds = user_fold(np.arange(known.n_users), max(n_folds, 1))
    parts = [known] + [known.without(folds == fold) for fold in range(1, n_folds + 1)]
    tables = {name: [SPACES[name](part) for part in parts] for name in names}
    there = {name: [table for table in tables_of if table is not None] for name, tables_of in tables.items()}
    missing = [name for name in names if len(there[name]) < len(parts)]
    if missing:
        getLogger(__name__).info(f"affinity_spaces left out, for want of vectors or data: {', '.join(missing)}")
    return {name: unit_rows(tables_of) for name, tables_of in there.items() if name not in missing}


def user_fold(users: Any, n_folds: int) -> Any:
    """The fold 1 … n_folds of each user, whose table knows nothing of him; array or tensor, any shape."""
    return users % n_folds + 1


def unit_rows(folds: Sequence[Tensor]) -> Tensor:
    """Tables [I, f] or [2, I, f] of all folds -> unit rows [roles, folds + 1, I, f]; row 0 is zero."""
    table = torch.stack([t if t.dim() == 3 else t.unsqueeze(0) for t in folds], dim=1).float()
    length = table.norm(dim=-1, keepdim=True)
    known = length > _NOISE * length.amax().clamp(min=_LEAST)  # rounding is no direction
    table = torch.where(known, table / length, 0.0)
    table[..., 0, :] = 0.0
    return table.contiguous()


def _counts(row: np.ndarray, column: np.ndarray, n_rows: int, n_columns: int, weight: Any = None) -> sparse.csr_matrix:
    """How often (or with what total ``weight``) each pair occurs."""
    weight = np.ones(len(row), dtype=np.float32) if weight is None else weight
    return sparse.csr_matrix((weight, (row, column)), shape=(n_rows, n_columns))


def _balanced(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Each value divided by the roots of the totals of its row and column."""
    rows, columns = (np.asarray(matrix.sum(axis)).ravel() for axis in (1, 0))
    scale = lambda totals: sparse.diags(1.0 / np.sqrt(np.maximum(totals, _LEAST)))  # noqa: E731
    return scale(rows) @ matrix @ scale(columns)


def _svd(matrix: sparse.csr_matrix, dim: int) -> Optional[Tuple[Tensor, Tensor]]:
    """Vectors of rows and columns, [n, f] and [m, f], whose inner products approximate ``matrix``; None if it is 0.

    Both sides take the root of the singular values. Equal data, equal vectors, to the last bit: ARPACK restarts from a
    random vector where the matrix has repeated or few singular values, this algorithm draws once, from a fixed seed.
    """
    dim = min(dim, min(matrix.shape) - 1)
    if dim < 1 or matrix.nnz == 0:
        return None
    left, values, right = randomized_svd(matrix.astype(np.float64), dim, n_iter=_POWERS, random_state=0)
    root = np.sqrt(values)
    return torch.from_numpy(left * root), torch.from_numpy((right.T * root).copy())
