"""Bodies that are too large or too slow end here, before anything is parsed."""

from __future__ import annotations

import asyncio
import json
import logging
import time

_log = logging.getLogger("dnr_recbole.serving.access")


class BodyLimits:
    """ASGI middleware: reads the whole body within the limits, counts answers, writes one line of JSON per answer."""

    def __init__(self, app, limits, watch):
        self.app, self.limits, self.watch = app, limits, watch

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, answered = time.monotonic(), []

        async def noted(message):
            if message["type"] == "http.response.start":
                answered.append(message["status"])
            await send(message)

        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.limits.body_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            await _refuse(noted, 408, f"the body did not arrive in {self.limits.body_seconds:g} s")
        else:
            if body is None:
                await _refuse(noted, 413, f"the body is larger than {self.limits.body} bytes")
            elif body is not _GONE:
                await self.app(scope, _replayed(body, receive), noted)
        if not answered:
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"
        self.watch.answers.labels(path, str(answered[0])).inc()
        if _log.isEnabledFor(logging.INFO):
            milliseconds = round(1000 * (time.monotonic() - started), 2)
            line = {"path": scope["path"][:200], "method": scope["method"], "status": answered[0], "ms": milliseconds}
            _log.info(json.dumps(line))

    async def _body(self, scope, receive):
        """The bytes; None = too large; ``_GONE`` = the client is."""
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value) > self.limits.body):
                return None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _GONE
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.body:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


_GONE = object()
_PATHS = {
    "/rank",
    "/feedback",
    "/health",
    "/health/ready",
    "/health/live",
    "/metrics",
    "/reload",
    "/models",
    "/",
    "/docs",
}


def _replayed(body: bytes, receive):
    sent = []

    async def again():
        if sent:
            return await receive()
        sent.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send, status: int, text: str) -> None:
    content = json.dumps({"detail": text}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
