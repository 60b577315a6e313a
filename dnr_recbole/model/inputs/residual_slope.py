"""Where the slope of ``score_fusion: residual`` starts: what the training requests say about their own scores."""

from __future__ import annotations

from typing import Callable, Iterator, Tuple, Union

import torch
from torch import Tensor

from dnr_recbole.data.dataset import RerankDataset
from dnr_recbole.lists import first_score
from dnr_recbole.model.inputs.score_fusion import log_odds

MAX_REQUESTS = 200_000  # evenly spaced ones of more: the slope's error is far below what one step of training moves
PRIOR_SD = 10.0  # a Gaussian prior around 0: scores that separate the training requests have no finite slope
_ROWS = 1 << 14  # requests at a time, bounds the memory of the temporaries
_STEPS, _TOLERANCE = 50, 1e-10

Block = Tuple[Tensor, Tensor, Tensor]  # log-odds [R, n], labels [R, n], both 0 at padding, and mask [R, n], in float64
Derivatives = Callable[[Tensor, Block], Tuple[Tensor, Tensor, Tensor]]


def fit_slope(train: RerankDataset, listwise: bool) -> float:
    """The slope a of the logit a · log-odds(x) that fits the labels of the training requests best.

    Args:
        train: the training requests; with weights or targets, positives count what those say.
        listwise: the logit inside a softmax over the candidates of each request, as in
            :func:`~dnr_recbole.model.losses.list_ce`; else a logistic regression over all candidates, with an intercept
            that is fitted beside it and not kept (a reranker has its own).

    Returns:
        a, which may be negative; 0 where the scores or the labels say nothing. Always the same for the same requests.
    """
    rows = torch.arange(len(train))[:: -(-len(train) // MAX_REQUESTS)]

    def blocks(centre: Union[Tensor, float] = 0.0) -> Iterator[Block]:
        for part in rows.split(_ROWS):
            slate = train.slate(part)
            x = first_score(slate.scores).double()
            mask = (slate.mask & (x >= 0)).double()  # of several scores, the first may be missing
            labels = slate.labels if slate.label_weights is None else slate.labels * slate.label_weights
            known = mask.any(1)  # a request without any such score says nothing
            odds = (log_odds(x.clamp(min=0)) - centre) * mask  # no NaN of a missing score times 0
            yield odds[known], labels.double()[known] * mask[known], mask[known]

    weighted = train.slate(rows[:1]).label_weights is not None
    softmax = _softmax_of_positives if weighted else _softmax
    derivatives, start = (softmax, torch.zeros(1)) if listwise else (_logistic, torch.zeros(2))
    # Around their mean, log-odds that are all the same are 0, and no intercept can be mistaken for a slope.
    total, count = (torch.stack(part).sum() for part in zip(*((odds.sum(), mask.sum()) for odds, _, mask in blocks())))
    return float(_newton(derivatives, lambda: blocks(total / count), start.double())[0])


def _newton(derivatives: Derivatives, blocks: Callable[[], Iterator[Block]], theta: Tensor) -> Tensor:
    """The minimum of a convex loss plus the prior, from ``theta`` on; a step that raises their sum is halved."""

    def evaluate(at: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        parts = zip(*(derivatives(at, block) for block in blocks()))
        value, gradient, curvature = (torch.stack(part).sum(0) for part in parts)
        prior = PRIOR_SD**-2
        return (
            value + 0.5 * prior * at.square().sum(), gradient + prior * at,
            curvature + prior * torch.eye(len(at), dtype=at.dtype),
        )  # fmt: skip

    value, gradient, curvature = evaluate(theta)
    for _ in range(_STEPS):
        step = torch.linalg.solve(curvature, gradient)
        if float(step @ gradient) <= _TOLERANCE * (1 + abs(float(value))):  # twice what can still be won
            break
        for _ in range(_STEPS):
            tried = evaluate(theta - step)
            if float(tried[0]) <= float(value):
                break
            step = step / 2
        theta = theta - step
        value, gradient, curvature = tried
    return theta


def _softmax_of_positives(theta: Tensor, block: Block) -> Tuple[Tensor, Tensor, Tensor]:
    """Sum of −label · log softmax(a · log-odds) over the positives, and its derivatives."""
    odds, labels, mask = block
    total = labels.sum(1)
    log_p = (theta[0] * odds).masked_fill(mask == 0, -torch.inf).log_softmax(1)
    p = log_p.exp()
    mean = (p * odds).sum(1)
    loss = -(labels * log_p.masked_fill(mask == 0, 0.0)).sum()
    slope = (total * mean - (labels * odds).sum(1)).sum()
    variance = (total * (p * (odds - mean.unsqueeze(1)).square()).sum(1)).sum()
    return loss, slope.view(1), variance.view(1, 1)


def _softmax(theta: Tensor, block: Block) -> Tuple[Tensor, Tensor, Tensor]:
    """The same where each request with a positive counts 1, shared among its positives."""
    odds, labels, mask = block
    return _softmax_of_positives(theta, (odds, labels / labels.sum(1, keepdim=True).clamp(min=1), mask))


def _logistic(theta: Tensor, block: Block) -> Tuple[Tensor, Tensor, Tensor]:
    """Sum over valid candidates of the cross-entropy of a · log-odds + b, and its derivatives in (a, b)."""
    odds, labels, mask = block
    logit = theta[0] * odds + theta[1]
    p = torch.sigmoid(logit)
    loss = (torch.nn.functional.softplus(logit) - labels * logit) * mask
    error, weight = (p - labels) * mask, p * (1 - p) * mask
    gradient = torch.stack([(error * odds).sum(), error.sum()])
    cross = (weight * odds).sum()
    curvature = torch.stack([(weight * odds.square()).sum(), cross, cross, weight.sum()]).view(2, 2)
    return loss.sum(), gradient, curvature
