"""What synthetic scores look like beside the real ones (the paper's Figure 5): one JSON line per noise and label.

    python benchmarks/noise_densities.py results/noise.jsonl [--dataset=ml-1m] [any key]

A DNR is trained for each noise on the same requests; then x' is drawn for the validation requests. A line holds the
density of x' (or of the real x: "true") on a grid, its Wasserstein distance to the real one, and the AUC of x' for the
label within requests.
"""

from __future__ import annotations

import argparse
import json

import torch
from training import trained

from dnr_recbole.config import Config
from dnr_recbole.dnr.objectives import request_auc, wasserstein
from dnr_recbole.files import atomic_write
from dnr_recbole.quick_start import prepare

BASE = {
    "dataset": "ml-1m", "split": "user", "retriever": "MF", "retriever_args": {"epochs": 4, "embedding_size": 64},
    "embedding_size": 32, "train_batch_size": 256, "epochs": 8, "rerank_loss": "listce",
    "score_normalization": "minmax",
    "max_training_requests": 6000,
    "log_dir": None, "tensorboard_dir": None, "show_progress": False, "baselines": [],
    "metrics": ["NDCG"], "use_gpu": False,
}  # fmt: skip
NOISES = {
    "Gaussian": {"noise_type": "gaussian", "adversarial": False},
    "Beta": {"noise_type": "beta", "adversarial": False},
    "fitted": {"variant": "fitted"},
    "empirical": {"variant": "empirical"},
    "learned (paper's generator)": {"noise_type": "beta", "lambda_e": 2},
    "learned (lists)": {
        "noise_type": "empirical", "generator": "list", "generator_warmup": True, "lx_estimator": "lists",
        "adv_balance": "gradient", "lambda_e": 2, "generator_learning_rate": 0.01,
    },
}  # fmt: skip
BINS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    arguments, keys = parser.parse_known_args()
    lines, data = [], None
    for name, noise in NOISES.items():
        config = Config("DNR", config_dict={**BASE, **noise}, argv=keys)
        data = prepare(config).data if data is None else data
        model = trained(config, data, seed=1, best_epoch=False).model
        slate = data.valid.slate(torch.arange(len(data.valid)))
        with torch.no_grad():
            drawn = model.synthesise(model.backbone.encode(slate), slate)
        for what, x in (("true", slate.scores), (name, drawn)):
            if what == "true" and lines:
                continue
            auc = float(request_auc(x, slate.labels, slate.mask))
            for label in (0, 1):
                chosen = slate.mask & (slate.labels == label)
                density = torch.histc(x[chosen].float(), BINS, 0.0, 1.0) * BINS / int(chosen.sum())
                distance = float(wasserstein(x[chosen].float(), slate.scores[chosen]))
                grid = [(number + 0.5) / BINS for number in range(BINS)]
                lines.append({
                    "name": what, "label": label, "x": grid, "density": density.tolist(), "wasserstein": distance,
                    "auc": auc,
                })  # fmt: skip
            print(f"{what}: AUC {auc:.3f}, distances {lines[-2]['wasserstein']:.3f} {lines[-1]['wasserstein']:.3f}")
    with atomic_write(arguments.output) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


if __name__ == "__main__":
    main()
