"""What is wrong with a log: every kind of problem with its places, at most ten of them, and how often it occurs."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from dnr_recbole.errors import DataError
from dnr_recbole.requestlog.columns import Place

MAX_EXAMPLES = 10


class Problem:
    """One kind of problem in one column.

    Attributes:
        what: in words.
        column: where; "" for the whole.
        fatal: whether training refuses the log for it; else it is treated as ``what`` says.
        count: how many rows (or requests) have it.
        examples: ``place: value`` of the first few.
    """

    def __init__(self, what: str, column: str, fatal: bool):
        self.what, self.column, self.fatal = what, column, fatal
        self.count, self.examples = 0, []  # type: int, List[str]

    def __str__(self) -> str:
        return self.show(MAX_EXAMPLES)

    def show(self, n: int) -> str:
        """In one line, with n examples at most."""
        where = f"{self.column}: " if self.column else ""
        shown = "; ".join(self.examples[:n])
        more = " …" if self.count > min(n, len(self.examples)) > 0 else ""
        return f"{where}{self.what} ({self.count:,}){': ' + shown + more if shown else ''}"


class Problems:
    """Everything found so far, in the order of first appearance."""

    def __init__(self) -> None:
        self.found: Dict[tuple, Problem] = {}

    def add(
        self,
        what: str,
        column: str = "",
        places: Sequence[str] = (),
        values: Sequence[Any] = (),
        count: Optional[int] = None,
        fatal: bool = True,
    ) -> None:
        """Count a problem; ``places`` and ``values`` are examples, ``count`` defaults to their number."""
        problem = self.found.setdefault((what, column), Problem(what, column, fatal))
        problem.count += len(places) if count is None else count
        for number, place in enumerate(places):
            if len(problem.examples) >= MAX_EXAMPLES:
                break
            problem.examples.append(f"{place}: {shorten(values[number])}" if len(values) else str(place))

    def add_rows(
        self, what: str, column: str, bad: np.ndarray, place: Place, values: Any = None, fatal: bool = True
    ) -> None:
        """Count the True of ``bad`` [m]; ``place(i)`` names row i, ``values`` [m] are shown."""
        rows = np.flatnonzero(bad)
        if len(rows):
            some = rows[:MAX_EXAMPLES]
            shown = [] if values is None else [values[i] for i in some]
            self.add(what, column, [place(i) for i in some], shown, count=len(rows), fatal=fatal)

    @property
    def fatal(self) -> List[Problem]:
        """Those for which training refuses the log."""
        return [problem for problem in self.found.values() if problem.fatal]

    @property
    def notes(self) -> List[Problem]:
        """Those that are treated, and how often."""
        return [problem for problem in self.found.values() if not problem.fatal]

    def raise_fatal(self, name: str) -> None:
        """Raises:
        DataError: there is a fatal problem; the line names the first three kinds.
        """
        if self.fatal:
            shown = " | ".join(problem.show(2) for problem in self.fatal[:3])
            rest = f" | and {len(self.fatal) - 3} further kinds" if len(self.fatal) > 3 else ""
            raise DataError(f"{name}: {shown}{rest}; `dnr-recbole validate` lists all")


def shorten(value: Any, length: int = 40) -> str:
    """A value for a message: on one line and not longer than that."""
    text = " ".join((f"{value:.6g}" if isinstance(value, float) else str(value)).split())
    return f"'{text if len(text) <= length else text[: length - 1] + '…'}'"
