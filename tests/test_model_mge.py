"""MG-E: distances of lists, and the choice among generators."""

from functools import partial

import pytest
import torch

from dnr_recbole.errors import ConfigError, UnknownNameError
from dnr_recbole.model.list_comprehensiveness import (
    comprehensiveness,
    comprehensiveness_gain,
    ebd,
    list_ranks,
    pod,
    soft_pod,
)
from dnr_recbole.testing import build, random_slate


def random_lists(batch=4, m=5, n=9, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, m, n, generator=g).argsort(-1)[..., :k]


@pytest.fixture(params=["pod", "ebd"])
def distance(request):
    vectors = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(2))
    return pod if request.param == "pod" else partial(ebd, vectors)


def test_distances_are_symmetric_and_zero_on_the_diagonal(distance):
    lists = random_lists()
    d = distance(lists.unsqueeze(2), lists.unsqueeze(1))
    torch.testing.assert_close(d, d.transpose(1, 2))
    torch.testing.assert_close(d.diagonal(dim1=1, dim2=2), torch.zeros(4, 5), atol=1e-6, rtol=0)
    assert (d >= 0).all()


def test_pod_of_known_lists():
    j = torch.tensor([4, 2, 7])
    assert pod(j, j.flip(0)) == 1
    assert pod(j, torch.tensor([1, 3, 5])) == 1
    torch.testing.assert_close(pod(j, torch.tensor([2, 4, 7])), torch.tensor(1 / 3))
    # One item replaced at the end: of the six pairs of four items only (7, 8) is turned round.
    torch.testing.assert_close(pod(j, torch.tensor([4, 2, 8])), torch.tensor(1 / 6))
    assert pod(torch.tensor([4, 2, -1]), torch.tensor([4, 2, -1])) == 0


def test_gain_is_the_difference_of_comprehensiveness(distance):
    lists = random_lists()
    for m in range(1, 5):
        gain = comprehensiveness_gain(lists[:, :m], lists[:, m], distance)
        difference = comprehensiveness(lists[:, : m + 1], distance) - comprehensiveness(
            lists[:, :m], distance
        )
        torch.testing.assert_close(gain, difference, atol=1e-5, rtol=1e-4)


def test_soft_pod_becomes_the_share_of_reversed_pairs():
    lists = torch.tensor([[[2, 0, 1]]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    agree = torch.tensor([[2.0, 1.0, 3.0, 0.0]])
    assert soft_pod(agree, lists, mask, 1e-3) == 0
    assert soft_pod(-agree, lists, mask, 1e-3) == 1
    scores = torch.zeros(1, 4, requires_grad=True)
    soft_pod(scores, lists, mask).backward()
    assert scores.grad[0, 2] < 0 < scores.grad[0, 3]  # the first of the list goes down, the absent item up


def test_list_ranks():
    assert list_ranks(torch.tensor([[2, 0, -1]]), 4).tolist() == [[1, 3, 0, 3]]


def test_another_generator_never_lowers_the_evaluation_of_the_shown_list():
    """Models with more and more generators, and the same weights in what they share."""
    slate, pool, values = random_slate(), ["retriever", "PRM", "SetRank", "NAR4Rec"], []
    largest = build("MGE", generators=pool, clig=False)
    for m in range(2, len(pool) + 1):
        model = build("MGE", generators=pool[:m], clig=False)
        shared = model.state_dict()
        model.load_state_dict({name: largest.state_dict()[name] for name in shared})
        with torch.no_grad():
            context, shown = model.encode(slate), model.generate(slate)
            values.append(model.utility(context, slate, slate.scores, shown.unsqueeze(1)).squeeze(1))
    for before, after in zip(values, values[1:]):
        assert (after >= before - 1e-6).all()
    assert (values[-1] > values[0] + 1e-6).any()


@pytest.mark.parametrize("name", ["PRM", "SetRank"])
def test_one_generator_alone_is_that_generator(name):
    model, slate = build("MGE", generators=[name], clig=False), random_slate()
    with torch.no_grad():
        alone = model.generators[name].predict(slate).argsort(1, descending=True)
        shown = model.predict(slate).argsort(1, descending=True)
    for a, b, mask in zip(alone, shown, slate.mask):
        assert torch.equal(a[: int(mask.sum())], b[: int(mask.sum())])


@pytest.mark.parametrize("generators", [["retriever"], ["Seq2Slate", "DPP"], ["retriever", "NAR4Rec"]])
def test_other_pools_work(generators):
    model, slate = build("MGE", generators=generators), random_slate()
    loss = model.train().calculate_loss(slate)
    loss.backward()
    assert torch.isfinite(loss)
    with torch.no_grad():
        lists, _ = model.eval().pool(model.encode(slate), slate, slate.scores)
    expected = sum(4 if g == "NAR4Rec" else 1 for g in generators) + 1  # and CLIG's
    assert lists.shape == (len(slate), expected, model.slate_size)


def test_clig_is_pushed_away_from_existing_lists():
    slate = random_slate()
    lists = torch.rand(len(slate), 2, 12).argsort(-1)[..., :3]
    logits = torch.zeros(len(slate), 12, requires_grad=True)
    near, far = (build("MGE", clig_weight=w).clig_loss(logits, slate, lists) for w in (0.0, 1.0))
    torch.testing.assert_close(near - far, soft_pod(logits, lists, slate.mask))


def test_generators_share_the_tables():
    model = build("MGE")
    assert all(g.items is model.items and g.users is model.users for g in model.generators.values())
    tables = [name for name in model.state_dict() if name.endswith("items.embedding.weight")]
    assert tables == ["items.embedding.weight"]


def test_refuses_impossible_generators():
    with pytest.raises(ConfigError, match="generators"):
        build("MGE", generators=["retriever"], clig=False)
    with pytest.raises(ConfigError, match="generators"):
        build("MGE", generators=["DNR"])
    with pytest.raises(ConfigError, match="no key 'n_liste'"):
        build("MGE", generator_args={"NAR4Rec": {"n_liste": 4}})
    with pytest.raises(UnknownNameError, match="NAR4Rek"):
        build("MGE", generator_args={"NAR4Rek": {}})


def test_scores_are_differentiable_in_x():
    slate = random_slate()
    for method in ("concat", "add", "weight"):
        model = build("MGE", score_fusion=method)
        x = slate.scores.clone().requires_grad_()
        model.criterion(model.score(model.encode(slate), slate, x), slate).backward()
        assert x.grad[slate.mask].abs().sum() > 0


def test_no_generator_carries_parts_that_are_never_used():
    assert not hasattr(build("MGE").generators["NAR4Rec"], "evaluator")
