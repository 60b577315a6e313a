"""Tiny interactions, a retriever with given scores, and slow references of both protocols."""

from types import SimpleNamespace

import numpy as np
import torch

from dnr_recbole.data.interactions import Interactions
from dnr_recbole.retriever.calibration import Calibration
from dnr_recbole.retriever.retrieval import Retrieval

CONFIG = {
    "protocol": "exposed",
    "split": "last",
    "n_candidates": 5,
    "slate_size": 2,
    "history_length": 3,
    "history_feedback": "all",
    "label_threshold": 3,
    "label_window": 4,
    "request_stride": 2,
    "retriever_fraction": 0.5,
    "exclude_seen": False,
    "repeatable": False,
    "score_normalization": "none",
    "max_feature_vocabulary": 64,
    "max_requests_per_user": 0,
    "use_cache": False,
    "seed": 3,
}


def make_interactions(users, n_items):
    """``users``: for each user (from id 1) the list of (item, clicked) in time order."""
    flat = [(u, item, click) for u, events in enumerate(users, start=1) for item, click in events]
    user, item, click = (np.array(column) for column in zip(*flat))
    ptr = np.concatenate([[0, 0], np.cumsum([len(events) for events in users])])
    return Interactions(
        user=user,
        item=item,
        time=np.arange(len(flat), dtype=np.float64),
        rating=None,
        click=click.astype(bool),
        ptr=ptr,
        row=np.arange(len(flat)),
        n_items=n_items + 1,
    )


def random_interactions(seed, n_users=12, n_items=25, longest=24, repeats=True):
    """Users of all lengths, some with none; items may repeat within a user."""
    rng = np.random.default_rng(seed)
    users = []
    for _ in range(n_users):
        length = int(rng.integers(0, longest))
        items = rng.integers(1, n_items + 1, length) if repeats else rng.permutation(n_items)[:length] + 1
        users.append([(int(i), bool(rng.random() < 0.6)) for i in items])
    return make_interactions(users, n_items)


class GivenScores(torch.nn.Module):
    """A RecBole-like recommender that looks its scores up."""

    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table

    def full_sort_predict(self, interaction):
        return self.table[interaction["user_id"]].reshape(-1)


def make_retrieval(data, seed=0, table=None):
    """A Retrieval with distinct random scores in (0, 1), or the given [U, I] ones."""
    if table is None:
        table = torch.rand(data.n_users, data.n_items, generator=torch.Generator().manual_seed(seed))
    return Retrieval(
        name="Given",
        model=GivenScores(table.float()),
        calibration=Calibration(),
        uid_field="user_id",
        iid_field="item_id",
        n_users=data.n_users,
        n_items=data.n_items,
        split=np.full(len(data), 2, dtype=np.int8),  # fitted on nothing
        train_count=torch.from_numpy(np.bincount(data.item, minlength=data.n_items)),
        key={"scores": seed},
    )


def history_of(events, position, config):
    past = [item for item, click in events[:position] if click or config["history_feedback"] == "all"]
    return past[-config["history_length"] :]


def reference_exposed(users, scores, config):
    """Protocol `exposed`, one request at a time: list of dicts in table order, without split=user codes."""
    n, k, out = config["n_candidates"], config["slate_size"], []
    for u, events in enumerate(users, start=1):
        mine = []
        for start in range(0, len(events) - k + 1, k):
            block = events[start : start + k]
            clicked = {item for item, click in block if click}
            if not clicked:
                continue
            shown = list(dict.fromkeys(item for item, _ in block))
            best = sorted(range(1, scores.shape[1]), key=lambda i: -scores[u, i])
            chosen = shown + [i for i in best if i not in shown][: n - len(shown)]
            mine.append(
                SimpleNamespace(
                    user=u,
                    start=start,
                    candidates=set(chosen),
                    positives=clicked,
                    n_positives=len(clicked),
                    history=history_of(events, start, config),
                    split=0,
                )
            )
        if mine:
            mine[-1].split = 2
        if len(mine) > 1:
            mine[-2].split = 1
        out += mine
    return out


def reference_retrieved(users, scores, config, splits=None):
    """Protocol `retrieved`, one request at a time. ``splits``: user → split code, for split=user."""
    n, k = config["n_candidates"], config["slate_size"]
    window, stride, out = config["label_window"], config["request_stride"], []
    for u, events in enumerate(users, start=1):
        later = min(max(int(len(events) * config["retriever_fraction"] + 1e-9), 1), len(events))
        room = len(events) - later

        def latest(limit):
            full = [s for s in range(0, limit, stride) if s + window <= limit]
            if full:
                return full[-1], full[-1] + window
            return (0, limit) if limit >= k else None

        chosen = []
        if splits is None:
            test = latest(room)
            if test:
                valid = latest(test[0])
                bound = valid[0] if valid else test[0]
                chosen = [(s, s + window, 0) for s in range(0, bound, stride) if s + window <= bound]
                chosen += [(*valid, 1)] if valid else []
                chosen += [(*test, 2)]
        else:
            full = [s for s in range(0, room, stride) if s + window <= room]
            if not full and room >= k:
                chosen = [(0, room, splits.get(u))]
            chosen = chosen or [(s, s + window, splits.get(u)) for s in full]
        for start, end, split in chosen:
            seen = {item for item, _ in events[: later + start]}
            clicked = {item for item, click in events[later + start : later + end] if click} - seen
            if split != 0 and not clicked:
                continue
            free = [i for i in range(1, scores.shape[1]) if i not in seen]
            top = sorted(free, key=lambda i: -scores[u, i])[:n]
            out.append(
                SimpleNamespace(
                    user=u,
                    start=later + start,
                    end=later + end,
                    candidates=set(top),
                    positives=clicked & set(top),
                    n_positives=len(clicked),
                    history=history_of(events, later + start, config),
                    split=split,
                )
            )
    return out


def as_lists(data):
    """Back from flat arrays to the argument of make_interactions."""
    return [
        [(int(i), bool(c)) for i, c in zip(data.item[a:b], data.click[a:b])]
        for a, b in zip(data.ptr[1:-1], data.ptr[2:])
    ]
