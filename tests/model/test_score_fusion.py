"""How scores enter: each way and their compositions by hand, and the residual from its fit to the checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dnr_recbole.config import Config
from dnr_recbole.config_schema import load_properties, properties_dir
from dnr_recbole.data.dataloader import SlateLoader
from dnr_recbole.data.dataset import RerankDataset
from dnr_recbole.data.synthetic import synthetic_rerank_data
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import score_ranks
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.inputs import residual_slope
from dnr_recbole.model.inputs.residual_slope import fit_slope
from dnr_recbole.model.inputs.score_fusion import EPSILON, METHODS, ScoreFusion, log_odds, parts_of
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.registry import get_reranker
from dnr_recbole.testing import build, model_config, random_catalogue, random_slate, train_one_batch
from dnr_recbole.trainer import RerankTrainer, checkpoint

SMALL = dict(
    dataset="synthetic", synthetic_users=60, synthetic_items=60, synthetic_requests_per_user=4, n_candidates=12,
    embedding_size=8, train_batch_size=64, epochs=2, use_gpu=False, show_progress=False, log_dir=None,
    tensorboard_dir=None, metrics=["NDCG"], history_interaction="none",
)  # fmt: skip


@pytest.fixture
def inputs():
    slate = random_slate()
    return torch.randn(*slate.mask.shape, 5, generator=torch.Generator().manual_seed(1)), slate.scores, slate.mask


def fusion(method, dim=5):
    torch.manual_seed(2)
    return ScoreFusion(method, dim, 12)


# ---------------------------------------------------------------------- ways and compositions


def by_hand(made: ScoreFusion, tokens, x, mask):
    """The definitions, candidate by candidate."""
    out = tokens.clone()
    for b, i in itertools.product(*map(range, mask.shape)):
        e, s = tokens[b, i], x[b, i]
        if "weight" in made.parts:
            e = e * s
        if "rank" in made.parts:
            better = [j for j in range(mask.shape[1]) if mask[b, j] and x[b, j] > s]
            e = e + made.rank_embedding.weight[len(better)]
        if "concat" in made.parts:
            e = made.project.weight @ torch.cat([e, s.view(1)]) + made.project.bias
        if "add" in made.parts:
            layer = made.shift if "concat" in made.parts else made.project
            e = e + layer.weight[:, 0] * s + layer.bias
        out[b, i] = e
    return out


@pytest.mark.parametrize(
    "method", [*METHODS, "rank+concat", "concat+rank", "weight+rank", "concat+add+residual", "weight+rank+concat+add"]
)
def test_every_way_and_composition_is_what_the_table_says(inputs, method):
    tokens, x, mask = inputs
    made = fusion(method)
    found = made(tokens, x, mask)
    torch.testing.assert_close(found[mask], by_hand(made, tokens, x, mask)[mask])
    assert made.differentiable == any(part in method for part in ("weight", "concat", "add", "residual"))
    assert (made.residual(x) is None) == ("residual" not in method)


def test_the_order_of_names_does_not_matter(inputs):
    a, b = fusion("rank+concat"), fusion("concat+rank")
    assert list(a.state_dict()) == list(b.state_dict()) and torch.equal(a(*inputs), b(*inputs))
    assert parts_of("residual+concat+weight") == ("weight", "concat", "residual") and parts_of("none") == ()
    choices = load_properties(properties_dir() / "overall.yaml").keys["score_fusion"].choices
    assert tuple(choices) == METHODS, "a config spells compositions in the order of application"


@pytest.mark.parametrize("method", ["", "ranks", "rank+", "rank+rank", "none+rank", "rank,concat"])
def test_what_is_no_composition_is_refused(method):
    with pytest.raises(ConfigError, match="score_fusion="):
        parts_of(method)


def test_parameters_of_the_five_old_ways_keep_their_names_and_random_numbers():
    expected = {
        "none": {}, "weight": {}, "rank": {"rank_embedding.weight": (12, 5)},
        "concat": {"project.weight": (5, 6), "project.bias": (5,)},
        "add": {"project.weight": (5, 1), "project.bias": (5,)},
    }  # fmt: skip
    for method, shapes in expected.items():
        made = fusion(method)
        assert {name: tuple(t.shape) for name, t in made.state_dict().items()} == shapes
        after = torch.rand(1)
        torch.manual_seed(2)
        if method == "rank":
            torch.nn.init.normal_(torch.nn.Embedding(12, 5).weight, std=0.02)
        elif shapes:
            torch.nn.Linear(shapes["project.weight"][1], 5)
        assert torch.equal(after, torch.rand(1)), "a model behind it starts from other numbers"


@pytest.mark.parametrize("model", ["PRM", "MiDNN", "Caser", "MGE"])
@pytest.mark.parametrize("method", ["concat", "rank+concat", "weight+add+residual", "concat+add"])
def test_a_state_loads_into_the_same_composition(model, method):
    source, target = build(model, score_fusion=method), build(model, score_fusion=method, seed=9)
    slate = random_slate()
    assert not torch.equal(source(slate), target(slate))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(slate), target(slate))


def test_every_value_to_search_is_a_value():
    for model in ("PRM", "DNR"):
        config = Config(model)
        for value in config.search_space()["score_fusion"]:
            assert config.schema["score_fusion"].check(value) == value
            assert Config(model, config_dict={"score_fusion": value})["score_fusion"] == value


@pytest.mark.parametrize("method, reads", [("rank+concat", True), ("residual", True), ("rank", False)])
def test_dnr_asks_for_one_differentiable_part(method, reads):
    if reads:
        assert build("DNR", score_fusion=method).generator is not None
    else:
        with pytest.raises(ConfigError, match="concat, add, weight or residual"):
            build("DNR", score_fusion=method)


def test_midnn_reads_x_itself_and_the_other_parts_act():
    model, slate = build("MiDNN", score_fusion="rank+concat+residual"), random_slate()
    assert model.fusion.project is None and model.from_score is not None and model.fusion.differentiable
    other = slate.with_scores(slate.scores.flip(1) * slate.mask)
    for parameter in (model.from_score.weight, model.fusion.slope):
        torch.nn.init.zeros_(parameter)
    assert not torch.allclose(model(slate), model(other)), "the rank embedding acts on e"
    torch.nn.init.zeros_(model.fusion.rank_embedding.weight)
    torch.testing.assert_close(model(slate), model(other))


# ---------------------------------------------------------------------- the residual


def test_log_odds_are_finite_strictly_increasing_and_never_flat():
    x = torch.tensor([0.0, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0], requires_grad=True)
    found = log_odds(x)
    assert (found.diff() > 0).all() and float(found[3].detach()) == pytest.approx(0, abs=1e-6)
    assert float(found[-1].detach()) == pytest.approx(np.log((1 - EPSILON) / EPSILON), rel=1e-4)
    assert float(-found[0].detach()) == pytest.approx(np.log((1 - EPSILON) / EPSILON), rel=1e-4)
    assert (torch.autograd.grad(found.sum(), x)[0] > 0).all()


def test_the_residual_is_added_to_the_models_own_logits():
    """With the slope at 0 a model is what it is without; the slope then adds exactly a · log-odds(x)."""
    for name in ("PRM", "SASRec", "GSF", "DiffuRec", "DCDR", "Seq2Slate", "NAR4Rec", "EGRerank", "MMR"):
        slate, plain = random_slate(), build(name, score_fusion="none")
        model = build(name, score_fusion="residual", seed=1)
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and missing == ["fusion.slope"]
        for slope in (0.0, 0.7):
            torch.nn.init.constant_(model.fusion.slope, slope)
            expected = plain(slate) + slope * log_odds(slate.scores)
            torch.testing.assert_close(model(slate)[slate.mask], expected[slate.mask])


def test_a_reranker_whose_own_logits_are_zero_starts_from_the_order_by_score():
    data = synthetic(score_fusion="residual")
    model = fresh("PRM", data, score_fusion="residual")
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    model.prepare(SlateLoader(data.train, 64, shuffle=True))
    slate = data.test.slate(torch.arange(20))
    assert float(model.fusion.slope.detach()) > 0.1
    assert torch.equal(model.generate(slate), slate.scores.argsort(dim=1, descending=True)[:, :6])


def test_the_slope_starts_where_it_makes_the_loss_smallest():
    """Of all slopes, under the reranker's very loss: for bce after its intercept has adapted."""
    for loss in ("bce", "listce"):
        data = synthetic(rerank_loss=loss)
        model = fresh("PRM", data, score_fusion="residual", rerank_loss=loss)
        model.prepare(SlateLoader(data.train, 64))
        slate, start = data.train.slate(torch.arange(len(data.train))), float(model.fusion.slope.detach())

        def best(slope, slate=slate, model=model):
            shift = np.linspace(-5, 5, 201) if model.likelihood.__name__ == "bce" else [0.0]
            return min(float(model.criterion(slope * log_odds(slate.scores) + float(b), slate)) for b in shift)

        assert best(start) <= min(best(start - 0.05), best(start + 0.05))


def test_where_the_score_says_nothing_the_slope_starts_near_nothing():
    data = synthetic()
    noise = torch.rand(data.train.table.scores.shape, generator=torch.Generator().manual_seed(0))
    random = dataset(data, scores=noise)
    constant = dataset(data, scores=torch.full_like(noise, 0.3))
    wrong = dataset(data, scores=1 - data.train.table.scores)
    for listwise in (True, False):
        right = fit_slope(data.train, listwise)
        assert abs(fit_slope(random, listwise)) < 0.1 * right
        assert fit_slope(constant, listwise) == pytest.approx(0, abs=1e-6)
        assert fit_slope(wrong, listwise) == pytest.approx(-right, rel=1e-4), "slopes may be negative"


def test_a_negative_start_is_said(caplog):
    data = synthetic()
    wrong = dataset(data, scores=1 - data.train.table.scores)
    model = fresh("PRM", data, score_fusion="residual")
    with caplog.at_level(logging.INFO):
        model.prepare(SlateLoader(wrong, 64))
    assert "slope of score_fusion residual starts at -" in caplog.text and "positives score lower" in caplog.text


# ---------------------------------------------------------------------- the fit


def synthetic(**keys):
    return synthetic_rerank_data(Config("PRM", config_dict={**SMALL, **keys}))


def fresh(name, data, **keys) -> AbstractReranker:
    torch.manual_seed(0)
    return get_reranker(name)(Config(name, config_dict={**SMALL, **keys}), data.catalogue).eval()


def dataset(data, **columns) -> RerankDataset:
    """The training requests with other columns in their table."""
    return dataclasses.replace(data.train, table=dataclasses.replace(data.train.table, **columns))


def ragged(rows=600, n=9, seed=0):
    """Requests of 2 to n candidates whose labels follow the score with slope 1.3, others at padding."""
    base = synthetic()
    rng = np.random.default_rng(seed)
    mask = np.arange(n) < rng.integers(2, n + 1, (rows, 1))
    scores = np.where(mask, rng.beta(0.6, 0.9, (rows, n)), rng.random((rows, n)))  # garbage at padding
    scores[:20] = scores[:20].round()  # exactly 0 and 1
    odds = log_odds(torch.tensor(scores)).numpy()
    labels = rng.random((rows, n)) < 1 / (1 + np.exp(-(1.3 * odds - 1)))
    labels[30:35] = False
    labels |= ~mask & (rng.random((rows, n)) < 0.5)
    again = torch.arange(rows) % len(base.train.table)
    whole = base.train.table
    others = {name: getattr(whole, name)[again] for name in ("users", "candidates", "history_begin", "history_end")}
    others["candidates"] = others["candidates"][:, :n]
    table = dataclasses.replace(
        whole, **others, scores=torch.tensor(scores, dtype=torch.float32), labels=torch.tensor(labels),
        mask=torch.tensor(mask),
    )  # fmt: skip
    return RerankDataset(table, torch.arange(rows)[rng.random(rows) < 0.9])


def reference(data: RerankDataset, listwise: bool) -> float:
    """The same by a loop over requests and a general minimiser without derivatives."""
    lists = []
    for row in data.rows.tolist():
        keep = data.table.mask[row]
        odds = log_odds(data.table.scores[row][keep].double()).numpy()
        lists.append((odds, data.table.labels[row][keep].numpy().astype(float)))
    mean = np.concatenate([odds for odds, _ in lists]).mean()
    lists = [(odds - mean, labels) for odds, labels in lists]

    def loss(theta):
        total = 0.5 * (theta**2).sum() / residual_slope.PRIOR_SD**2
        for odds, labels in lists:
            if not listwise:
                logit = theta[0] * odds + theta[1]
                total += (np.logaddexp(0, logit) - labels * logit).sum()
            elif labels.any():
                logit = theta[0] * odds
                total -= (labels * (logit - np.log(np.exp(logit).sum()))).sum() / labels.sum()
        return total

    exactly = {"xatol": 1e-7, "fatol": 1e-9}
    return minimize(loss, np.zeros(1 if listwise else 2), method="Nelder-Mead", options=exactly).x[0]


@pytest.mark.parametrize("listwise", [True, False])
def test_the_slope_is_that_of_a_slow_reference(listwise, monkeypatch):
    data = ragged()
    slope = fit_slope(data, listwise)
    assert slope == pytest.approx(reference(data, listwise), abs=1e-4)
    if not listwise:
        assert slope == pytest.approx(1.3, abs=0.1), "the slope that made the labels"
    monkeypatch.setattr(residual_slope, "_ROWS", 7)  # in pieces
    assert fit_slope(data, listwise) == pytest.approx(slope, abs=1e-8)
    monkeypatch.setattr(residual_slope, "MAX_REQUESTS", 100)
    some = RerankDataset(data.table, data.rows[:: -(-len(data) // 100)])
    assert 50 < len(some) <= 100 and fit_slope(data, listwise) == fit_slope(some, listwise) != slope


@pytest.mark.parametrize("listwise", [True, False])
def test_the_slope_of_several_scores_where_the_first_is_missing(listwise):
    data = ragged()
    table = data.table
    first = table.scores.clone()
    first[:, ::3] = -1.0  # found by the other retriever only
    first[5] = -1.0  # a whole request
    pooled = dataclasses.replace(table, scores=torch.stack([first, table.scores], -1))
    without = dataclasses.replace(table, scores=first.clamp(min=0), mask=table.mask & (first >= 0))
    slope = fit_slope(RerankDataset(pooled, data.rows), listwise)
    assert np.isfinite(slope) and slope == pytest.approx(fit_slope(RerankDataset(without, data.rows), listwise))


@pytest.mark.parametrize("listwise", [True, False])
def test_separable_requests_and_requests_without_news_have_a_finite_slope(listwise):
    data = ragged()
    scores, mask = data.table.scores, data.table.mask
    changed = lambda labels: RerankDataset(dataclasses.replace(data.table, labels=labels), data.rows)  # noqa: E731
    best = score_ranks(scores, mask) == 0
    worst = score_ranks(1 - scores, mask) == 0
    above, below = (best, worst) if listwise else ((scores > 0.5) & mask, (scores < 0.5) & mask)
    separable = fit_slope(changed(above), listwise)
    assert np.isfinite(separable) and separable > 2
    assert np.isfinite(fit_slope(changed(below), listwise)) and fit_slope(changed(below), listwise) < -2
    for same in (torch.zeros_like(mask), mask):
        assert abs(fit_slope(changed(same), listwise)) < 1, "labels that are all the same say nothing"


# ---------------------------------------------------------------------- the trainer's hook


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the trainer asks of a PRM, in order; runs keep their files in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    found, cls = [], get_reranker("PRM")
    prepare, pretraining, steps = cls.prepare, cls.pretraining, cls.training_steps

    def record(name, method):
        return lambda self, *args: found.append((name, args)) or method(self, *args)

    for name, method in (("prepare", prepare), ("pretraining", pretraining), ("training_steps", steps)):
        monkeypatch.setattr(cls, name, record(name, method))
    return found


def run(**keys):
    return run_dnr(config_dict={**SMALL, "model": "PRM", "score_fusion": "concat+residual", **keys})["row"]


@pytest.mark.parametrize("framework", [{}, {"model": "DNR", "backbone": "PRM", "lambda_e": 1}])
def test_prepare_comes_first_once_and_not_on_resume(calls, framework):
    whole = run(epochs=3, checkpoint_dir="whole", **framework)
    names = [name for name, _ in calls]
    assert names[:2] == ["prepare", "pretraining"] and names.count("prepare") == 1 and names[2] == "training_steps"
    assert isinstance(calls[0][1][0], SlateLoader) and calls[0][1][0].shuffle
    calls.clear()
    run(epochs=1, **framework)
    assert [name for name, _ in calls].count("prepare") == 1
    calls.clear()
    resumed = run(epochs=3, resume=True, **framework)
    assert "prepare" not in [name for name, _ in calls]
    assert resumed["test"] == whole["test"] and resumed["history"] == whole["history"]


def test_the_slope_comes_with_the_checkpoint(calls):
    run(learning_rate=1e-9)
    (path,) = Path("saved").glob("*-e2.pth")
    data = synthetic()
    start = fit_slope(data.train, listwise=False)
    stored = checkpoint.load(str(path), "cpu")["state_dict"]["fusion.slope"]
    assert float(stored) == pytest.approx(start, abs=1e-5) and abs(start - 1) > 0.05


def test_the_generators_of_mge_have_slopes_of_their_own():
    data = synthetic()
    model = fresh("MGE", data, score_fusion="residual", generator_args={"CLIG": {"rerank_loss": "listce"}})
    model.prepare(SlateLoader(data.train, 64))
    expected = fit_slope(data.train, listwise=False)
    slopes = {name: float(g.fusion.slope.detach()) for name, g in model.generators.items()}
    assert slopes.pop("CLIG") == pytest.approx(fit_slope(data.train, listwise=True))
    assert slopes and all(slope == pytest.approx(expected) for slope in slopes.values())
    assert float(model.fusion.slope.detach()) == pytest.approx(expected)


def test_a_list_that_is_the_retrievers_needs_no_slope():
    data = synthetic()
    for name in ("MMR", "DPP"):
        keys = dict(relevance="retriever", kernel="factors")
        model = build(name, model_config(name, score_fusion="residual", **keys), random_catalogue())
        model.prepare(SlateLoader(data.train, 64))
        assert float(model.fusion.slope.detach()) == 1.0 and not model.fusion.slope.requires_grad
        plain = build(name, model_config(name, score_fusion="none", **keys), random_catalogue())
        assert torch.equal(model(random_slate()), plain(random_slate()))


def test_the_first_item_of_dpp_is_the_most_relevant_one():
    """Its other places are a trade-off that no slope decides."""
    model, slate = build("DPP", score_fusion="residual"), random_slate(short=True)
    torch.nn.init.constant_(model.fusion.slope, 4.0)
    first = score_ranks(slate.scores, slate.mask).argmin(1)
    assert torch.equal(model.generate(slate)[:, 0], first)


@pytest.mark.parametrize("alternation", ["alternate", "reversal"])
def test_dnr_trains_around_a_residual(alternation):
    model = build("DNR", score_fusion="residual", lambda_e=0, alternation=alternation, lz_fraction=1.0).train()
    model.set_epoch(0)
    optimizers = {name: torch.optim.SGD(p, lr=0.1) for name, p in model.parameter_groups().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_one_batch(model, random_slate(), optimizers)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"backbone.fusion.slope"} & moved or {"fusion.slope"} & moved
    assert any(name.startswith("generator.") for name in moved)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def _one_of_two(rank, port, folder):
    """Fits in one of two processes, once with a model whose start differs between them."""
    torch.set_num_threads(1)
    keys = dict(world_size=2, nproc=2, local_rank=rank, port=port, ip="127.0.0.1", learning_rate=1e-9, epochs=1)
    config = Config("PRM", config_dict={**SMALL, **keys, "score_fusion": "residual"})
    data = synthetic_rerank_data(config)
    train, valid = (
        SlateLoader(part, 64, shuffle=part is data.train, rank=rank, world_size=2) for part in (data.train, data.valid)
    )
    found = []
    for start in (None, 7.0 + rank):
        model = get_reranker("PRM")(config, data.catalogue)
        if start is not None:
            model.prepare = lambda loader, model=model, start=start: model.fusion.slope.data.fill_(start)
        RerankTrainer(config, model, data.catalogue).fit(train, valid, saved=False)
        found.append(float(model.fusion.slope.detach()))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_start_alike(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == pytest.approx(fit_slope(synthetic().train, listwise=False), abs=1e-5)
    assert first[1] == pytest.approx(7.0, abs=1e-5)
