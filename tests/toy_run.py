"""A run of seconds whose every path lies elsewhere."""

from __future__ import annotations

import os

LINES = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
LINES += [f"u{u}\ti{(7 * u + 3 * t) % 80}\t{1 + (u + t) % 5}\t{t}" for u in range(30) for t in range(25)]
KEYS = {
    "model": "PRM", "dataset": "toy", "protocol": "exposed", "epochs": 1, "retriever_args": {"epochs": 1},
    "embedding_size": 8, "n_candidates": 10, "slate_size": 3, "use_gpu": False, "baselines": [],
    "metrics": ["NDCG"], "topk": [3], "valid_metric": "NDCG@3", "history_interaction": "none",  # loses to a probe
}  # fmt: skip


def toy_keys(tmp_path, monkeypatch):
    """For a fixture: keys with every path elsewhere, and a working folder that must stay empty."""
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "toy.inter").write_text("\n".join(LINES) + "\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    paths = {key: str(tmp_path / key) for key in ("log_dir", "tensorboard_dir", "cache_dir", "checkpoint_dir")}
    yield {**KEYS, **paths, "data_path": str(tmp_path / "data"), "result_file": str(tmp_path / "out" / "row.json")}
    assert os.listdir(tmp_path / "work") == []
