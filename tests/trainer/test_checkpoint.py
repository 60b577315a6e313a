"""Checkpoints: whole or absent, readable without pickle, refused where they do not fit."""

from __future__ import annotations

import errno

import pytest
import torch

from dnr_recbole import files
from dnr_recbole.errors import CheckpointError, ConfigError
from dnr_recbole.testing import build, random_catalogue, random_slate
from dnr_recbole.trainer import checkpoint


def meta(model, config, catalogue):
    return {"model": type(model).__name__, "config": config, "catalogue": catalogue.shapes()}


@pytest.fixture
def saved(tmp_path):
    from dnr_recbole.testing import model_config

    config, catalogue = model_config("PRM"), random_catalogue()
    model = build("PRM", config, catalogue)
    path = str(tmp_path / "m.pth")
    checkpoint.save(path, meta(model, config.as_dict(), catalogue), state_dict=model.state_dict())
    return model, path


def test_a_checkpoint_alone_rebuilds_the_model(saved):
    model, path = saved
    other, config = checkpoint.load_reranker(path)
    slate = random_slate()
    torch.testing.assert_close(model.predict(slate), other.predict(slate), atol=0, rtol=0)
    assert config["embedding_size"] == 16 and config["epochs"] >= 1
    with pytest.raises(ConfigError, match="'no such key' is read"):
        config["no such key"]


def test_a_checkpoint_of_another_model_is_refused(saved):
    _, path = saved
    with pytest.raises(CheckpointError, match="holds a PRM, not a DLCM"):
        checkpoint.load_state(build("DLCM"), checkpoint.load(path), path)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load_state(build("PRM", embedding_size=32), checkpoint.load(path), path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(saved, damage):
    _, path = saved
    content = open(path, "rb").read()
    with open(path, "wb") as f:
        f.write(damage(content))
    with pytest.raises(CheckpointError, match="m.pth"):
        checkpoint.load(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.pth"):
        checkpoint.load(str(tmp_path / "nothing.pth"))


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved, tmp_path, monkeypatch):
    model, path = saved
    before = open(path, "rb").read()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left|cannot write"):
        checkpoint.save(path, {"model": "PRM"}, state_dict=model.state_dict())
    monkeypatch.undo()
    assert open(path, "rb").read() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_random_generators_continue_where_they_were():
    import random

    import numpy as np

    state = checkpoint.rng_state()
    draw = lambda: (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: E731
    first = draw()
    draw()
    checkpoint.set_rng_state(state)
    assert draw() == first
