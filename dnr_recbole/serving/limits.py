"""Bodies that are too large, too slow or too many end here, before anything is parsed."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from typing import Any, Awaitable, Callable, Dict, List, Optional

from starlette.routing import Match

from dnr_recbole.serving.admission import Admission
from dnr_recbole.serving.watch import Watch

_log = logging.getLogger("dnr_recbole.serving.access")

RANKING = "ranking"  # tag of the routes whose bodies wait for the model
_HELD = 64  # largest bodies in memory at once


class BodyLimits:
    """ASGI middleware: reads the whole body within the limits, counts answers, writes one line of JSON per answer.

    Args:
        limits: a server's :class:`~dnr_recbole.serving.server.Limits`.
        admission: what decides over bodies that are to be ranked.
    """

    def __init__(self, app: Any, limits: Any, watch: Watch, admission: Admission) -> None:
        self.app, self.limits, self.watch, self.admission = app, limits, watch, admission
        self._held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        try:
            body = await asyncio.wait_for(self._body(scope, receive, exchange), self.limits.body_seconds)
            await self._answer(body, scope, receive, exchange)
        except _Refused as refused:
            await exchange.refuse(refused)
        except (asyncio.TimeoutError, TimeoutError):
            await exchange.refuse(_Refused(408, f"the body did not arrive in {self.limits.body_seconds:g} s"))
        except _Gone:
            return
        except Exception:
            exchange.status = exchange.status or 500  # which is answered outside of this, and counts all the same
            raise
        finally:
            self._held -= exchange.size
            self._note(exchange)

    async def _answer(self, body: bytes, scope: Any, receive: Any, exchange: _Exchange) -> None:
        if RANKING not in (getattr(exchange.route, "tags", None) or ()):
            await self.app(scope, _replayed(body, receive), exchange.send)
            return
        place, started = self.admission.enter(len(body)), time.monotonic()
        if place is None:
            self.watch.rejected.labels("overload").inc()
            raise _Refused(503, "more waits than can be answered in time: come again", self.admission.wait)
        try:
            await self.app(scope, _replayed(body, receive), exchange.send)
        finally:
            waited = exchange.status in (200, 503)  # 503 = until the time was up; others are quick and tell nothing
            self.admission.leave(place, time.monotonic() - started if waited else None)

    def _note(self, exchange: _Exchange) -> None:
        if exchange.status is None:
            return
        self.watch.answers.labels(getattr(exchange.route, "path", "other"), str(exchange.status)).inc()
        if _log.isEnabledFor(logging.INFO):
            _log.info(json.dumps(exchange.line()))

    async def _body(self, scope: Any, receive: Any, exchange: _Exchange) -> bytes:
        """All bytes.

        Raises:
            _Refused: too many, or no number of them. _Gone: the client is.
        """
        most = self.limits.body
        for name, value in scope["headers"]:
            if name == b"content-length":
                if not value.isdigit():
                    raise _Refused(400, "content-length is no number")
                if len(value) > 20 or int(value) > most:
                    raise _Refused(413, f"the body is larger than {most} bytes")
        parts: List[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            exchange.size += len(parts[-1])
            self._held += len(parts[-1])
            if exchange.size > most:
                raise _Refused(413, f"the body is larger than {most} bytes")
            if self._held > _HELD * most:
                self.watch.rejected.labels("memory").inc()
                raise _Refused(503, "too many large bodies at once: come again", 1.0)
            if not message.get("more_body"):
                return b"".join(parts)


class _Refused(Exception):
    """What is answered in the place of the application; ``wait`` in seconds where it pays to come again."""

    def __init__(self, status: int, text: str, wait: Optional[float] = None):
        super().__init__(text)
        self.status, self.wait = status, wait


class _Gone(Exception):
    """The client has left."""


class _Exchange:
    """A body and its answer.

    Attributes:
        route: of the application; None = there is none of this path. size: bytes that have arrived. status: of the
            answer, once it has begun.
    """

    def __init__(self, scope: Dict[str, Any], send: Callable[[Dict[str, Any]], Awaitable[None]]):
        self._scope, self._send, self._started = scope, send, time.monotonic()
        self.size = 0
        self.status: Optional[int] = None
        self.route = _route(scope)

    async def send(self, message: Dict[str, Any]) -> None:
        """Pass on a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, refused: _Refused) -> None:
        """Answer at once. The connection ends where the rest of the body would still come."""
        content = json.dumps({"detail": str(refused)}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if refused.wait is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(refused.wait))).encode()))
        else:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})

    def line(self) -> Dict[str, Any]:
        """For the access log."""
        milliseconds = round(1000 * (time.monotonic() - self._started), 2)
        return {"path": self._scope["path"][:200], "method": self._scope["method"], "status": self.status,
                "ms": milliseconds}  # fmt: skip


def _route(scope: Dict[str, Any]) -> Any:
    """The application's route of a path, before the application is asked."""
    found = None
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match == Match.FULL:
            return route
        if match == Match.PARTIAL and found is None:  # the path, by another method
            found = route
    return found


def _replayed(body: bytes, receive: Any) -> Callable[[], Awaitable[Any]]:
    sent: List[bool] = []

    async def again() -> Any:
        if sent:
            return await receive()
        sent.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    return again
