"""The HTTP interface."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import asynccontextmanager
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, List, Sequence

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from dnr_recbole._version import __version__
from dnr_recbole.errors import DnrError, UnknownNameError
from dnr_recbole.serving.limits import RANKING, BodyLimits
from dnr_recbole.serving.pages import interface, json_value, page
from dnr_recbole.serving.schema import (
    Answers,
    Feedback,
    Health,
    MetarankAnswer,
    MetarankBody,
    RankBody,
    RankRequest,
    Refusal,
)
from dnr_recbole.serving.scoring import BadValue
from dnr_recbole.serving.server import Server


def make_app(server: Server) -> FastAPI:
    """The application of a server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(server.watched())
        yield
        server.ready = False
        watching.cancel()
        await run_in_threadpool(server.batcher.stop)
        if server.records is not None:
            await run_in_threadpool(server.records.close)

    app = FastAPI(title="dnr_recbole", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimits, limits=server.limits, watch=server.watch, admission=server.admission)
    _errors(app)
    allowed = [Depends(_authorised(server.token))] if server.token else []
    _add_ranking(app, server, allowed)
    _add_operation(app, server, allowed)
    _add_pages(app, server, allowed)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _named(error.errors())}, 422)

    @app.exception_handler(UnknownNameError)
    async def unknown(_: Request, error: UnknownNameError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    @app.exception_handler(BadValue)
    async def unreadable(_: Request, error: BadValue) -> JSONResponse:
        return JSONResponse({"detail": [{"loc": ["body", *error.path], "msg": str(error)}]}, 422)

    @app.exception_handler(DnrError)
    async def expected(_: Request, error: DnrError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)


def _named(errors: Sequence[Any], where: Sequence[str] = ()) -> List[Dict[str, Any]]:
    """pydantic's errors: field and message. What was sent is not sent back: JSON cannot hold all numbers."""
    return [{"loc": [_shown(part) for part in (*where, *one["loc"])], "msg": _shown(one["msg"])} for one in errors[:20]]


def _shown(part: Any) -> Any:
    """A part of a path, or a message, that can be sent: names of fields are the client's, of any length and content."""
    return part if isinstance(part, int) else str(part)[:500].encode("utf-8", "replace").decode()


def _authorised(token: str) -> Callable[[Request], Awaitable[None]]:
    wanted = token.encode()

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are read as latin-1, whatever they are: these are the bytes that came.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), wanted):
            raise HTTPException(401, "a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})

    return check


_REFUSED = {
    400: "the body is no JSON", 401: "no or a wrong token", 404: "there is no such model, or nothing is recorded",
    408: "the body did not arrive in time", 413: "too large", 422: "a field is wrong: its path and what is wanted",
    503: "too much waits: come again after Retry-After",
}  # fmt: skip


def _refused(*statuses: int) -> Dict[Any, Dict[str, Any]]:
    """What an operation may answer beside its result, for the OpenAPI document."""
    return {status: {"model": Refusal, "description": _REFUSED[status]} for status in statuses}


_OF_BODIES = (400, 401, 404, 408, 413, 422, 503)


def _add_ranking(app: FastAPI, server: Server, allowed: list) -> None:
    about: Dict[str, Any] = {"dependencies": allowed, "responses": _refused(*_OF_BODIES), "tags": [RANKING]}

    @app.post("/rank", response_model=Answers, **about)
    async def rank(body: RankBody, explain: bool = Query(False)) -> Any:
        """Rank one request or many; each answer names the model and the version that gave it."""
        answers = Answers(answers=await server.rank(body.model, body.requests, explain, ["requests"]))
        hidden = None if explain else {"answers": {"__all__": {"items": {"__all__": {"explanation"}}}}}
        return Response(answers.model_dump_json(exclude=hidden), media_type="application/json")

    @app.post("/rank/{model}", response_model=MetarankAnswer, **about)
    async def rank_metarank(model: str, body: MetarankBody, explain: bool = Query(False)) -> Any:
        """metarank's ranking event → its answer: items by descending score."""
        started = time.monotonic()
        scores = server.models.get(model).artefact.preprocessor.columns.scores
        try:
            request = RankRequest.model_validate(body.request(scores))
        except ValidationError as error:
            raise HTTPException(422, _named(error.errors(), ["body"])) from None
        (answer,) = await server.rank(model, [request], explain, None)
        items = [{"item": item.item_id, "score": item.score} for item in answer.items]
        return {"took": round(1000 * (time.monotonic() - started)), "state": None, "items": items}

    @app.post("/feedback", dependencies=allowed, responses=_refused(*_OF_BODIES))
    async def feedback(body: Feedback) -> Dict[str, str]:
        """What a user did with an answer; acknowledged when it is on the disk."""
        if server.records is None:
            raise HTTPException(404, "this server records nothing: start it with --record=FOLDER")
        try:
            await server.records.feedback(body.model_dump())
        except OSError as error:
            raise HTTPException(503, f"cannot be kept: {error.strerror}", headers={"Retry-After": "5"}) from None
        server.watch.feedback.inc()
        return {"kept": str(body.request_id)}


def _add_operation(app: FastAPI, server: Server, allowed: list) -> None:
    guarded: Dict[str, Any] = {"dependencies": allowed, "responses": _refused(401)}

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "not ready"}})
    @app.get("/health/ready", response_model=Health, responses={503: {"model": Health, "description": "not ready"}})
    async def ready() -> Response:
        """Whether requests are answered; 503 while the server starts or stops."""
        good = server.ready and server.batcher.alive
        found = {name: server.models.get(name).version for name in server.models.names}
        return JSONResponse({"ready": good, "models": found}, 200 if good else 503)

    @app.get("/health/live")
    async def live() -> Dict[str, bool]:
        """Whether the process is there."""
        return {"live": True}

    @app.get("/metrics", response_class=PlainTextResponse, **guarded)
    async def metrics() -> Response:
        """Prometheus' text form."""
        server.watch.waiting.set(server.batcher.waiting)
        server.watch.unrecorded.set(0 if server.records is None else server.records.dropped)
        return Response(server.watch.text(), media_type="text/plain; version=0.0.4")

    @app.post("/reload", **guarded)
    async def reload() -> Dict[str, str]:
        """Look for newer versions now; model → what happened, nothing where nothing changed."""
        return await server.reload()

    @app.get("/models", **guarded)
    async def models() -> List[Dict[str, Any]]:
        """What is served."""
        return [_described(server, name) for name in server.models.names]


def _described(server: Server, name: str) -> Dict[str, Any]:
    served = server.models.get(name)
    preprocessor = served.artefact.preprocessor
    return {
        "name": name, "version": served.version, "reranker": type(served.artefact.model).__name__,
        "scores": preprocessor.columns.scores, "features": preprocessor.columns.features,
        "n_candidates": preprocessor.n_candidates, "items": len(preprocessor.items.ids),
        "runtime": server.models.runtime,
        "test": {name: json_value(value) for name, value in (served.artefact.metrics.get("test") or {}).items()},
    }  # fmt: skip


def _add_pages(app: FastAPI, server: Server, allowed: list) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def home() -> str:
        return page()

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return interface(app.openapi())

    @app.get("/samples/{model}", dependencies=allowed, responses=_refused(401, 404, 422))
    async def samples(model: str) -> List[Dict[str, Any]]:
        """Held-out requests of the artefact in the form that /rank reads; none if it was saved without users."""
        return server.models.get(model).samples
