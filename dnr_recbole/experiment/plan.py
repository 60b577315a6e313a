"""A plan: every row of a table, in every setting, with an equal search on validation and several seeds.

A plan is a YAML file::

    fixed: {dataset: ml-100k, embedding_size: 64}     # keys of every run
    settings:                                         # one table each
      retrieved: {protocol: retrieved, split: user}
    search: {learning_rate: [0.0005, 0.002]}          # tried for every row on the first seed, chosen on validation
    seeds: [2020, 2021, 2022]
    seed_key: seed                                    # or init_seed: same users and retriever, other initialisations
    rows:
      PRM + score: {model: PRM, score_fusion: concat}
    reference: PRM + score                            # tested against: a row or a probe; default: best on validation
    test_metric: ndcg@6                               # what is tested; default: NDCG at the deepest cut-off
    alpha: 0.05                                       # level of the tests
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator, model_validator

from dnr_recbole.config import Config
from dnr_recbole.config_schema import read_yaml
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.evaluator.probes import PROBES

Keys = Dict[str, Any]
# Keys that a plan decides about itself.
_OWN = ("resume", "result_file", "per_request_file", "seed_key")


@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes:
        setting, row, seed: where it stands.
        searched: its values of the searched keys.
        keys: all its keys, as they are given to Config.
    """

    setting: str
    row: str
    seed: int
    searched: Keys
    keys: Keys

    @property
    def place(self) -> str:
        """Where it stands, as a text to compare by."""
        return place(self.setting, self.row, self.seed, self.searched)

    def __str__(self) -> str:
        return f"{self.setting} | {self.row} | seed {self.seed} | {self.searched}"


def place(setting: str, row: str, seed: int, searched: Keys, **_: Any) -> str:
    """Where a line of results stands in a plan: ``place(**line)``."""
    return json.dumps([setting, row, seed, searched], sort_keys=True)


class Plan(BaseModel):
    """The content of a plan; see the module."""

    model_config = ConfigDict(extra="forbid")

    fixed: Keys = Field(default_factory=dict)
    settings: Dict[str, Keys] = Field(default_factory=lambda: {"default": {}}, min_length=1)
    search: Dict[str, List[Any]] = Field(default_factory=dict)
    seeds: List[StrictInt] = Field(default_factory=lambda: [2020], min_length=1)
    seed_key: Literal["seed", "init_seed"] = "seed"
    rows: Dict[str, Keys] = Field(min_length=1)
    reference: Optional[str] = None
    test_metric: Optional[str] = None
    alpha: float = Field(0.05, gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _empty_parts_are_absent(cls, content: Any) -> Any:
        return {k: v for k, v in content.items() if v is not None} if isinstance(content, dict) else content

    @field_validator("settings", "rows", mode="before")
    @classmethod
    def _rows_without_keys(cls, content: Any) -> Any:
        return {k: {} if v is None else v for k, v in content.items()} if isinstance(content, dict) else content

    @field_validator("search")
    @classmethod
    def _something_to_choose_from(cls, search: Dict[str, List[Any]]) -> Dict[str, List[Any]]:
        empty = [name for name, values in search.items() if not values]
        if empty:
            raise ValueError(f"'{empty[0]}' has no values")
        return search

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, seeds: List[int]) -> List[int]:
        twice = next((seed for place, seed in enumerate(seeds) if seed in seeds[:place]), None)
        if twice is not None:  # one run would count as two, and the deviation over seeds shrink
            raise ValueError(f"{twice} stands twice")
        return seeds

    @model_validator(mode="after")
    def _no_key_of_its_own(self) -> Plan:
        for keys in (self.fixed, self.search, *self.settings.values(), *self.rows.values()):
            for name in (*_OWN, self.seed_key):
                if name in keys:
                    raise ValueError(f"'{name}' cannot be given in a plan" + ": use `seeds`" * (name == self.seed_key))
        return self

    @model_validator(mode="after")
    def _known_reference(self) -> Plan:
        if self.reference is not None and self.reference not in (*self.rows, *PROBES):
            raise ValueError(f"reference '{self.reference}' is neither a row nor one of {', '.join(PROBES)}")
        return self

    def trials(self, setting: str, row: str) -> List[Run]:
        """The search of a row, on the first seed: what the row or the setting fixes is not searched."""
        own = {**self.settings[setting], **self.rows[row]}
        free = {name: values for name, values in self.search.items() if name not in own}
        grid = itertools.product(*free.values())
        return [self.run(setting, row, self.seeds[0], dict(zip(free, values))) for values in grid]

    def run(self, setting: str, row: str, seed: int, searched: Keys) -> Run:
        """A run with all its keys."""
        own = {**self.settings[setting], **self.rows[row]}
        keys = {**self.fixed, **searched, **own, self.seed_key: seed, "show_progress": False}
        return Run(setting, row, seed, searched, keys)

    def chosen(self, setting: str, row: str, line_of: Callable[[Run], Optional[Dict[str, Any]]]) -> Optional[Keys]:
        """The searched keys with the best validation score on the first seed; None if no run of the row succeeded."""
        lines = [(run, line_of(run)) for run in self.trials(setting, row)]
        scored = [(line["best_valid_score"], run.searched, line) for run, line in lines if line and "error" not in line]
        if not scored:
            return None
        best = max if scored[0][2].get("valid_score_bigger", True) else min
        return best(scored, key=lambda item: item[0])[1]

    def all_runs(self) -> Iterator[Run]:
        """Every run that the plan may come to, whatever the search will choose."""
        for setting, seed, row in self.places():
            for run in self.trials(setting, row):
                yield self.run(setting, row, seed, run.searched)

    def places(self) -> Iterator[tuple]:
        """(setting, seed, row) in the order of the runs: those on the same data stand together."""
        yield from itertools.product(self.settings, self.seeds, self.rows)

    def configs(self) -> Iterator[Config]:
        """The configs of all runs of the first seed.

        Raises:
            ConfigError: one has keys that cannot be used.
        """
        for setting, row in itertools.product(self.settings, self.rows):
            for run in self.trials(setting, row):
                try:
                    yield Config(config_dict=run.keys)
                except DnrError as error:
                    raise type(error)(f"plan, row '{row}' in '{setting}': {error}") from None


def read_plan(path: str) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: it is missing, no YAML, or does not have the form of a plan.
    """
    content = read_yaml(path, "plan")
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(f"plan {path}: {where}: {first['msg']} (parts: {', '.join(Plan.model_fields)})") from None
