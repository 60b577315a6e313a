"""What is logged of synthetic scores beside the losses."""

from __future__ import annotations

from typing import Dict, List, Tuple

import torch
from torch import Tensor

from dnr_recbole.data.slate import Slate
from dnr_recbole.dnr.objectives import request_auc, spread, wasserstein

_WATCHED = 64  # requests of a batch whose AUC is measured


@torch.no_grad()
def watched(x: Tensor, noisy: Slate) -> Dict[str, Tensor]:
    """What is logged of x' beside the losses; the mean over the scores where there are several.

    ``score_distance``: Wasserstein-1 distance to the real scores of the batch. ``auc_x``, ``auc_synthetic``: how
    well the real and the synthetic scores tell z within requests. ``between``, ``within``: standard deviations of
    the requests' means and of the deviations from them, ``_x`` of the real scores.
    """
    out: Dict[str, List[Tensor]] = {}
    for synthetic, real, mask in by_score(x.float(), noisy):
        if not bool(mask.any()):
            continue
        out.setdefault("score_distance", []).append(wasserstein(synthetic[mask], real[mask].float()))
        few = slice(0, _WATCHED)
        for name, values in (("", synthetic), ("_x", real.float())):
            auc = request_auc(values[few], noisy.labels[few], mask[few])
            out.setdefault("auc_x" if name else "auc_synthetic", []).append(auc)
            means, deviations = spread(values, mask)
            out.setdefault(f"between{name}", []).append(means.std(unbiased=False))
            out.setdefault(f"within{name}", []).append(deviations.std(unbiased=False))
    means = {name: torch.stack(values).nanmean() for name, values in out.items()}
    return {name: value for name, value in means.items() if torch.isfinite(value)}


def by_score(x: Tensor, noisy: Slate) -> List[Tuple[Tensor, Tensor, Tensor]]:
    """(synthetic, real, mask), ``[B, n]`` each, of every score; the mask holds the candidates that have it."""
    real = noisy.all_logged_scores
    if real.dim() == 2:
        return [(x, real, noisy.mask)]
    return [(x[..., s], real[..., s], noisy.mask & (real[..., s] >= 0)) for s in range(real.shape[-1])]
