"""A served model in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from typing import Iterator, List

import httpx
import numpy as np
from log_helpers import world

FAST = {"epochs": 1, "embedding_size": 16, "train_batch_size": 64, "use_gpu": False, "baselines": []}


class Running:
    """A server's process, its address and what it has said."""

    def __init__(self, process: subprocess.Popen, said: List[str]):
        self.process, self.said = process, said
        self.url = next(re.search(r"http://\S+", line).group() for line in said if "http://" in line)
        self.client = httpx.Client(base_url=self.url, timeout=30)


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Running]:
    """`dnr-recbole serve ARGUMENTS --port=0`, until the block ends."""
    import os

    command = [sys.executable, "-m", "dnr_recbole", "serve", *map(str, arguments), "--port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    said: List[str] = []
    started = threading.Event()

    def listen() -> None:
        for line in process.stderr:
            said.append(line.rstrip())
            if "http://" in line:
                started.set()
        started.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert started.wait(120), "the server says nothing"
        assert any("http://" in line for line in said), "\n".join(said)
        running = Running(process, said)
        with running.client:
            yield running
    finally:
        process.terminate()
        process.wait(30)


def body(frame, **more) -> dict:
    """Requests of a log in the form of /rank."""
    out = []
    for name, rows in frame.groupby("request_id", sort=False):
        values = [column for column in rows if column.startswith("score")]
        items = rows[["item_id", *values]].to_dict("records")
        out.append({"request_id": name, "user_id": rows.user_id.iloc[0], "items": items, **more})
    return {"requests": out}


def rich(n_requests: int, seed: int = 0):
    """A log with a second score and features of every kind, one of them called as a field of a request is."""
    frame, rng = world(n_requests, seed=seed), np.random.default_rng(seed)
    size = len(frame)
    return frame.assign(
        score_2=frame.score * 1000 - 300,
        price=rng.random(size).round(3),
        device=rng.choice(["web", "phone", "7"], size),
        embedding=list(rng.normal(size=(size, 3)).round(3)),
        tags=[list(rng.choice(["x", "y", "z"], rng.integers(0, 3), replace=False)) for _ in range(size)],
        category=rng.choice(["a", "b"], size),
    )
