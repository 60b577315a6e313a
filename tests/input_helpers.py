"""Small datasets as files: a seeded log, and ways to write it and its side files."""

import random

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
N_USERS, N_ITEMS, PER_USER = 40, 60, 20


def log(seed=1):
    """Rows (user, item, rating, time): 40 users with 20 different of 60 items each, in random order."""
    rng, rows = random.Random(seed), []
    for user in range(N_USERS):
        start = 1_600_000_000 + rng.randrange(10**6)
        for step, item in enumerate(rng.sample(range(N_ITEMS), PER_USER)):
            rating = rng.choice((4, 5) if item % 4 == user % 4 else (1, 2, 3, 4))
            rows.append((f"u{user:02d}", f"i{item:02d}", rating, start + step * 60))
    rng.shuffle(rows)
    assert len({row[1] for row in rows}) == N_ITEMS
    return rows


def items():
    return [f"i{n:02d}" for n in range(N_ITEMS)]


def users():
    return [f"u{n:02d}" for n in range(N_USERS)]


class Inputs:
    """A data_path; every dataset in it begins as the same log."""

    def __init__(self, root):
        self.root = root

    def write(self, name, suffix="inter", header=HEADER, rows=None, encoding="utf-8"):
        """Write ``<name>/<name>.<suffix>``: a header line, and rows of cells."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = [header, *("\t".join(map(str, row)) for row in (log() if rows is None else rows))]
        path = folder / f"{name}.{suffix}"
        path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
        return path

    def keys(self, **keys):
        return {
            "data_path": str(self.root), "protocol": "exposed", "baselines": [], "n_candidates": 10, "topk": [1, 6],
            "use_cache": False, "epochs": 1, "retriever": "Pop", "embedding_size": 8, "show_progress": False,
            "state": "ERROR", "slate_size": 4, **keys,
        }  # fmt: skip
