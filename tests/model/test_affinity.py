"""Similarities of candidates to the history, and the blocks that read them."""

import dataclasses

import pytest
import torch

from dnr_recbole.config import Config
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import UnknownNameError
from dnr_recbole.model.inputs.affinity import Affinity, register_statistic, register_weights, standardise
from dnr_recbole.model.inputs.interaction import HistoryInteraction, TargetAttention
from dnr_recbole.registry import get_reranker, list_models
from dnr_recbole.testing import build, random_catalogue, random_slate

ALL = ["mean", "max", "last1", "last5", "last10"]


def slate_of(candidates, history, fold=None):
    candidates, history = torch.tensor(candidates), torch.tensor(history)
    return Slate(
        users=torch.ones(len(candidates), dtype=torch.long),
        candidates=candidates,
        mask=candidates > 0,
        scores=torch.rand(candidates.shape),
        labels=torch.zeros(candidates.shape),
        history=history,
        history_mask=history > 0,
        fold=None if fold is None else torch.tensor(fold),
    )


def test_statistics_by_hand():
    # Items 1 and 2 at a right angle, 3 between them (3-4-5 triangle).
    space = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).view(1, 1, 4, 2)
    slate = slate_of([[1, 3, 2], [3, 1, 0]], [[1, 2, 3], [2, 0, 0]])
    found = Affinity({"s": space}, ["mean", "max", "last1"], standardised=False)(slate)
    expected = torch.tensor(
        [  # mean, last1 (linear ones first), max
            [[1.6 / 3, 0.6, 1.0], [2.4 / 3, 1.0, 1.0], [1.8 / 3, 0.8, 1.0]],
            [[0.8, 0.8, 0.8], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        ]
    )
    assert torch.allclose(found, expected)


def test_columns_are_named_in_the_order_of_the_values():
    affinity = Affinity(random_catalogue().spaces, ["max", "mean"])
    raw = ["factors.mean", "factors.max", "covisit.mean", "covisit.max"]
    assert affinity.columns == raw + [f"{name}.standardised" for name in raw]
    assert affinity(random_slate()).shape[-1] == len(affinity.columns)


def slow(space, statistic, slate, row, candidate):
    """One similarity in plain Python."""
    fold = 0 if slate.fold is None else int(slate.fold[row])
    length = int(slate.history_mask[row].sum())
    history = [int(i) for i in slate.history[row, :length]]
    item = space[0, fold, int(slate.candidates[row, candidate])]
    alike = [float(item @ space[-1, fold, h]) for h in history]
    if not alike:
        return 0.0
    if statistic == "max":
        return max(alike)
    newest = alike if statistic == "mean" else alike[-int(statistic[4:]) :]
    return sum(newest) / len(newest)


@pytest.mark.parametrize("folds", [False, True])
def test_all_statistics_and_spaces_against_a_slow_reference(folds):
    spaces, slate = random_catalogue().spaces, random_slate(history=12)
    if folds:
        slate = dataclasses.replace(slate, fold=torch.arange(len(slate.users)) % 3)
    affinity = Affinity(spaces, ALL)
    found = affinity(slate)
    raw = {}
    for number, name in enumerate(affinity.columns[: len(affinity.columns) // 2]):
        space, statistic = name.split(".")
        for row in range(len(slate.users)):
            for c in range(slate.candidates.shape[1]):
                if slate.mask[row, c]:
                    raw[row, c] = slow(spaces[space], statistic, slate, row, c)
                    assert float(found[row, c, number]) == pytest.approx(raw[row, c], abs=1e-5), (name, row, c)
        half = len(affinity.columns) // 2
        for row in range(len(slate.users)):
            values = torch.tensor([v for (r, _), v in raw.items() if r == row])
            expected = (values - values.mean()) / (values.var(unbiased=False) + 1e-8).sqrt()
            assert torch.allclose(found[row, slate.mask[row], half + number], expected, atol=2e-3)
    assert (found[~slate.mask][:, half:] == 0).all()


def test_an_empty_history_and_a_lone_candidate_are_zero_and_finite():
    slate = slate_of([[1, 2, 3], [4, 0, 0]], [[0, 0], [5, 6]])
    found = Affinity(random_catalogue().spaces, ALL)(slate)
    assert (found[0] == 0).all() and torch.isfinite(found).all()
    half = found.shape[-1] // 2
    assert (found[1, 0, half:] == 0).all()  # nothing to be standardised against


@pytest.mark.parametrize("kind", ["affinity", "attention", "both"])
def test_more_padding_of_the_history_changes_nothing(kind):
    catalogue, slate = random_catalogue(), random_slate()
    block, embed = interaction(kind, catalogue), torch.nn.Embedding(catalogue.n_items, 16)
    longer = _padded(slate, 5)
    outs = [block(embed(s.candidates), embed(s.history), s) for s in (slate, longer)]
    assert torch.allclose(*outs, atol=1e-6)


def _padded(slate, more):
    pad = lambda t: torch.nn.functional.pad(t, (0, more))  # noqa: E731
    return dataclasses.replace(slate, history=pad(slate.history), history_mask=pad(slate.history_mask))


def interaction(kind, catalogue, **kwargs):
    torch.manual_seed(0)
    config = Config("PRM", "ml-100k", config_dict={"history_interaction": kind, "embedding_size": 16, "use_gpu": False})
    return HistoryInteraction(config, catalogue, **kwargs)


@pytest.mark.parametrize("length", [1, 7])
def test_attention_against_a_slow_reference(length):
    torch.manual_seed(1)
    block = TargetAttention(8, length=4, n_heads=2)
    torch.nn.init.normal_(block.age)
    candidates, history = torch.randn(2, 3, 8), torch.randn(2, 7, 8)
    mask = torch.arange(7) < torch.tensor([[length], [3]])
    found = block(candidates, history, mask)
    key, value = block.kv(history).chunk(2, dim=-1)
    query = block.q(candidates)
    for row in range(2):
        valid = int(mask[row].sum())
        for c in range(3):
            parts = []
            for head in range(2):
                own = slice(4 * head, 4 * head + 4)
                logits = [
                    (query[row, c, own] @ key[row, h, own]) / 2 + block.age[head, min(valid - 1 - h, 3)]
                    for h in range(valid)
                ]
                weights = torch.stack(logits).softmax(0)
                parts.append(weights @ value[row, :valid, own])
            mixed = torch.cat(parts)
            expected = block.out(torch.cat([mixed, mixed * query[row, c]]))
            assert torch.allclose(found[row, c], expected, atol=1e-5)


def test_attention_over_an_empty_history_is_finite_and_gets_gradients_elsewhere():
    block = TargetAttention(8, length=4)
    history = torch.randn(2, 3, 8, requires_grad=True)
    out = block(torch.randn(2, 3, 8), history, torch.tensor([[False] * 3, [True, True, False]]))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(history.grad).all()
    assert (history.grad[0] == 0).all() and (history.grad[1, 2] == 0).all() and (history.grad[1, :2] != 0).any()


def test_standardising_ignores_padding_and_constant_columns():
    values = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [99.0, -7.0]]])
    found = standardise(values, torch.tensor([[True, True, False]]))
    assert torch.allclose(found, torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]), atol=1e-4)


def test_a_plugin_adds_statistics():
    @register_weights("oldest")
    def oldest(mask):
        return mask & (torch.arange(mask.shape[1]) == 0)

    @register_statistic("spread")
    def spread(alike, mask):
        return alike.amax(-1) - alike.amin(-1)

    spaces, slate = random_catalogue().spaces, random_slate()
    affinity = Affinity({"s": spaces["factors"]}, ["oldest", "spread"], standardised=False)
    assert affinity.columns == ["s.oldest", "s.spread"]
    found = affinity(slate)
    first = spaces["factors"][0, 0][slate.history[:, 0]].unsqueeze(1)
    alike = (spaces["factors"][0, 0][slate.candidates] * first).sum(-1) * slate.history_mask[:, :1]
    assert torch.allclose(found[..., 0][slate.mask], alike[slate.mask], atol=1e-6)


def test_an_unknown_statistic_is_named():
    with pytest.raises(UnknownNameError, match="affinity_statistics: 'median' is unknown; choose from .*last10"):
        Affinity(random_catalogue().spaces, ["mean", "median"])


def test_models_that_declare_independence_read_raw_values_only():
    independent = [info.name for info in list_models("reranker") if get_reranker(info.name).independent]
    assert {"SASRec", "GRU4Rec", "Caser"} <= set(independent)
    for name in independent:
        affinity = build(name).embedder.interaction.affinity
        assert affinity is None or not any("standardised" in column for column in affinity.columns), name


def test_the_labels_and_scores_of_a_request_are_not_read():
    slate, affinity = random_slate(), Affinity(random_catalogue().spaces, ALL)
    other = slate.with_scores(1 - slate.scores)
    other = dataclasses.replace(other, labels=1 - slate.labels)
    assert torch.equal(affinity(slate), affinity(other))


def test_bf16_keeps_the_similarities_in_full_precision():
    slate, affinity = random_slate(), Affinity(random_catalogue().spaces, ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = affinity(slate)
    assert low.dtype == torch.float32 and torch.equal(low, affinity(slate))
