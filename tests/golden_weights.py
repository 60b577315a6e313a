"""Weights of every reranker as an earlier version wrote them, with the scores that it gave.

``python tests/golden_weights.py`` writes those that are not there yet, e.g. of a new reranker. A file is never written
anew: that it loads and scores as it did is what ``test_golden.py`` tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Tuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.registry import get_reranker, list_models
from dnr_recbole.testing import build, random_slate

FOLDER = Path(__file__).with_name("golden_weights")
_KEYS = {"embedding_size": 8}
_SMALL = {
    "EGRerank": {"evaluator_hidden": 8}, "GRU4Rec": {"gru_size": 8}, "MIR": {"mlp_hidden": [8], "lstm_size": 8},
    "MiDNN": {"hidden_sizes": [8, 8]}, "PIER": {"field_size": 8, "head_hidden": 8},
}  # fmt: skip


def made(name: str, seed: int) -> AbstractReranker:
    """A small reranker whose parameters are all away from where they start."""
    interaction = {"history_interaction": "both"} if "both" in get_reranker(name).interactions else {}
    model = build(name, seed=seed, **_KEYS, **_SMALL.get(name, {}), **interaction)
    if model.fits_itself:
        model.fit([random_slate(seed) for seed in range(4)], [random_slate(4)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def scores(model: AbstractReranker) -> Dict[str, Tensor]:
    """Final scores and logits of fixed requests."""
    slate = random_slate(batch=3).without_labels()
    with torch.no_grad():
        found = {"predict": model.predict(slate), "forward": model.forward(slate)}
    return {name: value.masked_fill(~slate.mask, 0.0).float() for name, value in found.items()}


def stored(name: str) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Weights and scores of a file."""
    content = load_file(str(FOLDER / f"{name}.safetensors"))
    parts: Dict[str, Dict[str, Tensor]] = {"weights": {}, "scores": {}}
    for key, value in content.items():
        part, _, rest = key.partition(":")
        parts[part][rest] = value
    return parts["weights"], parts["scores"]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for info in list_models("reranker"):
        file = FOLDER / f"{info.name}.safetensors"
        if not file.exists():
            model = made(info.name, seed=1)
            content = {f"weights:{key}": value.clone().contiguous() for key, value in model.state_dict().items()}
            content.update({f"scores:{key}": value.contiguous() for key, value in scores(model).items()})
            save_file(content, str(file))
            print(f"{file} written")
