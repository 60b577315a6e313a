"""Formats that are tables: Kuaishou's RecFlow and KuaiRand, Open Bandit, RecTools, LensKit."""

from __future__ import annotations

from collections import defaultdict
from typing import Dict, List

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from dnr_recbole.config_schema import closest
from dnr_recbole.convert import Option, Request, converter
from dnr_recbole.convert.lines import SCORE, Popularity
from dnr_recbole.errors import ConfigError, DataError

_HISTORY = 50  # newest items that are kept


def _read(path: str, needed: List[str]) -> pd.DataFrame:
    """A table of any of the usual endings.

    Raises:
        DataError: it cannot be read or lacks a column.
    """
    try:
        if path.endswith(".parquet"):
            frame = pd.read_parquet(path)
        elif path.endswith((".feather", ".arrow")):
            frame = pyarrow.feather.read_feather(path)
        else:
            frame = pd.read_csv(path, sep="\t" if ".tsv" in path else ",")
    except (OSError, ValueError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read: {' '.join(str(error).split())[:200]}") from error
    for name in needed:
        if name not in frame:
            hint = closest(name, map(str, frame.columns)) or f"it has {', '.join(map(str, frame.columns))}"
            raise DataError(f"'{path}' has no column '{name}': {hint}")
    missing = frame[needed].isna().to_numpy()
    if missing.any():
        row, column = np.argwhere(missing)[0]
        raise DataError(f"'{path}', row {row + 1}: {needed[column]} is missing")
    return frame


@converter(
    "recflow", "DAY.feather… (in the order of days)",
    [Option("label", "effective_view", "column that says what a positive is"),
     Option("score", "rank_index", "column of the place in the incoming order; the best place gives x = 1")],
)  # fmt: skip
def recflow(inputs, options, counts):
    """Kuaishou's RecFlow: candidates of all stages; shown is ``realshow``, histories are what was shown before."""
    label, place = options["label"], options["score"]
    histories: Dict[str, List[str]] = defaultdict(list)
    needed = ["request_id", "request_timestamp", "user_id", "video_id", "realshow", label, place]
    for path in inputs:
        frame = _read(path, needed).sort_values(["request_timestamp", "request_id"], kind="stable")
        for name, part in frame.groupby("request_id", sort=False):
            user, items = str(part.user_id.iloc[0]), part.video_id.astype(str).tolist()
            shown = (part.realshow > 0).tolist()
            rank = part[place].to_numpy(dtype=float)
            known = rank >= 0
            highest = rank[known].max(initial=0) + 1
            score = [1 - r / highest if k else None for r, k in zip(rank, known)]
            columns = {
                "item_id": items, "score": score, "label": [int(v > 0) for v in part[label]], "exposed": shown,
            }  # fmt: skip
            stamp = int(part.request_timestamp.iloc[0] // 1000)
            yield Request(str(name), columns, user, stamp, histories[user][-_HISTORY:])
            histories[user] += [item for item, seen in zip(items, shown) if seen]


@converter(
    "kuairand", "log.csv…",
    [Option("gap", 10.0, "minutes between two requests of a user and tab"),
     Option("label", "is_click", "column that says what a positive is"), SCORE],
)  # fmt: skip
def kuairand(inputs, options, counts):
    """KuaiRand has no request id: what a user saw in one tab without a longer pause is a request. ``random`` marks
    items that were inserted at random. Whole files are held in memory."""
    needed = ["user_id", "video_id", "time_ms", options["label"], "tab"]
    frame = pd.concat([_read(path, needed) for path in inputs], ignore_index=True)
    frame = frame.sort_values(["user_id", "tab", "time_ms"], kind="stable").reset_index(drop=True)
    pause = frame.time_ms.diff() > options["gap"] * 60_000
    new = pause | frame.user_id.ne(frame.user_id.shift()) | frame.tab.ne(frame.tab.shift())
    number = new.cumsum()
    positive = frame[options["label"]] > 0
    popularity = None
    if options["score"] == "popularity":
        clicks: Dict[str, List[float]] = defaultdict(list)
        for item, when in zip(frame.video_id[positive].astype(str), frame.time_ms[positive]):
            clicks[item].append(float(when))
        popularity = Popularity(clicks)
        counts.notes.append("score: clicks before the request")
    for name, part in frame.groupby(number, sort=False):
        again = part.video_id.duplicated()
        if again.any():
            counts.skip("items shown again in the same request", int(again.sum()))
            part = part[~again]
        items, start = part.video_id.astype(str).tolist(), float(part.time_ms.iloc[0])
        columns = {
            "item_id": items, "label": positive[part.index].astype(int).tolist(), "position": list(range(len(items))),
            "tab": part.tab.tolist(),
        }  # fmt: skip
        if "is_rand" in part:
            columns["random"] = (part.is_rand > 0).tolist()
        if popularity is not None:
            columns["score"] = popularity(items, start)
        yield Request(str(name), columns, str(part.user_id.iloc[0]), int(start // 1000))


@converter("obd", "campaign.csv…")
def obd(inputs, options, counts):
    """Open Bandit: one line per slot. Lines of one time and one user description in ascending positions are a request;
    the score is the line's affinity to its own item."""
    for path in inputs:
        frame = _read(path, ["timestamp", "item_id", "position", "click", "propensity_score"])
        about = [name for name in frame if str(name).startswith("user_feature")]
        same = frame[["timestamp", *about]].eq(frame[["timestamp", *about]].shift()).all(axis=1)
        number = (~same | (frame.position <= frame.position.shift())).cumsum()
        affinity = {
            str(name)[len("user-item_affinity_") :]: name for name in frame if str(name).startswith("user-item_aff")
        }
        stamps = pd.to_datetime(frame.timestamp, utc=True, errors="coerce")
        for name, part in frame.groupby(number, sort=False):
            items = part.item_id.astype(str).tolist()
            if len(set(items)) < len(items):
                counts.skip("requests that show an item twice")
                continue
            columns = {
                "item_id": items, "label": part.click.astype(int).tolist(),
                "position": (part.position - part.position.min()).astype(int).tolist(),
                "propensity": part.propensity_score.astype(float).tolist(),
                **{each: part[each].astype(str).tolist() for each in about},
            }  # fmt: skip
            if affinity:
                columns["score"] = [
                    float(part[affinity[item]].iloc[i]) if item in affinity else None for i, item in enumerate(items)
                ]
            when = stamps[part.index[0]]
            yield Request(f"{path}:{name}" if len(inputs) > 1 else str(name), columns,
                          timestamp=None if pd.isna(when) else int(when.timestamp()))  # fmt: skip


@converter("rectools", "RECOMMENDATIONS INTERACTIONS")
def rectools(inputs, options, counts):
    """A user's recommendations are a request; what he interacted with (the second table, held out) is positive."""
    if len(inputs) != 2:
        raise ConfigError(f"rectools needs recommendations and held-out interactions, not {len(inputs)} files")
    recommended, truth = _read(inputs[0], ["user_id", "item_id"]), _read(inputs[1], ["user_id", "item_id"])
    yield from _labelled(recommended, truth, inputs[0], counts)


@converter("lenskit", "RECOMMENDATIONS.parquet [TRUTH.parquet]")
def lenskit(inputs, options, counts):
    """Native (lists of items) or flat; labels are in the file, or come from a second one of the same form."""
    frames = [_flat(path) for path in inputs[:2]]
    if len(frames) == 1:
        if "label" not in frames[0]:
            raise ConfigError("lenskit: the file has no column 'label': give the held-out items as a second file")
        truth = frames[0][frames[0].label > 0]
        yield from _labelled(frames[0].drop(columns="label"), truth, inputs[0], counts)
    else:
        yield from _labelled(*frames, inputs[0], counts)


def _flat(path: str) -> pd.DataFrame:
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{path}' cannot be read: {' '.join(str(error).split())[:200]}") from error
    if "items" not in schema.names:
        return _read(path, ["user_id", "item_id"])
    rows = []
    for record in pq.read_table(path).to_pylist():
        items = record.pop("items") or []
        rows += [{**record, **item} for item in items]
    frame = pd.DataFrame(rows)
    for name in ("user_id", "item_id"):
        if name not in frame:
            raise DataError(f"'{path}' has no '{name}'")
    return frame


def _labelled(recommended: pd.DataFrame, truth: pd.DataFrame, path: str, counts):
    positive = set(zip(truth.user_id.astype(str), truth.item_id.astype(str)))
    if "score" not in recommended and "rank" not in recommended:
        raise DataError(f"'{path}' has neither score nor rank: there is no incoming order")
    found = 0
    for user, part in recommended.groupby("user_id", sort=False):
        items = part.item_id.astype(str).tolist()
        label = [int((str(user), item) in positive) for item in items]
        found += sum(label)
        if "score" in part:
            score = [None if pd.isna(s) else float(s) for s in part.score]
        else:
            score = [1 / (1 + r) for r in part["rank"] - part["rank"].min()]
        yield Request(str(user), {"item_id": items, "score": score, "label": label}, str(user))
    if len(positive) > found:
        counts.skip("positives that were not recommended", len(positive) - found)
