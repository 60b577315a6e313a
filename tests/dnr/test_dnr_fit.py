"""DNR's noise, generators and objectives against data whose densities are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution
from sklearn.metrics import roc_auc_score

from dnr_recbole.data.slate import MISSING
from dnr_recbole.dnr.noises import NOISES, make_noise
from dnr_recbole.dnr.objectives import ESTIMATORS, request_auc, score_divergence, spread, wasserstein
from dnr_recbole.errors import ConfigError
from dnr_recbole.testing import (
    build,
    model_config,
    random_catalogue,
    random_slate,
    training_steps,
    two_scores,
)


class Requests:
    """Training requests: x | z as given, between-request shifts on top."""

    def __init__(self, positive, negative, shift=0.0, size=400, n=12, seed=0):
        rng = np.random.default_rng(seed)
        labels = rng.random((size, n)) < 0.3
        labels[:, 0], labels[:, 1] = True, False
        x = np.where(labels, positive.rvs((size, n), random_state=rng), negative.rvs((size, n), random_state=rng))
        x = np.clip(x + shift * rng.normal(size=(size, 1)), 0, 1)
        slate = random_slate(seed, batch=size, n=n, ragged=False)
        self.whole = dataclasses.replace(
            slate, scores=torch.tensor(x, dtype=torch.float32), labels=torch.tensor(labels).float()
        )
        self.table = None

    def __len__(self):
        return len(self.whole)

    def slate(self, rows):
        return self.whole.select(rows)


WIDE = beta_distribution(2, 2), beta_distribution(1, 3)
NARROW = beta_distribution(200, 200), beta_distribution(180, 220)
SKEWED = beta_distribution(6, 1), beta_distribution(0.5, 4)


def noise(name, train, **keys):
    made = make_noise(model_config("DNR", noise_type=name, **keys), random_catalogue())
    made.fit(train)
    return made


@pytest.mark.parametrize("densities", [WIDE, NARROW, SKEWED], ids=["wide", "narrow", "skewed"])
@pytest.mark.parametrize("name", ["fitted", "empirical"])
def test_noise_that_fits_has_the_densities_of_the_data(densities, name):
    train = Requests(*densities, size=2000)
    torch.manual_seed(0)
    x, labels = noise(name, train).draw(train.whole), train.whole.labels > 0
    for part, truth in ((x[labels], densities[0]), (x[~labels], densities[1])):
        assert float(part.mean()) == pytest.approx(truth.mean(), abs=0.03 * max(truth.std(), 0.3))
        assert float(part.std()) == pytest.approx(truth.std(), rel=0.12)
    real, synthetic = (
        float(request_auc(each, train.whole.labels, train.whole.mask)) for each in (train.whole.scores, x)
    )
    assert synthetic == pytest.approx(real, abs=0.03)


def test_empirical_noise_keeps_what_lists_have_in_common():
    train = Requests(*NARROW, shift=0.1, size=1000)
    torch.manual_seed(0)
    real_between = float(spread(train.whole.scores, train.whole.mask)[0].std())
    between = {
        name: float(spread(noise(name, train).draw(train.whole), train.whole.mask)[0].std())
        for name in ("fitted", "empirical")
    }
    assert between["empirical"] == pytest.approx(real_between, rel=0.15)
    assert between["fitted"] < 0.6 * real_between, "drawn candidate by candidate, lists are alike"


def test_empirical_noise_redraws_from_another_request_and_never_the_label():
    train = Requests(*WIDE, size=50)
    made = noise("empirical", train, noise_bank=50)
    torch.manual_seed(0)
    x = made.draw(train.whole)
    labels = train.whole.labels > 0
    pools = [set(train.whole.scores[labels == z].tolist()) for z in (False, True)]
    assert set(x[labels].tolist()) <= pools[1] and set(x[~labels].tolist()) <= pools[0]
    for row in x:  # one donor for each list
        donors = [set(each.tolist()) for each in train.whole.scores]
        assert any(set(row.tolist()) <= donor for donor in donors)


def test_residual_noise_stays_near_the_real_scores():
    train = Requests(*WIDE)
    torch.manual_seed(0)
    x = {scale: noise("residual", train, residual_scale=scale).draw(train.whole) for scale in (0.0, 0.3)}
    torch.testing.assert_close(x[0.0], train.whole.scores)
    correlation = np.corrcoef(x[0.3].flatten(), train.whole.scores.flatten())[0, 1]
    assert 0.7 < correlation < 0.999


@pytest.mark.parametrize("name", sorted(NOISES))
def test_every_noise_takes_several_scores_and_their_gaps(name):
    catalogue = dataclasses.replace(random_catalogue(), n_scores=2)
    slate = two_scores(random_slate(3))
    made = make_noise(model_config("DNR", noise_type=name), catalogue)
    made.fit(_Few(slate))
    x = made.draw(slate)
    assert x.shape == slate.scores.shape and ((x[slate.mask] >= 0) & (x[slate.mask] <= 1)).all()
    model = build("DNR", catalogue=catalogue, noise_type=name)
    model.noise.fit(_Few(slate))
    placed = model.synthesise(model.encode(slate), slate)
    assert torch.equal(placed == MISSING, slate.scores == MISSING)


class _Few:
    def __init__(self, slate):
        self.whole = slate

    def __len__(self):
        return len(self.whole)

    def slate(self, rows):
        return self.whole.select(rows)


# ---------------------------------------------------------------------- L_x


def test_request_auc_is_that_of_sklearn():
    slate = random_slate(4, batch=20, n=12)
    x = (torch.rand(slate.mask.shape) * 4).round() / 4  # with ties
    expected = [
        roc_auc_score(z[m].numpy(), s[m].numpy())
        for s, z, m in zip(x, slate.labels, slate.mask)
        if 0 < z[m].sum() < m.sum()
    ]
    assert float(request_auc(x, slate.labels, slate.mask)) == pytest.approx(np.mean(expected), abs=1e-6)


def test_wasserstein_of_samples_of_other_sizes():
    rng = np.random.default_rng(0)
    from scipy.stats import wasserstein_distance

    a, b = rng.random(4000), rng.random(900) ** 2
    found = float(wasserstein(torch.tensor(a), torch.tensor(b)))
    assert found == pytest.approx(wasserstein_distance(a, b), abs=5e-3)


@pytest.mark.parametrize("densities", [WIDE, NARROW, SKEWED], ids=["wide", "narrow", "skewed"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_minimising_it_recovers_the_density(densities, estimator):
    """From batches of 32 small lists."""
    recovered = recover(densities, estimator)
    for got, truth in zip(recovered, densities):
        assert got.mean() == pytest.approx(truth.mean(), abs=0.25 * truth.std() + 0.01)
        assert got.std() == pytest.approx(truth.std(), rel=0.3)


def recover(densities, estimator, steps=500, seed=0):
    """Synthetic scores of z = 1 and z = 0 after a generator of (z, noise) has learned on L_x alone."""
    train = Requests(*densities, size=3200)
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(9, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    draw = lambda z: torch.sigmoid(net(torch.cat([2 * z.unsqueeze(-1) - 1, torch.randn(*z.shape, 8)], -1))).squeeze(-1)  # noqa: E731
    for step in range(steps):
        slate = train.slate(torch.arange(32) + 32 * (step % 100))
        loss = score_divergence(estimator, draw(slate.labels), slate.scores, slate.mask, slate.labels, "label")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        labels = train.whole.labels
        x = draw(labels).numpy()
    return x[labels.numpy() > 0], x[labels.numpy() == 0]


def test_the_lists_estimator_sees_lists_that_are_all_alike():
    train = Requests(*WIDE, shift=0.15, size=500)
    slate = train.whole
    shuffled = slate.scores.flatten()[torch.randperm(slate.scores.numel())].view_as(slate.scores)
    flat = float(score_divergence("wasserstein", shuffled, slate.scores, slate.mask, slate.labels))
    lists = float(score_divergence("lists", shuffled, slate.scores, slate.mask, slate.labels))
    assert flat < 1e-6 and lists > 0.02


@pytest.mark.parametrize("generator", ["list", "residual"])
def test_a_generator_of_lists_learns_the_spread_between_and_within_requests(generator):
    train = Requests(*NARROW, shift=0.12, size=1600)
    torch.manual_seed(0)
    model = build(
        "DNR", generator=generator, generator_warmup=True, lx_estimator="lists", lambda_e=100, lz_fraction=1.0,
        dropout=0.0,
    ).train()  # fmt: skip
    model.set_epoch(0)
    optimizers = {"generator": torch.optim.Adam(model.generator.parameters(), lr=0.01)}
    for step in range(250):
        slate = train.slate(torch.arange(64) + 64 * (step % 25))
        *_, warm = training_steps(model, slate)
        assert warm.groups == ("generator",) and "L_adv" not in warm.terms
        optimizers["generator"].zero_grad()
        torch.autograd.backward(warm.loss, inputs=list(model.generator.parameters()))
        optimizers["generator"].step()
    with torch.no_grad():
        x = model.generator.draw(model.encode(train.whole), train.whole)
    real, ours = spread(train.whole.scores, train.whole.mask), spread(x, train.whole.mask)
    assert float(ours[0].std()) == pytest.approx(float(real[0].std()), rel=0.35)
    assert float(ours[1].std()) == pytest.approx(float(real[1].std()), rel=0.35)


# ---------------------------------------------------------------------- L_adv


@pytest.mark.parametrize("alternation", ["alternate", "reversal"])
def test_a_balanced_adversary_pulls_as_strongly_as_the_data(alternation):
    model = build(
        "DNR", lambda_e=0, adv_balance="gradient", alternation=alternation, lz_fraction=1.0, lx_estimator="wasserstein"
    ).train()
    model.set_epoch(0)
    with torch.no_grad():  # x' that grows with the label
        model.generator.from_label.weight.fill_(0.3)
        model.generator.out.weight.fill_(0.1)
    *_, step = training_steps(model, random_slate(2))
    parameters = list(model.generator.parameters())
    gradients = torch.autograd.grad(step.loss, parameters)
    assert sum(float(g.abs().sum()) for g in gradients) > 0 and all(torch.isfinite(g).all() for g in gradients)
    if alternation == "alternate":
        assert float(step.terms["adv_share"]) == pytest.approx(0.5, abs=1e-4)
        assert 0 < float(step.terms["adv_upright"]) <= 1


def test_no_adversary_acts_on_scores_whose_sign_has_turned():
    model = build("DNR", lambda_e=0, adv_balance="gradient", lz_fraction=1.0).train()
    model.set_epoch(0)
    slate = random_slate(1)
    upright = lambda x: model._upright(x * slate.mask, slate)  # noqa: E731
    assert upright(slate.labels).all() and not upright(1 - slate.labels).any()
    model.evidence.fill_(-1.0)
    assert upright(1 - slate.labels).all()
    with pytest.raises(ConfigError, match="lambda_x must be > 0"):
        build("DNR", adv_balance="gradient", lambda_x=0.0)


# ---------------------------------------------------------------------- schedule


def test_the_switch_may_be_counted_in_batches():
    model = build("DNR", lambda_e=50, lambda_e_steps=2).train()
    phases = []
    for _ in range(4):
        phases.append((model.phase, model.waits))
        list(training_steps(model, random_slate()))
    assert phases == [("heuristic", True)] * 2 + [("learned", False)] * 2
    other = build("DNR", lambda_e=50, lambda_e_steps=2)
    other.load_state_dict(model.state_dict())
    assert other.phase == "learned", "a resumed training goes on in the phase that it was in"
    assert build("DNR", adversarial=False).phase == "heuristic" and not build("DNR", adversarial=False).waits


def test_the_generator_has_a_weight_decay_of_its_own(tmp_path):
    from dnr_recbole.trainer import RerankTrainer

    config = model_config("DNR", weight_decay=0.1, tensorboard_dir=None)
    trainer = RerankTrainer(config, build("DNR"), random_catalogue())
    decays = {name: optimizer.defaults["weight_decay"] for name, optimizer in trainer.optimizers.items()}
    assert decays == {"reranker": 0.1, "generator": 0.0}


@pytest.mark.parametrize("anew", [False, True])
def test_the_served_checkpoint_says_its_phase(tmp_path, monkeypatch, anew):
    from dnr_recbole.quick_start import run_dnr
    from dnr_recbole.trainer import checkpoint

    monkeypatch.chdir(tmp_path)
    scores = iter([0.9, 0.8, 0.3, 0.4, 0.35])
    monkeypatch.setattr(
        "dnr_recbole.trainer.rerank_trainer.Trainer._valid_epoch",
        lambda self, data, show_progress=False: (next(scores), {"ndcg@6": 0.0}),
    )
    keys = {
        "synthetic_users": 60, "synthetic_items": 60, "n_candidates": 10, "embedding_size": 8, "epochs": 5,
        "lambda_e": 2, "baselines": [], "use_gpu": False, "select_after_switch": anew, "log_dir": None,
        "tensorboard_dir": None,
    }  # fmt: skip
    row = run_dnr("DNR", "synthetic", config_dict=keys)["row"]
    assert row["best_phase"] == ("learned" if anew else "heuristic")
    meta = checkpoint.load(row["checkpoint"])["meta"]
    assert meta.best_phase == row["best_phase"] and meta.epoch == (3 if anew else 0)
