"""No stage reads a key whose scope lies behind it: what it makes could not be identified by its keys."""

from __future__ import annotations

import pytest

from dnr_recbole.compat import OPTIONAL_KEYS
from dnr_recbole.config import Config
from dnr_recbole.config_schema import STAGES
from dnr_recbole.data.dataset import build_rerank_data, load_candidates
from dnr_recbole.data.feasibility import check_feasible
from dnr_recbole.data.interactions import Interactions
from dnr_recbole.data.loading import file_digests, load_recbole_dataset
from dnr_recbole.quick_start import train
from dnr_recbole.retriever.training import train_retriever

KEYS = {
    "model": "DNR", "dataset": "ml-100k", "epochs": 1, "lambda_e": 0, "embedding_size": 8, "max_requests_per_user": 1,
    "retriever_args": {"epochs": 1, "embedding_size": 8}, "use_gpu": False, "show_progress": False, "log_dir": None,
    "tensorboard_dir": None, "use_features": True, "baselines": [],
}  # fmt: skip


@pytest.fixture
def read(monkeypatch):
    """The keys that are read of the run's own config; stage 1's has its own values under the same names."""
    names = set()
    original = Config.__getitem__

    def record(self, name):
        if not self.is_retriever:
            names.add(name)
        return original(self, name)

    monkeypatch.setattr(Config, "__getitem__", record)
    return names


@pytest.mark.parametrize("protocol", ["exposed", "retrieved"])
def test_stages_read_the_keys_of_their_scopes(read, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(config_dict={**KEYS, "protocol": protocol})

    def check(stage, what):
        allowed = {"process", "files", *STAGES[: STAGES.index(stage) + 1]}
        defined = {name: config.schema[name].scope for name in read if name not in OPTIONAL_KEYS}
        behind = {name: scope for name, scope in defined.items() if scope not in allowed}
        assert not behind, f"{what} reads {behind}, which cannot change what it makes"
        assert read, what
        read.clear()

    read.clear()
    files = file_digests(config)
    read -= {"use_features", "retriever", "n_candidates"}  # which side files belong to which stage, and a size
    dataset = load_recbole_dataset(config)
    read -= {"use_features", "max_feature_vocabulary", "retriever", "n_candidates"}  # features are tried at once
    interactions = Interactions.from_recbole(dataset, config)
    check("source", "reading the data")
    check_feasible(config, interactions)
    read.clear()  # it makes nothing, and looks ahead
    retrieval = train_retriever(config, dataset, interactions, files)
    # The division of the interactions follows the protocol, and is in the retriever's key by content.
    read -= {"protocol", "split", "slate_size", "request_stride", "label_window"}
    check("retriever", "stage 1")
    table = load_candidates(config, interactions, retrieval)
    check("candidates", "retrieval")
    data = build_rerank_data(config, dataset, interactions, retrieval, table)
    check("training", "the reranker's data")
    train(config, data, retrieval.metrics)
    check("evaluation", "training and evaluation")
