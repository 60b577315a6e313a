"""Ranges of integers as flat arrays, and row blocks that bound the memory of what is made of them."""

from __future__ import annotations

from typing import Iterator, Tuple

import numpy as np

# Elements of the largest temporary array; float32 → 32 MiB. Bounds the memory, whatever the size of the data.
BLOCK_ELEMENTS = 1 << 23


def count_within(counts: np.ndarray) -> np.ndarray:
    """0, 1, …, counts[0] - 1, 0, 1, …, counts[1] - 1, …"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def ranges(begin: np.ndarray, end: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [begin_i, end_i) in a row, and the index i of each."""
    owner = np.repeat(np.arange(len(begin)), end - begin)
    return begin[owner] + count_within(end - begin), owner


def blocks(n_rows: int, width: int) -> Iterator[Tuple[int, int]]:
    """Row ranges whose [rows, width] array stays within BLOCK_ELEMENTS."""
    size = max(1, BLOCK_ELEMENTS // max(1, int(width)))
    for low in range(0, int(n_rows), size):
        yield low, min(low + size, int(n_rows))
