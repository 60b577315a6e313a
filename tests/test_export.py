"""ONNX graphs of rerankers, and ranking with them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from log_helpers import world
from serving_helpers import FAST, body, serving

from dnr_recbole import Reranker, run_dnr
from dnr_recbole.cli import main
from dnr_recbole.errors import ConfigError
from dnr_recbole.export import TOLERANCE, OnnxScorer, difference, export, random_requests, to_onnx
from dnr_recbole.model.reranker.prm import PRM
from dnr_recbole.ranking import prepare, requests_of
from dnr_recbole.registry import list_models
from dnr_recbole.requestlog.decoding import Columns
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.reading import Source
from dnr_recbole.retriever.calibration import Calibration
from dnr_recbole.serving.models import Models
from dnr_recbole.testing import as_artefact, build, random_catalogue

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
MODELS = {each.name: each.cls for each in list_models("reranker")}
EXPORTED = [name for name, cls in MODELS.items() if not cls.export_refusal]
SHORT = {"DCDR": dict(diffusion_steps=3)}  # every step is in the graph, and all are alike
# Options that take another path when a model ranks, and other ways to read the scores.
VARIANTS = [
    ("PRM", dict(score_fusion="rank+weight+concat+add+residual", history_interaction="both")),
    ("PRM", dict(use_pv=True, pv_folds=2, id_dropout=0.2, use_features=False)),
    ("PRM", dict(score_fusion="none", history_interaction="none", use_popularity=False, n_layers=6)),
    ("SetRank", dict(attention="imsab", fuse_every_block=True)),
    ("GSF", dict(group_size=1)),
    ("GSF", dict(group_size=3)),
    ("DLCM", dict(scoring="multiplicative")),
    ("Seq2Slate", dict(decoding="beam", score_fusion="residual")),
    ("DCDR", dict(decoding="path", evaluator_kind="transformer", start="retriever")),
    ("NAR4Rec", dict(evaluator_kind="gru", decode_alphas=[1.0])),
    ("EGRerank", dict(inference_lists=4)),
    ("PIER", dict(list_value="mean", include_pointwise=False)),
    ("MGE", dict(generators=["retriever", "DPP", "DCDR"], generator_args={"DCDR": {"diffusion_steps": 2}})),
    ("MMR", dict(relevance="retriever")),
    ("DPP", dict(kernel="items")),
]


def name_of(value) -> str:
    return value if isinstance(value, str) else "-".join(value)


def fitted(name, frame=None, **keys):
    return Reranker(name, **{**FAST, **keys}).fit(world(120) if frame is None else frame)


def rich():
    """A log with two scores, one with gaps, and features."""
    frame, rng = world(120), np.random.default_rng(0)
    frame["score_b"] = np.where(rng.random(len(frame)) < 0.3, np.nan, rng.random(len(frame)))
    frame["price"], frame["kind"] = rng.random(len(frame)), rng.choice(["a", "b"], len(frame))
    return frame


def test_all_rerankers_but_the_trees_are_graphs():
    assert [name for name in MODELS if name not in EXPORTED] == ["LambdaMART"]


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


def test_dnr_is_what_its_backbone_is(monkeypatch):
    monkeypatch.setattr(MODELS["PIER"], "export_refusal", "it is a test")
    with pytest.raises(ConfigError, match="DNR cannot be exported: it is a test"):
        to_onnx(fitted("DNR", backbone="PIER", lambda_e=0).artefact)


# ------------------------------------------------------------------ all sizes, all paths


def in_all_sizes(artefact) -> None:
    """Sizes of batch, list and history that the graph was not traced with, one candidate among them: scores are
    torch's, and the order is theirs but for neighbours closer than the tolerance."""
    scorer = OnnxScorer(to_onnx(artefact))
    for seed, (requests, n) in enumerate([(8, 12), (1, 1), (3, 2), (1, 50), (65, 5)], 10):
        slate = random_requests(artefact, requests, n, seed)
        if seed % 2:
            slate = dataclasses.replace(slate, history=slate.history[:, :3], history_mask=slate.history_mask[:, :3])
        agree(artefact, scorer, slate)


def agree(artefact, scorer, slate) -> None:
    with torch.no_grad():
        wanted = artefact.model.predict(slate).float().numpy()
    found, (_, order), mask = scorer(slate), scorer.run(slate), slate.mask.numpy()
    assert found.shape == order.shape == mask.shape and found.dtype == np.float32
    np.testing.assert_allclose(found[mask], wanted[mask], rtol=TOLERANCE, atol=TOLERANCE)
    assert (found[~mask] < found[mask].min()).all()
    assert (np.sort(order, 1) == np.arange(mask.shape[1])).all()
    assert (np.take_along_axis(mask, order, 1) == np.sort(mask, 1)[:, ::-1]).all(), "padding behind"
    in_order = np.take_along_axis(wanted, order, 1)
    assert (in_order[:, :-1] - in_order[:, 1:] >= -2 * TOLERANCE).all()


@pytest.mark.parametrize("name", EXPORTED)
def test_graphs_hold_for_all_sizes(name):
    in_all_sizes(as_artefact(build(name, **SHORT.get(name, {}))))


@pytest.mark.parametrize("backbone", ["SASRec", "Seq2Slate", "PIER"])
def test_dnr_around_others(backbone):
    in_all_sizes(as_artefact(build("DNR", backbone=backbone)))


@pytest.mark.parametrize("name, options", VARIANTS, ids=name_of)
def test_other_paths(name, options):
    in_all_sizes(as_artefact(build(name, **{**SHORT.get(name, {}), **options})))


@pytest.mark.parametrize("name", ["PRM", "SASRec", "DLCM", "Seq2Slate", "DPP", "NAR4Rec"])
def test_two_scores_of_which_some_are_missing(name):
    artefact = as_artefact(build(name, catalogue=dataclasses.replace(random_catalogue(), n_scores=2)))
    columns, calibrations = Columns(["score", "second"], []), [Calibration(), Calibration()]
    artefact.preprocessor = dataclasses.replace(artefact.preprocessor, columns=columns, calibrations=calibrations)
    in_all_sizes(artefact)


# ------------------------------------------------------------------ real requests


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """ml-100k with its retriever: artefacts of three models, trained for an epoch."""
    folder = tmp_path_factory.mktemp("films")
    keys = {**FAST, "cache_dir": str(folder / "cache"), "max_requests_per_user": 2, "history_length": 20,
            "retriever_args": {"epochs": 2}, "log_dir": None, "tensorboard_dir": None}  # fmt: skip
    for name in ("PRM", "SASRec", "PIER"):
        more = {"artefact_dir": str(folder / name), "checkpoint_dir": str(folder / "checkpoints")}
        run_dnr(name, "ml-100k", config_dict={**keys, **more})
    return folder


@pytest.mark.parametrize("name", ["PRM", "SASRec", "PIER"])
def test_real_requests(films, name, tmp_path):
    model = Reranker.load(films / name)
    model.export(tmp_path / "m.onnx")
    scorer = OnnxScorer((tmp_path / "m.onnx").read_bytes())
    found = requests_of(model.artefact, Source(model.artefact.sample.drop(columns="label")), Problems())
    slates = [prepare(model.artefact, some).slate for some in found]
    assert sum(map(len, slates)) > 50 and slates[0].mask.shape[1] == 50
    for slate in slates:
        agree(model.artefact, scorer, slate)


# ------------------------------------------------------------------ the file


def test_the_file_says_what_it_is(tmp_path):
    model = fitted("PRM")
    model.save(tmp_path / "m")
    model.export(tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    said = json.loads(graph.metadata_props[0].value)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["weights_sha256"] == config["sha256"]["model.safetensors"]
    assert (said["model"], said["dnr_recbole"], said["backbone"]) == ("PRM", config["written_by"], None)
    shapes = {value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in graph.graph.input}
    assert said["inputs"] == list(shapes) and shapes["history"] == ["B", "H"] and shapes["candidates"] == ["B", "n"]
    assert [value.name for value in graph.graph.output] == ["ranking", "order"]


def test_inputs_that_nothing_reads_are_left_out():
    scorer = OnnxScorer(to_onnx(as_artefact(build("SASRec", score_fusion="none"))))
    assert scorer.names == ["history", "history_mask", "candidates", "mask"]


class FixedSize(PRM):
    """Its tracer sees a number where there is a size."""

    def predict(self, slate):
        return super().predict(slate) / len(slate.mask)


class NoGraph(PRM):
    """It needs what no graph has."""

    def predict(self, slate):
        scores = super().predict(slate)
        return torch.linalg.eigvals(scores.T @ scores).real + scores


@pytest.mark.parametrize("cls, message", [(FixedSize, "its graph differs"), (NoGraph, "cannot be exported: .*eigvals")])
def test_a_model_that_is_no_graph_and_does_not_say_so(cls, message):
    artefact = as_artefact(build("PRM"))
    artefact.model.__class__ = cls
    with pytest.raises(ConfigError, match=message) as caught:
        to_onnx(artefact)
    assert "\n" not in str(caught.value)


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
        assert OnnxScorer(path.read_bytes()).names
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
    pytest.importorskip("lightgbm")
    fitted("LambdaMART", n_trees=3).save(tmp_path / "m")
    assert main(["serve", str(tmp_path / "m"), "--runtime=onnx", "--port=0"]) != 0
    assert "LambdaMART cannot be exported" in capsys.readouterr().err


def test_the_page_names_every_reranker():
    table = PAGE.read_text().split("## int8")[0].splitlines()
    rows = {line.split("|")[1].strip(): line for line in table if line.startswith("| ")}
    for name, cls in MODELS.items():
        assert name in rows and (cls.export_refusal in rows[name] if cls.export_refusal else "yes" in rows[name]), name
