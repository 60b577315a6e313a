"""DiffuRec's own invariants."""

from __future__ import annotations

import pytest
import torch

from dnr_recbole.model.reranker.diffurec import GaussianDiffusion, random_positive
from dnr_recbole.testing import RerankerContract, build, random_slate


@pytest.fixture
def slate():
    return random_slate()


def test_schedule_is_the_published_one():
    signal = GaussianDiffusion(32, 32).root_signal.double().square()
    beta = 1 - signal[1:] / signal[:-1]
    assert abs(float(beta[0]) - 0.0131) < 1e-4 and abs(float(beta[-1]) - 0.635) < 1e-3
    assert 1e-7 < float(signal[-1]) < 1e-5


@pytest.mark.parametrize("steps", [2, 4, 8, 32, 200])
def test_every_chain_ends_in_noise(steps):
    diffusion = GaussianDiffusion(steps, 1)
    assert float(diffusion.root_signal[-1]) < 0.05
    assert int(diffusion.times[0]) == steps - 1


def test_no_noise_before_the_first_step():
    diffusion = GaussianDiffusion(32, 32)
    x0, noise = torch.randn(5, 16), torch.randn(5, 16)
    assert torch.equal(diffusion.q_sample(x0, torch.full((5,), -1), noise), x0)
    assert not torch.allclose(diffusion.q_sample(x0, torch.zeros(5, dtype=torch.long), noise), x0, atol=0.01)


def test_forward_process_has_the_stated_moments():
    diffusion = GaussianDiffusion(32, 32)
    x = diffusion.q_sample(torch.full((20000, 1), 2.0), torch.full((20000,), 6), torch.randn(20000, 1))
    assert abs(float(x.mean()) - 2 * float(diffusion.root_signal[7])) < 0.03
    assert abs(float(x.std()) - float(diffusion.root_noise[7])) < 0.03


@pytest.mark.parametrize("reverse_steps", [1, 2, 4, 32])
def test_posterior_of_the_first_step_is_x0(reverse_steps):
    diffusion = GaussianDiffusion(32, reverse_steps)
    assert (float(diffusion.from_x0[0]), float(diffusion.from_xt[0])) == (1.0, 0.0)
    assert float(diffusion.sigma[0]) == 0.0


def test_posterior_is_bayes_rule():
    """Mean and variance of q(x_{t−1} | x_t, x_0) from the product of the two Gaussians that define it."""
    diffusion = GaussianDiffusion(32, 32)
    signal = diffusion.root_signal.double().square()
    for t in (1, 10, 31):
        before, now = signal[t], signal[t + 1]
        alpha = now / before
        precision = alpha / (1 - alpha) + 1 / (1 - before)
        assert float(diffusion.sigma[t]) ** 2 == pytest.approx(float(1 / precision), rel=1e-4)
        from_x0 = float(before.sqrt() / (1 - before) / precision)
        assert float(diffusion.from_x0[t]) == pytest.approx(from_x0, rel=1e-3)
        from_xt = float(alpha.sqrt() / (1 - alpha) / precision)
        assert float(diffusion.from_xt[t]) == pytest.approx(from_xt, rel=1e-4)


@pytest.mark.parametrize("reverse_steps", [1, 4, 32])
def test_a_perfect_approximator_recovers_the_item(reverse_steps):
    diffusion = GaussianDiffusion(32, reverse_steps)
    e, noise = torch.randn(3, 16), torch.randn(reverse_steps, 3, 16)
    assert torch.equal(diffusion.reverse(lambda x, t: e, noise[-1], noise[:-1]), e)


def test_reverse_chain_follows_the_forward_marginals():
    """With a perfect approximator, x_t on the way back is distributed as q(x_t | x_0)."""
    diffusion, seen = GaussianDiffusion(32, 8), {}
    e = torch.full((20000, 1), 1.5)

    def oracle(x, t):
        seen[int(t[0])] = (float(x.mean()), float(x.std()))
        return e

    diffusion.reverse(oracle, torch.randn(20000, 1), torch.randn(7, 20000, 1))
    assert sorted(seen) == diffusion.times.tolist()
    for t, (mean, std) in seen.items():
        assert mean == pytest.approx(1.5 * float(diffusion.root_signal[t + 1]), abs=0.03)
        assert std == pytest.approx(float(diffusion.root_noise[t + 1]), abs=0.03)


def test_mask_covers_keys(slate):
    model = build("DiffuRec", delta=1.0)
    context = model.encode(slate)
    tokens, valid = context.tokens, context.valid
    assert not valid.all()
    x, t = torch.randn(len(slate), model.dim), torch.full((len(slate),), 3)
    dirty = tokens + 10 * torch.randn_like(tokens) * ~valid.unsqueeze(-1)
    torch.testing.assert_close(model.approximate(tokens, valid, x, t), model.approximate(dirty, valid, x, t))


def test_last_block_equals_the_full_one(slate):
    model = build("DiffuRec", delta=0.5)
    context = model.encode(slate)
    hidden, valid = context.tokens, context.valid
    x, t = torch.randn(len(slate), model.dim), torch.full((len(slate),), 3)
    expected = hidden + model.delta * (x + model.time_net(model.time_table[t])).unsqueeze(1)
    for block in model.blocks:
        expected = block(expected, valid)
    rows = torch.arange(len(slate))
    torch.testing.assert_close(model.approximate(hidden, valid, x, t), expected[rows, valid.sum(1) - 1])


def test_lambda_is_random_in_training_only(slate):
    model = build("DiffuRec", delta=1.0, dropout=0.0, block_dropout=0.0)
    context = model.encode(slate)
    inputs = (context.tokens, context.valid, torch.randn(8, model.dim), torch.full((8,), 3))
    assert torch.equal(model.approximate(*inputs), model.approximate(*inputs))
    model.train()
    assert not torch.allclose(model.approximate(*inputs), model.approximate(*inputs), atol=1e-3)


def test_seed_decides_the_chains(slate):
    scores = lambda **o: build("DiffuRec", delta=1.0, **o).predict(slate.without_labels())  # noqa: E731
    assert torch.equal(scores(chain_seed=1), scores(chain_seed=1))
    assert not torch.allclose(scores(chain_seed=1), scores(chain_seed=2))


def test_chains_are_averaged(slate):
    model = build("DiffuRec", delta=1.0, chains=3)
    together, noise = model.predict(slate), model.noise
    alone = []
    for chain in range(3):
        model.noise = noise[:, chain : chain + 1]
        alone.append(model.predict(slate))
    torch.testing.assert_close(together, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)


def test_positive_is_drawn_among_the_valid_positives(slate):
    drawn = torch.zeros_like(slate.labels)
    for _ in range(300):
        position, usable = random_positive(slate)
        drawn.scatter_(1, position.unsqueeze(1), 1.0)
    assert usable.all() and torch.equal(drawn, slate.labels)
    dirty = type(slate)(**{**slate.__dict__, "labels": (~slate.mask).float()})
    assert not random_positive(dirty)[1].any()


def test_catalogue_targets_count_every_item_once(slate):
    model = build("DiffuRec", targets="catalogue", score_fusion="none", history_interaction="none")
    context = model.encode(slate)
    interest = context.interest
    logits = model.match(interest, context, slate, slate.scores)
    table = model.embedder.items(torch.arange(1, model.n_items))
    expected = -(interest @ table.T + model.bias).log_softmax(-1)
    expected = expected.gather(1, (slate.candidates - 1).clamp(min=0))
    got = model.surprise(logits, interest, slate)
    torch.testing.assert_close(got[slate.mask], expected[slate.mask])


def test_the_diffusion_loss_alone_fits_eight_requests():
    slate = random_slate(seed=5, ragged=False)
    model, check = build("DiffuRec", pointwise_weight=0.0, dropout=0.0), RerankerContract()
    before = check.ndcg(model, slate)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model.train().calculate_loss(slate).backward()
        optimizer.step()
    assert check.ndcg(model, slate) > 0.93 > before + 0.2
