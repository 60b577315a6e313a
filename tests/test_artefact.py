"""The directory that serves: whole or not at all, readable by eye, nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import stat

import numpy as np
import pandas as pd
import pytest
from log_helpers import world

from dnr_recbole import Reranker
from dnr_recbole.artefact import load_artefact, save_artefact
from dnr_recbole.errors import CheckpointError, DnrError
from dnr_recbole.identity import file_digest

FAST = {"epochs": 1, "embedding_size": 16, "train_batch_size": 64, "use_gpu": False, "baselines": []}
FILES = {
    "README.md", "config.json", "histories.safetensors", "metrics.json", "model.safetensors", "preprocessor.json",
    "sample.parquet", "vocabulary.parquet",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Reranker("PRM", **FAST).fit(world(200))


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "m")
    return tmp_path / "m"


def test_what_is_in_it(folder, model):
    assert set(os.listdir(folder)) == FILES
    assert os.listdir(folder.parent) == ["m"], "nothing half-written is left"
    card = (folder / "README.md").read_text()
    assert "# PRM" in card and "score_desc" in card and "Reranker.load" in card and "personal data" in card
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"test", "probes", "command", "versions", "seed"} <= set(metrics)
    assert all(stat.S_IMODE(os.stat(folder / name).st_mode) & 0o044 for name in FILES), "a server may be another user"


def test_personal_data_can_be_left_out(model, tmp_path):
    model.save(tmp_path / "m", with_users=False)
    assert set(os.listdir(tmp_path / "m")) == FILES - {"histories.safetensors", "sample.parquet"}
    request = world(5).drop(columns="label")
    assert len(Reranker.load(tmp_path / "m").rank(request)) == len(request)


def test_loading_gives_the_same_scores(folder, model):
    request = world(20, seed=3).drop(columns="label")
    pd.testing.assert_frame_equal(Reranker.load(folder).rank(request), model.rank(request))
    again = Reranker.load(folder)
    again.save(folder)  # replaces it
    pd.testing.assert_frame_equal(Reranker.load(folder).rank(request), model.rank(request))
    assert again.report == model.report


def test_no_folder_that_is_no_artefact_is_replaced(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no artefact"):
        model.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_one(folder, model, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in FILES}
    monkeypatch.setattr("dnr_recbole.artefact.writing.model_card", lambda artefact: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert os.listdir(folder.parent) == ["m"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor.json", "vocabulary.parquet"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "garbage", "pickle"])
def test_damage_is_said_in_a_line(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        evil = pickle.dumps(_Evil())
        half = content[: len(content) // 2]
        path.write_bytes({"empty": b"", "cut": half, "garbage": b"\x00\xff" * 50, "pickle": evil}[damage])
    with pytest.raises(DnrError) as error:
        load_artefact(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(_Evil.trace), "something was executed"


class _Evil:
    trace = "/tmp/dnr_recbole_was_here"

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_other_versions_and_other_models(folder):
    content = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format": 99, "written_by": "9.0"}, "artefact format 99 .written by version 9.0"),
        ({"model": "PRMM"}, "unknown reranker 'PRMM'"),
        ({"model": "MiDNN"}, "damaged"),
        ({"catalogue": {**content["catalogue"], "n_items": 10**3}}, "damaged"),
    ):
        (folder / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(DnrError, match=message):
            load_artefact(str(folder))
    with pytest.raises(CheckpointError, match="no artefact at"):
        load_artefact(str(folder.parent / "nowhere"))


def test_histories_that_point_elsewhere_are_refused(folder):
    from safetensors.numpy import load_file, save_file

    path = folder / "histories.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "items": tensors["items"] + 10**6}, path)
    with pytest.raises(CheckpointError, match="checksum"):
        load_artefact(str(folder))
    content = json.loads((folder / "config.json").read_text())
    content["sha256"][path.name] = file_digest(path)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="stored histories"):
        load_artefact(str(folder))


def test_trees_are_kept_as_text(tmp_path):
    pytest.importorskip("lightgbm")
    model = Reranker("LambdaMART", **FAST).fit(world(300))
    model.save(tmp_path / "m")
    assert (tmp_path / "m" / "model.trees.txt").read_text().startswith("tree\n")
    request = world(20, seed=3).drop(columns="label")
    pd.testing.assert_frame_equal(Reranker.load(tmp_path / "m").rank(request), model.rank(request))
    text = (tmp_path / "m" / "model.trees.txt").read_text()
    (tmp_path / "m" / "model.trees.txt").write_text(text.replace("leaf_value", "leaf_v4lue", 1))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        Reranker.load(tmp_path / "m")


def test_an_artefact_can_be_written_by_hand_and_read_again(model, tmp_path):
    save_artefact(str(tmp_path / "a" / "b" / "m"), model.artefact)
    artefact = load_artefact(str(tmp_path / "a" / "b" / "m"))
    np.testing.assert_array_equal(artefact.preprocessor.histories.items, model.artefact.preprocessor.histories.items)
    assert artefact.preprocessor.to_dict() == model.artefact.preprocessor.to_dict()
