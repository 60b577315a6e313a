"""What single parts of a training step cost on this CPU: the small tables of docs/speed.md.

    python benchmarks/bench_layers.py                 # attention and dropout
    python benchmarks/bench_layers.py --steps         # steps of every reranker, fp32 over bf16

Best of several runs by CPU time, one thread, so that other jobs on the machine matter little.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from bench_train import Run  # noqa: E402

from dnr_recbole.config import Config  # noqa: E402
from dnr_recbole.data.dataloader import SlateLoader  # noqa: E402
from dnr_recbole.model.blocks.attention import _matmul_attention  # noqa: E402
from dnr_recbole.model.blocks.dropout import Dropout  # noqa: E402
from dnr_recbole.quick_start import prepare  # noqa: E402
from dnr_recbole.registry import list_models  # noqa: E402
from dnr_recbole.trainer.memory import reuse_large_blocks  # noqa: E402

SHAPES = [  # lists, heads, length, width of a head
    (2048, 4, 50, 32), (256, 4, 50, 32), (256, 2, 50, 16), (256, 4, 20, 16), (256, 4, 100, 32), (256, 4, 200, 32),
]  # fmt: skip
SIZES = [(16, 16), (64, 32), (256, 64)]  # requests of a batch, d


def best(run: Callable[[], object], times: int = 6) -> float:
    """Milliseconds of CPU time."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return min(taken) * 1000


def attention() -> None:
    """Forward and backward of the fused kernel and of two matrix products."""
    print("| lists, heads, length, width of a head | bf16 fused | bf16 products | fp32 fused | fp32 products |")
    print("|---|---|---|---|---|")
    for lists, heads, length, width in SHAPES:
        cells = []
        for kind in (torch.bfloat16, torch.float32):
            inputs = torch.randn(3, lists, heads, length, width, dtype=kind, requires_grad=True)
            mask = torch.ones(lists, 1, 1, length, dtype=torch.bool)
            mask[..., -3:] = False

            def backward(attend):
                out = attend(*inputs)  # noqa: B023
                out.backward(torch.ones_like(out))

            fused = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731, B023
            products = lambda q, k, v: _matmul_attention(q, k, v, mask)  # noqa: E731, B023
            cells += [f"{best(lambda: backward(each)):.1f}" for each in (fused, products)]  # noqa: B023
        print(f"| {lists}, {heads}, {length}, {width} | {' | '.join(cells)} |")


def dropout() -> None:
    """Forward and backward of torch's dropout and of ours, 100,000 × 128 elements."""
    print("\n| dropout | torch, forward + backward | here |\n|---|---|---|")
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x = torch.randn(100_000, 128, dtype=kind, requires_grad=True)
        ones, cells = torch.ones_like(x), []
        for layer in (torch.nn.Dropout(0.1), Dropout(0.1)):
            forward = best(lambda: layer(x))  # noqa: B023
            out = layer(x)
            cells.append(f"{forward:.1f} + {best(lambda: out.backward(ones, retain_graph=True)):.1f} ms")  # noqa: B023
        print(f"| {name} | {' | '.join(cells)} |")


def steps() -> None:
    """Steps of every reranker in fp32 over those in bf16."""
    names = [each.name for each in list_models("reranker") if not each.cls.fits_itself and not each.cls.wraps_backbone]
    print(f"\n| batch × d | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for batch, d in SIZES:
        base = [
            "--dataset=synthetic", "--show_progress=False", "--synthetic_users=300", "--synthetic_items=3000",
            f"--train_batch_size={batch}", f"--embedding_size={d}",
        ]  # fmt: skip
        data = prepare(Config("PRM", argv=base)).data
        slate, cells = next(iter(SlateLoader(data.train, batch, shuffle=True))), []
        for name in names:
            taken = []
            for precision in ("fp32", "bf16"):
                run = Run(name, {"precision": precision}, base, data)
                run.train(slate, count=False)
                taken.append(best(lambda: run.train(slate, count=False)))  # noqa: B023
            cells.append(f"{taken[0] / taken[1]:.2f}")
        print(f"| {batch} × {d} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="every reranker's step instead")
    torch.set_num_threads(1)
    reuse_large_blocks()
    if parser.parse_args().steps:
        steps()
    else:
        attention()
        dropout()
