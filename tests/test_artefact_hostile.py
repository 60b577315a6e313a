"""Artefacts that somebody has altered, checksums and all: one line says so, and a server goes on with what it has."""

from __future__ import annotations

import copy
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from serving_helpers import FAST, rich

from dnr_recbole import Reranker
from dnr_recbole.artefact import load_artefact
from dnr_recbole.errors import DnrError
from dnr_recbole.identity import file_digest
from dnr_recbole.serving.models import Models, ServedModel


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    keys = {**FAST, "log_features": ["price", "device", "embedding"], "score_calibration": "logistic"}
    path = tmp_path_factory.mktemp("hostile") / "m"
    Reranker("PRM", **keys).fit(rich(120)).save(path)
    return path


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def sealed(folder) -> None:
    """Checksums of whatever stands there now."""
    content = json.loads((folder / "config.json").read_text())
    content["sha256"] = {name: file_digest(folder / name) for name in os.listdir(folder) if name != "config.json"}
    (folder / "config.json").write_text(json.dumps(content))


def refused(folder) -> str:
    with pytest.raises(DnrError) as error:
        ServedModel.load("m", str(folder))
    text = str(error.value)
    assert "\n" not in text and str(folder) in text, text
    return text


def with_tensors(folder, name, change) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def a_weight(tensors) -> str:
    return next(name for name, values in tensors.items() if values.ndim == 2 and values.dtype == np.float32)


TENSORS = {
    "NaN": lambda t: [t[name].fill(np.nan) for name in t if t[name].dtype == np.float32],
    "one is gone": lambda t: t.pop(a_weight(t)),
    "another shape": lambda t: t.update({a_weight(t): np.zeros((3, 3), np.float32)}),
    "one more": lambda t: t.update({"../../weight": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("what", TENSORS)
def test_altered_weights(folder, what):
    with_tensors(folder, "model.safetensors", TENSORS[what])
    assert "does not match its checksum" in refused(folder)
    sealed(folder)
    refused(folder)


def test_a_table_of_a_size_that_nobody_has(folder):
    content = json.loads((folder / "config.json").read_text())
    for name in ("n_items", "n_users"):
        claimed = {**content, "catalogue": {**content["catalogue"], name: 10**13}}
        (folder / "config.json").write_text(json.dumps(claimed))
        assert "the vocabulary does not fit the model" in refused(folder)


def test_names_of_files_lead_nowhere_else(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    content = json.loads((folder / "config.json").read_text())
    for name in ("../secret", str(tmp_path / "secret"), "..", ".", "", "m/../../secret", "sub/secret"):
        altered = {**content, "sha256": {**content["sha256"], name: file_digest(tmp_path / "secret")}}
        (folder / "config.json").write_text(json.dumps(altered))
        message = refused(folder)
        assert "is no file in it" in message or "is missing" in message


def test_a_file_without_a_checksum_is_not_read(folder):
    content = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "sample.parquet", "preprocessor.json"):
        some = {file: digest for file, digest in content["sha256"].items() if file != name}
        (folder / "config.json").write_text(json.dumps({**content, "sha256": some}))
        assert "has no checksum" in refused(folder)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "notes.txt").write_text("what this model is for")
    assert load_artefact(str(folder)).sample is not None, "notes of people do not matter"


def test_the_name_of_the_dataset_leads_to_no_other_file(folder, tmp_path):
    (tmp_path / "evil.yaml").write_text("embedding_size: {default: 9, type: int, help: another's, scope: training}")
    content = json.loads((folder / "config.json").read_text())
    for name in (str(tmp_path / "evil"), f"../../../../../../../../{tmp_path}/evil", "\0", "a" * 5000, None, {"a": 1}):
        altered = {**content, "config": {**content["config"], "dataset": name}}
        (folder / "config.json").write_text(json.dumps(altered))
        try:
            assert load_artefact(str(folder)).config["embedding_size"] == FAST["embedding_size"]
        except DnrError as error:
            assert "evil" not in str(error)


def test_plugins_of_an_artefact_are_not_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_plugin.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = json.loads((folder / "config.json").read_text())
    altered = {**content, "config": {**content["config"], "plugins": ["evil_plugin"]}}
    (folder / "config.json").write_text(json.dumps(altered))
    load_artefact(str(folder))


JSON = {
    "deep": "[" * 100_000,
    "a list": "[]",
    "NaN": "NaN",
    "bytes": "\ufeff{}",
    "yaml": "!!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("name", ["config.json", "preprocessor.json", "metrics.json"])
@pytest.mark.parametrize("what", JSON)
def test_strange_texts(folder, name, what):
    (folder / name).write_text(JSON[what])
    if name != "config.json":
        sealed(folder)
    refused(folder)


def parts(content, path=()):
    if path:
        yield path
    if isinstance(content, dict):
        for name, value in content.items():
            yield from parts(value, (*path, name))


ODD = [
    None,
    True,
    "x",
    "../x",
    "nan",
    -1,
    0,
    10**12,
    1e308,
    -0.5,
    [],
    {},
    [[]],
    ["x"] * 9,
    {"kind": "number"},
    float("nan"),
]
FUZZ = settings(
    derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", ["preprocessor.json", "config.json"])
@FUZZ
@given(data=st.data())
def test_any_value_may_be_another(original, tmp_path_factory, name, data):
    """Either the model still ranks, or one line says why not."""
    folder = tmp_path_factory.mktemp("altered") / "m"
    shutil.copytree(original, folder)
    content = json.loads((folder / name).read_text())
    keys = {"preprocessor.json": ("until",), "config.json": ("sha256", "written_by")}[name]
    path = data.draw(st.sampled_from([path for path in parts(content) if path[0] not in keys]))
    altered = copy.deepcopy(content)
    holder = altered
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = data.draw(st.sampled_from(ODD))
    (folder / name).write_text(json.dumps(altered))
    if name != "config.json":
        sealed(folder)
    try:
        assert len(ServedModel.load("m", str(folder)).samples) <= 50
    except DnrError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("what", ["other columns", "other types", "empty", "no parquet"])
def test_held_out_requests_of_another_kind(folder, what):
    frame = pd.read_parquet(folder / "sample.parquet")
    if what == "other columns":
        pd.DataFrame({"a": [1]}).to_parquet(folder / "sample.parquet")
    elif what == "other types":
        frame.assign(score="x", label="y").to_parquet(folder / "sample.parquet")
    elif what == "empty":
        frame.head(0).to_parquet(folder / "sample.parquet")
    else:
        (folder / "sample.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    sealed(folder)
    if what == "empty":
        assert ServedModel.load("m", str(folder)).samples == []
    else:
        refused(folder)


def test_a_server_goes_on_with_the_old_one(folder):
    models = Models({"m": str(folder)})
    version = models.get("m").version
    with_tensors(folder, "model.safetensors", TENSORS["NaN"])
    sealed(folder)
    outcome = models.reload()
    assert outcome["m"].startswith("failed") and "no numbers" in outcome["m"]
    assert models.get("m").version == version
