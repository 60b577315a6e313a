"""What is taken when more comes than can be answered in time; decided by counts and given seconds, no clock."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from dnr_recbole.serving.admission import Admission
from dnr_recbole.serving.limits import RANKING, BodyLimits
from dnr_recbole.serving.server import Limits
from dnr_recbole.serving.watch import Watch

SIZE = 2500  # bytes of a body


def simulated(rate: float, per_body: float, budget: float = 0.05, seconds: float = 20.0):
    """A server that does one body after another, ``per_body`` seconds each; -> waits of accepted ones, refused ones."""
    admission, running, waits, refused, free = Admission(budget), deque(), [], 0, 0.0
    for number in range(int(rate * seconds)):
        now = number / rate
        while running and running[0][1] <= now:
            place, end, came = running.popleft()
            admission.leave(place, end - came)
        place = admission.enter(SIZE)
        if place is None:
            refused += 1
            continue
        waits.append(max(free - now, 0.0))
        free = max(free, now) + per_body
        running.append((place, free, now))
    return waits, refused


def test_below_capacity_nothing_is_refused():
    for per_body in (0.0005, 0.002, 0.02):
        waits, refused = simulated(0.9 / per_body, per_body)
        assert refused == 0 and max(waits) < 0.001


@pytest.mark.parametrize("load", [1.2, 2, 10])
@pytest.mark.parametrize("per_body", [0.0005, 0.002, 0.01])
def test_above_capacity_what_is_taken_waits_no_longer_than_the_budget(load, per_body):
    waits, refused = simulated(load / per_body, per_body)
    late = waits[len(waits) // 10 :]  # by then it knows how long a body takes
    assert max(late) <= 0.05 + 2 * per_body
    assert len(waits) * per_body > 0.95 * 20, "it is busy all the time"
    assert refused / (refused + len(waits)) == pytest.approx(1 - 1 / load, abs=0.05)


def test_a_body_that_finds_nothing_in_work_is_always_taken():
    admission = Admission(0.0)
    for _ in range(100):
        place = admission.enter(10**9)
        assert place is not None and admission.enter(1) is None
        admission.leave(place, 60.0)
        assert admission.wait == 0


def test_it_recovers_from_slow_times():
    admission = Admission(0.05)
    for _ in range(100):
        places = [admission.enter(SIZE), admission.enter(SIZE)]
        for place in places:
            if place is not None:
                admission.leave(place, 3.0)
    for turn in range(200):  # one at a time is taken now, and each of them says that things are better
        first, second = admission.enter(SIZE), admission.enter(SIZE)
        assert turn or second is None
        admission.leave(first, 0.001)
        if second is not None:
            break
    assert second is not None


def test_what_is_not_answered_gives_its_place_back():
    admission = Admission(0.05)
    places = [admission.enter(SIZE) for _ in range(5)]
    for place in places:
        admission.leave(place, None)
    assert admission.wait == 0


# ------------------------------------------------------------------ in the application


def application(limits=None, budget=0.05):
    app = FastAPI()
    gate = SimpleNamespace(open=asyncio.Event(), inside=0)

    @app.post("/slow/{name}", tags=[RANKING])
    async def slow(name: str):
        gate.inside += 1
        await gate.open.wait()
        return JSONResponse({"name": name})

    @app.get("/quick")
    async def quick():
        return {}

    watch = Watch()
    guarded = BodyLimits(app, limits or Limits(), watch, Admission(budget))

    async def with_app(scope, receive, send):
        await guarded({**scope, "app": app}, receive, send)

    return with_app, gate, watch


async def ask(app, method, path, content=b"", headers=(), parts=None):
    """(status, headers, body) of one exchange."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts or [content]]
    messages[-1]["more_body"] = False
    sent = []

    async def receive():
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": list(headers), "root_path": "", "scheme": "http", "http_version": "1.1"}  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def counted(watch) -> dict:
    lines = (
        line
        for line in watch.text().decode().splitlines()
        if line.startswith(("dnr_answers_total", "dnr_rejected_total"))
    )
    return {line.rsplit(" ", 1)[0].split("{", 1)[1]: float(line.rsplit(" ", 1)[1]) for line in lines if "{" in line}


def test_too_much_is_refused_before_it_is_parsed_and_other_paths_are_answered():
    async def scenario():
        app, gate, watch = application(budget=0.05)
        body = b"x" * 60_000  # 30 ms by the first guess
        tasks = [asyncio.create_task(ask(app, "POST", "/slow/a", body)) for _ in range(4)]
        while gate.inside < 2:
            await asyncio.sleep(0)
        status, headers, content = await ask(app, "POST", "/slow/a", body)
        assert status == 503 and int(headers[b"retry-after"]) >= 1 and "come again" in json.loads(content)["detail"]
        assert (await ask(app, "GET", "/quick"))[0] == 200
        gate.open.set()
        answers = sorted(status for status, _, _ in await asyncio.gather(*tasks))
        assert answers == [200, 200, 503, 503] and gate.inside == 2
        assert (await ask(app, "POST", "/slow/a", body))[0] == 200
        assert counted(watch)['why="overload"}'] == 3

    asyncio.run(scenario())


def test_answers_are_counted_by_the_routes_of_the_application():
    async def scenario():
        app, gate, watch = application()
        gate.open.set()
        for method, path in (("POST", "/slow/a"), ("POST", "/slow/b"), ("GET", "/slow/c"), ("GET", "/quick"),
                             ("GET", "/nothing"), ("GET", "/slow/a/b"), ("POST", "/" + "x" * 5000)):  # fmt: skip
            await ask(app, method, path)
        assert counted(watch) == {
            'path="/slow/{name}",status="200"}': 2, 'path="/slow/{name}",status="405"}': 1,
            'path="/quick",status="200"}': 1, 'path="other",status="404"}': 3,
        }  # fmt: skip

    asyncio.run(scenario())


def test_many_large_bodies_do_not_fill_the_memory():
    async def scenario():
        app, gate, watch = application(Limits(body=100))
        pieces = [asyncio.create_task(ask(app, "POST", "/slow/a", b"x" * 100)) for _ in range(200)]
        while len([task for task in pieces if task.done()]) < 136:
            await asyncio.sleep(0)
        gate.open.set()
        statuses = [status for status, _, _ in await asyncio.gather(*pieces)]
        assert statuses.count(200) == 64 and statuses.count(503) == 136
        assert (await ask(app, "POST", "/slow/a", b"x"))[0] == 200, "they have been let go"
        assert counted(watch)['why="memory"}'] == 136

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "value, status",
    [(b"abc", 400), (b"-1", 400), (b"101", 413), (b"9" * 5000, 413), ("²".encode("latin-1"), 400), (b"3", 200)],
)
def test_content_lengths(value, status):
    async def scenario():
        app, gate, _ = application(Limits(body=100))
        gate.open.set()
        found, _, _ = await ask(app, "POST", "/slow/a", b"abc", [(b"content-length", value)])
        assert found == status

    asyncio.run(scenario())
