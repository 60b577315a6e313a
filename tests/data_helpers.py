"""Tiny interactions, a retriever with given scores, and a slow reference of both protocols."""

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
    "max_training_requests": 0,
    "propensity": "none",
    "position_input": "none",
    "keep_empty_requests": False,
    "use_cache": False,
    "seed": 3,
}


def make_interactions(users, n_items):
    """``users``: for each user (from id 1) the list of (item, clicked) or (item, clicked, part) in time order."""
    flat = [(u, *event) for u, events in enumerate(users, start=1) for event in events]
    user, item, click, *part = (np.array(column) for column in zip(*flat))
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
        part=part[0].astype(np.int8) if part and part[0][0] is not None else None,
    )


def random_interactions(seed, n_users=12, n_items=25, longest=24, repeats=True, parts=False):
    """Users of all lengths, some with none; items may repeat within a user; ``parts``: from the user's own files,
    for some users in the order train, valid, test, for others in any."""
    rng = np.random.default_rng(seed)
    users = []
    for u in range(n_users):
        length = int(rng.integers(0, longest))
        items = rng.integers(1, n_items + 1, length) if repeats else rng.permutation(n_items)[:length] + 1
        events = [(int(i), bool(rng.random() < 0.6)) for i in items]
        if parts:
            part = rng.choice(3, length, p=(0.6, 0.2, 0.2))
            part = np.sort(part) if u % 2 else part
            events = [(*event, int(p)) for event, p in zip(events, part)]
        users.append(events)
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


def retriever_positions(events, config):
    """What the retriever may learn of a user with these events: a set of positions among them."""

    def earlier(n):
        return min(max(int(n * config["retriever_fraction"] + 1e-9), 1), n)

    if events and events[0][2] is not None:
        train = [p for p, (_, _, part) in enumerate(events) if part == 0]
        return set(train[: earlier(len(train))])
    end, k = earlier(len(events)), config["slate_size"]
    if config["protocol"] == "exposed" and config["split"] == "last":
        starts = [s for s in range(0, len(events) - k + 1, k) if any(c for _, c, _ in events[s : s + k])]
        end = min([end, *starts[-2:]])
    return set(range(end))


def label_lines(events, fitted, whole):
    """Split code → the positions that may be labels; ``whole``: the retriever's part included (not of own files)."""
    if events and events[0][2] is not None:
        lines = {code: [p for p, event in enumerate(events) if event[2] == code] for code in range(3)}
        return {**lines, 0: [p for p in lines[0] if p not in fitted]}
    return {0: [p for p in range(len(events)) if whole or p not in fitted]}


def reference(users, scores, config, splits=None):
    """The requests of either protocol, one at a time, in table order; ``splits``: user → split code, for split=user."""
    out = []
    for u, events in enumerate(users, start=1):
        fitted = retriever_positions(events, config)
        requests = {"exposed": lists_of, "retrieved": windows_of}[config["protocol"]](events, fitted, config, splits, u)
        for lines, split in sorted(requests):
            past = [e for e in events[: lines[0]] if e[2] is None or e[2] <= split]
            kept = [item for item, click, _ in past if click or config["history_feedback"] == "all"]
            seen = {item for item, _, _ in past}
            clicked = {events[p][0] for p in lines if events[p][1]}
            if config["protocol"] == "retrieved":
                forbidden = set() if config["repeatable"] else seen | {events[p][0] for p in fitted}
                clicked, shown = clicked - forbidden, []
                if split != 0 and not clicked:
                    continue
            else:
                shown = list(dict.fromkeys(events[p][0] for p in lines))
                forbidden = seen if config["exclude_seen"] and not config["repeatable"] else set()
            free = [i for i in range(1, scores.shape[1]) if i not in forbidden and i not in shown]
            best = sorted(free, key=lambda i: -scores[u, i])[: config["n_candidates"] - len(shown)]
            out.append(
                SimpleNamespace(
                    user=u,
                    start=lines[0],
                    lines=lines,
                    fitted=fitted,
                    candidates={*shown, *best},
                    positives=clicked & {*shown, *best},
                    n_positives=len(clicked),
                    history=kept[-config["history_length"] :],
                    split=split,
                )
            )
    return out


def lists_of(events, fitted, config, splits, user):
    """[(positions of the labels, split)] of one user under `exposed`."""
    k, out = config["slate_size"], []
    for code, lines in label_lines(events, fitted, whole=True).items():
        chunks = [lines[s : s + k] for s in range(0, len(lines) - k + 1, k)]
        out += [(chunk, code) for chunk in chunks if any(events[p][1] for p in chunk)]
    if events and events[0][2] is not None:
        return out
    if config["split"] == "last":
        return [(lines, (0, 1, 2)[max(0, n - len(out) + 3)]) for n, (lines, _) in enumerate(out)]
    split = splits.get(user, 0)
    return [(lines, split) for lines, _ in out if split == 0 or not fitted & set(lines)]


def windows_of(events, fitted, config, splits, user):
    """[(positions of the labels, split)] of one user under `retrieved`."""
    k, window, stride = config["slate_size"], config["label_window"], config["request_stride"]
    out = []
    for code, lines in label_lines(events, fitted, whole=False).items() if events else ():
        room = len(lines)

        def latest(limit):
            full = [s for s in range(0, limit, stride) if s + window <= limit]
            if full:
                return full[-1], full[-1] + window
            return (0, limit) if limit >= k else None

        if events[0][2] is None and config["split"] == "last":
            test = latest(room)
            if not test:
                return []
            valid = latest(test[0])
            bound = valid[0] if valid else test[0]
            chosen = [(s, s + window, 0) for s in range(0, bound, stride) if s + window <= bound]
            chosen += [(*valid, 1)] if valid else []
            chosen += [(*test, 2)]
        else:
            split = code if events[0][2] is not None else splits.get(user, 0)
            full = [s for s in range(0, room, stride) if s + window <= room]
            chosen = [(s, s + window, split) for s in full]
            if not full and room >= (k if code == 0 else 1):
                chosen = [(0, room, split)]
        out += [(lines[begin:end], split) for begin, end, split in chosen]
    return out


def as_lists(data):
    """Back from flat arrays to the argument of make_interactions, always with a part (or None)."""
    part = [None] * len(data) if data.part is None else data.part.tolist()
    flat = [(int(i), bool(c), p) for i, c, p in zip(data.item, data.click, part)]
    return [flat[a:b] for a, b in zip(data.ptr[1:-1], data.ptr[2:])]
