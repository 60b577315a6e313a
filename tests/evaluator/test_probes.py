"""Model-free rankings, their table and their warnings."""

from types import SimpleNamespace

import pytest
import torch

from dnr_recbole.errors import ConfigError
from dnr_recbole.evaluator import format_probe_table, probe_warnings, probes


class FakeConfig(dict):
    def __missing__(self, key):
        return None


CONFIG = FakeConfig(
    metrics=["NDCG", "GAUC"],
    topk=[1, 6],
    metric_decimal_place=6,
    eval_args={"mode": "full"},
    device=torch.device("cpu"),
    LABEL_FIELD="label",
    seed=2024,
)


class FakeDataset:
    """Requests whose positives are what the retriever scores lowest, as under the protocol `exposed`."""

    def __init__(self, requests=400, n=20, n_items=100, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.candidates = torch.randint(1, n_items, (requests, n), generator=g)
        self.mask = torch.ones(requests, n, dtype=torch.bool)
        self.scores = torch.rand(requests, n, generator=g)
        self.labels = (self.scores.argsort(dim=1).argsort(dim=1) < 3).float()
        self.n_positives = self.labels.sum(dim=1).long()
        self.catalogue = SimpleNamespace(n_items=n_items, item_popularity=torch.rand(n_items, generator=g))

    def __len__(self):
        return len(self.candidates)

    def slate(self, rows):
        fields = ("candidates", "mask", "scores", "labels")
        found = {name: getattr(self, name)[rows] for name in fields}
        return SimpleNamespace(**found, shown=None, gains=found["labels"])


def test_probes_find_the_leak():
    dataset = FakeDataset()
    result = probes(CONFIG, dataset, dataset.catalogue)
    assert set(result) == {"score_desc", "score_asc", "popularity_desc", "popularity_asc", "random"}
    assert result["score_asc"]["ndcg@6"] == 1 and result["score_asc"]["gauc"] == 1
    assert result["score_desc"]["gauc"] == 0
    # chance: 3 positives of 20 at rank 1; standard error of 400 requests is 0.018
    assert result["random"]["ndcg@1"] == pytest.approx(3 / 20, abs=0.06)
    assert result["random"]["gauc"] == pytest.approx(0.5, abs=0.03)
    assert result["popularity_desc"]["gauc"] == pytest.approx(1 - result["popularity_asc"]["gauc"], abs=1e-5)


def test_popularity_ranks_by_the_catalogue():
    dataset = FakeDataset()
    popular = dataset.catalogue.item_popularity[dataset.candidates]
    dataset.labels = (popular == popular.max(dim=1, keepdim=True).values).float()
    dataset.n_positives = dataset.labels.sum(dim=1).long()
    result = probes(CONFIG, dataset, dataset.catalogue)
    assert result["popularity_desc"]["ndcg@1"] == 1 and result["popularity_asc"]["ndcg@1"] == 0


def test_probes_are_reproducible_and_independent_of_the_batch():
    dataset = FakeDataset()
    expected = probes(CONFIG, dataset, dataset.catalogue)
    assert probes(CONFIG, dataset, dataset.catalogue) == expected
    assert probes(CONFIG, dataset, dataset.catalogue, batch_size=37) == expected
    other_seed = probes(FakeConfig(CONFIG, seed=1), dataset, dataset.catalogue)
    assert other_seed["random"] != expected["random"] and other_seed["score_asc"] == expected["score_asc"]


MODEL = {"ndcg@6": 0.5, "giniindex@6": 0.4, "e2e_recall@6": 0.1}
PROBES = {"score_asc": {"ndcg@6": 0.8, "giniindex@6": 0.9}, "random": {"ndcg@6": 0.5, "giniindex@6": 0.1}}


def test_table_is_aligned_and_marks_better_probes():
    table = format_probe_table(MODEL, PROBES, model_name="PRM").splitlines()
    assert table[0].split() == ["ranking", "by", "ndcg@6", "giniindex@6"]
    assert [line.split() for line in table[1:4]] == [
        ["PRM", "0.5000", "0.4000"],
        ["score_asc", "0.8000*", "0.9000"],
        ["random", "0.5000", "0.1000*"],  # less is better for the Gini index
    ]
    assert table[1].index("0.5000") == table[2].index("0.8000") == table[3].index("0.5000")
    assert "better than the model" in table[4]
    assert "*" not in format_probe_table(MODEL, {"random": PROBES["random"]}, ["ndcg@6"])


def test_warnings_name_the_probe_and_what_it_means():
    (warning,) = probe_warnings(MODEL, PROBES, "ndcg@6")
    assert "score_asc" in warning and "0.8000" in warning and "0.5000" in warning and "betray" in warning
    (warning,) = probe_warnings(MODEL, PROBES, "giniindex@6")
    assert "random" in warning and "chance" in warning
    assert probe_warnings({"ndcg@6": 0.9}, PROBES, "ndcg@6") == []
    with pytest.raises(ConfigError, match="probe's result"):
        probe_warnings(MODEL, PROBES, "e2e_recall@6")
