"""What stands behind the HTTP interface: models, the thread that scores, counters and records."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from fastapi import HTTPException
from starlette.concurrency import run_in_threadpool

from dnr_recbole.serving.admission import Admission
from dnr_recbole.serving.batching import Batcher, Scored, Stopping
from dnr_recbole.serving.constraints import constrained
from dnr_recbole.serving.models import Models
from dnr_recbole.serving.records import Records
from dnr_recbole.serving.schema import Answer, RankedItem, RankRequest
from dnr_recbole.serving.scoring import RankedRequest, check_values
from dnr_recbole.serving.watch import Watch


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        body: bytes of a body. body_seconds: until it has arrived.
        requests: of one body. candidates: of one request.
        seconds: until an answer. wait: behind others, from which on a body is refused at once.
    """

    body: int = 4 * 2**20
    body_seconds: float = 10.0
    requests: int = 256
    candidates: int = 2000
    seconds: float = 5.0
    wait: float = 0.05


class Server:
    """Models, the thread that scores, counters and records behind one application.

    Args:
        token: what clients have to send as bearer token; None = anybody may ask.
        watch_seconds: how often the artefacts are looked at for a newer version; 0 = only /reload does.
    """

    def __init__(
        self, models: Models, batcher: Batcher, limits: Optional[Limits] = None, token: Optional[str] = None,
        records: Optional[Records] = None, watch_seconds: float = 1.0,
    ):  # fmt: skip
        self.models, self.batcher, self.records = models, batcher, records
        self.limits, self.token, self.watch_seconds = limits or Limits(), token, watch_seconds
        self.watch, self.admission = Watch(), Admission(self.limits.wait)
        self.ready = True

    # ------------------------------------------------------------------ ranking

    async def rank(
        self, name: Optional[str], requests: List[RankRequest], explain: bool, path: Optional[List[Any]]
    ) -> List[Answer]:
        """Answers in the order of the requests.

        Args:
            name: of the model; None = the split of the traffic decides, by the user of each request.
            path: where the list of requests stands in the body, for messages; None = the body is the request.

        Raises:
            UnknownNameError: no such model. BadValue: a score that it cannot read. HTTPException: too much.
        """
        if len(requests) > self.limits.requests:
            raise _too_much(path or [], f"{len(requests)} requests in a body, at most {self.limits.requests} are taken")
        names = []
        for number, request in enumerate(requests):
            where = [] if path is None else [*path, number]
            if len(request.items) > self.limits.candidates:
                raise _too_much(where, f"{len(request.items)} candidates, at most {self.limits.candidates} are taken")
            user = None if request.user_id is None else str(request.user_id)
            names.append(name or self.models.choose(user))
            check_values(self.models.get(names[-1]).artefact, request, where)
        answers: List[Optional[Answer]] = [None] * len(requests)
        for model in dict.fromkeys(names):
            rows = [row for row, own in enumerate(names) if own == model]
            found = await self._scored(model, [requests[row] for row in rows], explain)
            for row, ranked in zip(rows, found.ranked):
                answers[row] = self._answer(found, requests[row], ranked)
        return answers  # type: ignore[return-value]

    async def _scored(self, model: str, requests: List[RankRequest], explain: bool) -> Scored:
        started = time.monotonic()
        try:
            found = await self.batcher.rank(model, requests, explain, self.limits.seconds)
        except Stopping:
            self.watch.rejected.labels("stopping").inc()
            raise HTTPException(503, "the server is stopping", headers={"Retry-After": "1"}) from None
        except (asyncio.TimeoutError, TimeoutError):
            self.watch.rejected.labels("timeout").inc()
            raise HTTPException(503, "no answer in time", headers={"Retry-After": "1"}) from None
        self.watch.seconds.labels(model).observe(time.monotonic() - started)
        self.watch.batch.observe(found.together)
        self.watch.requests.labels(model).inc(len(requests))
        self.watch.drift(found.served, requests)
        return found

    def _answer(self, found: Scored, request: RankRequest, ranked: RankedRequest) -> Answer:
        place = {int(number): row for row, number in enumerate(ranked.candidate)}
        items = []
        for rank, number in enumerate(constrained(request, [int(number) for number in ranked.candidate])):
            row = place[number]
            score = float(ranked.score[row])
            why = {name: int(ranks[number]) for name, ranks in ranked.ranks.items()}
            items.append(
                RankedItem(
                    item_id=request.items[number].item_id,
                    rank=rank,
                    score=None if math.isnan(score) else score,
                    incoming_rank=int(ranked.incoming[row]),
                    explanation={**why, "incoming": int(ranked.incoming[row])} if why else None,
                )
            )
        name = request.request_id if request.request_id is not None else uuid.uuid4().hex
        answer = Answer(request_id=name, model=found.served.name, version=found.served.version, items=items)
        if self.records is not None:
            self.records.answer(_recorded(request, answer))
        return answer

    # ------------------------------------------------------------------ reloading

    async def reload(self) -> Dict[str, str]:
        """Exchange the models that have changed on disk."""
        outcome = await run_in_threadpool(self.models.reload)
        for name, what in outcome.items():
            self.watch.reloads.labels(name, "failed" if what.startswith("failed") else "done").inc()
        return outcome

    async def watched(self) -> None:
        """Look for newer versions again and again."""
        known: Dict[str, str] = {}
        while self.watch_seconds > 0:
            await asyncio.sleep(self.watch_seconds)
            now = {name: _stamp(path) for name, path in self.models.paths.items()}
            if now != known:  # what failed to load is not tried again until it changes
                known = now
                await self.reload()


def _stamp(path: str) -> str:
    try:
        found = (Path(path) / "config.json").stat()
        return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"
    except OSError:
        return ""


def _recorded(request: RankRequest, answer: Answer) -> Dict[str, Any]:
    rank = {str(item.item_id): item.rank for item in answer.items}
    return {
        "request_id": answer.request_id, "user_id": request.user_id, "history": request.history,
        "model": answer.model, "version": answer.version,
        "items": [
            {"item_id": item.item_id, "rank": rank.get(str(item.item_id)), "values": item.given}
            for item in request.items
        ],
    }  # fmt: skip


def _too_much(path: List[Any], message: str) -> HTTPException:
    return HTTPException(413, [{"loc": ["body", *path], "msg": message}])
