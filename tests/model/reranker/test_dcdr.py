"""DCDR's own invariants."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from dnr_recbole.lists import best_first
from dnr_recbole.model.reranker._list_decoding import list_utility
from dnr_recbole.model.reranker._swap_diffusion import SwapMoves
from dnr_recbole.model.reranker.dcdr import UNKNOWN
from dnr_recbole.testing import build, random_slate


@pytest.fixture
def slate():
    return random_slate()


def served(model, slate):
    """The search's result on a slate."""
    context = model.encode(slate)
    tokens = model.vectors(context, slate, slate.scores)
    return tokens, context.user, model.denoise(tokens, context.user, slate)


def neighbours(state, n):
    """All lists one legal move away, by definition."""
    k, out = len(state), []
    for a, b in itertools.combinations(range(k), 2):
        out.append(tuple(state[b] if j == a else state[a] if j == b else state[j] for j in range(k)))
    for a in range(k):
        out += [tuple(i if j == a else state[j] for j in range(k)) for i in range(n) if i not in state]
    return out


# ---------------------------------------------------------------------- moves


def test_280_moves_for_50_candidates_and_6_slots():
    moves = SwapMoves(6)
    state = torch.randperm(50)[:6].view(1, 1, 6)
    assert int(moves.legal(state, torch.ones(1, 50, dtype=torch.bool)).sum()) == 280
    assert int(moves.count(torch.tensor(50))) == 279


@pytest.mark.parametrize("k, n", [(1, 4), (2, 2), (3, 3), (3, 5)])
def test_moves_lead_to_every_neighbour_once(k, n):
    moves = SwapMoves(k)
    state = torch.randperm(n)[:k]
    legal = moves.legal(state.view(1, 1, k), torch.ones(1, n, dtype=torch.bool))[0, 0].nonzero()[:, 0]
    reached = [tuple(s) for s in moves.make(state.expand(len(legal), k), legal, n).tolist()]
    assert reached[0] == tuple(state.tolist())
    assert sorted(reached[1:]) == sorted(neighbours(state.tolist(), n))
    assert len(legal) - 1 == int(moves.count(torch.tensor(n)))


def test_fewer_candidates_than_slots():
    moves = SwapMoves(4)
    state = torch.tensor([[[2, 0, -1, -1]]])
    legal = moves.legal(state, torch.tensor([[True, False, True]]))[0, 0].nonzero()[:, 0]
    assert len(legal) == 2  # stay, and the one exchange
    assert moves.make(state[0], legal[1:], 3).tolist() == [[0, 2, -1, -1]]


# ---------------------------------------------------------------------- forward process


@pytest.mark.parametrize("t, beta", [(0, 0.5), (8, 0.0)])
def test_no_steps_or_no_moves_change_nothing(t, beta):
    order = torch.rand(20, 9).argsort(1)
    noised = SwapMoves(4).forward_process(order, torch.full((20,), 9), torch.full((20,), t), beta)
    assert torch.equal(noised.state, order[:, :4]) and not noised.undo.any()


def test_every_state_is_valid_and_undo_leads_to_a_neighbour():
    n, k = 9, 4
    moves, n_valid = SwapMoves(k), torch.randint(1, n + 1, (500,))
    order = torch.arange(n).expand(500, n)
    noised = moves.forward_process(order, n_valid, torch.randint(1, 9, (500,)), 0.8)
    mask = torch.arange(n) < n_valid.unsqueeze(1)
    for state, m in zip(noised.state.tolist(), n_valid.tolist()):
        real = [s for s in state if s >= 0]
        assert len(set(real)) == len(real) == min(k, m) and all(s < m for s in real)
        assert state[: len(real)] == real
    assert moves.legal(noised.state.unsqueeze(1), mask)[:, 0].gather(1, noised.undo.unsqueeze(1)).all()


def test_one_step_is_undone_exactly():
    order = torch.rand(300, 9).argsort(1)
    moves = SwapMoves(4)
    noised = moves.forward_process(order, torch.full((300,), 9), torch.ones(300, dtype=torch.long), 0.7)
    assert 0.6 < float((noised.undo > 0).float().mean()) < 0.8
    assert torch.equal(moves.make(noised.state, noised.undo, 9), order[:, :4])


@pytest.mark.parametrize("k, n, t", [(3, 3, 1), (3, 3, 4), (2, 4, 1), (2, 4, 3)])
def test_frequencies_match_the_transition_matrix(k, n, t):
    beta, rows = 0.5, 40000
    lists = list(itertools.permutations(range(n), k))
    index = {s: i for i, s in enumerate(lists)}
    step = torch.eye(len(lists), dtype=torch.float64) * (1 - beta)
    for s in lists:
        around = neighbours(s, n)
        for other in around:
            step[index[s], index[other]] += beta / len(around)
    assert torch.allclose(step.sum(0), torch.ones(len(lists), dtype=torch.float64))  # doubly stochastic
    torch.manual_seed(0)
    order = torch.arange(n).expand(rows, n)
    state = SwapMoves(k).forward_process(order, torch.full((rows,), n), torch.full((rows,), t), beta).state
    code = torch.tensor([index[tuple(s)] for s in state.tolist()])
    seen = torch.bincount(code, minlength=len(lists)).double() / rows
    expected = torch.linalg.matrix_power(step, t)[index[tuple(range(k))]]
    assert float((seen - expected).abs().max()) < 4.5 * math.sqrt(0.25 / rows)


# ---------------------------------------------------------------------- reverse net and search


def test_move_probabilities_sum_to_one(slate):
    model = build("DCDR")
    context = model.encode(slate)
    tokens = model.vectors(context, slate, slate.scores)
    state = model.moves.first(best_first(slate.scores, slate.mask), slate.mask.sum(1)).unsqueeze(1).expand(-1, 2, -1)
    log_p = model.net(
        tokens,
        model.net.pool(tokens),
        context.user,
        slate.mask,
        state,
        torch.full((8, 2), 4),
        torch.ones_like(state),
    )
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(8, 2))
    assert torch.equal(log_p > -torch.inf, model.moves.legal(state, slate.mask))


@pytest.mark.parametrize("width, stop", [(1, True), (1, False), (4, True)])
def test_a_perfect_net_restores_the_target(width, stop):
    n, k = 10, 4
    moves = SwapMoves(k)
    target, start = torch.rand(30, n).argsort(1)[:, :k], torch.rand(30, n).argsort(1)[:, :k]
    numbers = torch.zeros(30, n, dtype=torch.long)

    def oracle(states, t):
        # Repairs the first wrong slot, from the slot that has its candidate or from the pool.
        gain = torch.full((*states.shape[:2], 1 + moves.n_pairs + k * n), -20.0)
        for row, beam in itertools.product(range(30), range(states.shape[1])):
            state, goal = states[row, beam].tolist(), target[row].tolist()
            wrong = [j for j in range(k) if state[j] != goal[j]]
            move = 0
            if wrong and goal[wrong[0]] in state:
                a, b = sorted((wrong[0], state.index(goal[wrong[0]])))
                move = 1 + b * (b - 1) // 2 + a
            elif wrong:
                move = 1 + moves.n_pairs + wrong[0] * n + goal[wrong[0]]
            gain[row, beam, move] = 0.0
        return gain.masked_fill(~moves.legal(states, numbers == 0), -torch.inf)

    result = moves.search(start, n, oracle, lambda s: torch.zeros(s.shape[:2]), 8, width, stop)
    assert torch.equal(result.states[:, 0], target)


@pytest.mark.parametrize("start", ["head", "retriever"])
@pytest.mark.parametrize("search", ["density", "path"])
def test_width_one_is_greedy(slate, search, start):
    model = build("DCDR", decoding=search, start=start, beam_width=1, early_stop=False, swap_probability=0.95)
    torch.manual_seed(0)
    with torch.no_grad():
        model.net.out.weight.mul_(10)  # opinions strong enough to move
        tokens, user, result = served(model, slate)
        n_valid = slate.mask.sum(1)
        by = slate.scores if start == "retriever" else model.head(tokens).squeeze(-1)
        state = model.moves.first(best_first(by, slate.mask), n_valid).unsqueeze(1)
        visited = [state]
        for t in range(model.n_steps, 0, -1):
            log_p = model.net(
                tokens,
                model.net.pool(tokens),
                user,
                slate.mask,
                state,
                torch.full((8, 1), t),
                torch.ones_like(state),
            )
            if search == "density":
                prior = torch.full_like(log_p, model.beta) / model.moves.count(n_valid).view(-1, 1, 1)
                prior[..., 0] = 1 - model.beta
                log_p = log_p - prior.log()
            state = model.moves.make(state, log_p.argmax(-1), slate.mask.shape[1])
            visited.append(state)
        assert any(not torch.equal(v, visited[0]) for v in visited)
        assert torch.equal(result.states, state)
        visited = torch.cat(visited, 1)
        value = list_utility(model.evaluator, tokens, user, visited)
        torch.testing.assert_close(result.value, value.max(1).values)
        assert torch.equal(result.best, visited[torch.arange(8), value.argmax(1)])


def test_full_width_is_exhaustive_over_paths():
    """K = n = 3: totals of all lists equal the best of all 4³ move sequences."""
    moves, n_steps = SwapMoves(3), 3
    torch.manual_seed(0)
    table = torch.randn(n_steps + 1, 27, 13)
    code = torch.tensor([9, 3, 1])

    def gains(states, t):
        gain = table[t][(states * code).sum(-1)]
        return gain.masked_fill(~moves.legal(states, torch.ones(len(states), 3, dtype=torch.bool)), -torch.inf)

    start = torch.tensor([[2, 0, 1]])
    result = moves.search(start, 3, gains, lambda s: torch.zeros(s.shape[:2]), n_steps, 6, early_stop=False)
    best = {}
    for sequence in itertools.product(range(4), repeat=n_steps):
        state, total = start, 0.0
        for t, move in zip(range(n_steps, 0, -1), sequence):
            total += float(gains(state.unsqueeze(1), t)[0, 0, move])
            state = moves.make(state, torch.tensor([move]), 3)
        key = tuple(state[0].tolist())
        best[key] = max(total, best.get(key, -math.inf))
    found = {tuple(s): total for s, total in zip(result.states[0].tolist(), result.totals[0].tolist())}
    assert found == pytest.approx(best)


@pytest.mark.parametrize("n", [3, 5])
def test_full_width_is_exhaustive_over_lists(n):
    slate = random_slate(batch=3, n=n, ragged=False)
    model = build("DCDR", beam_width=60, early_stop=False)
    with torch.no_grad():
        tokens, user, result = served(model, slate)
        lists = torch.tensor(list(itertools.permutations(range(n), 3))).expand(3, -1, -1)
        value = list_utility(model.evaluator, tokens, user, lists)
    torch.testing.assert_close(result.value, value.max(1).values)
    assert torch.equal(result.best, lists[torch.arange(3), value.argmax(1)])


@pytest.mark.parametrize("stop", [True, False])
def test_best_of_all_visited_lists_is_served(slate, stop):
    model = build("DCDR", beam_width=4, early_stop=stop)
    visited, value = [], []

    def spy(evaluator, tokens, user, lists, residual):
        visited.append(lists)
        value.append(list_utility(evaluator, tokens, user, lists, residual))
        return value[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("dnr_recbole.model.reranker.dcdr.list_utility", spy)
        rows = slate.select(torch.tensor([3]))  # alone, so that its early stop ends the search
        result = served(model, rows)[2]
    visited, value = torch.cat(visited, 1)[0], torch.cat(value, 1)[0]
    assert torch.equal(result.best[0], visited[value.argmax()])
    for state in visited.tolist():
        assert len(set(state)) == len(state)


def test_beam_holds_distinct_lists(slate):
    model = build("DCDR", beam_width=6, early_stop=False)
    with torch.no_grad():
        result = served(model, slate)[2]
    for states, totals in zip(result.states.tolist(), result.totals):
        kept = [tuple(s) for s, total in zip(states, totals) if total > -math.inf]
        assert len(set(kept)) == len(kept)


# ---------------------------------------------------------------------- condition and targets


def test_condition_is_dropped_as_often_as_asked(slate):
    model = build("DCDR", condition_dropout=0.3, evaluator_lists=0)
    target = model.moves.first(best_first(slate.labels, slate.mask), slate.mask.sum(1))
    torch.manual_seed(0)
    condition = model.condition_of(target.unsqueeze(1).expand(-1, 2000, -1), slate)
    dropped = (condition == UNKNOWN).all(-1)
    assert 0.27 < float(dropped.float().mean()) < 0.33
    labels = slate.labels.gather(1, target).long().unsqueeze(1).expand_as(condition)
    assert torch.equal(condition[~dropped], labels[~dropped])


def test_condition_is_all_ones_at_inference(slate, monkeypatch):
    model = build("DCDR")
    seen, forward = [], model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda *args: seen.append(args[-1]) or forward(*args))
    with torch.no_grad():
        model.predict(slate)  # labels are at hand
    assert seen and all(bool((condition == 1).all()) for condition in seen)


def test_target_puts_positives_first_in_score_order(slate):
    model = build("DCDR")
    order = model.target_order(slate)
    for row, request in enumerate(order.tolist()):
        key = [(-int(slate.mask[row, i]), -float(slate.labels[row, i]), -float(slate.scores[row, i])) for i in request]
        assert key == sorted(key) and sorted(request) == list(range(len(request)))


def test_shuffled_targets_keep_their_candidates():
    model = build("DCDR", shuffled_targets=1.0)
    order = torch.rand(50, 12).argsort(1)
    n_valid = torch.randint(1, 13, (50,))
    shuffled = model.shuffle_slots(order, n_valid)
    filled = torch.arange(12) < n_valid.clamp(max=model.slate_size).unsqueeze(1)
    assert torch.equal(shuffled[~filled], order[~filled])
    assert torch.equal((shuffled * filled).sort(1).values, (order * filled).sort(1).values)
    assert not torch.equal(shuffled, order)
    model.shuffled_targets = 0.0
    assert torch.equal(model.shuffle_slots(order, n_valid), order)


def test_evaluator_never_learns_on_lists_made_from_labels(slate):
    model = build("DCDR")
    logits = model(slate).detach()
    lists = []
    for s in (slate, dataclasses.replace(slate, labels=1 - slate.labels)):
        torch.manual_seed(0)
        lists.append(model.sample_lists(logits, s))
    assert torch.equal(*lists)
    retrieved = model.moves.first(best_first(slate.scores, slate.mask), slate.mask.sum(1))
    assert torch.equal(lists[0][:, 0], retrieved)


def test_the_list_that_the_search_found_is_shown(slate):
    model = build("DCDR")
    with torch.no_grad():
        model.net.out.weight.mul_(10)
        *_, result = served(model, slate)
        assert torch.equal(model.generate(slate), result.best)
        assert not torch.equal(result.best, model.moves.first(best_first(model(slate), slate.mask), slate.mask.sum(1)))


def test_the_moves_alone_learn_eight_requests():
    """Without head and evaluator, from the retriever's list: only the reverse process can find the target."""
    slate = random_slate(seed=5, ragged=False)
    model = build(
        "DCDR", pointwise_weight=0.0, evaluator_weight=0.0, denoising_weight=1.0, start="retriever", dropout=0.0,
        paths=8, condition_dropout=0.0, shuffled_targets=0.0, evaluator_lists=1,
    ).train()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        model.calculate_loss(slate).backward()
        optimizer.step()
    with torch.no_grad():
        *_, result = served(model.eval(), slate)
    labels = slate.labels.gather(1, result.states[:, 0])
    possible = slate.labels.sum(1).clamp(max=3)
    retrieved = slate.labels.gather(1, best_first(slate.scores, slate.mask)[:, :3])
    assert labels.sum() >= 0.9 * possible.sum() > 1.3 * retrieved.sum()
