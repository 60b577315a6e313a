"""What is recorded: cut lines are left out and counted, and nothing is acknowledged that is not on the disk."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
from places import ROOT

from dnr_recbole.cli import main
from dnr_recbole.convert import served
from dnr_recbole.serving.records import Records


def message(name: str, **more) -> dict:
    return {"request_id": name, "clicked": ["a"], "exposed": None, **more}


def answer(name: str) -> dict:
    values = {"score": 0.5, "tags": ["x", "y"], "embedding": [0.5, 1.0], "category": "a"}
    items = [{"item_id": item, "rank": rank, "values": values} for rank, item in enumerate("abc")]
    return {"request_id": name, "user_id": "u", "history": None, "model": "m", "version": "v", "items": items}


def lines(folder, name="feedback.jsonl"):
    """The request of each line; None where it was cut."""
    out = []
    for line in (folder / name).read_bytes().split(b"\n")[:-1]:
        try:
            out.append(json.loads(line)["request_id"])
        except ValueError:
            out.append(None)
    return out


def test_a_cut_line_is_ended_before_the_next(tmp_path):
    (tmp_path / "feedback.jsonl").write_bytes(b'{"request_id": "cut"')
    records = Records(str(tmp_path))
    asyncio.run(records.feedback(message("r")))
    asyncio.run(records.feedback(message("s")))
    records.close()
    assert lines(tmp_path) == [None, "r", "s"]


class Partial:
    """A file on a disk with room for ``room`` bytes."""

    def __init__(self, file, room: int):
        self.file, self.room, self.name = file, room, file.name

    def write(self, content: bytes) -> int:
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        written = self.file.write(content[: min(self.room, 7)])  # a few bytes at a time
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 20, 40, 62, 63, 64, 100])
def test_no_line_is_glued_to_one_that_a_full_disk_has_cut(tmp_path, room):
    records = Records(str(tmp_path))
    asyncio.run(records.feedback(message("first")))
    whole = records._files["feedback.jsonl"]
    disk = records._files["feedback.jsonl"] = Partial(whole, room)
    told = []
    for name in ("second", "third"):
        try:
            asyncio.run(records.feedback(message(name)))
            told.append(name)
        except OSError as error:
            assert error.strerror == "No space left on device"
    disk.room = 10**6  # somebody has made room
    asyncio.run(records.feedback(message("last")))
    records.close()
    found = lines(tmp_path)
    assert [name for name in found if name in ("first", *told, "last")] == ["first", *told, "last"]
    assert found.count(None) <= 1 and (tmp_path / "feedback.jsonl").read_bytes().endswith(b"\n")


def test_a_full_disk_is_said_and_nothing_is_acknowledged(tmp_path, monkeypatch):
    records = Records(str(tmp_path))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            asyncio.run(records.feedback(message("r")))
    asyncio.run(records.feedback(message("s")))
    records.close()


LIMITED = """
    import asyncio, json, resource, sys
    from dnr_recbole.serving.records import Records
    from test_serving_records import answer, message
    folder, limit = sys.argv[1], int(sys.argv[2])
    records = Records(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    kept = []
    for number in range(60):
        records.answer(answer(f"r{number}"))
        try:
            asyncio.run(records.feedback(message(f"r{number}")))
            kept.append(f"r{number}")
        except OSError:
            pass
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    records.answer(answer("last"))
    asyncio.run(records.feedback(message("last")))
    records.close()
    print(json.dumps({"kept": kept, "dropped": records.dropped}))
"""


def test_a_file_at_the_systems_limit(tmp_path):
    """Real short writes: the system takes what still fits and then refuses."""
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + textwrap.dedent(LIMITED)
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "serving")])}
    command = [sys.executable, "-c", code, str(tmp_path), "2000"]
    said = json.loads(subprocess.run(command, env=here, check=True, capture_output=True, text=True).stdout)
    assert 0 < len(said["kept"]) < 60 and said["dropped"] > 0
    found = lines(tmp_path)
    assert [name for name in found if name] == [*said["kept"], "last"] and found.count(None) == 1
    answers = lines(tmp_path, "answers.jsonl")
    assert answers[-2:] == [None, "last"] and len([name for name in answers if name]) == 61 - said["dropped"]
    log, printed = converted(tmp_path)
    assert "lines that a crash has cut: 2" in printed
    assert log.request_id.unique().tolist() == [name for name in answers if name]
    assert list(log.tags[0]) == ["x", "y"] and list(log.embedding[0]) == [0.5, 1.0] and log.category[0] == "a"


def converted(folder):
    command = [sys.executable, "-m", "dnr_recbole", "convert", "served", str(folder), str(folder / "log.parquet")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return pd.read_parquet(folder / "log.parquet"), done.stdout + done.stderr


def test_fields_do_not_take_the_place_of_columns(tmp_path):
    values = {"score": 0.5, "label": 1, "items": "x", "randomised": True, "examination": 0.5, "colour": "red"}
    said = {**answer("r"), "time": 5.0, "items": [{"item_id": "a", "rank": 0, "values": values}]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(said) + "\n")
    log, _ = converted(tmp_path)
    taken = {"item_label", "item_items", "item_randomised", "item_examination"}
    assert set(log) >= taken | {"colour"} and log.label.tolist() == [0]
    assert not set(log) & {"items", "randomised", "examination"}


@pytest.mark.parametrize("items", [[5], [{}], [{"item_id": "a", "rank": 0, "values": []}], [{"values": {}}]])
def test_lines_that_are_no_answers_are_left_out(tmp_path, items):
    said = [{**answer("r"), "time": 5.0}, {**answer("s"), "time": 5.0, "items": items}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said))
    log, printed = converted(tmp_path)
    assert log.request_id.unique().tolist() == ["r"] and "lines that a crash has cut: 1" in printed


@pytest.mark.parametrize("cut", [0, 9])
def test_a_server_may_write_while_its_records_are_read(tmp_path, monkeypatch, cut):
    """Its next answers, one of them half-written at first, are the next conversion's."""
    own = [json.dumps({**answer(f"r{n}"), "time": 5.0}).encode() + b"\n" for n in range(4)]
    (tmp_path / "answers.jsonl").write_bytes(b"".join(own[:2]) + own[2][:cut])
    passes, lines = [], served._lines

    def watched(path, *given):
        passes.append(path.name)
        if passes.count("answers.jsonl") == 2:
            with open(tmp_path / "answers.jsonl", "ab") as file:
                file.write(own[2][cut:] + own[3])
        return lines(path, *given)

    monkeypatch.setattr(served, "_lines", watched)
    assert main(["convert", "served", str(tmp_path), str(tmp_path / "log.parquet")]) == 0
    assert pd.read_parquet(tmp_path / "log.parquet").request_id.unique().tolist() == ["r0", "r1"]


def test_every_place_at_which_a_kill_may_cut(tmp_path, capsys):
    whole = {name: [json.dumps({**one(f"r{n}"), "time": 5.0}).encode() + b"\n" for n in range(3)]
             for name, one in (("answers.jsonl", answer), ("feedback.jsonl", message))}  # fmt: skip
    folder, last = tmp_path, whole["feedback.jsonl"][-1]
    (folder / "answers.jsonl").write_bytes(b"".join(whole["answers.jsonl"]))
    for cut in range(0, len(last), 7):
        (folder / "feedback.jsonl").write_bytes(b"".join(whole["feedback.jsonl"][:-1]) + last[:cut])
        assert main(["convert", "served", str(folder), str(folder / "log.parquet")]) == 0
        printed = capsys.readouterr()
        assert ("lines that a crash has cut" in printed.out + printed.err) == (0 < cut < len(last) - 1)
        assert pd.read_parquet(folder / "log.parquet").label.sum() == 2 + (cut >= len(last) - 1)


@pytest.mark.parametrize("line", [b'{"request_id": "r"}', b'{"request_id": "r", "clicked": 5}', b"\0" * 50, b"[" * 5000,
                                  b'{"clicked": []}', b"\xff\xfe", b'"text"', b"5"])  # fmt: skip
def test_lines_that_hold_no_message_are_counted(tmp_path, line, capsys):
    records = Records(str(tmp_path))
    records.answer(answer("r"))
    asyncio.run(records.feedback(message("r")))
    records.close()
    for name in ("answers.jsonl", "feedback.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(line + b"\n")
    assert main(["convert", "served", str(tmp_path), str(tmp_path / "log.parquet")]) == 0
    printed = capsys.readouterr()
    assert "lines that a crash has cut: 2" in printed.out + printed.err
    assert pd.read_parquet(tmp_path / "log.parquet").label.tolist() == [1, 0, 0]
