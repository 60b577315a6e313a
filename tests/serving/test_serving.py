"""The server: the same ranking as offline, rules, limits, several models, reload, records; in a real process."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pandas as pd
import pytest
from log_helpers import world
from serving_helpers import FAST, body, serving

from dnr_recbole import Reranker
from dnr_recbole.artefact import load_artefact
from dnr_recbole.cli import main
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.serving import scoring
from dnr_recbole.serving.app import make_app
from dnr_recbole.serving.batching import Batcher
from dnr_recbole.serving.command import listening, shares, token
from dnr_recbole.serving.constraints import constrained
from dnr_recbole.serving.models import Models, named_paths
from dnr_recbole.serving.records import Records
from dnr_recbole.serving.schema import RankRequest
from dnr_recbole.serving.scoring import rank
from dnr_recbole.serving.server import Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    Reranker("PRM", **FAST).fit(world(200)).save(path / "one")
    Reranker("MiDNN", **FAST).fit(world(200)).save(path / "two")
    return path


@pytest.fixture(scope="module")
def running(folder):
    with serving(folder / "one", f"two={folder / 'two'}", "--split=two=0.5") as found:
        yield found


def requests(n=20, seed=3):
    return world(n, seed=seed).drop(columns=["label", "timestamp"])


# ------------------------------------------------------------------ the same as offline


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_server_ranks_as_the_model_does_offline(running, folder, name):
    frame = requests()
    offline = Reranker.load(folder / name).rank(frame)
    answers = running.client.post("/rank", json={**body(frame), "model": name}).json()["answers"]
    online = pd.DataFrame([
        {"request_id": one["request_id"], "item_id": item["item_id"], "rank": item["rank"], "rerank_score": item["score"],  # noqa: E501
         "incoming_rank": item["incoming_rank"]}
        for one in answers for item in one["items"]
    ])  # fmt: skip
    key = ["request_id", "rank"]
    both = offline.merge(online, on=key, suffixes=("", "_online"))
    assert len(both) == len(frame)
    assert (both.item_id == both.item_id_online).all() and (both.incoming_rank == both.incoming_rank_online).all()
    np.testing.assert_allclose(both.rerank_score, both.rerank_score_online, rtol=1e-5, atol=1e-6)


def test_a_given_history_is_read_and_mixes_with_stored_ones(folder):
    artefact = load_artefact(folder / "one")
    first, second = body(requests(2))["requests"]
    given = {**first, "history": ["i1", "i2"]}
    together = rank(artefact, [RankRequest.model_validate(one) for one in (given, second, first)])
    alone = [rank(artefact, [RankRequest.model_validate(one)])[0] for one in (given, second, first)]
    for one, other in zip(together, alone):
        assert one.candidate.tolist() == other.candidate.tolist()
        np.testing.assert_allclose(one.score, other.score, atol=1e-6)
    assert not np.allclose(np.sort(together[0].score), np.sort(together[2].score)), "the history makes a difference"


def test_strangers_missing_scores_and_numbers_as_ids(running):
    answer = running.client.post("/rank", json={"requests": [
        {"user_id": 77, "items": [{"item_id": 5, "score": 0.5}, {"item_id": "new", "score": None}, {"item_id": "i1"}]}
    ]}).json()["answers"][0]  # fmt: skip
    assert sorted(map(str, (item["item_id"] for item in answer["items"]))) == ["5", "i1", "new"]
    assert len(answer["request_id"]) == 32, "a request without an id gets one, for feedback"


def test_an_explanation_says_what_moved_an_item(running, folder):
    frame = requests(3)
    answers = running.client.post("/rank?explain=true", json={**body(frame), "model": "one"}).json()["answers"]
    offline = Reranker.load(folder / "one")
    for answer, (_, rows) in zip(answers, frame.groupby("request_id", sort=False)):
        flat = offline.rank(rows.assign(score=rows.score.mean()))
        order = dict(zip(flat.item_id, flat["rank"]))
        for item in answer["items"]:
            why = item["explanation"]
            assert set(why) == {"without_score", "without_history", "alone", "incoming"}
            assert why["incoming"] == item["incoming_rank"]
            if np.diff(np.sort(flat.rerank_score)).min() > 1e-5:  # no ties
                assert why["without_score"] == order[item["item_id"]]
        assert sorted(item["explanation"]["alone"] for item in answer["items"]) == list(range(len(rows)))


def test_explaining_many_candidates_takes_them_in_parts(folder, monkeypatch):
    artefact = Reranker.load(folder / "one").artefact
    asked = [RankRequest.model_validate(each) for each in body(requests(5))["requests"]]
    whole = scoring.rank(artefact, asked, explain=True)
    sizes, predict = [], scoring.predict
    monkeypatch.setattr(scoring, "_ALONE", 7)
    monkeypatch.setattr(scoring, "predict", lambda *given: sizes.append(len(given[1])) or predict(*given))
    parts = scoring.rank(artefact, asked, explain=True)
    assert max(sizes) == 7
    for one, other in zip(whole, parts):
        assert one.candidate.tolist() == other.candidate.tolist()
        assert {name: ranks.tolist() for name, ranks in one.ranks.items()} == {
            name: ranks.tolist() for name, ranks in other.ranks.items()
        }


# ------------------------------------------------------------------ rules at rank time


def request_of(names, **rules):
    items = [{"item_id": name, "score": 0.5, "category": name[0]} for name in names]
    return RankRequest.model_validate({"items": items, **rules})


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({}, "a1 a2 a3 b1 b2 c1"),
        ({"k": 2}, "a1 a2"),
        ({"exclude": ["a2", "nobody"]}, "a1 a3 b1 b2 c1"),
        ({"pins": {"c1": 0, "a1": 2}}, "c1 a2 a1 a3 b1 b2"),
        ({"pins": {"a1": 99}}, "a2 a3 b1 b2 c1 a1"),
        ({"at_most": 1, "k": 3}, "a1 b1 c1"),
        ({"at_most": 1, "k": 5}, "a1 b1 c1 a2 a3"),  # too few categories: the best of the others
        ({"at_most": 1, "k": 3, "pins": {"b2": 0}}, "b2 a1 c1"),
        ({"at_most": 1, "k": 3, "pins": {"a3": 1}}, "b1 a3 c1"),
        ({"exclude": ["a1"], "pins": {"a1": 0}, "k": 2}, "a2 a3"),
    ],
)
def test_rules(rules, expected):
    names = "a1 a2 a3 b1 b2 c1".split()
    request = request_of(names, **rules)
    assert [names[number] for number in constrained(request, range(6))] == expected.split()


def test_rules_hold_for_any_order():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 12))
        names = [f"{'abc'[rng.integers(3)]}{number}" for number in range(n)]
        pinned = rng.permutation(n)[: rng.integers(0, 3)]
        places = rng.permutation(n + 3)[: len(pinned)]
        rules = {
            "k": int(rng.integers(1, n + 2)), "at_most": int(rng.integers(1, 4)),
            "exclude": [names[number] for number in rng.permutation(n)[: rng.integers(0, 3)]],
            "pins": {names[number]: int(place) for number, place in zip(pinned, places)},
        }  # fmt: skip
        request = request_of(names, **rules)
        out = [names[number] for number in constrained(request, rng.permutation(n).tolist())]
        left = [name for name in names if name not in rules["exclude"]]
        assert len(out) == len(set(out)) == min(rules["k"], len(left)) and set(out) <= set(left)
        for name, place in rules["pins"].items():
            if name in left and place < len(out):
                assert out[place] == name
        free = [name for name in out if name not in rules["pins"]]
        counts = pd.Series([name[0] for name in out]).value_counts()
        if free and counts.max() > rules["at_most"]:  # only where nothing else was left
            over = {c for c, count in counts.items() if count > rules["at_most"]}
            others = [name for name in left if name not in out and name[0] not in over and name not in rules["pins"]]
            assert not [name for name in others if counts.get(name[0], 0) < rules["at_most"]]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "change, where, says",
    [
        ({"requests": []}, ["requests"], "at least 1"),
        ({"requests": [{"items": []}]}, ["requests", 0, "items"], "at least 1"),
        ({"requests": [{"items": [{"score": 1}]}]}, ["requests", 0, "items", 0, "item_id"], "required"),
        ({"requests": [{"items": [{"item_id": True, "score": 0.5}]}]}, ["requests", 0, "items", 0, "item_id"], ""),
        ({"requests": [{"items": [{"item_id": "a", "score": 7}]}]}, ["requests", 0, "items", 0, "score"], "[0, 1]"),
        ({"requests": [{"items": [{"item_id": "a", "score": "x"}]}]}, ["requests", 0, "items", 0, "score"], "number"),
        ({"requests": [{"items": [{"item_id": "a", "score": []}]}]}, ["requests", 0, "items", 0, "score"], ""),
        ({"requests": [{"items": [{"item_id": "a"}]}]}, ["requests", 0, "items"], "score"),
        ({"requests": [{"items": [{"item_id": "a", "score": 0.5}] * 2}]}, ["requests", 0, "items"], "twice"),
        ({"requests": [{"items": [{"item_id": "a", "score": 0.5}], "k": 0}]}, ["requests", 0, "k"], "greater"),
        ({"requests": [{"items": [{"item_id": "a", "score": 0.5}], "top": 3}]}, ["requests", 0, "top"], "not permitted"),  # noqa: E501
        ({"requests": [{"items": [{"item_id": "a", "score": 0.5}], "pins": {"b": 0}}]}, ["requests", 0], "not among"),
        ({"requests": [{"items": [{"item_id": "a", "score": 0.5}]}] * 300}, ["requests"], "at most 256"),
        ({"requests": [{"items": [{"item_id": f"{i}", "score": 0.5} for i in range(2001)]}]}, ["requests", 0], "2000"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_field(running, change, where, says):
    answer = running.client.post("/rank", json=change)
    assert answer.status_code in (422, 413), answer.text
    found = answer.json()["detail"][0]
    assert found["loc"][1 : 1 + len(where)] == where and says in found["msg"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1", b"\xff\xfe", b'{"requests": NaN}', b'{"requests": [{"items": [{"item_id": "a", "score": NaN}]}]}',  # noqa: E501
                                     b'{"requests": [{"items": [{"item_id": "a", "score": 1e999}]}]}', b'[' * 100_000])  # noqa: E501  # fmt: skip
def test_no_json_no_answer(running, content):
    answer = running.client.post("/rank", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert running.client.get("/health").json()["ready"]


@pytest.mark.parametrize("name", ["nobody", "../one", "one/..", "a" * 5000, "%00"])
def test_models_that_are_not_there(running, name):
    assert running.client.post("/rank", json={**body(requests(1)), "model": name}).status_code in (404, 422)
    answer = running.client.post(f"/rank/{name}", json={"items": [{"id": "a", "relevancy": 0.5}]})
    assert answer.status_code in (404, 405, 422), answer.text


def test_bodies_too_large_and_too_slow(folder):
    with serving(folder / "one", "--max_body=2000") as running:
        answer = running.client.post("/rank", json=body(requests(20)))
        assert answer.status_code == 413 and "2000 bytes" in answer.json()["detail"]
        chunks = (b"x" * 1000 for _ in range(10))  # without a content-length
        assert running.client.post("/rank", content=chunks).status_code == 413
        host, port = running.url[len("http://") :].split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert running.client.post("/rank", json=body(requests(1))).status_code == 200, (
                "others are answered meanwhile"
            )
            slow.settimeout(20)
            assert b"408" in slow.recv(1000).split(b"\r\n")[0]
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert running.client.post("/rank", json=body(requests(1))).status_code == 200


def test_a_token(folder, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with serving(folder / "one", f"--token_file={tmp_path / 'token'}") as running:
        for given in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "Bearer s3crets"},
                      {"authorization": "Basic s3cret"}, {"authorization": "Bearer " + "x" * 7000}):  # fmt: skip
            assert running.client.post("/rank", json=body(requests(1)), headers=given).status_code == 401
            assert running.client.get("/metrics", headers=given).status_code == 401
        right = {"authorization": "Bearer s3cret"}
        assert running.client.post("/rank", json=body(requests(1)), headers=right).status_code == 200
        assert running.client.get("/health").status_code == 200, "a load balancer has no token"
        assert "s3cret" not in "\n".join(running.said)


def test_options_that_cannot_be_used(folder, tmp_path, capsys):
    one = str(folder / "one")
    (tmp_path / "empty").write_text("")
    for arguments, says in (
        (["nowhere"], "no artefact"), ([one, one], "two models are called"), ([f"a/b={one}"], "no name"),
        ([one, "--split=three=0.5"], "no such model"), ([one, "--split=one=x"], "NAME=SHARE"), ([one, "--split=one=1.5"], "[0, 1]"),  # noqa: E501
        ([one, f"--token_file={tmp_path / 'empty'}"], "empty"), ([one, f"--token_file={tmp_path}"], "token_file"),
        ([one, f"--record={one}/config.json"], "config.json"), ([one, "--max_wait=nan"], "--max_wait=nan: must lie in"),
        ([one, "--max_batch=0"], "must lie in [1, 10000]"), ([one, "--max_candidates=1000000"], "must lie in"),
    ):  # fmt: skip
        assert main(["serve", *arguments, "--port=0"]) in (1, 2), arguments
        printed = capsys.readouterr().err
        assert says in printed and printed.count("\n") == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", one, f"--port={taken.getsockname()[1]}"]) == 2


def test_answers_are_sent_at_once():
    """Every accepted connection sends small packets without waiting for the acknowledgement of earlier ones."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_no_full_collection_walks_what_is_there_before_the_first_request(folder, monkeypatch):
    """It would stop every answer for a fifth of a second, wherever torch's hundred thousands of objects are."""
    import gc

    import uvicorn

    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: seen.append((gc.get_freeze_count(), len(gc.get_objects()))))
    try:
        assert main(["serve", str(folder / "one"), "--port=0", "--watch=0"]) == 0
    finally:
        gc.unfreeze()
    ((frozen, walked),) = seen
    assert frozen > 20 * walked


def test_names_shares_and_tokens(monkeypatch):
    assert named_paths(["x/y", "b=c"]) == {"y": "x/y", "b": "c"}
    assert shares(["a=.25"]) == {"a": 0.25}
    monkeypatch.setenv("DNR_RECBOLE_TOKEN", " t\n")
    assert token(None) == "t"
    for empty in ("", " "):
        monkeypatch.setenv("DNR_RECBOLE_TOKEN", empty)
        with pytest.raises(ConfigError, match="DNR_RECBOLE_TOKEN is set and empty"):
            token(None)
    with pytest.raises(ConfigError):
        named_paths([".hidden=x"])


# ------------------------------------------------------------------ several models


def test_users_stay_with_their_model(running):
    frame = requests(60, seed=5)
    answers = running.client.post("/rank", json=body(frame)).json()["answers"]
    users = dict(zip(frame.request_id, frame.user_id))
    of_user = {}
    for answer in answers:
        of_user.setdefault(users[answer["request_id"]], set()).add(answer["model"])
    assert all(len(models) == 1 for models in of_user.values())
    assert {"one", "two"} == set.union(*of_user.values())


def test_shares_are_kept(folder):
    models = Models({"a": str(folder / "one"), "b": str(folder / "one")}, {"b": 0.2})
    chosen = [models.choose(f"user {number}") for number in range(5000)]
    assert 0.17 < chosen.count("b") / 5000 < 0.23
    assert models.choose(None) == "a"


def test_a_clients_body_of_metarank(running, folder):
    rows = requests(1)
    items = [
        {"id": item, "fields": [{"name": "score", "value": score}]} for item, score in zip(rows.item_id, rows.score)
    ]
    event = {"event": "ranking", "id": "e1", "timestamp": "1599391467000", "user": rows.user_id.iloc[0], "session": "s",
             "fields": [{"name": "query", "value": "socks"}], "items": items}  # fmt: skip
    answer = running.client.post("/rank/one", json=event).json()
    expected = Reranker.load(folder / "one").rank(rows)
    assert [item["item"] for item in answer["items"]] == expected.item_id.tolist()
    assert answer["took"] >= 0
    relevancies = [{"id": item, "relevancy": score} for item, score in zip(rows.item_id, rows.score)]
    again = running.client.post("/rank/one", json={**event, "items": relevancies}).json()
    assert again["items"] == answer["items"]
    wrong = {**event, "items": [{"id": "a", "relevancy": 0.5}, {"id": "b", "relevancy": 7.0}]}
    (detail,) = running.client.post("/rank/one", json=wrong).json()["detail"]
    assert detail["loc"] == ["body", "items", 1, "score"]


# ------------------------------------------------------------------ operation


def test_health_metrics_and_drift(running):
    assert running.client.get("/health/live").json() == {"live": True}
    assert set(running.client.get("/health/ready").json()["models"]) == {"one", "two"}
    strange = body(requests(4).assign(item_id=[f"x{n}" for n in range(32)]))
    running.client.post("/rank", json={**strange, "model": "two"})
    text = running.client.get("/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    assert values['dnr_unknown_share{model="two",what="items"}'] > 0
    assert values['dnr_requests_total{model="two"}'] >= 4
    assert 'dnr_score_shift{model="two",score="score"}' in values
    assert values["dnr_waiting"] == 0
    assert any(name.startswith("dnr_rank_seconds_bucket") for name in values)


def asked(server, *asking):
    """Answers of an application in this process to (method, path, options) each."""

    async def ask():
        transport = httpx.ASGITransport(app=make_app(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.request(method, path, **options) for method, path, options in asking]

    return asyncio.run(ask())


def test_what_goes_wrong_inside_is_counted(folder, tmp_path):
    """A model that fails, and answers that could not be recorded."""
    models, records = Models({"one": str(folder / "one")}), Records(str(tmp_path))
    records.dropped = 3
    server = Server(models, Batcher(models, rank=lambda *_: 1 / 0), records=records)
    failed, metrics = asked(server, ("POST", "/rank", {"json": body(requests(1))}), ("GET", "/metrics", {}))
    server.batcher.stop()
    records.close()
    assert failed.status_code == 500
    assert 'dnr_answers_total{path="/rank",status="500"} 1.0' in metrics.text
    assert "dnr_unrecorded_answers 3.0" in metrics.text


def test_a_token_of_any_characters(folder):
    models = Models({"one": str(folder / "one")})
    server = Server(models, Batcher(models), token="geheim-ä€")
    given = ("geheim-ä€", "geheim-a€", "geheim-ä")
    codes = [("GET", "/models", {"headers": {b"authorization": b"Bearer " + text.encode()}}) for text in given]
    assert [answer.status_code for answer in asked(server, *codes)] == [200, 401, 401]
    server.batcher.stop()


def test_the_interface_is_described_without_a_network(running):
    text = running.client.get("/docs").text
    assert "POST /rank" in text and "src=" not in text and "https://" not in text
    assert "/feedback" in running.client.get("/openapi.json").json()["paths"]
    page = running.client.get("/").text
    assert "https://" not in page and "http://" not in page


def test_held_out_requests_can_be_asked_for(running):
    samples = running.client.get("/samples/one").json()
    assert samples and samples[0]["request"]["items"] and samples[0]["clicked"]
    answer = running.client.post("/rank", json={"requests": [samples[0]["request"]]})
    assert answer.status_code == 200


def test_a_new_model_takes_over_without_a_lost_or_mixed_answer(folder, tmp_path):
    versions = [Reranker("PRM", **{**FAST, "seed": seed}).fit(world(120)) for seed in (1, 2)]
    versions[0].save(tmp_path / "m")
    frame = requests(1)
    orders = {tuple(np.round(model.rank(frame).rerank_score, 4)) for model in versions}
    assert len(orders) == 2
    with serving(tmp_path / "m", "--watch=0.05", "--max_wait=10000") as running:
        seen, stop, failures = {}, threading.Event(), []

        def ask():
            while not stop.is_set():
                answer = running.client.post("/rank", json=body(frame))
                if answer.status_code != 200:
                    failures.append(answer.text)
                    continue
                one = answer.json()["answers"][0]
                seen.setdefault(one["version"], set()).add(tuple(round(item["score"], 4) for item in one["items"]))

        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(ask) for _ in range(4)]
            for turn in range(6):
                versions[(turn + 1) % 2].save(tmp_path / "m")
                time.sleep(1)
            stop.set()
            [job.result() for job in jobs]
        assert not failures
        assert len(seen) >= 2, "it was reloaded"
        assert all(len(orders) == 1 for orders in seen.values()), "a version has one answer"


def test_a_damaged_version_is_named_and_the_old_one_goes_on(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "m")
    frame = requests(1)
    with serving(tmp_path / "m", "--watch=0") as running:  # nobody else looks
        before = running.client.post("/rank", json=body(frame)).json()["answers"][0]
        (tmp_path / "m" / "model.safetensors").write_bytes(b"damaged")
        (tmp_path / "m" / "config.json").write_text((tmp_path / "m" / "config.json").read_text() + " ")
        assert running.client.post("/reload").json()["m"].startswith("failed")
        after = running.client.post("/rank", json=body(frame)).json()["answers"][0]
    assert (after["version"], after["items"]) == (before["version"], before["items"])


def test_a_graceful_end(folder):
    with serving(folder / "one", "--max_wait=10000") as running:
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(running.client.post, "/rank", json=body(requests(50))) for _ in range(8)]
            time.sleep(0.3)
            running.process.send_signal(signal.SIGTERM)
            codes = []
            for job in jobs:
                try:
                    codes.append(job.result().status_code)
                except Exception as error:
                    codes.append(type(error).__name__)
        assert running.process.wait(30) in (0, 143)
        assert codes.count(200) >= 1 and set(codes) <= {200, 503, "ConnectError"}


def test_whatever_a_new_version_raises_the_old_one_goes_on(folder, tmp_path, monkeypatch):
    """And the server looks for the next one: an exporter has errors of its own."""
    model = Reranker.load(folder / "one")
    model.save(tmp_path / "m")
    models = Models({"m": str(tmp_path / "m")})
    first = models.get("m")
    model.artefact.metrics["again"] = 1
    model.save(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr("dnr_recbole.serving.models.load_artefact", lambda path: 1 / 0)
        assert models.reload() == {"m": "failed: division by zero"}
    assert models.get("m") is first
    assert models.reload() == {"m": f"{first.version} -> {models.get('m').version}"}


# ------------------------------------------------------------------ records


def test_answers_and_feedback_become_a_log_to_train_on(folder, tmp_path):
    frame = world(80, seed=9)
    with serving(folder / "one", f"--record={tmp_path / 'rec'}") as running:
        answers = running.client.post("/rank", json=body(frame.drop(columns="label"), k=5)).json()["answers"]
        for answer, (_, rows) in zip(answers, frame.groupby("request_id", sort=False)):
            clicked = rows.item_id[rows.label == 1].tolist()
            if clicked:
                sent = {"request_id": answer["request_id"], "clicked": clicked}
                assert running.client.post("/feedback", json=sent).status_code == 200
        assert running.client.post("/feedback", json={"request_id": "?", "clicked": ["a"]}).status_code == 200
        # It is on the disk before it is acknowledged: nothing is lost if the process dies now.
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
    with open(tmp_path / "rec" / "answers.jsonl", "ab") as file:
        file.write(b'{"request_id": "cut", "it')
    assert main(["convert", "served", str(tmp_path / "rec"), str(tmp_path / "log.parquet")]) == 0
    log = pd.read_parquet(tmp_path / "log.parquet")
    merged = frame.merge(log, on=["request_id", "item_id"], suffixes=("", "_log"))
    assert len(merged) == len(frame) and (merged.label == merged.label_log).all()
    np.testing.assert_allclose(merged.score, merged.score_log)
    shown = log.groupby("request_id").exposed.sum()
    assert (shown == 5).all() and log.position[log.exposed].between(0, 4).all()
    model = Reranker("PRM", **FAST).fit(str(tmp_path / "log.parquet"))
    assert "ndcg@6" in model.metrics


def test_models_that_cannot_be_loaded_are_said_in_a_line(folder, tmp_path):
    with pytest.raises(DnrError, match="no artefact"):
        Models({"x": str(tmp_path)})
