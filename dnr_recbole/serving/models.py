"""The models that are served: loaded, warmed up, exchanged as a whole, chosen per request."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from dnr_recbole.artefact import Artefact, load_artefact
from dnr_recbole.errors import CheckpointError, ConfigError, DnrError, UnknownNameError
from dnr_recbole.export.onnx_file import export_artefact
from dnr_recbole.export.runtime import OnnxScorer
from dnr_recbole.serving.pages import sample_requests
from dnr_recbole.serving.schema import RankRequest
from dnr_recbole.serving.scoring import rank

_WARM_UP = (1, 8)  # requests at a time
_LONGEST = 2000  # candidates of these


@dataclass(frozen=True)
class ServedModel:
    """One version of a model.

    Attributes:
        version: 12 digits of the digest of the artefact's ``config.json``, which holds the checksums of all others.
        usual: score → mean and standard deviation of its raw values in the artefact's sample.
        samples: of :func:`~dnr_recbole.serving.pages.sample_requests`.
    """

    name: str
    version: str
    artefact: Artefact
    usual: Dict[str, Tuple[float, float]]
    samples: List[Dict[str, Any]]

    @classmethod
    def load(cls, name: str, path: str, runtime: str = "torch") -> ServedModel:
        """Read the artefact and rank with it before anybody asks.

        Args:
            runtime: "torch", or "onnx" for onnxruntime.

        Raises:
            CheckpointError: it is missing, damaged, changed while it was read, or ranks nothing.
            DnrError: the model cannot be exported.
        """
        version = version_of(path)
        artefact = load_artefact(path)
        if runtime == "onnx":
            artefact.scorer = OnnxScorer(export_artefact(artefact).content)
        if version_of(path) != version:
            raise DnrError(f"'{path}' changed while it was read")
        try:
            served = cls(name, version, artefact, _usual(artefact), sample_requests(artefact))
            for size in _WARM_UP:
                ranked = rank(artefact, [served.invented_request()] * size)
        except DnrError:
            raise
        except Exception as error:  # an artefact whose parts do not fit each other, whatever that makes them raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"'{path}' cannot rank: {reason}") from error
        if not np.isfinite(ranked[0].score).all():
            raise CheckpointError(f"'{path}' cannot rank: its model's scores are no numbers")
        return served

    def invented_request(self) -> RankRequest:
        """A request as long as the model reads (or :data:`_LONGEST`), of known items where it knows as many."""
        preprocessor = self.artefact.preprocessor
        n = min(preprocessor.n_candidates, _LONGEST)
        known = preprocessor.items.ids.list()[:n]
        ids = [*known, *(f"warm-up {number}" for number in range(n - len(known)))]
        items = [
            {"item_id": item, **{score: place / n for score in preprocessor.columns.scores}}
            for place, item in enumerate(ids)
        ]
        return RankRequest.model_validate({"items": items})


def _usual(artefact: Artefact) -> Dict[str, Tuple[float, float]]:
    out = {}
    for score in artefact.preprocessor.columns.scores:
        if artefact.sample is not None and score in artefact.sample:
            values = artefact.sample[score].astype(float)
            out[score] = float(values.mean()), float(values.std())
    return out


def version_of(path: str) -> str:
    """The version that stands there now.

    Raises:
        DnrError: there is none.
    """
    try:
        return hashlib.sha256((Path(path) / "config.json").read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise DnrError(f"no artefact at '{path}': {error.strerror}") from error


class Models:
    """Models by name; :meth:`get` never waits for a reload.

    Args:
        paths: name → directory of the artefact.
        shares: name → share of the traffic; the rest, or all, goes to the first model.
        runtime: "torch" or "onnx".
    """

    def __init__(self, paths: Dict[str, str], shares: Optional[Dict[str, float]] = None, runtime: str = "torch"):
        self.paths, self.shares, self.runtime = paths, dict(shares or {}), runtime
        for name, share in self.shares.items():
            if name not in paths:
                raise ConfigError(f"--split {name}: no such model; there are {', '.join(paths)}")
            if not 0 <= share <= 1:
                raise ConfigError(f"--split {name}={share}: must lie in [0, 1]")
        if sum(self.shares.values()) > 1 + 1e-9:
            raise ConfigError(f"--split: shares add up to {sum(self.shares.values())}, more than 1")
        self._served = {name: ServedModel.load(name, path, runtime) for name, path in paths.items()}
        self._reloading = threading.Lock()

    @property
    def names(self) -> List[str]:
        """All names, the default first."""
        return list(self.paths)

    def get(self, name: str) -> ServedModel:
        """The version that is served now.

        Raises:
            UnknownNameError: there is no such model.
        """
        try:
            return self._served[name]
        except KeyError:
            raise UnknownNameError(f"no model '{name[:100]}': there are {', '.join(self.names)}") from None

    def choose(self, user: Optional[str]) -> str:
        """The model of a user: always the same as long as the shares are (A/B); strangers get the default."""
        if not self.shares or user is None:
            return self.names[0]
        place = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") / 2**64
        edges = np.cumsum(list(self.shares.values()))
        number = int(np.searchsorted(edges, place, side="right"))
        return list(self.shares)[number] if number < len(self.shares) else self.names[0]

    def reload(self) -> Dict[str, str]:
        """Load what has changed on disk beside what is served, then exchange it; name → what happened."""
        out = {}
        with self._reloading:
            for name, path in self.paths.items():
                try:
                    if version_of(path) == self._served[name].version:
                        continue
                    fresh = ServedModel.load(name, path, self.runtime)
                except Exception as error:  # whatever a new version makes anybody raise, the old one goes on
                    why = (str(error).splitlines() or [type(error).__name__])[0]
                    out[name] = f"failed: {why}"
                    getLogger(__name__).warning(json.dumps({"event": "reload failed", "model": name, "why": why}))
                    continue
                old, self._served[name] = self._served[name], fresh
                out[name] = f"{old.version} -> {fresh.version}"
                getLogger(__name__).info(
                    json.dumps({"event": "reloaded", "model": name, "from": old.version, "to": fresh.version})
                )
        return out


def named_paths(arguments: List[str]) -> Dict[str, str]:
    """``NAME=DIRECTORY`` or ``DIRECTORY``, whose last part is then the name.

    Raises:
        ConfigError: a name comes twice, or is not one.
    """
    out: Dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator:
            name, path = os.path.basename(os.path.abspath(argument)), argument
        if not name or not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
            raise ConfigError(f"'{name}' is no name of a model: letters, digits, and _ - . inside")
        if name in out:
            raise ConfigError(f"two models are called '{name}': give NAME=DIRECTORY")
        out[name] = path
    return out
