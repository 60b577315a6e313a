"""Seq2Slate: the lists it writes, its two ways to compute logits, and its losses."""

import itertools

import pytest
import torch

from dnr_recbole.testing import build, random_slate


def make(**overrides):
    """A model whose untrained logits differ enough to decide."""
    model = build("Seq2Slate", **overrides)
    torch.nn.init.normal_(model.pointer.weight)
    torch.nn.init.normal_(model.token.item.weight)
    return model


def remember(model, slate):
    return model.memory(model.encode(slate), slate, slate.scores)


@pytest.mark.parametrize("write", ["greedy", "sampled", "beam"])
def test_no_candidate_is_written_twice(write):
    model, slate = make(slate_size=6), random_slate(ragged=True)
    slate.mask[0] = slate.scores[0] > slate.scores[0].sort(descending=True).values[3]  # fewer candidates than slots
    memory = remember(model, slate)
    ranks, real = model.beam(memory, 4) if write == "beam" else model.write(memory, sample=write == "sampled")
    assert torch.equal(real.sum(1), slate.mask.sum(1).clamp(max=6))
    for row, valid, mask in zip(ranks, real, memory.mask):
        assert len(set(row[valid].tolist())) == int(valid.sum()) and mask[row[valid]].all()


def test_teacher_forced_and_stepwise_logits_agree():
    model, slate = make(), random_slate()
    memory = remember(model, slate)
    chosen, _ = model.write(memory)
    decoder, stepwise = model.start(memory), []
    for j in range(model.slate_size):
        logits, decoder = model.step(memory, decoder)
        stepwise.append(logits)
        decoder = model.choose(memory, decoder, chosen[:, j])
    torch.testing.assert_close(torch.stack(stepwise, 1), model.teacher_forced(memory, chosen), atol=1e-5, rtol=1e-4)


def test_the_first_step_is_the_score():
    model, slate = make(), random_slate()
    memory = remember(model, slate)
    first = model.teacher_forced(memory, memory.order[:, :3] * 0)[:, 0]
    scores = model(slate)
    torch.testing.assert_close(scores.gather(1, memory.order)[memory.mask], first[memory.mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_permuted_input_with_the_same_score_order_is_equal(decoding):
    model, slate = make(decoding=decoding), random_slate()
    order = torch.rand(slate.candidates.shape).argsort(1)
    mask = slate.mask.gather(1, order)
    a, b = model.predict(slate).gather(1, order), model.predict(slate.shuffled(order))
    assert torch.equal(a[mask], b[mask])


def test_the_order_of_scores_matters():
    model, slate = make(), random_slate()
    other = slate.with_scores((1 - slate.scores) * slate.mask)
    assert (model(slate) - model(other))[slate.mask].abs().max() > 1e-4


def test_beam_of_width_one_is_greedy():
    model, slate = make(), random_slate()
    memory = remember(model, slate)
    assert torch.equal(model.beam(memory, 1)[0], model.write(memory)[0])


def test_a_full_beam_finds_the_most_likely_list():
    model, slate = make(slate_size=2), random_slate(batch=4, n=5, ragged=False)
    memory = remember(model, slate)
    likelihoods = []
    pairs = list(itertools.permutations(range(5), 2))
    for pair in pairs:
        chosen = torch.tensor(pair).expand(4, -1)
        real = torch.ones_like(chosen, dtype=torch.bool)
        left = model.left_over(memory.mask, chosen, real)
        log_p = model.teacher_forced(memory, chosen).masked_fill(~left, -torch.inf).log_softmax(-1)
        likelihoods.append(log_p.gather(-1, chosen.unsqueeze(-1)).sum((1, 2)))
    best = torch.stack(likelihoods).argmax(0)
    assert model.beam(memory, 20)[0].tolist() == [list(pairs[i]) for i in best]


def test_candidates_left_over_before_each_step():
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    left = build("Seq2Slate").left_over(mask, torch.tensor([[2, 0, 0]]), torch.tensor([[1, 1, 0]]).bool())
    assert left.long().tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]]]


def test_the_teacher_writes_positives_first():
    model, slate = build("Seq2Slate", trajectory="teacher"), random_slate()
    memory = remember(model, slate)
    labels = slate.labels.gather(1, memory.order) * memory.mask
    chosen, _ = model.trajectories(memory, labels)
    gains = labels.gather(1, chosen)
    assert (gains.diff(dim=1) <= 0).all() and torch.equal(gains.sum(1), labels.sum(1).clamp(max=3))


def test_ndcg_of_a_list():
    model = build("Seq2Slate")
    labels = torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 3)
    chosen = torch.tensor([[1, 2, 0], [0, 3, 1], [0, 3, 0]])
    real = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    expected = torch.tensor([1.0, 0.5 / (1 + 1 / torch.log2(torch.tensor(3.0))), 0.0])
    torch.testing.assert_close(model.ndcg(labels, chosen, real), expected)


def written_ndcg(model, slate):
    """Mean NDCG of the lists that the model writes greedily."""
    with torch.no_grad():
        memory = remember(model, slate)
        return float(model.ndcg(slate.labels.gather(1, memory.order), *model.write(memory)).mean())


def train(model, slate, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = model.calculate_loss(slate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_reinforce_alone_improves_the_lists():
    torch.manual_seed(0)
    slate = random_slate(seed=5, ragged=False)
    model = build("Seq2Slate", reinforce_weight=1.0, reinforce_samples=8, dropout=0.0)
    model.one_step = lambda logits, *_: logits.sum() * 0  # no supervision

    before = written_ndcg(model, slate)
    train(model, slate, 60)
    assert written_ndcg(model, slate) > max(0.9, before + 0.2)


@pytest.mark.parametrize("overrides", [{}, {"rerank_loss": "bce"}, {"step_loss": "hinge"}, {"trajectory": "teacher"}])
def test_every_loss_trains(overrides):
    torch.manual_seed(0)
    slate, model = random_slate(seed=5, ragged=False), build("Seq2Slate", dropout=0.0, **overrides)
    train(model, slate, 120)
    assert written_ndcg(model, slate) > 0.9


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_the_written_list_is_shown(decoding):
    model, slate = make(decoding=decoding, beam_size=4), random_slate(ragged=False)
    memory = remember(model, slate)
    ranks, _ = model.beam(memory, 4) if decoding == "beam" else model.write(memory)
    assert torch.equal(model.generate(slate), memory.order.gather(1, ranks))


def test_reinforce_reads_its_lists_back_under_the_policy_that_wrote_them():
    model, slate = make(dropout=0.5, reinforce_weight=1.0).train(), random_slate(ragged=False)
    memory = remember(model, slate)
    chosen = memory.order[:, :3] * 0 + torch.arange(3)
    torch.testing.assert_close(model.teacher_forced(memory, chosen), model.teacher_forced(memory, chosen))
