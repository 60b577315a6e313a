"""Load on `dnr-recbole serve`: latency at rising rates, what happens above capacity, and reloads under load.

    python benchmarks/bench_serve.py                                  # PRM, d = 64, 50 candidates, loopback
    python benchmarks/bench_serve.py --rates=20,50,100 --seconds=30
    python benchmarks/bench_serve.py --soak=600 --rates=50            # ten minutes with a reload every minute

An invented log trains the model; requests arrive at a fixed rate whatever the answers do (open loop). Capacity is the
highest rate without a failed answer and with a p99 below 50 ms. The client shares the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from typing import List, NamedTuple

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from dnr_recbole import Reranker  # noqa: E402
from dnr_recbole.ranking import predict  # noqa: E402
from dnr_recbole.serving.schema import RankRequest  # noqa: E402
from dnr_recbole.serving.scoring import rank, requests_of  # noqa: E402


class Answered(NamedTuple):
    """An answer: HTTP status (0 = none) and milliseconds from when the request was due."""

    status: int
    milliseconds: float


def invented_log(n_requests: int, n: int, seed: int = 0) -> pd.DataFrame:
    """Random candidates; what matters here is only how many."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(n_requests), n)
    return pd.DataFrame({
        "request_id": request, "user_id": request % 200, "timestamp": request,
        "item_id": np.concatenate([rng.permutation(3000)[:n] for _ in range(n_requests)]),
        "score": rng.random(len(request)), "label": (rng.random(len(request)) < 0.1).astype(int),
    })  # fmt: skip


def payload(number: int, n: int) -> bytes:
    """One request as HTTP."""
    rng = np.random.default_rng(number)
    items = [{"item_id": int(i), "score": float(s)} for i, s in zip(rng.permutation(3000)[:n], rng.random(n))]
    body = json.dumps({"requests": [{"user_id": number % 200, "items": items, "k": 10}]}).encode()
    head = f"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Client:
    """Connections that are kept, one request at a time on each."""

    def __init__(self, host: str, port: int):
        self.host, self.port, self.free = host, port, []

    async def ask(self, content: bytes, due: float) -> Answered:
        """Send and wait for the whole answer."""
        try:
            return Answered(await self._exchange(content), 1000 * (time.perf_counter() - due))
        except (OSError, EOFError, asyncio.TimeoutError, AttributeError):
            return Answered(0, 1000 * (time.perf_counter() - due))

    async def _exchange(self, content: bytes) -> int:
        while True:
            kept = bool(self.free)
            reader, writer = self.free.pop() if kept else await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(content)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            except (OSError, asyncio.IncompleteReadError) as error:
                if kept and not getattr(error, "partial", b""):  # the server closed it while it was idle
                    continue
                raise
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I).group(1)))
            self.free.append((reader, writer))
            return int(head.split()[1])


async def load(host: str, port: int, rate: float, seconds: float, contents: List[bytes]) -> List[Answered]:
    """Requests at ``rate`` per second for ``seconds``."""
    client, tasks, start = Client(host, port), [], time.perf_counter()
    for number in range(int(rate * seconds)):
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(contents[number % len(contents)], due)))
    return await asyncio.gather(*tasks)


def line(name: str, answers: List[Answered], seconds: float) -> str:
    """A row of the table."""
    good = [one.milliseconds for one in answers if one.status == 200]
    refused, lost = (sum(one.status == status for one in answers) for status in (503, 0))
    other = len(answers) - len(good) - refused - lost
    p50, p99 = np.percentile(good, [50, 99]) if good else (np.nan, np.nan)
    return (
        f"| {name} | {len(answers)} | {len(good) / seconds:.0f} | {p50:.1f} | {p99:.1f} | {refused} | {lost + other} |"
    )


def bare(model: Reranker, n: int, count: int = 200) -> None:
    """The same requests without HTTP: the forward pass alone, and the whole path from the checked body."""
    bodies = [json.loads(payload(number, n).partition(b"\r\n\r\n")[2])["requests"][0] for number in range(count)]
    requests = [RankRequest.model_validate(one) for one in bodies]
    artefact, forward, whole = model.artefact, [], []
    for request in requests:
        slate = artefact.preprocessor.slate(requests_of(artefact, [request]))
        started = time.perf_counter()
        predict(artefact, slate)
        forward.append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()
        rank(artefact, [request])
        whole.append(1000 * (time.perf_counter() - started))
    print(f"forward pass p50 {np.median(forward):.2f} ms; from the checked body to the order {np.median(whole):.2f} ms")


def memory(pid: int) -> float:
    """MiB that the process holds."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="PRM")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--rates", default="20,50,100,150,200,300,600")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--soak", type=float, help="seconds at the first rate with a reload every minute, nothing else")
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    contents = [payload(number, arguments.candidates) for number in range(500)]
    with tempfile.TemporaryDirectory() as folder:
        model = Reranker(arguments.model, embedding_size=64, epochs=1, baselines=[], n_candidates=arguments.candidates)
        model.fit(invented_log(600, arguments.candidates)).save(f"{folder}/m")
        bare(model, arguments.candidates)
        command = [sys.executable, "-m", "dnr_recbole", "serve", f"{folder}/m", "--port=0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            address = next(text for text in process.stderr if "http://" in text)
            port = int(address.rsplit(":", 1)[1])
            asyncio.run(load("127.0.0.1", port, 10, 2, contents))  # warm
            print("| rate | requests | answered/s | p50 ms | p99 ms | 503 | lost |\n|---|---|---|---|---|---|---|")
            if arguments.soak:
                soak(model, f"{folder}/m", port, rates[0], arguments.soak, contents)
            else:
                for rate in rates:
                    before = memory(process.pid)
                    answers = asyncio.run(load("127.0.0.1", port, rate, arguments.seconds, contents))
                    print(line(f"{rate:g}/s", answers, arguments.seconds), f"{before:.0f} MiB", flush=True)
                answers = asyncio.run(load("127.0.0.1", port, rates[0], 3, contents))
                print(line(f"{rates[0]:g}/s again", answers, 3))
            print(f"memory at the end {memory(process.pid):.0f} MiB")
        finally:
            process.terminate()
            process.wait(30)


def soak(model: Reranker, path: str, port: int, rate: float, seconds: float, contents: List[bytes]) -> None:
    """The model is written anew (another version) every minute while requests go on."""

    async def both() -> List[Answered]:
        async def reload() -> None:
            number = 0
            while True:
                await asyncio.sleep(60)
                number += 1
                model.artefact.metrics["reload"] = number  # another checksum, so another version
                await asyncio.get_running_loop().run_in_executor(None, model.save, path)

        writing = asyncio.create_task(reload())
        answers = await load("127.0.0.1", port, rate, seconds, contents)
        writing.cancel()
        return answers

    print(line(f"{rate:g}/s, reloads", asyncio.run(both()), seconds))


if __name__ == "__main__":
    main()
