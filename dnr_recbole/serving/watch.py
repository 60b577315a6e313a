"""What the server says about itself: Prometheus metrics, and how far requests have drifted from the training."""

from __future__ import annotations

from typing import Any, Dict, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dnr_recbole.serving.models import ServedModel
from dnr_recbole.serving.schema import RankRequest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SMOOTH = 0.01  # weight of a request in the running means


class Watch:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: Dict[str, Any] = {"registry": self.registry}
        self.seconds = Histogram(
            "dnr_rank_seconds", "from the checked body to the answer", ["model"], buckets=_SECONDS, **given
        )
        self.answers = Counter("dnr_answers", "HTTP answers", ["path", "status"], **given)
        self.requests = Counter("dnr_requests", "ranked requests", ["model"], **given)
        self.rejected = Counter("dnr_rejected", "bodies that were refused with 503", ["why"], **given)
        self.batch = Histogram(
            "dnr_batch_requests", "requests scored together", buckets=(1, 2, 4, 8, 16, 32, 64), **given
        )
        self.waiting = Gauge("dnr_waiting", "requests that wait or are being scored", **given)
        self.reloads = Counter("dnr_reloads", "exchanges of a model", ["model", "outcome"], **given)
        self.unknown = Gauge(
            "dnr_unknown_share",
            "share of items and users that the model does not know, smoothed",
            ["model", "what"],
            **given,
        )
        self.shift = Gauge(
            "dnr_score_shift", "mean score against the training's, in its deviations, smoothed", ["model", "score"],
            **given,
        )  # fmt: skip
        self.feedback = Counter("dnr_feedback", "messages of /feedback", **given)
        self.unrecorded = Gauge("dnr_unrecorded_answers", "answers that --record had to leave out", **given)
        self._means: Dict[tuple, float] = {}

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self.registry)

    def drift(self, served: ServedModel, requests: Sequence[RankRequest]) -> None:
        """Take note of the ids and scores of requests."""
        name, preprocessor = served.name, served.artefact.preprocessor
        for request in requests:
            items = [str(item.item_id) for item in request.items]
            self._follow("unknown", name, "items", float((preprocessor.items.ids.find(items) < 0).mean()))
            if request.user_id is not None:
                found = preprocessor.users.ids.find([str(request.user_id)])[0]
                self._follow("unknown", name, "users", float(found < 0))
            for score, (mean, spread) in served.usual.items():
                values = [value for item in request.items if (value := item.score(score)) is not None]
                if values and spread > 0:
                    self._follow("shift", name, score, (sum(values) / len(values) - mean) / spread)

    def _follow(self, gauge: str, model: str, what: str, value: float) -> None:
        key = (gauge, model, what)
        self._means[key] = self._means.get(key, value) + _SMOOTH * (value - self._means.get(key, value))
        getattr(self, gauge).labels(model, what).set(self._means[key])
