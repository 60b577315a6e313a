"""Where clicked candidates lie for the retriever and for rerankers (the paper's Figure 1): JSON lines of points.

    python benchmarks/embeddings.py results/embeddings.jsonl [--dataset=ml-1m] [any key]

Of the retriever: the product of a user's and a candidate's vector, component by component, whose sum is the score. Of a
reranker: what its last layer reads. Both are put on their first two principal components. A line holds some clicked
or other candidates of test requests, the AUC of the final score for the label within requests, and the noise of that
score: its mean distance to the label after the best monotone map to a probability (isotonic regression).
"""

from __future__ import annotations

import argparse
import json
from typing import List

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from training import trained

from dnr_recbole.config import Config
from dnr_recbole.dnr.objectives import request_auc
from dnr_recbole.files import atomic_write
from dnr_recbole.quick_start import prepare

BASE = {
    "dataset": "ml-1m", "split": "user", "retriever": "MF", "retriever_args": {"epochs": 4, "embedding_size": 64},
    "embedding_size": 32, "train_batch_size": 256, "epochs": 8, "rerank_loss": "listce", "precision": "fp32",
    "max_training_requests": 6000, "log_dir": None, "tensorboard_dir": None, "show_progress": False, "baselines": [],
    "metrics": ["NDCG"], "use_gpu": False,
}  # fmt: skip
MODELS = {
    "PRM": {"model": "PRM", "score_fusion": "none"},
    "PRM with the score": {"model": "PRM", "score_fusion": "concat"},
    "DNR, fitted": {"model": "DNR", "variant": "fitted"},
}
POINTS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    arguments, keys = parser.parse_known_args()
    data, lines = None, []
    for name, own in MODELS.items():
        config = Config(config_dict={**BASE, **own}, argv=keys)
        if data is None:
            data = prepare(config).data
            slate = data.test.slate(torch.arange(len(data.test)))
            users, items = data.catalogue.user_factors[slate.users], data.catalogue.item_factors[slate.candidates]
            lines += points("retriever", users.unsqueeze(1) * items, slate.scores, slate)
        model = trained(config, data, seed=1, best_epoch=False).model
        read: List[Tensor] = []
        head = getattr(model, "backbone", model).head
        hook = head.register_forward_hook(lambda _, inputs, __, read=read: read.append(inputs[0]))
        with torch.no_grad():
            scores = torch.sigmoid(model.eval().forward(slate.without_labels()))
        hook.remove()
        lines += points(name, read[-1], scores, slate)
    with atomic_write(arguments.output) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def points(name: str, vectors: Tensor, scores: Tensor, slate) -> List[dict]:
    """Lines of the vectors ``[B, n, d]`` behind the scores ``[B, n]``."""
    auc = float(request_auc(scores.float(), slate.labels, slate.mask))
    x, z = scores[slate.mask].double().numpy(), slate.labels[slate.mask].double().numpy()
    noise = float(np.abs(IsotonicRegression(out_of_bounds="clip").fit(x, z).predict(x) - z).mean())
    flat = vectors[slate.mask].double()
    flat = (flat - flat.mean(0)) / flat.std()
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    plane = flat @ directions[:2].T
    plane = plane * torch.sign(plane.abs().max(0).values * plane.gather(0, plane.abs().argmax(0, keepdim=True))[0])
    generator = torch.Generator().manual_seed(0)
    lines = []
    for label, what in ((0, "not clicked"), (1, "clicked")):
        rows = torch.nonzero(slate.labels[slate.mask] == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)[:POINTS]]
        lines.append({
            "panel": name, "name": what, "x": plane[rows, 0].tolist(), "y": plane[rows, 1].tolist(), "auc": auc,
            "noise": noise,
        })  # fmt: skip
    print(f"{name}: AUC {auc:.3f}, noise {noise:.4f}")
    return lines


if __name__ == "__main__":
    main()
