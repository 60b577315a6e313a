"""MG-E: distances of lists, and the choice among generators."""

from functools import partial

import pytest
import torch

from dnr_recbole.errors import ConfigError, UnknownNameError
from dnr_recbole.lists import list_ranks
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.reranker._list_distances import comprehensiveness, comprehensiveness_gain, ebd, pod, soft_pod
from dnr_recbole.model.reranker.mge import GeneratorConfig
from dnr_recbole.registry import get_reranker, list_models
from dnr_recbole.testing import build, model_config, random_catalogue, random_slate

PRETRAINED = {  # what gives each generator a stage before the main training
    "PRM": {"use_pv": True, "pv_epochs": 1},
    "EGRerank": {"evaluator_epochs": 1},
    "SASRec": {"pretrain_epochs": 1},
    "GRU4Rec": {"pretrain_epochs": 1},
    "Caser": {"pretrain_epochs": 1},
}


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
        difference = comprehensiveness(lists[:, : m + 1], distance) - comprehensiveness(lists[:, :m], distance)
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
    assert all(
        g.embedder.items is model.embedder.items and g.embedder.users is model.embedder.users
        for g in model.generators.values()
    )
    tables = [name for name in model.state_dict() if name.endswith("items.embedding.weight")]
    assert tables == ["embedder.items.embedding.weight"]


def test_every_reranker_with_a_stage_is_tested_as_a_generator():
    stages = {m.name for m in list_models("reranker") if m.cls.pretraining is not AbstractReranker.pretraining}
    assert stages - {"DNR", "MGE"} == set(PRETRAINED)


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_generator_is_pretrained_as_it_would_be_alone(name):
    """Same parameters, shared tables included; same loss; same weights behind two steps."""
    keys = dict(generators=["SetRank", name], generator_args={name: PRETRAINED[name]}, clig=False)
    model = build("MGE", **keys).train()
    cls = get_reranker(name)
    alone = cls(GeneratorConfig(model_config("MGE", **keys), cls, PRETRAINED[name]), random_catalogue()).train()
    inside = model.generators[name]

    def weights():
        """Of the generator, with the tables that it shares."""
        return dict(inside.named_parameters())

    with torch.no_grad():
        for n, p in weights().items():
            p.copy_(dict(alone.named_parameters())[n])
    (stage,), (expected,) = model.pretraining(), alone.pretraining()
    assert stage.name == f"{name}, {expected.name}"
    names = {id(p): n for n, p in weights().items()}
    assert len({id(p) for p in stage.parameters}) == len(stage.parameters)  # an optimiser refuses a parameter twice
    own_names = {id(p): n for n, p in alone.named_parameters()}
    assert {names[id(p)] for p in stage.parameters} == {own_names[id(p)] for p in expected.parameters}
    for part in (stage, expected):
        optimizer = torch.optim.Adam(part.parameters, lr=0.01)
        for seed in range(2):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            torch.autograd.backward(part.loss(random_slate(seed)), inputs=part.parameters)
            optimizer.step()
    for n, p in weights().items():
        torch.testing.assert_close(p, dict(alone.named_parameters())[n], msg=n)


def test_stages_leave_the_generators_as_they_were():
    """Tables are lent for the moment only, and what a stage alone trains is in no optimiser of the main training."""
    model = build("MGE", generators=list(PRETRAINED), generator_args=PRETRAINED)
    state, groups = list(model.state_dict()), model.parameter_groups()
    stages = model.pretraining()
    assert len(stages) == len(PRETRAINED)
    assert list(model.state_dict()) == state
    assert all("items" not in g._modules for g in model.generators.values())
    assert model.generators["SASRec"].embedder.users is None  # it reads no user, so it is given none
    everything = {id(p) for p in model.parameters()}
    assert all(id(p) in everything for stage in stages for p in stage.parameters)
    trained = [id(p) for p in groups["reranker"]]
    assert len(set(trained)) == len(trained)
    assert everything - set(trained) == {id(p) for p in model.generators["PRM"].pv.parameters()}


def test_refuses_impossible_generators():
    with pytest.raises(ConfigError, match="freeze_evaluator"):
        build("MGE", generators=["EGRerank"], generator_args={"EGRerank": {"freeze_evaluator": True}})
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
    assert build("MGE").generators["NAR4Rec"].evaluator is None
