"""ONNX graphs of rerankers, and ranking with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from log_helpers import world
from serving_helpers import FAST, body, serving

from dnr_recbole import Reranker
from dnr_recbole.cli import main
from dnr_recbole.errors import ConfigError
from dnr_recbole.export import TOLERANCE, OnnxScorer, difference, export, random_requests, to_onnx
from dnr_recbole.registry import list_models
from dnr_recbole.serving.models import Models

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
MODELS = {each.name: each.cls for each in list_models("reranker")}
EXPORTED = [name for name, cls in MODELS.items() if not cls.export_refusal]


def fitted(name, frame=None, **keys):
    return Reranker(name, **{**FAST, **keys}).fit(world(120) if frame is None else frame)


def rich():
    """A log with two scores, one with gaps, and features."""
    frame, rng = world(120), np.random.default_rng(0)
    frame["score_b"] = np.where(rng.random(len(frame)) < 0.3, np.nan, rng.random(len(frame)))
    frame["price"], frame["kind"] = rng.random(len(frame)), rng.choice(["a", "b"], len(frame))
    return frame


def test_at_least_twelve_rerankers_are_graphs():
    assert len(EXPORTED) >= 12 and "DNR" in EXPORTED


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_ranks_as_its_model_does(name):
    model = fitted(name, epochs=2)
    scorer = OnnxScorer(to_onnx(model.artefact))
    worst, same = difference(model.artefact, scorer)
    assert worst <= TOLERANCE and same == 1.0
    new = world(40, seed=1).drop(columns="label")
    wanted = model.rank(new)
    model.artefact.scorer = scorer
    found = model.rank(new)
    assert found.item_id.equals(wanted.item_id)
    assert np.allclose(found.rerank_score, wanted.rerank_score, atol=1e-4)


@pytest.mark.parametrize("name", ["PRM", "MiDNN", "DNR"])
@pytest.mark.parametrize("fusion", ["concat+residual", "rank+concat"])
def test_several_scores_and_features_are_inputs(name, fusion):
    keys = {"adversarial": False} if name == "DNR" else {}
    model = fitted(name, rich(), log_features=["price", "kind"], score_fusion=fusion, **keys)
    scorer = OnnxScorer(to_onnx(model.artefact))
    assert {"scores", "features", "mask", "candidates"} <= set(scorer.names)
    assert random_requests(model.artefact, 2, 5, 0).scores.shape == (2, 5, 2)
    worst, same = difference(model.artefact, scorer)
    assert worst <= TOLERANCE and same == 1.0


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(EXPORTED)))
def test_what_is_no_graph_says_why(name, tmp_path):
    if MODELS[name].needs:
        pytest.importorskip(MODELS[name].needs[0])
    model = fitted(name)
    with pytest.raises(ConfigError, match=re.escape(MODELS[name].export_refusal)):
        export(model.artefact, str(tmp_path / "m.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_dnr_is_what_its_backbone_is():
    with pytest.raises(ConfigError, match="DNR cannot be exported: it looks permutations up"):
        to_onnx(fitted("DNR", backbone="PIER", lambda_e=0).artefact)


def test_a_graph_that_ranks_otherwise_is_not_written(tmp_path, monkeypatch):
    model = fitted("PRM")
    monkeypatch.setattr("dnr_recbole.export.difference", lambda artefact, scorer: (0.5, 0.0))
    with pytest.raises(ConfigError, match="differs from it by 5.0e-01"):
        export(model.artefact, str(tmp_path / "m.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_graph_and_a_smaller_one(tmp_path, capsys):
    fitted("PRM", embedding_size=64).save(tmp_path / "m")
    sizes = []
    for name, options in (("plain", []), ("small", ["--quantise=int8"])):
        path = tmp_path / f"{name}.onnx"
        assert main(["export", str(tmp_path / "m"), str(path), *options]) == 0
        assert re.search(r"MiB; scores differ by \S+ of the largest, \d+% of the orders", capsys.readouterr().out)
        sizes.append(path.stat().st_size)
        assert OnnxScorer(path.read_bytes()).least >= 2
    assert sizes[1] < sizes[0]


def test_without_onnx_the_command_names_the_extra(tmp_path, monkeypatch, capsys):
    fitted("PRM").save(tmp_path / "m")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "m.onnx")]) != 0
    assert "export needs onnx: pip install 'dnr_recbole[export]'" in capsys.readouterr().err


def test_a_server_ranks_with_the_graph_and_reloads(tmp_path):
    model = fitted("PRM", epochs=2)
    model.save(tmp_path / "m")
    models = Models({"m": str(tmp_path / "m")}, runtime="onnx")
    assert isinstance(models.get("m").artefact.scorer, OnnxScorer)
    newer = fitted("MiDNN")
    newer.save(tmp_path / "m")
    assert " -> " in models.reload()["m"]
    assert isinstance(models.get("m").artefact.scorer, OnnxScorer)
    new = world(10, seed=1).drop(columns="label")
    with serving(tmp_path / "m", "--runtime=onnx") as running:
        answers = running.client.post("/rank", json=body(new)).json()["answers"]
    wanted = newer.rank(new)
    for answer, (_, rows) in zip(answers, wanted.groupby("request_id", sort=False)):
        assert [item["item_id"] for item in answer["items"]] == list(rows.item_id.astype(str))


def test_a_server_refuses_a_model_without_graph(tmp_path, capsys):
    fitted("PIER").save(tmp_path / "m")
    assert main(["serve", str(tmp_path / "m"), "--runtime=onnx", "--port=0"]) != 0
    assert "PIER cannot be exported" in capsys.readouterr().err


def test_the_page_names_every_reranker():
    table = PAGE.read_text().split("## int8")[0].splitlines()
    rows = {line.split("|")[1].strip(): line for line in table if line.startswith("| ")}
    for name, cls in MODELS.items():
        assert name in rows and (cls.export_refusal in rows[name] if cls.export_refusal else "yes" in rows[name]), name
