"""Metrics of every request in a file, and whether two such files differ: significance across runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnr_recbole.errors import DataError, DnrError, UnknownNameError
from dnr_recbole.evaluator.evaluator import CandidateEvaluator
from dnr_recbole.evaluator.significance import PairedTest, holm, paired_test
from dnr_recbole.files import atomic_write

UNITS = ("users", "requests")
IDENTITY = ("request", "user", "positives")
_META, _FORMAT = b"dnr_recbole", 1
_META_KEYS = ("dataset", "model", "backbone", "seed")


@dataclass(frozen=True)
class PerRequest:
    """What one file holds, by ascending request number.

    Attributes:
        path: the file.
        meta: dataset, model, backbone and seed of the run, as far as its config has them.
        identity: int64 ``[R, 3]``: number, user (internal id, 0 = none) and number of positives of each request.
        metrics: name → ``[R]``; NaN where the metric leaves the request out.
    """

    path: str
    meta: dict
    identity: np.ndarray
    metrics: dict[str, np.ndarray]

    @property
    def users(self) -> np.ndarray:
        """int64 ``[R]``: what requests of one user have in common; a request without a user is by itself."""
        number, user = self.identity[:, 0], self.identity[:, 1]
        return np.where(user == 0, -1 - number, user)  # the same in every file of these requests

    def __str__(self) -> str:
        known = [f"{key}={self.meta[key]}" for key in _META_KEYS if self.meta.get(key) is not None]
        return f"{self.path} ({', '.join(known)})" if known else self.path


@dataclass(frozen=True)
class Comparison:
    """One metric of two files.

    Attributes:
        metric: its name.
        n_requests: requests with a value.
        t, wilcoxon, bootstrap: tests of a − b over the chosen unit; the interval to report is the bootstrap's.
        p_holm: p-value of the t-test, adjusted for the number of metrics compared together.
    """

    metric: str
    n_requests: int
    t: PairedTest
    wilcoxon: PairedTest
    bootstrap: PairedTest
    p_holm: float


def save_per_request(path: str, evaluator: CandidateEvaluator, config, users) -> int:
    """Write every reported metric that has values per request, whole or not at all.

    Columns: request (its number in the split), user (internal id, 0 = none), positives, then one per metric. Requests
    that a metric leaves out, e.g. without a positive among the candidates, are empty there.

    Args:
        path: a Parquet file; an older one of that name is replaced.
        evaluator: was given the requests with their ``rows``.
        config: whose run this is.
        users: ``[R]``, internal user ids by request number (``RerankDataset.users``).

    Returns:
        the number of requests.

    Raises:
        DataError: nothing was evaluated, or without ``rows``.
        DnrError: the file cannot be written.
    """
    names = list(evaluator.result())
    requests = evaluator.collector.requests()
    number = requests["request.row"].numpy()
    if (number < 0).any():
        raise DataError("values per request need the numbers of the requests: give `rows` to CandidateEvaluator.add")
    columns = {
        "request": number,
        "user": np.asarray(users)[number].astype(np.int64),
        "positives": requests["request.positives"].numpy(),
    }
    for name in names:
        try:
            values = evaluator.per_request(name)
        except UnknownNameError:  # a metric of all requests at once, such as coverage
            continue
        columns[name] = np.full(len(number), np.nan)
        columns[name][np.searchsorted(number, evaluator.request_rows(name))] = values
    meta = {key: str(config[key]) for key in _META_KEYS if key in config and config[key] is not None}
    _write(path, columns, {"format": _FORMAT, **meta})
    return len(number)


def read_per_request(path: str) -> PerRequest:
    """Read what :func:`save_per_request` wrote.

    Raises:
        DataError: no such file, or not one of these.
    """
    arrow, parquet = parquet_modules()
    try:
        table = parquet.read_table(path)
        meta = json.loads((table.schema.metadata or {})[_META])
        known = meta["format"] == _FORMAT
        if any(table[name].null_count for name in IDENTITY):
            raise ValueError("a request without a number, user or count")
        identity = np.stack([table[name].to_numpy().astype(np.int64) for name in IDENTITY], axis=1)
        metrics = {name: table[name].to_numpy().astype(float) for name in table.column_names if name not in IDENTITY}
        if meta.pop("sha256", None) not in (None, _checksum(identity, metrics)):  # None: an older file
            raise ValueError("other values than were written")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}: a run writes it with per_request_file={path}") from error
    except OSError as error:
        reason = str(error).partition("\n")[0]  # pyarrow's texts go over lines
        raise DataError(f"{path} cannot be read, so make it again: {reason}") from error
    except (arrow.ArrowException, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged or no file of values per request: make it with per_request_file") from error
    if not known:
        raise DataError(f"{path} has format {meta['format']}, this version reads {_FORMAT}: make it again")
    order = np.argsort(identity[:, 0], kind="stable")
    identity = identity[order]
    if (np.diff(identity[:, 0]) == 0).any() or not len(identity):
        raise DataError(f"{path} is damaged: it has no requests or holds one twice; make it again")
    return PerRequest(path, meta, identity, {name: values[order] for name, values in metrics.items()})


def compare_files(
    path_a: str, path_b: str, metrics: Sequence[str] | str | None = None, over: str = "users", **options
) -> list[Comparison]:
    """Compare two runs on the same requests, pair by pair.

    Args:
        path_a, path_b: files of :func:`save_per_request`.
        metrics: names or one name; None = all that both files have.
        over: "users": values are averaged per user first, since requests of a user are not independent. "requests":
            each request counts.
        options: ``n_resamples`` and ``seed`` of the bootstrap, as for :func:`paired_test`.

    Raises:
        DataError: the files hold different requests, or a metric covers different ones.
        UnknownNameError: a metric that one of the files lacks, or another unit.
    """
    return _compare(read_per_request(path_a), read_per_request(path_b), metrics, over, options)


def report_files(
    path_a: str, path_b: str, metrics: Sequence[str] | str | None = None, over: str = "users", **options
) -> str:
    """The rows of :func:`compare_files` as a table for people."""
    a, b = read_per_request(path_a), read_per_request(path_b)
    rows = _compare(a, b, metrics, over, options)
    table = [["metric", "requests", "pairs", "mean a", "mean b", "a − b", "95 % interval", "p (t)", "p (Wilcoxon)"]]
    table[0].append("p (t, Holm)")
    for row in rows:
        t, interval = row.t, row.bootstrap
        cells = [row.metric, row.n_requests, t.n, f"{t.mean_a:.4f}", f"{t.mean_b:.4f}", f"{t.difference:+.4f}"]
        cells += [f"[{interval.low:+.4f}, {interval.high:+.4f}]"]
        cells += [format_p(p) for p in (t.p_value, row.wilcoxon.p_value, row.p_holm)]
        table.append([str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    unit = "users, over each of whose requests values are averaged first" if over == "users" else "requests"
    notes = [f"pairs are {unit}; interval: bootstrap of the mean; Holm: adjusted for {len(rows)} metric(s)"]
    notes += [
        f"only in {mine}: {', '.join(lone)}"
        for mine, own, other in (("a", a, b), ("b", b, a))
        if metrics is None and (lone := [name for name in own.metrics if name not in other.metrics])
    ]
    return "\n".join([f"a: {a}", f"b: {b}", *lines, *notes])


def _compare(a: PerRequest, b: PerRequest, metrics, over: str, options: dict) -> list[Comparison]:
    if over not in UNITS:
        raise UnknownNameError(f"over must be one of {', '.join(UNITS)}, got {over!r}")
    same_requests(a, b)
    clusters = a.users if over == "users" else None
    rows: list[tuple[str, int, PairedTest, PairedTest, PairedTest]] = []
    for name in _names(a, b, metrics):
        same_population(a, b, name)
        left, right = a.metrics[name], b.metrics[name]
        t, wilcoxon, bootstrap = (
            paired_test(left, right, method, clusters, **options) for method in ("t", "wilcoxon", "bootstrap")
        )
        rows.append((name, int((~np.isnan(left)).sum()), t, wilcoxon, bootstrap))
    adjusted = holm([t.p_value for _, _, t, _, _ in rows])
    return [Comparison(*row, p) for row, p in zip(rows, adjusted)]


def format_p(value: float) -> str:
    """A p-value for people."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def same_requests(a: PerRequest, b: PerRequest) -> None:
    """See that two files are about the same requests of the same data.

    Raises:
        DataError: they are not; it names the first difference.
    """
    if a.meta.get("dataset") != b.meta.get("dataset"):
        raise DataError(
            f"{a.path} is about the dataset {a.meta.get('dataset')} and {b.path} about {b.meta.get('dataset')}: "
            "only runs on the same requests can be compared"
        )
    advice = "compare runs with the same data, protocol and split"
    numbers_a, numbers_b = a.identity[:, 0], b.identity[:, 0]
    if not np.array_equal(numbers_a, numbers_b):
        lone = np.setxor1d(numbers_a, numbers_b)[0]
        raise DataError(
            f"{a.path} has {len(numbers_a)} requests and {b.path} {len(numbers_b)}; request {lone} is only in "
            f"{a.path if lone in numbers_a else b.path}: {advice}"
        )
    different = np.flatnonzero((a.identity != b.identity).any(1))
    if len(different):
        row = different[0]
        (number, *left), (_, *right) = a.identity[row].tolist(), b.identity[row].tolist()
        raise DataError(
            f"request {number} is of user {left[0]} with {left[1]} positives in {a.path} and of user {right[0]} with "
            f"{right[1]} in {b.path} ({len(different)} of {len(a.identity)} differ): {advice}"
        )


def same_population(a: PerRequest, b: PerRequest, name: str) -> None:
    """See that the metric ``name`` has a value for the same requests in two files about the same requests.

    Raises:
        DataError: it has not.
    """
    left, right = ~np.isnan(a.metrics[name]), ~np.isnan(b.metrics[name])
    if not np.array_equal(left, right):
        raise DataError(
            f"{name} has a value for {left.sum()} requests in {a.path} and for {right.sum()} in {b.path}: their "
            "candidates differ, so compare a metric that counts what was not retrieved, such as e2e_ndcg@K"
        )


def _names(a: PerRequest, b: PerRequest, wanted: Sequence[str] | str | None) -> list[str]:
    common = [name for name in a.metrics if name in b.metrics]
    if wanted is None:
        if not common:
            raise DataError(f"{a.path} and {b.path} have no metric in common: evaluate both with the same `metrics`")
        return common
    names = [name.lower() for name in ([wanted] if isinstance(wanted, str) else wanted)]
    for name in names:
        if name not in common:
            lacking = a if name not in a.metrics else b
            raise UnknownNameError(f"{lacking.path} has no metric {name!r}; both files have {', '.join(common)}")
    return list(dict.fromkeys(names))


def _write(path: str, columns: dict[str, np.ndarray], meta: dict) -> None:
    arrow, parquet = parquet_modules()
    identity = np.stack([columns[name] for name in IDENTITY], axis=1)
    meta["sha256"] = _checksum(identity, {name: of for name, of in columns.items() if name not in IDENTITY})
    table = arrow.table({name: arrow.array(values, from_pandas=True) for name, values in columns.items()})
    try:
        with atomic_write(path) as file:
            parquet.write_table(table.replace_schema_metadata({_META: json.dumps(meta)}), file)
    except (OSError, arrow.ArrowException) as error:
        raise DnrError(f"cannot write per_request_file {path}: {error}; choose another path") from error


def _checksum(identity: np.ndarray, metrics: dict[str, np.ndarray]) -> str:
    """sha256 of the content: Parquet itself does not notice a turned bit among the values."""
    found = hashlib.sha256(np.ascontiguousarray(identity, np.int64).tobytes())
    for name, values in metrics.items():
        found.update(name.encode())
        found.update(np.where(np.isnan(values), np.nan, values).tobytes())  # one of the many NaNs
    return found.hexdigest()


def parquet_modules():
    """pyarrow and pyarrow.parquet.

    Raises:
        DnrError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DnrError("values per request are kept in Parquet files: install pyarrow") from error
    return pyarrow, pyarrow.parquet
