"""Every repair of RecBole: it is in place, needed, and applied once."""

import ast
import json
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import Dataset
from recbole.trainer import Trainer
from recbole.utils import get_trainer, init_seed

import dnr_recbole
from dnr_recbole import compat
from dnr_recbole.config import Config
from dnr_recbole.registry import get_retriever


def test_numpy_aliases_that_recbole_and_ray_need():
    for name in (
        "bool",
        "int",
        "float",
        "complex",
        "object",
        "str",
        "long",
        "unicode",
        "float_",
        "unicode_",
        "bool8",
    ):
        assert hasattr(np, name), name
    assert np.zeros(1, dtype=np.float).dtype == np.float64


def test_dok_matrix_update():
    matrix = sp.dok_matrix((2, 2), dtype=np.float32)
    matrix._update({(0, 1): 1.0})
    assert matrix.tocsr()[0, 1] == 1.0


def test_pandas_3_is_refused(monkeypatch):
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: "3.0.1")
    with pytest.raises(ImportError, match="pip install 'pandas<3'"):
        compat.apply()


def test_a_missing_recbole_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps recbole==1.2.1"):
        compat.apply()


def test_applying_twice_changes_nothing():
    before = Trainer._save_checkpoint, Dataset._download
    compat.apply()
    compat.apply_recbole()
    assert (Trainer._save_checkpoint, Dataset._download) == before


def test_plain():
    class Color(str, Enum):
        RED = "r"

    value = {
        "a": np.float64(1.5),
        2: (np.int64(3), Color.RED),
        "c": torch.device("cpu"),
        "d": int,
        "e": {2, 1},
    }
    got = compat.plain({**value, "f": np.ones(2), "g": True, "h": None})
    assert got == {
        "a": 1.5, "2": [3, "RED"], "c": "cpu", "d": "builtins.int", "e": [1, 2], "f": [1.0, 1.0],
        "g": True, "h": None,
    }  # fmt: skip
    assert type(got["a"]) is float and type(got["g"]) is bool and type(got["2"][0]) is int
    json.dumps(got)


def test_no_module_imports_ray_at_the_top():
    """Ray takes seconds to import and is absent on new Pythons; `recbole.quick_start` imports it."""
    for path in Path(dnr_recbole.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [name for name in names if name.split(".")[0] == "ray" or name.startswith("recbole.quick_start")]
            assert not bad, f"{path}: {bad}"


@pytest.mark.slow
def test_package_and_config_do_not_import_ray():
    code = "import sys; sys.modules['ray'] = None; import dnr_recbole.config as c; c.Config()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def tiny(tmp_path):
    """A written dataset of 12 users and 15 items."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{u}\ti{(u * 3 + t) % 15}\t{1 + (u + t) % 5}\t{t}" for u in range(12) for t in range(10)]
    (folder / "tiny.inter").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", ["BPR", "LightGCN", "EASE", "ItemKNN"])
def test_recbole_reads_back_its_own_checkpoints(tiny, tmp_path, name):
    config = Config(
        model=get_retriever(name), dataset="tiny",
        config_dict={
            "data_path": str(tiny), "checkpoint_dir": str(tmp_path / "saved"), "epochs": 1, "topk": 2,
            "valid_metric": "Recall@2", "n_candidates": 10, "use_gpu": False, "show_progress": False,
        },
    )  # fmt: skip
    init_seed(0, True)
    train, valid, test = data_preparation(config, create_dataset(config))
    model = config.model_class(config, train._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(train, valid, saved=True, show_progress=False)
    state = torch.load(trainer.saved_model_file, weights_only=True)
    assert state["config"]["model"] == name and type(state["best_valid_score"]) is float
    result = trainer.evaluate(test, load_best_model=True, show_progress=False)
    assert 0 <= result["recall@2"] <= 1
    trainer.resume_checkpoint(trainer.saved_model_file)


def test_download_needs_no_process_group(tmp_path, monkeypatch):
    """RecBole ends a download with a barrier, which raises in a single process."""
    from recbole.data.dataset import dataset as module

    target = tmp_path / "ml-1m"

    def extract(path, folder):
        lines = "user_id:token\titem_id:token\n" + "".join(f"{u}\t{i}\n" for u in range(3) for i in range(3))
        (target / "ml-1m.inter").write_text(lines)

    monkeypatch.setattr(module, "decide_download", lambda url: True)
    monkeypatch.setattr(module, "download_url", lambda url, folder: str(target / "ml-1m.zip"))
    monkeypatch.setattr(module.os, "unlink", lambda path: None)
    monkeypatch.setattr(module, "extract_zip", extract)
    config = Config(dataset="ml-1m", config_dict={
        "data_path": str(tmp_path), "user_inter_num_interval": None, "item_inter_num_interval": None,
    })  # fmt: skip
    assert create_dataset(config).inter_num == 9


def test_a_failed_download_stays_an_error(tmp_path, monkeypatch):
    from recbole.data.dataset import dataset as module

    def broken(url):
        raise RuntimeError("Stopped downloading due to interruption.")

    monkeypatch.setattr(module, "decide_download", broken)
    with pytest.raises(RuntimeError, match="Stopped downloading"):
        create_dataset(Config(dataset="ml-1m", config_dict={"data_path": str(tmp_path)}))
