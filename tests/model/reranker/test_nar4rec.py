"""NAR4Rec: the matching matrix, its losses and contrastive decoding."""

import pytest
import torch

from dnr_recbole.model.reranker._list_decoding import (
    contrastive_decode,
    cosine_matrix,
    greedy_decode,
    list_utility,
    seeded_gumbel,
)
from dnr_recbole.model.reranker.nar4rec import contrast_loss, likelihood_loss, unlikelihood_loss
from dnr_recbole.testing import build, random_slate


@pytest.fixture
def model():
    return build("NAR4Rec")


@pytest.fixture
def slate():
    return random_slate()


def log_matching(model, slate):
    with torch.no_grad():
        matched = model.match(model.encode(slate), slate, slate.scores)
        return model.log_matching(matched, slate.mask), matched


def test_columns_are_distributions_over_valid_candidates(model, slate):
    p = log_matching(model, slate)[0].exp()
    torch.testing.assert_close(p.sum(1), torch.ones(len(slate), model.slate_size))
    assert p[~slate.mask].abs().max() == 0


def test_permuting_candidates_permutes_rows(model, slate):
    order = torch.rand(slate.candidates.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    p, moved = log_matching(model, slate)[0], log_matching(model, slate.shuffled(order))[0]
    expected = p.gather(1, order.unsqueeze(-1).expand_as(p))
    valid = slate.mask.gather(1, order)
    torch.testing.assert_close(moved[valid], expected[valid], atol=1e-5, rtol=1e-4)


def test_alpha_zero_is_masked_argmax(model, slate):
    log_p, matched = log_matching(model, slate)
    shown = model.decode(matched, slate)[:, 0]  # the grid starts with α = 0
    for row in range(len(slate)):
        left = slate.mask[row].clone()
        for slot in range(model.slate_size):
            best = log_p[row, :, slot].masked_fill(~left, -torch.inf).argmax()
            assert shown[row, slot] == best
            left[best] = False


def test_alpha_one_takes_the_least_similar_second():
    g = torch.Generator().manual_seed(0)
    vectors, relevance = torch.randn(5, 9, 4, generator=g), torch.rand(5, 1, 9, 2, generator=g)
    mask = torch.ones(5, 9, dtype=torch.bool)
    similarity = cosine_matrix(vectors)
    lists = contrastive_decode(relevance, similarity, mask, torch.ones(1))[:, 0]
    assert torch.equal(lists[:, 0], relevance[:, 0, :, 0].argmax(1))  # nothing to be unlike yet
    for row, (first, second) in enumerate(lists.tolist()):
        others = similarity[row, first].clone()
        others[first] = torch.inf
        assert second == int(others.argmin())


def test_top_k_limits_what_similarity_can_choose():
    g = torch.Generator().manual_seed(0)
    relevance, mask = torch.rand(6, 1, 9, 3, generator=g), torch.ones(6, 9, dtype=torch.bool)
    similarity = cosine_matrix(torch.randn(6, 9, 4, generator=g))
    limited = contrastive_decode(relevance, similarity, mask, torch.ones(1), top_k=1)
    assert torch.equal(limited, greedy_decode(relevance, mask))


def test_unlikelihood_lowers_the_given_cell():
    logits = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bad = torch.tensor([[4, 1, -1]])
    loss = unlikelihood_loss(torch.log_softmax(logits, 1), bad)
    loss.backward()
    after = torch.softmax(logits - logits.grad, 1)
    before = torch.softmax(logits, 1)
    assert after[0, 4, 0] < before[0, 4, 0] and after[0, 1, 1] < before[0, 1, 1]
    assert logits.grad[..., 2].abs().max() == 0  # an empty slot carries no loss


def test_likelihood_raises_the_given_cell():
    logits = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    likelihood_loss(torch.log_softmax(logits, 1), torch.tensor([[4, 1, -1]])).backward()
    assert logits.grad[0, 4, 0] < 0 and logits.grad[0, 1, 1] < 0 and logits.grad[..., 2].abs().max() == 0


def test_losses_at_certainty_are_finite():
    log_p = torch.log_softmax(torch.tensor([[[80.0], [0.0]]]), 1).requires_grad_()
    loss = unlikelihood_loss(log_p, torch.tensor([[0]]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_p.grad).all()


def test_no_list_has_duplicates(model, slate):
    lists = model.decode(log_matching(model, slate)[1], slate)
    assert lists.shape == (len(slate), 10, model.slate_size)
    for request, mask in zip(lists, slate.mask):
        for shown in request.tolist():
            real = [p for p in shown if p >= 0]
            assert len(set(real)) == len(real) == min(model.slate_size, int(mask.sum()))
            assert mask[real].all()


def test_targets_are_positives_and_zero_labels_by_score(model, slate):
    good, bad = model.target_lists(slate)
    for row in range(len(slate)):
        g, b = good[row][good[row] >= 0], bad[row][bad[row] >= 0]
        labels, scores = slate.labels[row], slate.scores[row]
        assert (labels[g] == 1).all() and (labels[b] == 0).all() and slate.mask[row][b].all()
        assert len(g) == min(model.slate_size, int(labels.sum()))
        assert torch.equal(scores[g], scores[g].sort(descending=True).values)
        assert torch.equal(scores[b], scores[b].sort(descending=True).values)


def test_retriever_lists_are_bad_only_below_the_median(slate):
    model = build("NAR4Rec", bad_lists="retriever")
    bad = model.target_lists(slate)[1]
    top = slate.scores.masked_fill(~slate.mask, -1).topk(model.slate_size).indices
    hits = slate.labels.gather(1, top).sum(1)
    used = (bad >= 0).any(1)
    assert torch.equal(used, hits < hits.median())
    assert torch.equal(bad[used], top[used])


def test_contrast_loss_is_zero_for_orthogonal_and_margin_for_equal_candidates():
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert contrast_loss(torch.eye(4).unsqueeze(0), mask, 0.5) == 0
    torch.testing.assert_close(contrast_loss(torch.ones(1, 4, 3), mask, 0.5), torch.tensor(0.5))


def test_sampling_noise_follows_request_and_candidate():
    ids, keys = torch.tensor([[3, 9, 4], [9, 3, 8]]), torch.tensor([1, 1])
    noise = seeded_gumbel(ids, keys, 2, 3)
    assert torch.equal(noise[0, :, 0], noise[1, :, 1])  # item 3 for the same user, in another position and request
    assert not torch.equal(noise[0, :, 0], noise[0, :, 1])
    many = seeded_gumbel(torch.arange(20000).view(200, 100), torch.arange(200), 1, 2).flatten()
    assert abs(float(many.mean()) - 0.5772) < 0.03 and abs(float(many.var()) - 1.645) < 0.1


def test_scores_are_differentiable_in_x(slate):
    for method in ("concat", "add", "weight"):
        model = build("NAR4Rec", score_fusion=method)
        x = slate.scores.clone().requires_grad_()
        model.criterion(model.score(model.encode(slate), slate, x), slate).backward()
        assert x.grad[slate.mask].abs().sum() > 0


def test_the_evaluators_choice_is_shown(model, slate):
    with torch.no_grad():
        model.evaluator.head[-1].weight.mul_(100)
        context = model.encode(slate)
        matched = model.match(context, slate, slate.scores)
        lists = model.decode(matched, slate)
        best = list_utility(model.evaluator, matched.tokens, context.user, lists).argmax(1)
        assert torch.equal(model.generate(slate), lists[torch.arange(len(slate)), best])
    assert len(best.unique()) > 1


def test_the_evaluator_never_learns_on_lists_that_synthetic_scores_ordered(model, slate):
    """Under DNR x is made of labels: in its order, positives would stand first."""
    matched = log_matching(model, slate)[1]
    retrieved = model.training_lists(matched, slate)[:, 0]
    assert torch.equal(retrieved, slate.scores.masked_fill(~slate.mask, -1).topk(model.slate_size).indices)
    seen = []
    model.evaluator.register_forward_hook(lambda *args: seen.append(args[1][0].detach()))
    torch.manual_seed(0)
    model.loss(model.encode(slate), slate, slate.labels)
    tokens = model.fusion(model.encode(slate).tokens, slate.labels, slate.mask)
    rows = torch.arange(len(slate)).unsqueeze(1)
    torch.testing.assert_close(seen[0][:, 0], tokens[rows, retrieved])
