"""Nothing half-written stays: not after an error, and not after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from dnr_recbole import files
from dnr_recbole.errors import DnrError


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def name_of(tmp_path, **parts) -> Path:
    own = files._TEMPORARY.fullmatch(os.path.basename(files.temporary_name(tmp_path / "a.pth"))).groupdict()
    own.update(parts)
    return tmp_path / ".a.pth.{host}-{pid}-{start}-0123abcd.tmp".format(**own)


def test_a_write_is_whole_or_does_not_happen(tmp_path):
    target = tmp_path / "new" / "a.json"
    files.write_json(target, {"a": 1})
    assert target.read_text() == '{\n  "a": 1\n}'
    with pytest.raises(KeyboardInterrupt), files.atomic_write(target) as file:
        file.write(b"half")
        assert len(list(target.parent.iterdir())) == 2
        raise KeyboardInterrupt
    assert target.read_text() == '{\n  "a": 1\n}' and list(target.parent.iterdir()) == [target]


def test_links_are_followed_and_devices_written_directly(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_json(tmp_path / "link", [])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "[]"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_json(pipe, [1])
    assert os.read(reader, 100) == b"[\n  1\n]" and pipe.is_fifo()


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DnrError, match=f"cannot write output_file {tmp_path}"):
        files.write_json(tmp_path, {}, "output_file")
    (tmp_path / "file").write_text("")
    with pytest.raises(DnrError, match="result_file"):
        files.write_json(tmp_path / "file" / "a.json", {})


def test_what_a_dead_process_left_is_swept_and_nothing_else(tmp_path):
    mine, other = tmp_path / "notes.tmp", Path(files.temporary_name(tmp_path / "b"))
    reused = name_of(tmp_path, start=1)  # the number lives, but began at another time
    dead, folder = name_of(tmp_path, pid=dead_pid()), name_of(tmp_path, pid=dead_pid(), start=3)
    folder.mkdir()
    (folder / "tensors.pt").write_text("")
    for path in (mine, other, reused, dead):
        path.write_text("")
    away, old = name_of(tmp_path, host="00000000"), name_of(tmp_path, host="00000000", pid=7)
    for path in (away, old):
        path.write_text("")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    swept = 4 if sys.platform == "linux" else 3
    assert files.sweep(tmp_path) == swept
    assert {p.name for p in tmp_path.iterdir()} - {reused.name} == {mine.name, other.name, away.name}
    assert files.sweep(tmp_path / "absent") == 0


def test_a_process_killed_while_it_writes_is_swept(tmp_path):
    code = (
        "import os, signal, sys; from dnr_recbole.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file: os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pth")], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1
    assert files.sweep(tmp_path) == 1 and not list(tmp_path.iterdir())
