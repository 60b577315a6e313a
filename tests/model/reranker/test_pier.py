"""PIER: what holds for it beyond the contract of all rerankers."""

import dataclasses
import itertools
import math

import pytest
import torch

from dnr_recbole.lists import best_first, gather_lists, pages, unpage
from dnr_recbole.model.reranker._permutation_hash import PermutationHash, permutation_rows
from dnr_recbole.testing import build, random_slate


@pytest.fixture
def slate():
    return random_slate()


def hashing(length=3, pool=5, limit=10**6, bits=64, n_pages=5, dim=16):
    torch.manual_seed(0)
    return PermutationHash(dim, length, pool, limit, bits, n_pages)


def hamming(a, b):
    return (a != b).sum(-1)


def test_hamming_distance_is_zero_for_the_same_list_and_full_for_the_opposite():
    h = hashing()
    lists, mask = torch.randn(20, 3, 16), torch.ones(20, 3, dtype=torch.bool)
    bits = h.page_bits(lists, mask)
    assert bits.shape == (20, 64) and bits.dtype == torch.bool
    assert torch.equal(bits, h.page_bits(lists.clone(), mask))
    near, far = lists + 0.01 * torch.randn_like(lists), -lists
    assert (hamming(bits, h.page_bits(near, mask)) <= 6).all()
    assert (hamming(bits, h.page_bits(far, mask)) == 64).all()  # the other side of every hyperplane


def test_expected_hamming_distance_is_the_angle():
    """E[Hamming] / b = angle / π between the hashed vectors."""
    h = hashing(length=1, pool=2, bits=20000)
    a, b = torch.randn(8, 1, 16), torch.randn(8, 1, 16)
    b = a + 0.7 * b
    mask = torch.ones(8, 1, dtype=torch.bool)
    cosine = torch.cosine_similarity((a * h.slots).sum(1), (b * h.slots).sum(1))
    share = hamming(h.page_bits(a, mask), h.page_bits(b, mask)) / 20000
    torch.testing.assert_close(share, torch.arccos(cosine) / math.pi, atol=0.015, rtol=0)


def test_hash_depends_on_the_slots():
    h = hashing(bits=256)
    items, mask = torch.randn(10, 3, 16), torch.ones(10, 3, dtype=torch.bool)
    turned = h.page_bits(items.roll(1, dims=1), mask)
    assert (hamming(h.page_bits(items, mask), turned) > 0).all()


def test_hyperplanes_point_everywhere():
    """Multiplying with a positive vector would change no sign."""
    assert (hashing().hyperplanes < 0).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("length,pool", [(1, 4), (2, 2), (3, 5), (6, 8)])
def test_rows_are_all_permutations_once(length, pool):
    rows = permutation_rows(pool, length, 10**6)
    assert len(rows) == math.perm(pool, length)
    assert {tuple(row) for row in rows.tolist()} == set(itertools.permutations(range(pool), length))
    assert rows[0].tolist() == list(range(length))


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_rows_never_exceed_the_limit(limit):
    rows = permutation_rows(9, 6, limit)
    assert len(rows) == limit
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(torch.unique(rows, dim=0)) == limit
    assert all(len(set(row)) == 6 and max(row) < 9 for row in rows.tolist())


@pytest.mark.parametrize("length,pool,limit", [(1, 4, 10**6), (3, 5, 10**6), (4, 6, 50)])
def test_distances_equal_those_of_hashed_permutation_vectors(length, pool, limit):
    """The table of slot × item contributions gives what forming and hashing every permutation gives."""
    h = hashing(length=length, pool=pool, limit=limit)
    torch.manual_seed(1)
    items, history = torch.randn(4, pool, 16), torch.randn(4, 5, length, 16)
    has_page = torch.arange(5) < torch.tensor([5, 3, 1, 0]).unsqueeze(1)
    page_bits = h.page_bits(history, has_page.unsqueeze(-1).expand(4, 5, length))
    lists = items[:, h.rows]
    bits = h.page_bits(lists, torch.ones(lists.shape[:-1], dtype=torch.bool))
    weight = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 4])
    expected = (hamming(bits.unsqueeze(2), page_bits.unsqueeze(1)) * weight * has_page.unsqueeze(1)).sum(-1)
    distances = h.distances(items, page_bits, has_page)
    torch.testing.assert_close(distances * h.unit, expected)
    subset = torch.tensor([0, 3, 2])
    torch.testing.assert_close(h.distances(items, page_bits, has_page, subset), distances[:, subset])


def test_distances_do_not_depend_on_the_chunking():
    h = hashing(length=4, pool=8, bits=1024)  # 1680 rows: a chunk is one request
    items, bits = torch.randn(5, 8, 16), torch.rand(5, 5, 1024) < 0.5
    has_page = torch.ones(5, 5, dtype=torch.bool)
    together = h.distances(items, bits, has_page)
    alone = torch.cat([h.distances(items[i : i + 1], bits[i : i + 1], has_page[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)


def test_nearest_are_the_smallest_of_the_enumerated():
    h = hashing()
    distances = torch.randint(0, 30, (6, 60)).float()
    columns, usable = h.nearest(distances, torch.full((6,), 5), 20)
    assert usable.all() and columns.max() < 60
    assert all(len(set(row)) == 20 for row in columns.tolist())
    torch.testing.assert_close(distances.gather(1, columns), distances.sort(1).values[:, :20])
    far, _ = h.nearest(distances, torch.full((6,), 5), 20, farthest=True)
    torch.testing.assert_close(distances.gather(1, far), distances.sort(1, descending=True).values[:, :20])


def test_ties_go_to_the_better_items():
    columns, _ = hashing().nearest(torch.zeros(2, 60), torch.full((2,), 5), 4)
    assert columns.tolist() == [[0, 1, 2, 3]] * 2


def test_history_is_cut_into_pages_newest_first():
    model = build("PIER", n_pages=3)
    mask = torch.arange(8) < torch.tensor([8, 4, 0]).unsqueeze(1)
    positions, real = model._history_pages(mask)
    assert positions[0].tolist() == [[5, 6, 7], [2, 3, 4], [0, 1, -1]]
    assert positions[1].tolist() == [[1, 2, 3], [0, -1, -1], [-1, -1, -1]]
    assert torch.equal(real, positions >= 0) and not real[2].any()


@pytest.mark.parametrize("sample", [0, 16])
@pytest.mark.parametrize("n", [12, 4, 2])
def test_lists_are_valid_permutations_of_the_pool(sample, n):
    slate = random_slate(n=n)
    model = build("PIER", pool_size=5)
    context = model.encode(slate)
    point = torch.randn(slate.mask.shape)
    lists, usable = model.permutations(context, slate, point, 10, sample, farthest=10)
    assert usable.any(1).all()
    for r, request in enumerate(lists):
        valid = int(slate.mask[r].sum())
        pool = point[r].masked_fill(~slate.mask[r], -torch.inf).topk(min(5, valid)).indices.tolist()
        for row, ok in zip(request.tolist(), usable[r]):
            if ok:
                real = [i for i in row if i >= 0]
                assert len(set(real)) == len(real) == min(3, valid)
                assert row[: len(real)] == real and set(real) <= set(pool)


def test_serving_looks_at_no_more_permutations_than_configured(slate, monkeypatch):
    model = build("PIER", max_permutations=9, n_nearest=50)
    assert len(model.hash.rows) == 9
    seen = []
    original = PermutationHash.nearest
    monkeypatch.setattr(
        PermutationHash,
        "nearest",
        lambda self, d, *a, **k: seen.append(d.shape[1]) or original(self, d, *a, **k),
    )
    with torch.no_grad():
        model.predict(slate)
    assert seen == [9]


def test_serves_the_list_with_the_highest_value(slate):
    model = build("PIER", list_value="mean")
    with torch.no_grad():
        context = model.encode(slate)
        state = model.represent(context, slate, slate.scores)
        lists, usable = model.candidate_lists(context, slate, state.point)
        pctr = torch.sigmoid(model.list_logits(state, lists, lists >= 0)) * (lists >= 0)
        value = (pctr.sum(-1) / (lists >= 0).sum(-1)).masked_fill(~usable, -1)
        shown = model.generate(slate)
        own = torch.sigmoid(model.list_logits(state, shown.unsqueeze(1), shown.unsqueeze(1) >= 0))
    reached = (own * (shown >= 0).unsqueeze(1)).sum((1, 2)) / (shown >= 0).sum(1)
    torch.testing.assert_close(reached, value.amax(1))


def test_without_contrast_the_loss_is_the_plain_likelihood(slate):
    def run(weight):
        model = build("PIER", contrast_weight=weight, dropout=0.0).train()
        context = model.encode(slate)
        torch.manual_seed(7)
        loss = model.loss(context, slate, slate.scores)
        torch.manual_seed(7)
        return model, context, loss, *model.losses(context, slate, slate.scores)

    model, context, plain, supervised, _ = run(0.0)
    torch.testing.assert_close(plain, supervised)
    _, _, contrasted, same, gap = run(0.5)
    torch.testing.assert_close(same, supervised)
    torch.testing.assert_close(contrasted, supervised - 0.5 * gap)
    assert gap.abs() > 0

    state = model.represent(context, slate, slate.scores)
    torch.manual_seed(7)
    near, usable = model.permutations(context, slate, state.point, model.n_contrast, model.train_permutations)
    mask = (near >= 0) & usable.unsqueeze(-1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = (
        bce(model.score(context, slate, slate.scores)[slate.mask], slate.labels[slate.mask])
        + bce(state.point[slate.mask], slate.labels[slate.mask])
        + bce(model.list_logits(state, near, mask)[mask], gather_lists(slate.labels, near)[mask])
    )
    torch.testing.assert_close(plain, expected)


def test_oracle_bounds_what_is_served(slate):
    model = build("PIER", pool_size=4)
    oracle = model.oracle(slate)
    with torch.no_grad():
        shown = model.generate(slate)
    hits = (gather_lists(slate.labels, shown) * (shown >= 0)).sum(1)
    reached = hits / slate.labels.sum(1).clamp(max=3)
    assert (reached <= oracle["lists"] + 1e-6).all()
    assert (oracle["lists"] <= oracle["pool"] + 1e-6).all()
    assert (oracle["pool"] <= 1).all() and oracle["pool"].min() < 1
    everything = build("PIER", pool_size=12, n_nearest=1320)
    torch.testing.assert_close(everything.oracle(slate)["lists"], torch.ones(len(slate)))


@pytest.mark.parametrize("method", ["concat", "add", "weight"])
def test_score_is_differentiable_in_x(slate, method):
    model = build("PIER", score_fusion=method)
    x = slate.scores.clone().requires_grad_()
    model.criterion(model.score(model.encode(slate), slate, x), slate).backward()
    assert (x.grad[slate.mask] != 0).any() and torch.isfinite(x.grad).all()


def test_listed_items_know_the_other_items_of_their_list(slate):
    model = build("PIER")
    context = model.encode(slate)
    state = model.represent(context, slate, slate.scores)
    top = best_first(slate.scores, slate.mask)[:, :4].tolist()
    lists = torch.tensor([[[a, b, c], [a, b, d], [a, c, b]] for a, b, c, d in top])
    logits = model.list_logits(state, lists, torch.ones_like(lists, dtype=torch.bool))
    assert (logits[:, 0, 0] != logits[:, 1, 0]).all(), "another neighbour"
    assert (logits[:, 0, 0] != logits[:, 2, 0]).all(), "another order of the neighbours"


def test_taste_reaches_the_served_lists(slate):
    model = build("PIER", include_pointwise=False, n_nearest=1)
    other = dataclasses.replace(
        slate, history=slate.history.roll(1, dims=0), history_mask=slate.history_mask.roll(1, 0)
    )
    pool = lambda s: model.permutations(model.encode(s), s, slate.scores, 1)[0]  # noqa: E731
    assert not torch.equal(pool(slate), pool(other))


def test_pages_and_back():
    mask = torch.rand(4, 13) < 0.8
    order = best_first(torch.rand(4, 13), mask)
    positions, page_mask = pages(order, mask, 6)
    assert positions.shape == (4, 3, 6) and int(page_mask.sum()) == int(mask.sum())
    values = torch.randn(4, 13)
    assert torch.equal(unpage(gather_lists(values, positions), order), values)


def test_training_hashes_what_serving_hashes():
    model, slate = build("PIER", dropout=0.5), random_slate(ragged=False)
    point = slate.scores
    torch.manual_seed(0)
    served = model.eval().permutations(model.encode(slate), slate, point, 4)[0]
    trained = model.train().permutations(model.encode(slate), slate, point, 4)[0]
    assert torch.equal(served, trained)


def test_requests_without_a_page_have_no_near_and_far_lists():
    model, slate = build("PIER", dropout=0.0).train(), random_slate(ragged=False)
    alone = dataclasses.replace(slate, history_mask=slate.history_mask & False, history=slate.history * 0)
    assert float(model.losses(model.encode(alone), alone, alone.scores)[1]) == 0
    assert float(model.losses(model.encode(slate), slate, slate.scores)[1].abs()) > 0
