"""Columns of a log that say where candidates were shown and what was done with them, beyond one click."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from dnr_recbole.config_schema import Keys
from dnr_recbole.data.weighting import reads_exposure
from dnr_recbole.errors import ConfigError, DataError, closest
from dnr_recbole.log_names import EXAMINATION, INTENDED, PLACE, PROPENSITY, RANDOMISED
from dnr_recbole.requestlog.columns import Numbers, flags, numbers
from dnr_recbole.requestlog.reading import Batch

EXPOSURE = {  # column → name in the table, type, and what stands at padding and where the value is missing
    PLACE: ("position", np.int16, -1),
    INTENDED: ("intended", np.int16, -1),
    PROPENSITY: ("propensity", np.float32, np.nan),
    EXAMINATION: ("examination", np.float32, np.nan),
    RANDOMISED: ("randomised", np.bool_, False),
}
_LAST_POSITION = 2**15 - 1

Add = Callable[..., None]


@dataclass(frozen=True)
class Feedback:
    """Which of these columns are read.

    Attributes:
        exposure: of :data:`EXPOSURE`.
        weight: the column of sample weights, or "".
        objectives: column → its weight.
        apart: whether each of them is kept for itself, too.
        grades: the highest grade of the labels; 1 = they are 0 or 1.
        positive: labels of at least this grade are positives.
    """

    exposure: Sequence[str] = ()
    weight: str = ""
    objectives: Dict[str, float] = field(default_factory=dict)
    apart: bool = False
    grades: int = 1
    positive: int = 1

    @classmethod
    def choose(cls, names: Sequence[str], config: Keys, source: str) -> Feedback:
        """Those that the keys of a run ask for.

        Raises:
            DataError: a column is missing. ConfigError: a weight is none.
        """
        objectives = {str(name): weight for name, weight in (config["objectives"] or {}).items()}
        for name, weight in objectives.items():
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < np.inf:
                raise ConfigError(f"objectives: the weight of {name} must be a number above 0, not {weight!r}")
        if config["positive_grade"] > config["label_grades"]:
            raise ConfigError(
                f"positive_grade={config['positive_grade']} is above label_grades={config['label_grades']}"
            )
        weight = config["sample_weight"] or ""
        for key, wanted in (("objectives", list(objectives)), ("sample_weight", [weight] if weight else [])):
            for name in wanted:
                if name not in names:
                    hint = closest(name, names) or f"the columns are {', '.join(names)}"
                    raise DataError(f"{source} has no column '{name}' (key {key}): {hint}")
        exposure = [name for name in EXPOSURE if name in names] if reads_exposure(config) else []
        apart = config["objective_outputs"] == "apart"
        if apart and len(objectives) < 2:
            raise ConfigError(f"objective_outputs=apart needs at least two objectives, not {len(objectives)}")
        return cls(exposure, weight, objectives, apart, config["label_grades"], config["positive_grade"])

    @property
    def columns(self) -> List[str]:
        """Names of columns that are neither canonical nor features."""
        return [*self.objectives, *([self.weight] if self.weight else [])]

    @property
    def kinds(self) -> Dict[str, Tuple[Tuple[int, ...], type]]:
        """Names of the arrays that :meth:`read` gives, with the shape of a candidate's value and its type."""
        out: Dict[str, Tuple[Tuple[int, ...], type]] = {
            EXPOSURE[name][0]: ((), EXPOSURE[name][1]) for name in self.exposure
        }
        if self.objectives or self.grades > 1:
            out["targets"] = ((), np.float32)
        if self.apart:
            out["objectives"] = ((len(self.objectives),), np.float32)
        if self.weight:
            out["weights"] = ((), np.float32)
        return out

    def read(self, batch: Batch, grade: Optional[np.ndarray], add: Add) -> Dict[str, np.ndarray]:
        """The arrays [M], or [M, T], of a batch; what is wrong goes to ``add(what, column, rows, values)``."""
        out = {EXPOSURE[name][0]: self._exposure(batch, name, add) for name in self.exposure}
        if self.objectives:
            total = sum(self.objectives.values())
            parts = {name: self._objective(batch, name, add) for name in self.objectives}
            weighted = np.sum([share * parts[name] for name, share in self.objectives.items()], axis=0)
            out["targets"] = (weighted / total).astype(np.float32)
            if self.apart:
                out["objectives"] = np.stack(list(parts.values()), axis=1).astype(np.float32)
        elif self.grades > 1 and grade is not None:
            out["targets"] = ((2.0**grade - 1) / (2.0**self.grades - 1)).astype(np.float32)
        if self.weight:
            values = _numbers(batch, self.weight, add, lambda v: v >= 0, "a sample weight is missing, negative or none")
            out["weights"] = values.astype(np.float32)
        return out

    def grade(self, column: Any, add: Add, name: str) -> np.ndarray:
        """float64 [M]: grades 0 … ``grades``."""
        found = numbers(column)
        wrong = found.wrong | (~found.missing & ~np.isin(found.values, np.arange(self.grades + 1)))
        add("a label is missing", name, found.missing)
        add(f"a label is no grade from 0 to {self.grades} (key label_grades)", name, wrong, column)
        return np.where(found.missing | wrong, 0.0, found.values)

    def _exposure(self, batch: Batch, name: str, add: Add) -> np.ndarray:
        column, (_, kind, nothing) = batch.per_candidate[name], EXPOSURE[name]
        found: Numbers = flags(column) if kind is np.bool_ else numbers(column)
        if name == EXAMINATION:
            bad = ~found.missing & ~((found.values > 0) & (found.values <= 1))
            add("an examination is outside (0, 1]", name, bad, column)
        elif name == RANDOMISED:
            add("neither true nor false", name, found.wrong, column)
        elif kind is np.int16:
            add("a position is too large", name, found.values > _LAST_POSITION, column)
            add("a position is no number from 0 on", name, found.wrong | (found.values < 0), column)
        known = np.isfinite(found.values) & ~found.missing & ~found.wrong
        return np.where(known, np.clip(found.values, -1, _LAST_POSITION), nothing).astype(kind)

    @staticmethod
    def _objective(batch: Batch, name: str, add: Add) -> np.ndarray:
        return _numbers(batch, name, add, lambda v: (v >= 0) & (v <= 1), "an objective is missing or outside [0, 1]")


def _numbers(batch: Batch, name: str, add: Add, fits: Callable[[np.ndarray], np.ndarray], what: str) -> np.ndarray:
    column = batch.per_candidate[name]
    values = numbers(column).values
    bad = ~(np.isfinite(values) & fits(values))
    add(what, name, bad, column)
    return np.where(bad, 0.0, values)
