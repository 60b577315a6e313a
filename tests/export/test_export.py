"""ONNX files: every registered reranker scores in onnxruntime as in torch, or says why it cannot."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from log_helpers import world
from places import ROOT
from serving_helpers import FAST, body, serving

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402

from dnr_recbole import Reranker, run_dnr  # noqa: E402
from dnr_recbole.artefact import load_artefact  # noqa: E402
from dnr_recbole.cli import main  # noqa: E402
from dnr_recbole.errors import CheckpointError, ConfigError, DnrError  # noqa: E402
from dnr_recbole.export.graph import random_slate  # noqa: E402
from dnr_recbole.export.onnx_file import TOLERANCE, export_artefact  # noqa: E402
from dnr_recbole.export.runtime import OnnxScorer  # noqa: E402
from dnr_recbole.lists import best_first  # noqa: E402
from dnr_recbole.model.reranker.prm import PRM  # noqa: E402
from dnr_recbole.ranking import Source, predict, prepare, requests_of  # noqa: E402
from dnr_recbole.registry import list_models  # noqa: E402
from dnr_recbole.requestlog.decoding import Columns  # noqa: E402
from dnr_recbole.requestlog.problems import Problems  # noqa: E402
from dnr_recbole.retriever.calibration import Calibration  # noqa: E402
from dnr_recbole.serving.models import Models, ServedModel  # noqa: E402
from dnr_recbole.serving.schema import RankRequest  # noqa: E402
from dnr_recbole.serving.scoring import rank  # noqa: E402
from dnr_recbole.testing import as_artefact, build, random_catalogue  # noqa: E402

EXPORTED = [model.name for model in list_models("reranker") if not model.cls.export_refusal]
BACKBONES = ["SASRec", "Seq2Slate", "PIER"]  # DNR's own is PRM
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


def agree(artefact, scorer, slate) -> None:
    """Scores and order of all requests are torch's, whatever their lengths."""
    expected, found = predict(artefact, slate), scorer(slate)
    mask, order = slate.mask.numpy(), scorer.run(slate, "ranking")
    assert found.shape == order.shape == mask.shape and found.dtype == np.float32
    np.testing.assert_allclose(found[mask], expected[mask], rtol=TOLERANCE, atol=TOLERANCE)
    assert (found[~mask] < found[mask].min()).all()
    # Neighbours closer than the tolerance may change places, and no others.
    in_order = np.take_along_axis(expected, order, 1)
    assert (np.take_along_axis(mask, order, 1) == np.sort(mask, 1)[:, ::-1]).all()  # padding behind
    assert (np.sort(order, 1) == np.arange(mask.shape[1])).all()
    assert (in_order[:, :-1] - in_order[:, 1:] >= -2 * TOLERANCE).all()
    assert torch.equal(best_first(torch.from_numpy(found), slate.mask), torch.from_numpy(order))


def in_all_sizes(artefact) -> None:
    """Several sizes of batch, list and history, none of which the graph was traced with."""
    scorer = OnnxScorer(export_artefact(artefact).content)
    for seed, size in enumerate([(8, 12, 7), (1, 1, 1), (2, 3, 7), (1, 50, 4), (65, 5, 7)]):
        agree(artefact, scorer, random_slate(artefact, *size, seed=seed + 10))


@pytest.mark.parametrize("name", EXPORTED)
def test_scores_and_order_are_those_of_torch(name):
    in_all_sizes(as_artefact(build(name, **SHORT.get(name, {}))))


@pytest.mark.parametrize("name", BACKBONES)
def test_dnr_around_it(name):
    in_all_sizes(as_artefact(build("DNR", backbone=name)))


def name_of(value) -> str:
    return value if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize("name, options", VARIANTS, ids=name_of)
def test_another_path(name, options):
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
    requests = slates_of(model.artefact, model.artefact.sample.drop(columns="label"))
    assert sum(map(len, requests)) > 50 and requests[0].mask.shape[1] == 50
    scorer = OnnxScorer(tmp_path / "m.onnx")
    for slate in requests:
        agree(model.artefact, scorer, slate)


def slates_of(artefact, frame):
    """The requests of a table as the model reads them."""
    found = requests_of(artefact, Source(frame), Problems())
    return [prepare(artefact, some).slate for some in found]


# ------------------------------------------------------------------ the file


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """PRM on a log with two scores, one with gaps, and features."""
    log = world(200)
    log["second"] = np.where(np.arange(len(log)) % 5, 1 - log.score, np.nan)
    log["price"], log["colour"] = np.sin(np.arange(len(log))), np.where(np.arange(len(log)) % 3, "red", "blue")
    folder = tmp_path_factory.mktemp("fitted")
    keys = {"score_columns": ["score", "second"], "log_features": ["price", "colour"]}
    Reranker("PRM", **FAST, **keys).fit(log).save(folder / "m")
    log.drop(columns="label").to_parquet(folder / "requests.parquet")
    return folder


def test_features_and_scores_of_a_log(fitted, tmp_path):
    artefact = load_artefact(fitted / "m")
    Reranker.load(fitted / "m").export(tmp_path / "m.onnx")
    scorer = OnnxScorer(tmp_path / "m.onnx")
    assert "features" in scorer.inputs
    for slate in slates_of(artefact, str(fitted / "requests.parquet")):
        assert slate.scores.shape[-1] == 2 and (slate.scores < 0).any() and slate.features.abs().sum() > 0
        agree(artefact, scorer, slate)
    in_all_sizes(artefact)


def test_the_file_says_what_it_is(fitted, tmp_path, capsys):
    assert main(["export", str(fitted / "m"), str(tmp_path / "m.onnx")]) == 0
    assert "differ from torch's by" in capsys.readouterr().out
    model = onnx.load(tmp_path / "m.onnx")
    said = {entry.key.partition(".")[2]: entry.value for entry in model.metadata_props}
    config = json.loads((fitted / "m" / "config.json").read_text())
    assert said["weights_sha256"] == config["sha256"]["model.safetensors"]
    assert said["model"] == "PRM" and said["version"] == config["written_by"] == model.producer_version
    assert json.loads(said["scores"]) == ["score", "second"]
    axes = {value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in model.graph.input}
    for name, described in json.loads(said["inputs"]).items():
        assert axes[name][: len(described["axes"])] == described["axes"]
    assert set(axes) == set(json.loads(said["inputs"]))
    assert [value.name for value in model.graph.output] == ["ranking_scores", "ranking"]


def test_inputs_that_nothing_reads_are_left_out():
    found = export_artefact(as_artefact(build("SASRec", score_fusion="none")))
    assert found.inputs == ["history", "history_mask", "candidates", "mask"]


def test_int8_is_smaller_and_ranks_much_the_same():
    artefact = as_artefact(build("PRM", d_ff=256, embedding_size=32))
    whole, small = export_artefact(artefact), export_artefact(artefact, "int8")
    assert len(small.content) < 0.6 * len(whole.content) and 1e-4 < small.difference < 1
    slate = random_slate(artefact, 64, 12, 7, seed=3)
    first, second = (OnnxScorer(found.content)(slate) for found in (whole, small))
    best = first.argmax(1)
    assert (best == second.argmax(1)).mean() > 0.7
    with pytest.raises(ConfigError, match="int4"):
        export_artefact(artefact, "int4")


# ------------------------------------------------------------------ what is refused


def test_a_model_that_cannot_be_exported_says_why(tmp_path, capsys):
    pytest.importorskip("lightgbm")
    Reranker("LambdaMART", **FAST, n_trees=3).fit(world(60)).save(tmp_path / "m")
    folder = str(tmp_path / "m")
    for command in (["export", folder, str(tmp_path / "m.onnx")], ["serve", "--runtime=onnx", folder]):
        assert main(command) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: LambdaMART cannot be exported: ") and "Traceback" not in "".join(said)
    assert not (tmp_path / "m.onnx").exists()


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'dnr_recbole\[export\]'"):
        export_artefact(as_artefact(build("MiDNN")))


class FixedSize(PRM):
    """Its tracer sees a number where there is a size."""

    def predict(self, slate):
        return super().predict(slate) / len(slate.mask)


class NoGraph(PRM):
    """It leaves torch."""

    def predict(self, slate):
        return torch.linalg.eigvals(super().predict(slate).T @ super().predict(slate)).real + super().predict(slate)


@pytest.mark.parametrize(
    "cls, message", [(FixedSize, "a size or a branch is fixed"), (NoGraph, "cannot be written as ONNX")]
)
def test_a_model_that_is_no_graph_and_does_not_say_so(cls, message):
    artefact = as_artefact(build("PRM"))
    artefact.model.__class__ = cls
    with pytest.raises(DnrError, match=message) as caught:
        export_artefact(artefact)
    assert "\n" not in str(caught.value)


class NoNumbers(OnnxScorer):
    """A runtime that makes no number of some scores."""

    def __call__(self, slate):
        found = super().__call__(slate)
        found[:, 0] = np.nan
        return found


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_scores_that_are_no_numbers_are_not_torchs(monkeypatch, quantise):
    monkeypatch.setattr("dnr_recbole.export.onnx_file.OnnxScorer", NoNumbers)
    with pytest.raises(DnrError, match="does not score as the model does .up to inf apart"):
        export_artefact(as_artefact(build("PRM")), quantise)


def test_files_that_are_none(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing of the kind")
    for path in (tmp_path / "m.onnx", tmp_path / "none.onnx"):
        with pytest.raises(CheckpointError) as caught:
            OnnxScorer(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
    with pytest.raises(DnrError, match="cannot write"):
        Reranker.export(fitted_in_memory(), "/proc/none/m.onnx")


def fitted_in_memory() -> Reranker:
    """A model that was never saved."""
    model = Reranker("MiDNN", **FAST)
    model._artefact = as_artefact(build("MiDNN"))
    return model


# ------------------------------------------------------------------ the page


def test_the_tables_are_those_of_the_results_and_hold_every_reranker(monkeypatch):
    root = ROOT
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import bench_export

    found = json.loads((root / "results" / "export.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "export.md").read_text(encoding="utf-8")
    for table in bench_export.tables(found):
        assert "\n".join(table) in page
    printed = {line for table in bench_export.tables(found) for line in table}
    own = "## What exports", "## Vespa"  # what stands before and behind has tables of its own
    assert {line for line in page[page.index(own[0]) : page.index(own[1])].splitlines() if line[:1] == "|"} == printed
    short = {name: ".".join(found["machine"][name].split(".")[:2]) for name in ("torch", "onnxruntime")}
    assert found["machine"]["cpu"] in page and f"torch {short['torch']}, onnxruntime {short['onnxruntime']}," in page
    models = {model.name: model.cls.export_refusal for model in list_models("reranker")}
    assert {name: row.get("refusal", "") for name, row in found["models"].items()} == models


# ------------------------------------------------------------------ the server


def requests(n=20, seed=3):
    return world(n, seed=seed).drop(columns=["label", "timestamp"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    for name in ("PRM", "Seq2Slate"):
        Reranker(name, **FAST).fit(world(200)).save(path / name)
    return path


@pytest.mark.parametrize("name", ["PRM", "Seq2Slate"])
def test_both_runtimes_give_the_same_answers(folder, name):
    asked = [RankRequest.model_validate(one) for one in body(requests())["requests"]]
    torch_served, served = (ServedModel.load(name, str(folder / name), runtime) for runtime in ("torch", "onnx"))
    expected = rank(torch_served.artefact, asked, True)
    served.artefact.model.predict = None  # whoever asks torch now fails
    for one, other in zip(rank(served.artefact, asked, True), expected):
        assert one.candidate.tolist() == other.candidate.tolist()
        assert {key: ranks.tolist() for key, ranks in one.ranks.items()} == {
            key: ranks.tolist() for key, ranks in other.ranks.items()
        }
        np.testing.assert_allclose(one.score, other.score, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_server_and_a_new_version(folder, tmp_path):
    for name in ("PRM", "Seq2Slate"):
        Reranker.load(folder / name).save(tmp_path / name)
    with serving("--runtime=onnx", tmp_path / "PRM", "--watch=0") as running:
        assert running.client.get("/models").json()[0]["runtime"] == "onnx"
        for version in ("PRM", "Seq2Slate"):
            Reranker.load(folder / version).save(tmp_path / "PRM")
            running.client.post("/reload")
            offline = Reranker.load(folder / version).rank(requests())
            answers = running.client.post("/rank", json=body(requests())).json()["answers"]
            online = [item["item_id"] for answer in answers for item in answer["items"]]
            assert online == offline.item_id.tolist()


def test_a_version_that_cannot_be_exported_leaves_the_old_one(folder, tmp_path):
    pytest.importorskip("lightgbm")
    Reranker.load(folder / "PRM").save(tmp_path / "m")
    models = Models({"m": str(tmp_path / "m")}, runtime="onnx")
    before = models.get("m").version
    Reranker("LambdaMART", **FAST, n_trees=3).fit(world(60)).save(tmp_path / "m")
    assert models.reload()["m"].startswith("failed: LambdaMART cannot be exported")
    assert models.get("m").version == before and models.get("m").artefact.scorer is not None
