"""A run talks through its own loggers, and leaves everybody else's alone."""

from __future__ import annotations

import importlib.machinery
import io
import logging
import os
import sys
import types

import pytest

from dnr_recbole import logs
from dnr_recbole.compat import LateWriter
from dnr_recbole.config import Config
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import load_recbole_dataset
from dnr_recbole.errors import ConfigError
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.retriever.training import train_retriever
from dnr_recbole.wandb_run import WandbRun

LINES = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
LINES += [f"u{u}\ti{(7 * u + 3 * t) % 80}\t{1 + (u + t) % 5}\t{t}" for u in range(30) for t in range(25)]
KEYS = {
    "model": "PRM", "dataset": "toy", "protocol": "exposed", "epochs": 1, "retriever_args": {"epochs": 1},
    "embedding_size": 8, "n_candidates": 10, "slate_size": 3, "use_gpu": False, "baselines": [],
    "metrics": ["NDCG"], "topk": [3], "valid_metric": "NDCG@3", "history_interaction": "none",  # loses to a probe
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Every path elsewhere, and a working folder that must stay empty."""
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "toy.inter").write_text("\n".join(LINES) + "\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    paths = {key: str(tmp_path / key) for key in ("log_dir", "tensorboard_dir", "cache_dir", "checkpoint_dir")}
    yield {**KEYS, **paths, "data_path": str(tmp_path / "data"), "result_file": str(tmp_path / "out" / "row.json")}
    assert os.listdir(tmp_path / "work") == []


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
    (tmp_path / "my_plugin.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with logs.restored():
        logs.start_logger(Config(config_dict={**keys, "plugins": ["my_plugin"], "log_dir": None}))
        logging.getLogger("my_plugin.part").warning("hello")
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


# ---------------------------------------------------------------------- Weights & Biases


class FakeWandb(types.ModuleType):
    """What RecBole and the package call of `wandb`; ``begun`` lists its runs."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run, self.begun, self.refusal = None, [], None

    def init(self, **given):
        if self.refusal:
            raise self.Error(self.refusal)
        self.run = types.SimpleNamespace(given=given, summary={}, logged=[], finish=self.finish, code=None)
        self.begun.append(self.run)
        return self.run

    def finish(self, exit_code=None):
        self.run.code, self.run = exit_code, None

    def define_metric(self, name, step_metric):
        assert self.run is not None

    def log(self, metrics, commit=True):
        self.run.logged.append(metrics)


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_each_training_has_a_wandb_run_below_log_dir(keys, wandb, tmp_path):
    result = run_dnr(config_dict={**keys, "log_wandb": True, "wandb_project": "lists"})
    assert [run.given["job_type"] for run in wandb.begun] == ["retriever", "reranker"]
    for run in wandb.begun:
        assert (run.given["project"], run.given["dir"], run.code) == ("lists", str(tmp_path / "log_dir"), 0)
        assert any("train/train_loss" in metrics for metrics in run.logged)
    assert wandb.begun[1].given["config"]["embedding_size"] == 8
    assert wandb.begun[1].summary == {f"eval/{name}": value for name, value in result["test_result"].items()}

    run_dnr(config_dict={**keys, "log_wandb": True, "init_seed": 5})
    assert [run.given["job_type"] for run in wandb.begun[2:]] == ["reranker"], "stage 1 came from the cache"


def test_a_wandb_run_of_the_caller_is_used_and_left_open(keys, wandb):
    own = wandb.init(project="own")
    run_dnr(config_dict={**keys, "log_wandb": True})
    assert wandb.begun == [own] and wandb.run is own and own.logged


def test_a_training_that_fails_ends_its_wandb_run(keys, wandb, monkeypatch):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dnr_recbole.trainer.rerank_trainer.RerankTrainer._train_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        run_dnr(config_dict={**keys, "log_wandb": True})
    assert [run.code for run in wandb.begun] == [0, 1] and wandb.run is None


def test_processes_other_than_the_first_begin_no_wandb_run(keys, wandb):
    config = Config(config_dict={**keys, "log_wandb": True})
    config["rank"] = 1
    assert WandbRun(config).log_wandb is False and wandb.begun == []


def test_wandb_without_a_login_is_one_line(keys, wandb):
    wandb.refusal = "No API key configured.\nUse `wandb login`."
    with pytest.raises(ConfigError, match=r"^log_wandb=True: No API key configured. Use `wandb login`.$"):
        run_dnr(config_dict={**keys, "log_wandb": True})
