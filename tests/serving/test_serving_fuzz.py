"""Input that no client should send: it is refused with the path of the field, and the next good request is answered."""

from __future__ import annotations

import copy
import json
import socket

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks
from serving_helpers import FAST, rich, serving

from dnr_recbole import Reranker

FEATURES = ["price", "device", "embedding", "tags", "category"]
ITEMS = [
    {"item_id": f"i{n}", "score": 0.1 * n, "score_2": None, "price": 0.5, "device": "web", "embedding": [0.1, 0.2, 0.3],
     "tags": ["x"], "category": "a"}
    for n in range(3)
]  # fmt: skip
RANK = {
    "requests": [
        {"request_id": "r", "user_id": "u1", "history": ["i4", "i5"], "items": ITEMS, "k": 2, "exclude": ["i9"],
         "pins": {"i2": 0}, "at_most": 2}
    ],
    "model": "rich.v2",
}  # fmt: skip
METARANK = {
    "event": "ranking", "id": "e1", "user": "u1", "session": "s", "timestamp": "1599391467000",
    "fields": [{"name": "price", "value": 0.5}],
    "items": [{"id": f"i{n}", "relevancy": 0.5, "fields": [{"name": "device", "value": "web"}]} for n in range(2)],
}  # fmt: skip
FEEDBACK = {"request_id": "r", "clicked": ["i1"], "exposed": ["i1", "i2"]}
BODIES = {"/rank": RANK, "/rank?explain=true": RANK, "/rank/rich.v2": METARANK, "/feedback": FEEDBACK}
REFUSED = {400, 404, 413, 422}
TYPE = {"content-type": "application/json"}
FUZZ = settings(
    derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    keys = {**FAST, "log_features": FEATURES, "score_calibration": "logistic"}
    Reranker("PRM", **keys).fit(rich(150)).save(folder / "rich")
    with serving(f"rich.v2={folder / 'rich'}", f"--record={folder / 'rec'}", "--max_candidates=50") as found:
        yield found


def well(running) -> None:
    """A good request is answered, and nothing that was not expected has happened."""
    answer = running.client.post("/rank", json=RANK)
    assert answer.status_code == 200, answer.text
    assert not [line for line in running.said if "Traceback" in line], "\n".join(running.said)


# ------------------------------------------------------------------ what the OpenAPI document says


CHECKS = [
    checks.not_a_server_error, openapi_checks.status_code_conformance, openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance, openapi_checks.response_headers_conformance,
    openapi_checks.negative_data_rejection, openapi_checks.unsupported_method,
]  # fmt: skip
# Of what is wrong, the longest is refused for its size before it is read.
WRONG = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": ["400", "401", "404", "413", "422"]}}}
)
OPERATIONS = [
    "POST /rank", "POST /rank/{model}", "POST /feedback", "GET /health", "GET /health/ready", "GET /health/live",
    "GET /metrics", "POST /reload", "GET /models", "GET /samples/{model}",
]  # fmt: skip


@pytest.fixture(scope="module")
def document(running):
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json", config=WRONG)


def test_every_operation_is_tried(document):
    found = [f"{method.upper()} {path}" for path, methods in document.raw_schema["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_are_those_of_the_document(document, running, operation, mode):
    method, path = operation.split()
    if mode == GenerationMode.NEGATIVE and "requestBody" not in document.raw_schema["paths"][path][method.lower()]:
        pytest.skip("every text is a name of a model, and nothing else can be wrong")

    @settings(parent=FUZZ, max_examples=25)
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def tried(case):
        case.call_and_validate(checks=CHECKS, timeout=30)

    tried()
    well(running)


# ------------------------------------------------------------------ every field


def places(content, path=()):
    """The path of every field and every first element."""
    if path:
        yield path
    if isinstance(content, dict):
        for name, value in content.items():
            yield from places(value, (*path, name))
    elif isinstance(content, list) and content:
        yield from places(content[0], (*path, 0))


ODD = [
    "", " ", "\0", "\x1b[31m", "\u202e", "\ud800", "\U0001f600" * 40, "NaN", "null", "1e999", "../../etc/passwd", "%00",
    "9" * 400, "x" * 5000, "' OR 1=1", "${jndi:x}", 10**19, -(10**19), 10**400, 2**63, 2**53 + 1, 1e308, -1e308, -0.0,
    5e-324, float("nan"), float("inf"), [], {}, [[]], [None], {"": None}, ["i1"] * 20_000,
    {str(n): n for n in range(5000)},
]  # fmt: skip
anything = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=20)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    ),
)


@st.composite
def altered(draw, content):
    """``content`` with one field replaced, removed, doubled, or beside one of another name; the path of that field."""
    content = copy.deepcopy(content)
    path = draw(st.sampled_from(list(places(content))))
    holder = content
    for part in path[:-1]:
        holder = holder[part]
    what = draw(st.sampled_from(["other", "other", "other", "gone", "twice", "beside", "name"]))
    if what == "gone":
        del holder[path[-1]]
    elif what == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[0]))
    elif what == "beside" and isinstance(holder, dict):
        holder[draw(st.text(st.characters(), max_size=8))] = draw(anything)
    elif what == "name" and isinstance(holder, dict):
        holder[draw(st.text(st.characters(), max_size=8))] = holder.pop(path[-1])
    else:
        holder[path[-1]] = draw(anything)
    return path, content


@pytest.mark.parametrize("url", BODIES)
@FUZZ
@given(data=st.data())
def test_every_field_may_be_anything(running, url, data):
    path, content = data.draw(altered(BODIES[url]))
    answer = running.client.post(url, content=json.dumps(content).encode(), headers=TYPE)
    assert answer.status_code == 200 or answer.status_code in REFUSED, answer.text
    detail = answer.json().get("detail")
    if answer.status_code == 422:
        assert detail
        for one in detail:
            where = [str(part) for part in one["loc"]]
            common = [*map(str, path[:-1])][: len(where) - 1]
            assert where[0] == "body" and where[1 : 1 + len(common)] == common and one["msg"], (path, one)
    else:
        assert answer.status_code == 200 or detail
    well(running)


@FUZZ
@given(content=anything, url=st.sampled_from(list(BODIES)))
def test_a_whole_body_may_be_anything(running, content, url):
    answer = running.client.post(url, content=json.dumps(content).encode(), headers=TYPE)
    assert answer.status_code in REFUSED and answer.json()["detail"]
    well(running)


@FUZZ
@given(content=st.one_of(st.binary(max_size=200), st.data()), url=st.sampled_from(list(BODIES)))
def test_bytes_that_are_no_json(running, content, url):
    if not isinstance(content, bytes):  # a good body that is cut, or has a byte changed
        whole = bytearray(json.dumps(BODIES[url]).encode())
        at = content.draw(st.integers(0, len(whole) - 1))
        if content.draw(st.booleans()):
            whole[at] = content.draw(st.integers(0, 255))
        else:
            del whole[at:]
        content = bytes(whole)
    answer = running.client.post(url, content=content, headers=TYPE)
    assert answer.status_code == 200 or (answer.status_code in REFUSED and answer.json()["detail"]), answer.text
    well(running)


# ------------------------------------------------------------------ bodies as a whole


def items(n: int) -> str:
    return ",".join('{"item_id":%d,"score":0.5}' % number for number in range(n))


LARGE = {
    "items": '{"requests":[{"items":[%s]}]}' % items(100_000),
    "items with the last one twice": '{"requests":[{"items":[%s,{"item_id":0}]}]}' % items(90_000),
    "requests": '{"requests":[%s]}' % ",".join('{"items":[%s]}' % items(1) for _ in range(80_000)),
    "lists": '{"requests":[{"items":[%s]}]}' % ",".join(["[]"] * 1_000_000),
    "fields": '{"requests":[{"items":[{"item_id":1,%s}]}]}' % ",".join('"f%d":{}' % n for n in range(300_000)),
    "pins": '{"requests":[{"items":[{"item_id":1}],"pins":{%s}}]}' % ",".join('"f%d":{}' % n for n in range(300_000)),
    "history": '{"requests":[{"items":[{"item_id":1}],"history":[%s]}]}' % ",".join(["{}"] * 1_000_000),
    "one number": "1" * 4_000_000,
    "one text": '"%s"' % ("x" * 4_000_000),
    "deep": '{"requests":%s1%s}' % ("[" * 900, "]" * 900),
    "deeper": "[" * 2_000_000,
    "deep in a field": '{"requests":[{"items":[{"item_id":"a","score":%s1%s}]}]}' % ('{"a":' * 900, "}" * 900),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_bodies_end_soon(running, name):
    answer = running.client.post("/rank", content=LARGE[name].encode(), headers=TYPE, timeout=20)
    assert answer.status_code in REFUSED and len(answer.text) < 20_000
    well(running)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/xml", "multipart/form-data", "application/json; charset=utf-16", "", "\xff",
     "application/x-www-form-urlencoded", "application/octet-stream", "a/b" * 1000],
)  # fmt: skip
@pytest.mark.parametrize("url", ["/rank", "/rank/rich.v2", "/feedback"])
def test_other_content_types(running, url, content_type):
    content, headers = json.dumps(BODIES[url]).encode(), {"content-type": content_type.encode("latin-1")}
    answer = running.client.post(url, content=content, headers=headers)
    assert answer.status_code in (200, 415, 422), answer.text
    well(running)


def test_methods_and_paths_that_are_not_there(running):
    operations = "/", "/health", "/metrics", "/models", "/reload", "/samples/rich.v2", "/docs", "/openapi.json"
    for path in [*BODIES, *operations]:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"):
            answer = running.client.request(method, path)
            assert answer.status_code in (200, 404, 405, 422), (method, path, answer.text)
            assert answer.status_code != 405 or answer.headers["allow"]
    for name in ("nobody", "rich", "../rich.v2", "rich.v2/", "rich.v2/..", "%2e%2e", "a" * 8000, "%00", "%ff"):
        for path in (f"/rank/{name}", f"/samples/{name}"):
            answer = running.client.post(path, json=METARANK) if "rank" in path else running.client.get(path)
            assert answer.status_code in (404, 405, 307, 422), (path, answer.text)  # the client shortens dots
    well(running)


POST = b"POST /rank HTTP/1.1\r\nhost: x\r\n"
RAW = [
    b"", b"\0" * 100, b"GET\r\n\r\n", b"POST /rank HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", POST + b"content-length: -1\r\n\r\n",
    POST + b"content-length: 1e3\r\n\r\n", POST + b"content-length: " + b"9" * 300 + b"\r\n\r\n",
    POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    POST + b"authorization: Bearer \xff\r\ncontent-length: 2\r\n\r\n{}",
    POST.replace(b"rank", b"rank/../../etc/passwd") + b"content-length: 2\r\n\r\n{}",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
    b"GET /rank/\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /nothing?\xff=%zz HTTP/1.1\r\nhost: x\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RAW)))
def test_what_is_no_http(running, number):
    host, port = running.url[len("http://") :].split(":")
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        try:
            connection.sendall(RAW[number])
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
        except OSError:  # the server has had enough of it
            answer = b""
    assert not answer or answer.split()[1][:1] == b"4", answer
    well(running)
