"""The candidates of several retrievers as one request log, each with the scores of those that found it.

    python benchmarks/pooled_candidates.py pooled.parquet --retrievers=EASE,MF --dataset=ml-1m --n_candidates=50

One line per request: the union of the lists, with ``score_<retriever>`` (missing where that retriever did not find the
item) and the split of the requests, so that `dnr-recbole run --requests=pooled.parquet` ranks what a system with two
retrievers would have to rank. Any configuration key may follow; ``<retriever>.<key>`` is a key of one retriever.
"""

from __future__ import annotations

import argparse
from typing import List, Tuple

import pandas as pd
import yaml

from dnr_recbole.config import Config
from dnr_recbole.data.splits import SPLIT_NAMES
from dnr_recbole.quick_start import prepare


def candidates_of(retriever: str, keys: List[str], own: dict) -> Tuple[pd.DataFrame, pd.DataFrame]:
    """One row per candidate of the retriever, with its score; and one per request, with user, split and history.

    A request is named by its place in the interactions, which are the same for all retrievers.
    """
    config = Config("PRM", config_dict={"retriever": retriever, "retriever_args": own}, argv=keys)
    table = prepare(config).data.train.table
    request, place = table.mask.nonzero(as_tuple=True)
    candidates = pd.DataFrame(
        {
            "request_id": table.history_end[request].numpy(),
            "item_id": table.candidates[request, place].numpy(),
            "label": table.labels[request, place].int().numpy(),
            f"score_{retriever.lower()}": table.scores[request, place].numpy(),
        }
    )
    history, seen = table.history, table.history_mask
    requests = pd.DataFrame(
        {
            "request_id": table.history_end.numpy(),
            "user_id": table.users.numpy(),
            "split": pd.Series(table.split.numpy()).map(dict(enumerate(SPLIT_NAMES))),
            "history": [row[mask].tolist() for row, mask in zip(history, seen)],
        }
    )
    return candidates, requests


def keys_of(retriever: str, keys: List[str]) -> dict:
    """The keys ``--<retriever>.<key>=<value>`` of one retriever, taken out of ``keys``."""
    own = {}
    for key in [key for key in keys if key.startswith(f"--{retriever}.")]:
        name, _, value = key.partition(".")[2].partition("=")
        own[name] = yaml.safe_load(value)
        keys.remove(key)
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--retrievers", default="EASE,MF")
    arguments, keys = parser.parse_known_args()
    names = arguments.retrievers.split(",")
    own = {name: keys_of(name, keys) for name in names}
    pool, requests = candidates_of(names[0], keys, own[names[0]])
    for name in names[1:]:
        found, more = candidates_of(name, keys, own[name])
        pool = pool.merge(found, how="outer", on=["request_id", "item_id", "label"])
        requests = pd.concat([requests, more]).drop_duplicates("request_id")
    scores = [column for column in pool if column.startswith("score_")]
    lists = pool.groupby("request_id", sort=True)[["item_id", "label", *scores]].agg(list).reset_index()
    requests.merge(lists, on="request_id").to_parquet(arguments.output, row_group_size=1000)
    sizes = lists.item_id.map(len)
    print(f"{arguments.output}: {len(lists)} requests, {sizes.min()} to {sizes.max()} candidates")
    print(f"clicked: {pool.label.mean():.4f}; without the score: {pool[scores].isna().mean().round(3).to_dict()}")


if __name__ == "__main__":
    main()
