"""EGRerank: what holds for it beyond the contract of all rerankers."""

import pytest
import torch
from torch import nn

from dnr_recbole.lists import gather_lists
from dnr_recbole.model.blocks.list_evaluator import ListEvaluator
from dnr_recbole.testing import build, random_slate


@pytest.fixture
def slate():
    return random_slate()


def prepared(slate, **overrides):
    """A model with what its generator needs: tokens, user, pCTR."""
    model = build("EGRerank", **{"discriminator_weight": 0.0, "explore": 0.0, **overrides})
    context = model.encode(slate)
    tokens = model.tokens(context, slate, slate.scores).detach()
    pctr = torch.sigmoid(model.score(context, slate, slate.scores)).detach()
    return model, tokens, context.user.detach(), pctr


def distinct_and_valid(positions, mask):
    """No list repeats a candidate or holds padding, and empty slots are at its end."""
    for request, valid in zip(positions, mask):
        for row in request.view(-1, request.shape[-1]):
            real = row[row >= 0]
            assert len(real) == min(len(row), int(valid.sum()))
            assert (row[: len(real)] >= 0).all()
            assert len(set(real.tolist())) == len(real)
            assert valid[real].all()


@pytest.mark.parametrize("explore", [0.0, 1.0])
def test_rollouts_repeat_no_candidate(slate, explore):
    model, *inputs = prepared(slate, explore=explore, slate_size=5)
    distinct_and_valid(model.play(*inputs, slate.mask).positions, slate.mask)


def test_short_requests_end_with_empty_slots():
    slate = random_slate(n=4)
    model, *inputs = prepared(slate, slate_size=6)
    distinct_and_valid(model.play(*inputs, slate.mask).positions, slate.mask)


@pytest.mark.parametrize("explore", [0.0, 0.5])
def test_ratio_is_one_in_the_first_inner_epoch(slate, explore):
    model, *inputs = prepared(slate, explore=explore, dropout=0.0)
    episode = model.train().play(*inputs, slate.mask)
    _, terms = model.ppo_loss(episode)
    torch.testing.assert_close(terms["ratio"], torch.ones_like(terms["ratio"]), atol=1e-5, rtol=0)


def test_policy_is_a_distribution_over_the_free_candidates(slate):
    model, tokens, user, pctr = prepared(slate)
    positions = model.play(tokens, user, pctr, slate.mask).positions
    policy = model.generator.log_policy(*model.generator.encode(tokens, user, pctr), slate.mask, positions).exp()
    torch.testing.assert_close(policy.sum(-1), torch.ones(policy.shape[:-1]))
    assert (policy * ~slate.mask[:, None, None]).sum() == 0
    for k in range(1, positions.shape[-1]):
        assert policy[:, :, k].gather(-1, positions[..., :k]).abs().max() == 0


def test_samples_follow_the_policy():
    slate = random_slate(batch=1, n=5, ragged=False)
    model, *inputs = prepared(slate, rollouts=4000, explore=0.0)
    with torch.no_grad():
        model.generator.out.weight.mul_(400)
        encoded, keys = model.generator.encode(*inputs)
    torch.manual_seed(0)
    positions = model.play(*inputs, slate.mask).positions
    expected = model.generator.log_policy(encoded, keys, slate.mask, positions)[0, 0, 0].exp()
    frequency = torch.bincount(positions[0, :, 0], minlength=5) / 4000
    assert expected.std() > 0.01
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)


class LinearEvaluator(nn.Module):
    """A planted judge that likes one direction."""

    def __init__(self, direction):
        super().__init__()
        self.direction = direction

    def forward(self, vectors, user, mask=None):
        return vectors @ self.direction


def test_ppo_approaches_the_best_list_of_a_planted_evaluator():
    torch.manual_seed(0)
    slate = random_slate(batch=16, n=12, ragged=False)
    model, tokens, user, pctr = prepared(slate, dropout=0.0)
    direction = torch.randn(model.dim)
    model.evaluator = LinearEvaluator(direction * 2 / (tokens @ direction).std())
    value = torch.sigmoid(model.evaluator(tokens, user))
    nothing = torch.zeros_like(pctr)  # the generator has to find out from the tokens

    def reward():
        greedy = torch.zeros(len(slate), 1, model.slate_size, 12)
        with torch.no_grad():
            lists, _ = model.generator.rollout(*model.generator.encode(tokens, user, nothing), slate.mask, greedy)
        return float(gather_lists(value, lists).mean())

    chance, best = float(value.mean()), float(value.topk(model.slate_size).values.mean())
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=0.005)
    for _ in range(50):
        episode = model.play(tokens, user, nothing, slate.mask)
        for _ in range(2):
            optimizer.zero_grad()
            model.ppo_loss(episode)[0].backward()
            optimizer.step()
    assert reward() > chance + 0.95 * (best - chance), (chance, reward(), best)


def test_discriminator_is_undecided_when_the_sources_are_the_same():
    torch.manual_seed(0)
    slate = random_slate(batch=64, ragged=False)
    model, tokens, user, _ = prepared(slate)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=0.003)

    def lists():
        return torch.rand(64, 12).argsort(1)[:, : model.slate_size]

    for _ in range(150):
        optimizer.zero_grad()
        model.discriminator_loss(tokens, user, lists(), lists()).backward()
        optimizer.step()
    with torch.no_grad():
        decision = torch.sigmoid(model.discriminator(gather_lists(tokens, lists()), user))
    assert abs(float(decision.mean()) - 0.5) < 0.05
    assert float((decision - 0.5).abs().mean()) < 0.1


def test_discriminator_tells_different_sources_apart():
    torch.manual_seed(0)
    slate = random_slate(batch=64, ragged=False)
    model, tokens, user, _ = prepared(slate, score_fusion="concat")
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=0.01)
    order = slate.scores.argsort(1, descending=True)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model.discriminator_loss(tokens, user, order[:, :3], order[:, -3:])
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.2


def test_logged_list_is_the_retrievers_top(slate):
    model = build("EGRerank")
    logged = model.logged_list(slate)
    expected = slate.scores.masked_fill(~slate.mask, -1).topk(3).indices
    assert torch.equal(logged.masked_fill(logged < 0, 0), expected.masked_fill(logged < 0, 0))


def test_discriminator_reward_is_minus_log_one_minus_d(slate):
    model, tokens, user, _ = prepared(slate, discriminator_weight=0.5)
    lists = torch.arange(3).expand(len(slate), 2, 3)
    with torch.no_grad():
        vectors = gather_lists(tokens, lists)
        d = torch.sigmoid(model.discriminator(vectors, user))
        expected = torch.sigmoid(model.evaluator(vectors, user)) - 0.5 * torch.log(1 - d)
        torch.testing.assert_close(model.rewards(tokens, user, lists), expected)


def test_objectives_touch_disjoint_parameters(slate):
    model = build("EGRerank").train()
    context = model.encode(slate)
    tokens = model.tokens(context, slate, slate.scores)
    episode = model.play(tokens, context.user, torch.rand(slate.mask.shape), slate.mask)
    model.ppo_loss(episode)[0].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"generator"}


def test_first_step_is_the_single_step_loss_and_more_inner_epochs_follow(slate):
    model = build("EGRerank", dropout=0.0, ppo_epochs=3).train()
    torch.manual_seed(1)
    single = model.calculate_loss(slate)
    torch.manual_seed(1)
    steps = list(model.training_steps(slate))
    assert len(steps) == 3
    torch.testing.assert_close(steps[0].loss, single)


def test_pretraining_trains_the_evaluator_alone(slate):
    model = build("EGRerank").train()
    (stage,) = model.pretraining()
    stage.loss(slate).backward()
    trained = {id(p) for p in stage.parameters}
    for name, p in model.named_parameters():
        assert (id(p) in trained) == (name.split(".")[0] not in ("generator", "discriminator"))
        assert p.grad is None or id(p) in trained


def test_frozen_evaluator_does_not_move(slate):
    model = build("EGRerank", freeze_evaluator=True).train()
    model.calculate_loss(slate).backward()
    assert all(p.grad is None for p in model.evaluator.parameters())
    assert any(p.grad is not None for p in model.generator.parameters())


@pytest.mark.parametrize("method", ["concat", "add", "weight"])
def test_score_is_differentiable_in_x(slate, method):
    model = build("EGRerank", score_fusion=method)
    x = slate.scores.clone().requires_grad_()
    model.criterion(model.score(model.encode(slate), slate, x), slate).backward()
    assert (x.grad[slate.mask] != 0).any() and torch.isfinite(x.grad).all()


def test_best_of_several_lists_pleases_the_evaluator_no_less(slate):
    def value(model):
        with torch.no_grad():
            context = model.encode(slate)
            tokens = model.tokens(context, slate, slate.scores)
            lists = model.generate(slate).unsqueeze(1)
            logits = model.evaluator(gather_lists(tokens, lists), context.user, lists >= 0)
            return (torch.sigmoid(logits) * (lists >= 0)).sum((1, 2))

    one, many = build("EGRerank"), build("EGRerank", inference_lists=16)
    assert (value(many) >= value(one) - 1e-6).all()
    assert (value(many) > value(one) + 1e-6).any()


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_list_evaluator_broadcasts_and_ignores_empty_slots(kind):
    torch.manual_seed(0)
    evaluator = ListEvaluator(8, 12, 5, kind=kind).eval()
    vectors, user = torch.randn(3, 4, 5, 8), torch.randn(3, 8)
    logits = evaluator(vectors, user)
    assert logits.shape == (3, 4, 5)
    torch.testing.assert_close(logits[:, 1], evaluator(vectors[:, 1], user))
    mask = (torch.arange(5) < 3).expand(3, 4, 5)
    dirty = vectors.masked_fill(~mask.unsqueeze(-1), 7.0)
    torch.testing.assert_close(evaluator(vectors, user, mask)[mask], evaluator(dirty, user, mask)[mask])


def test_gru_evaluator_reads_from_the_top():
    torch.manual_seed(0)
    evaluator = ListEvaluator(8, 12, 5)
    vectors, user = torch.randn(3, 5, 8), torch.randn(3, 8)
    changed = vectors.clone()
    changed[:, 3] += 1
    before, after = evaluator(vectors, user), evaluator(changed, user)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all()


def test_list_evaluator_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="kind"):
        ListEvaluator(8, 12, 5, kind="mlp")
