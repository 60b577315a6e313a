"""A log with everything that users can tell: positions, propensities, grades, several objectives, weights."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dnr_recbole import RequestLog
from dnr_recbole.config import Config
from dnr_recbole.requestlog.building import build

KEYS = dict(embedding_size=8, epochs=1, baselines=[], history_interaction="none", knowledge="none", dropout=0.0)


def log_of(requests=200, n=6, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for request in range(requests):
        place = rng.permutation(n)
        grade = rng.integers(0, 5, size=n) * (rng.random(n) < 1 / (1.0 + place))
        for item in range(n):
            shown = place[item] < 4
            rows.append({
                "request_id": f"r{request}", "user_id": f"u{request % 30}", "item_id": f"i{item}",
                "score": float(0.2 * grade[item] + 0.1 * rng.random()), "label": int(grade[item] * shown),
                "exposed": shown, "position": int(place[item]) if shown else None,
                "examination": 1 / (1.0 + place[item]), "propensity": 0.25, "randomised": request % 2 == 0,
                "intended_position": int(place[item]) if shown else None,
                "watched": float(rng.random() * shown), "importance": 1.0 + (request % 3),
            })  # fmt: skip
    return pd.DataFrame(rows)


def binary(frame):
    return frame.assign(label=(frame.label > 0).astype(int))


def built(frame, **keys):
    config = Config("PRM", "log", config_dict={"source": "log", "use_cache": False, **KEYS, **keys})
    return build(config, RequestLog.read(frame))
