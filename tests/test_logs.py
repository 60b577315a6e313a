"""A run talks through its own loggers, and leaves everybody else's alone."""

from __future__ import annotations

import io
import logging
import os
import sys

import pytest
from toy_run import toy_keys

from dnr_recbole import logs
from dnr_recbole.compat import LateWriter
from dnr_recbole.config import Config
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import load_recbole_dataset
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.retriever.training import train_retriever


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def keys(tmp_path, monkeypatch):
    yield from toy_keys(tmp_path, monkeypatch)


@pytest.fixture
def root():
    """The root logger of a service: a handler and a level of its own, and nothing of pytest's."""
    logger = logging.getLogger()
    before, level = logger.handlers[:], logger.level
    logger.handlers[:] = [logging.StreamHandler(io.StringIO())]
    logger.setLevel(logging.WARNING)
    yield logger
    logger.handlers[:] = before
    logger.setLevel(level)


def state():
    loggers = [logging.getLogger(name) for name in ("", "dnr_recbole", "recbole")]
    return [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]


def test_handlers_survive_and_nothing_is_said_twice(keys, root, tmp_path, monkeypatch):
    before = state()
    for attempt in (1, 2):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        run_dnr(config_dict={**keys, "use_cache": False})
        assert state() == before
        said = sys.stderr.getvalue()
        files = sorted((tmp_path / "log_dir" / "PRM").iterdir(), key=os.path.getmtime)
        written = files[-1].read_text()
        # What RecBole says itself about both stages, and what we do; no colours where nobody sees them.
        for text in (said, written):
            assert text.count("epoch 0 training") == 2, attempt  # one of each stage
            assert text.count("retriever MF fitted") == 1 and text.count("General Hyper Parameters") == 1
            assert "\x1b" not in text and "it/s" not in text
    # The service asked for warnings only.
    heard = root.handlers[0].stream.getvalue()
    assert "no model, just" in heard and "epoch 0" not in heard
    folders = {p.parent.name for p in (tmp_path / "tensorboard_dir").rglob("*tfevents*")}
    assert "retriever" in folders and any(name.startswith("PRM-toy-") for name in folders)


def test_a_root_handler_on_the_console_says_it_instead_of_ours(keys, root, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    root.addHandler(logging.StreamHandler(sys.stderr))
    with logs.restored():
        logs.start_logger(Config(config_dict=keys))
        logging.getLogger("dnr_recbole.x").warning("once")
        logging.getLogger("recbole.y").info("ours alone")
        logging.getLogger("other").info("theirs")
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["once", "alone"]
    assert "once" in root.handlers[0].stream.getvalue()


def test_a_run_within_a_run_hands_back(keys, monkeypatch, root):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logger = logging.getLogger("dnr_recbole")
    with logs.restored():
        logs.start_logger(Config(config_dict={**keys, "log_dir": None}))
        outer = logger.handlers[:]
        with logs.restored():
            logs.start_logger(Config(config_dict=keys), quiet=True)
            logger.warning("unheard")
            logs.start_logger(Config(config_dict=keys))
            assert len(logger.handlers) == 3 and not set(logger.handlers) & set(outer)
        assert logger.handlers == outer and logger.level == logging.INFO
        logger.info("heard")
    assert [line.split()[-1] for line in sys.stderr.getvalue().splitlines()] == ["heard"]


def test_loggers_of_plugins_are_heard(keys, monkeypatch, root, tmp_path):
    (tmp_path / "plugin_that_speaks.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with logs.restored():
        logs.start_logger(Config(config_dict={**keys, "plugins": ["plugin_that_speaks"], "log_dir": None}))
        logging.getLogger("plugin_that_speaks.part").warning("hello")
    assert sys.stderr.getvalue().count("hello") == 1 and "\x1b[33m" in sys.stderr.getvalue()  # yellow


def test_only_errors_of_other_ranks(keys, monkeypatch, root, tmp_path):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    config = Config(config_dict=keys)
    config["rank"] = 1
    with logs.restored():
        logs.start_logger(config)
        logging.getLogger("dnr_recbole").warning("no")
        logging.getLogger("dnr_recbole").error("yes")
    assert "yes" in sys.stderr.getvalue() and "no" not in sys.stderr.getvalue()
    assert not (tmp_path / "log_dir").exists()


def test_nothing_is_written_where_null_is_said(keys, tmp_path):
    run_dnr(config_dict={**keys, "log_dir": None, "tensorboard_dir": None, "result_file": None}, saved=False)
    assert {p.name for p in tmp_path.iterdir()} <= {"data", "work", "cache_dir", "checkpoint_dir"}
    assert not list((tmp_path / "checkpoint_dir").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(keys, monkeypatch, root):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with logs.restored():
        logs.start_logger(Config(config_dict=keys), path="/dev/full")
        for _ in range(3):
            logging.getLogger("dnr_recbole").info("a line")
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split()[-1] for line in lines].count("line") == 3 and len(lines) == 4
    assert sum("/dev/full cannot be written (No space left on device)" in line for line in lines) == 1


def test_tensorboard_goes_silent_too(tmp_path, monkeypatch, caplog, capfd):
    (tmp_path / "file").write_text("")
    board = logs.TensorBoard(str(tmp_path / "file" / "below"))
    for step in range(3):
        board.add_scalar("loss", 1.0, step)
    board.close()
    assert len([r for r in caplog.records if "TensorBoard" in r.getMessage()]) == 1
    assert "Traceback" not in capfd.readouterr().err
    logs.TensorBoard().add_hparams({}, {})  # without a folder: nothing, for whatever a trainer calls
    opened = []
    late = LateWriter(lambda: opened.append(1) or logs.TensorBoard())
    late.close()
    assert opened == []
    late.add_scalar("loss", 1.0)
    late.flush()
    assert opened == [1]


def test_progress_bars_are_for_terminals(keys, monkeypatch):
    config = Config(config_dict=keys)
    for stream, shown in ((io.StringIO(), False), (Terminal(), True), (None, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert logs.shows_progress(config) is shown
    config["show_progress"] = False
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert logs.shows_progress(config) is False


def test_stage_one_alone_respects_its_paths_too(keys, tmp_path):
    config = Config(config_dict={**keys, "use_cache": False})
    dataset = load_recbole_dataset(config)
    train_retriever(config, dataset, Interactions.from_recbole(dataset, config))
    assert list((tmp_path / "tensorboard_dir").rglob("*tfevents*"))
