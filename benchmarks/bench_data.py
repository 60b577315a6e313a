"""From files to requests, evaluation, and exact retrieval against FAISS: seconds and peak memory.

    python benchmarks/bench_data.py --dataset=ml-1m                      # files to request tensors, evaluation
    python benchmarks/bench_data.py --search=3000,30000,100000        # top 50 of 4,000 users, factors of width 64

`pip install 'dnr_recbole[faiss]'` for the second. Any configuration key may follow.
"""

from __future__ import annotations

import argparse
import resource
import time

from dnr_recbole.threads import be_a_good_neighbour

be_a_good_neighbour()  # as the commands do; what follows imports torch

import torch  # noqa: E402

from dnr_recbole.config import Config  # noqa: E402
from dnr_recbole.data.dataloader import SlateLoader  # noqa: E402
from dnr_recbole.quick_start import prepare  # noqa: E402
from dnr_recbole.registry import get_reranker  # noqa: E402
from dnr_recbole.retriever.search import best_items  # noqa: E402
from dnr_recbole.trainer import RerankTrainer  # noqa: E402

_USERS, _WIDTH, _TOP = 4000, 64, 50


def peak() -> str:
    """The highest memory of this process so far."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def data_and_evaluation(keys) -> None:
    """Seconds from the files to request tensors, of an epoch of PRM, and of the evaluation of the test requests."""
    started = time.perf_counter()
    config = Config("PRM", argv=["--show_progress=False", "--log_dir=null", *keys])
    data = prepare(config).data
    built = time.perf_counter() - started
    print(f"files → {len(data.train.table)} requests, the retriever from the cache or trained: {built:.1f} s, {peak()}")
    torch.manual_seed(0)
    model = get_reranker("PRM")(config, data.catalogue)
    trainer = RerankTrainer(config, model, data.catalogue, data.catalogue.item_counts)
    train = SlateLoader(data.train, config["train_batch_size"], shuffle=True, seed=0)
    test = SlateLoader(data.test, config["eval_batch_size"])
    trainer._train_epoch(train, 0)
    started = time.perf_counter()
    trainer.evaluate(test, load_best_model=False)
    evaluation, epoch = time.perf_counter() - started, trainer.epoch_seconds[-1]
    print(f"epoch of {len(data.train)} requests {epoch:.1f} s; evaluation of {len(data.test)}: {evaluation:.2f} s, "
          f"{evaluation / epoch:.1%} of it; {peak()}")  # fmt: skip


def search(sizes) -> None:
    """Exact top 50 of 4,000 users among the items, ours and FAISS' flat index, alternating; medians of three."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    print(f"{'items':>8}{'ours s':>9}{'FAISS s':>9}{'ratio':>7}   same items")
    for size in sizes:
        torch.manual_seed(0)
        users, items = torch.randn(_USERS, _WIDTH), torch.randn(int(size) + 1, _WIDTH)
        index = faiss.IndexFlatIP(_WIDTH)
        index.add(items[1:].numpy())
        ours, theirs = [], []
        for _ in range(3):
            started = time.perf_counter()
            found, _ = best_items(lambda u, a=users, b=items: a[u] @ b.T, torch.arange(_USERS), _TOP, len(items))
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            _, exact = index.search(users.numpy(), _TOP)
            theirs.append(time.perf_counter() - started)
        same = (found.sort(1).values == (torch.from_numpy(exact) + 1).sort(1).values).float().mean()
        a, b = sorted(ours)[1], sorted(theirs)[1]
        print(f"{size:>8}{a:>9.2f}{b:>9.2f}{a / b:>7.2f}   {same:.4f}; {peak()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", help="catalogue sizes, comma-separated")
    arguments, keys = parser.parse_known_args()
    if arguments.search:
        search(arguments.search.split(","))
    else:
        data_and_evaluation(keys)


if __name__ == "__main__":
    main()
