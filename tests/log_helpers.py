"""Invented request logs, and a slow reference of what is made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd


def world(n_requests=300, n=8, n_users=30, n_items=40, seed=0, taste=1.5, noise=1.0):
    """A log in the long form: clicks follow tastes, the score is a noisy view of their probability."""
    rng = np.random.default_rng(seed)
    users, items = rng.normal(size=(n_users, 4)), rng.normal(size=(n_items, 4))
    rows = []
    for request in range(n_requests):
        user = rng.integers(n_users)
        candidates = rng.permutation(n_items)[:n]
        logit = taste * users[user] @ items[candidates].T / 2 - 1
        label = rng.random(n) < 1 / (1 + np.exp(-logit))
        score = 1 / (1 + np.exp(-(logit + noise * rng.normal(size=n))))
        for place in range(n):
            rows.append((
                f"r{request}", f"u{user}", f"i{candidates[place]}", round(float(score[place]), 6), int(label[place]),
                request * 60,
            ))  # fmt: skip
    return pd.DataFrame(rows, columns=["request_id", "user_id", "item_id", "score", "label", "timestamp"])


def as_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """The same in the list form."""
    grouped = frame.groupby("request_id", sort=False)
    each = {name: "first" for name in frame if name in ("user_id", "timestamp", "split", "history")}
    out = grouped.agg({**each, **{name: list for name in frame if name not in (*each, "request_id")}})
    return out.reset_index()


def earlier_clicks(frame: pd.DataFrame, request: str) -> list:
    """Slow reference: the user's clicks in requests at earlier times, oldest first."""
    own = frame[frame.request_id == request].iloc[0]
    clicks = frame[(frame.user_id == own.user_id) & (frame.timestamp < own.timestamp) & (frame.label == 1)]
    return clicks.sort_values("timestamp", kind="stable").item_id.tolist()
