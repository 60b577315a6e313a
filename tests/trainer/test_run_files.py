"""Which run a checkpoint belongs to: other keys, other data, other trainings and other processes never mix."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

from dnr_recbole.errors import CheckpointError
from dnr_recbole.identity import content_digest
from dnr_recbole.locks import hold
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.trainer import checkpoint

SMALL = {
    "model": "PRM",
    "dataset": "synthetic",
    "synthetic_users": 60,
    "synthetic_items": 60,
    "synthetic_requests_per_user": 4,
    "n_candidates": 12,
    "embedding_size": 8,
    "train_batch_size": 64,
    "epochs": 2,
    "use_gpu": False,
    "show_progress": False,
    "log_dir": None,
    "tensorboard_dir": None,
    "metrics": ["NDCG"],
    "dropout": 0.1,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(**keys):
    return run_dnr(config_dict={**SMALL, **keys})["row"]


def names():
    return sorted(p.name for p in Path("saved").glob("*.pth"))


def test_runs_that_differ_in_one_key_keep_their_own_files():
    first = run(epochs=1)
    before = {name: Path("saved", name).read_bytes() for name in names()}
    assert len(before) == 2
    for keys in ({"epochs": 2}, {"synthetic_noise": 0.3}, {"seed": 1}, {"init_seed": 1}, {"learning_rate": 0.1}):
        assert run(**keys)["identity"] != first["identity"]
    assert len(names()) == 12 and all(Path("saved", name).read_bytes() == content for name, content in before.items())


def test_more_epochs_go_on_from_fewer():
    whole = run(epochs=4, checkpoint_dir="whole")
    run(epochs=1)
    run(epochs=2, resume=True)
    resumed = run(epochs=4, resume=True)
    assert resumed["test"] == whole["test"] and resumed["history"] == whole["history"]
    assert [name.count("-e4") for name in names()].count(1) == 2 and len(names()) == 6


def test_other_data_is_refused():
    run()
    old = next(Path("saved").glob("*-last.pth"))
    moved = old.with_name(old.name.replace(f"-{old.name.split('-')[3]}-", "-00000000-"))
    old.rename(moved)
    with pytest.raises(CheckpointError, match="belong to other data.*start without --resume"):
        run(resume=True)
    assert run()["test"], "without --resume the run starts anew"


def test_a_changed_log_is_other_data(folder):
    def write(flip):
        rows = [
            f"{u}\t{i}\t{5 if (u * i + flip) % 3 else 1}\t{u * 100 + i}" for u in range(1, 31) for i in range(1, 41)
        ]
        path = folder / "dataset" / "mine" / "mine.inter"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows) + "\n")

    keys = {
        "dataset": "mine",
        "n_candidates": 12,
        "retriever_args": {"epochs": 1, "embedding_size": 4},
        "protocol": "exposed",
    }
    keys = {**{k: v for k, v in SMALL.items() if not k.startswith("synthetic")}, **keys}
    write(0)
    first = run_dnr(config_dict=keys)["row"]
    write(1)
    with pytest.raises(CheckpointError, match="belong to other data"):
        run_dnr(config_dict={**keys, "resume": True})
    second = run_dnr(config_dict=keys)["row"]
    assert second["identity"] != first["identity"] and second["data"] != first["data"] and len(names()) == 4
    write(0)
    again = run_dnr(config_dict={**keys, "data_path": str(folder / "dataset"), "resume": True})["row"]
    assert again["test"] == first["test"] and again["identity"] == first["identity"], "the same data somewhere else"


def test_files_of_two_trainings_are_no_pair():
    """A restart that died between its new best and its new last file leaves such a pair."""
    whole = run(epochs=3)
    best, last = sorted(Path("saved").glob("*.pth"), key=lambda p: "-last" in p.name)
    kept = last.read_bytes()
    run(epochs=3)
    last.write_bytes(kept)  # of the earlier training
    assert run(epochs=3, resume=True)["test"] == whole["test"]
    best.unlink()
    assert run(epochs=3, resume=True)["test"] == whole["test"], "without its best model a training is not gone on with"


def test_a_run_is_trained_by_one_process():
    run()
    stem = next(Path("saved").glob("*-e2.pth")).stem
    with hold(os.path.join("saved", f".{stem}.lock"), wait=False) as held:
        assert held
        with pytest.raises(CheckpointError, match="another process is training this very run"):
            run()
    run()


def test_the_same_command_twice_at_once():
    """One of them trains; the other is refused, or comes after it: nobody reports another number."""
    alone = run(checkpoint_dir="alone", epochs=6)
    keys = [f"--{k}={'null' if v is None else json.dumps(v) if isinstance(v, list) else v}" for k, v in SMALL.items()]
    command = [sys.executable, str(ROOT / "run_dnr.py"), *[k for k in keys if "epochs" not in k], "--epochs=6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([*command, f"--result_file={n}.json"], env=environment, stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    for n, (process, text) in enumerate(zip(processes, said)):
        if process.returncode == 0:
            assert json.loads(Path(f"{n}.json").read_text())["test"] == alone["test"]
        else:
            assert process.returncode == 1 and "another process is training this very run" in text
            assert "Traceback" not in text and not Path(f"{n}.json").exists()
    assert 0 in [process.returncode for process in processes]


# ---------------------------------------------------------------------- content


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    row = run_dnr(config_dict={**SMALL, "checkpoint_dir": str(folder)})["row"]
    return folder, row


def test_no_damage_is_used_silently(trained, tmp_path):
    """One flipped bit anywhere: the file is refused, or its content is the same as before."""
    folder, _ = trained
    r = random.Random(3)
    for source in sorted(folder.glob("*.pth")):
        original, data = content_digest(strip(checkpoint.load(str(source)))), source.read_bytes()
        refused = 0
        for _ in range(60):
            damaged = bytearray(data)
            damaged[r.randrange(len(data))] ^= 1 << r.randrange(8)
            path = tmp_path / "damaged.pth"
            path.write_bytes(damaged)
            try:
                assert content_digest(strip(checkpoint.load(str(path)))) == original
            except CheckpointError as error:
                assert "damaged.pth" in str(error) and "\n" not in str(error)
                refused += 1
        assert refused > 20


def strip(content):
    return {**content, "meta": content["meta"].model_dump()}


HOSTILE = {
    "no meta": None,
    "a list": [],
    "no model": {"model": None},
    "a number": {"model": 3},
    "unknown model": {"model": "Nobody"},
    "no config": {"config": None},
    "empty config": {"config": {}},
    "wrong sizes": {"config": {"embedding_size": "x"}},
    "huge": {"catalogue": {"n_users": 10**9, "n_items": 10**9}},
    "no catalogue": {"catalogue": []},
    "negative epoch": {"epoch": -5},
    "text epoch": {"epoch": "later"},
    "history": {"history": [3]},
    "scores": {"best_valid_result": 3},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metas_are_refused_in_one_line(trained, tmp_path, name):
    """Signed as a file of ours would be: the checksum is no defence against somebody who writes one."""
    folder, _ = trained
    source = next(p for p in folder.glob("*.pth") if "-last" not in p.name)
    content = torch.load(source, weights_only=True)
    change = HOSTILE[name]
    if isinstance(change, dict):
        meta = json.loads(content["meta"])
        for key, value in change.items():
            meta[key] = {**meta[key], **value} if isinstance(value, dict) and value else value
        change = meta
    content["meta"] = json.dumps(change)
    content.pop("checksum")
    path = tmp_path / "hostile.pth"
    torch.save({**content, "checksum": content_digest(content)}, path)
    with pytest.raises(Exception) as caught:
        checkpoint.load_reranker(str(path))
        pytest.skip("this change does no harm")
    from dnr_recbole.errors import DnrError

    assert isinstance(caught.value, DnrError) and "\n" not in str(caught.value)


def test_an_edited_last_file_is_not_gone_on_with(trained, tmp_path):
    folder, _ = trained
    for source in folder.glob("*.pth"):
        shutil.copy(source, tmp_path)
    last = next(tmp_path.glob("*-last.pth"))
    content = torch.load(last, weights_only=True)
    content["meta"] = content["meta"].replace('"epoch": 1', '"epoch": 0', 1)
    torch.save(content, last)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        run_dnr(config_dict={**SMALL, "checkpoint_dir": str(tmp_path), "resume": True})


def test_a_key_that_is_younger_than_a_checkpoint_has_its_earlier_value(trained, monkeypatch):
    folder, _ = trained
    path = str(next(p for p in folder.glob("*.pth") if "-last" not in p.name))
    content = checkpoint.load(path)
    stored = {k: v for k, v in content["meta"].config.items() if k not in ("use_popularity", "layer_scale")}
    from dnr_recbole.config_schema import Key, recbole_keys
    from dnr_recbole.registry import get_reranker

    cls = get_reranker("PRM")
    assert checkpoint.SavedConfig(cls, stored)["use_popularity"] is True, "its default"
    assert checkpoint.SavedConfig(cls, stored)["layer_scale"] is None
    young = Key(name="tail_ratio", type="float", scope="evaluation", earlier=0.5, was=["tail_share"])
    monkeypatch.setitem(recbole_keys(), "tail_ratio", young)
    assert checkpoint.SavedConfig(cls, stored)["tail_ratio"] == 0.5
    assert checkpoint.SavedConfig(cls, {**stored, "tail_share": 0.7})["tail_ratio"] == 0.7
    assert checkpoint.SavedConfig(cls, {**stored, "tail_ratio": 0.9})["tail_ratio"] == 0.9


def test_checkpoints_of_the_first_format_load(trained, tmp_path):
    folder, _ = trained
    source = next(p for p in folder.glob("*.pth") if "-last" not in p.name)
    content = torch.load(source, weights_only=True)
    content.pop("checksum")
    path = tmp_path / "old.pth"
    torch.save({**content, "format": 1}, path)
    model, config = checkpoint.load_reranker(str(path))
    assert type(model).__name__ == "PRM" and config["embedding_size"] == 8
    torch.save({**content, "format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99, this version reads 1 and 2"):
        checkpoint.load(str(path))
    assert json.loads(content["meta"])["written_by"]
