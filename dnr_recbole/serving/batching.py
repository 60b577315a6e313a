"""One thread scores what waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Callable, Deque, List, Optional, Sequence, Tuple, Union

from dnr_recbole.serving.models import Models, ServedModel
from dnr_recbole.serving.schema import RankRequest
from dnr_recbole.serving.scoring import RankedRequest, rank

Rank = Callable[[ServedModel, Sequence[RankRequest], bool], List[RankedRequest]]


class Stopping(Exception):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Scored:
    """Answers, the version of the model that gave all of them, and how many requests were scored together."""

    served: ServedModel
    ranked: List[RankedRequest]
    together: int


Outcome = Union[Scored, BaseException]


@dataclass
class _Job:
    model: str
    requests: List[RankRequest]
    explain: bool
    deadline: float  # time.monotonic()
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future


def _rank(served: ServedModel, requests: Sequence[RankRequest], explain: bool) -> List[RankedRequest]:
    return rank(served.artefact, requests, explain=explain)


class Batcher:
    """Requests that wait are scored together, those of one model at a time, in the order in which they came.

    Args:
        models: whose current version is asked for once per batch, so that a batch has one version.
        max_batch: requests that are scored together at most (one job of more is scored alone).
        rank: how a batch is scored (the runtime).
    """

    def __init__(self, models: Models, max_batch: int = 32, rank: Rank = _rank):
        self.models, self.max_batch, self._rank = models, max_batch, rank
        self._jobs: Deque[_Job] = deque()
        self._waiting = 0  # requests
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait or are being scored."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether the thread that scores is there."""
        return self._thread.is_alive()

    async def rank(self, model: str, requests: List[RankRequest], explain: bool, timeout: float) -> Scored:
        """Raises:
        Stopping: nothing was done; TimeoutError: not in ``timeout`` seconds.
        """
        loop = asyncio.get_running_loop()
        job = _Job(model, requests, explain, time.monotonic() + timeout, loop, loop.create_future())
        with self._changed:
            if self._stopping:
                raise Stopping
            self._jobs.append(job)
            self._waiting += len(requests)
            self._changed.notify()
        return await asyncio.wait_for(job.future, timeout)

    def stop(self) -> None:
        """Finish what waits, then end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # ------------------------------------------------------------------ the thread

    def _work(self) -> None:
        while True:
            jobs = self._next()
            if jobs is None:
                return
            now, count = time.monotonic(), sum(len(job.requests) for job in jobs)
            live = [job for job in jobs if not job.future.cancelled() and job.deadline > now]
            tellings = self._answers(live) if live else []
            with self._changed:  # before anybody is told: who asks again at once must not find himself waiting
                self._waiting -= count
            for job, outcome in tellings:
                _tell(job, outcome)

    def _next(self) -> Optional[List[_Job]]:
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return None
                self._changed.wait()
            first = self._jobs.popleft()
            later: Deque[_Job] = deque()
            jobs, count = [first], len(first.requests)
            while self._jobs and count < self.max_batch:
                job = self._jobs.popleft()
                fits = count + len(job.requests) <= self.max_batch
                if (job.model, job.explain) == (first.model, first.explain) and fits:
                    jobs.append(job)
                    count += len(job.requests)
                else:
                    later.append(job)
            self._jobs.extendleft(reversed(later))
            return jobs

    def _answers(self, jobs: List[_Job]) -> List[Tuple[_Job, Outcome]]:
        requests = [request for job in jobs for request in job.requests]
        try:
            served = self.models.get(jobs[0].model)
            ranked = iter(self._rank(served, requests, jobs[0].explain))
        except BaseException as error:  # whatever a model raises belongs to those who asked, and the thread lives on
            if len(jobs) == 1:
                return [(jobs[0], error)]
            return [telling for job in jobs for telling in self._answers([job])]  # to whom, each alone will show
        return [(job, Scored(served, list(islice(ranked, len(job.requests))), len(requests))) for job in jobs]


def _tell(job: _Job, outcome: Outcome) -> None:
    def tell() -> None:
        if job.future.done():
            return
        if isinstance(outcome, Scored):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)

    try:
        job.loop.call_soon_threadsafe(tell)
    except RuntimeError:  # the loop is closed: nobody waits any more
        pass
