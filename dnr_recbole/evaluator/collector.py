"""RecBole's Collector for short candidate lists: scores are ``[B, n]``, never ``[B, n_items]``."""

from __future__ import annotations

from logging import getLogger

import numpy as np
import torch
import torch.nn.functional as F
from recbole.evaluator.collector import Collector, DataStruct
from torch import Tensor

from dnr_recbole import metrics as _metrics  # noqa: F401  (registers our metrics)
from dnr_recbole.errors import ConfigError, DataError

FILL = {"rec.score": float("-inf")}  # what widens a short row; 0 for everything else


class RequestRows(DataStruct):
    """RecBole's DataStruct, but batches stay CPU chunks and are joined once, not after every batch."""

    def update_tensor(self, name: str, value: Tensor):
        self._data_dict.setdefault(name, []).append(value.detach().cpu())

    def pop_chunk(self, name: str) -> Tensor:
        """Take back the chunk added last."""
        return self._data_dict[name].pop()

    def joined(self) -> dict[str, Tensor]:
        """Every name as one tensor, requests along dimension 0."""
        for name, chunks in self._data_dict.items():
            if len(chunks) > 1:
                self._data_dict[name] = [torch.cat(_same_width(chunks, FILL.get(name, 0)))]
        return {name: chunks[0] for name, chunks in self._data_dict.items() if chunks}


def _same_width(chunks: list[Tensor], fill: float) -> list[Tensor]:
    widths = {chunk.shape[1] for chunk in chunks if chunk.dim() == 2}
    if len(widths) < 2:
        return chunks
    return [F.pad(chunk, (0, max(widths) - chunk.shape[1]), value=fill) for chunk in chunks]


class CandidateCollector(Collector):
    """Collects what RecBole's metrics need from scored candidate lists.

    Four things differ from full ranking; RecBole's own ``eval_batch_collect`` does the rest:

    - padded candidates score -inf, and one more -inf column follows: RecBole reads the length of a list,
      which gauc needs, off its first -inf;
    - ``rec.items`` holds item ids, found by ``candidates[row, position]``;
    - ``topk`` may exceed n: the missing places count as misses and show the padding item 0;
    - non-tensor resources (``data.num_items``, ``data.count_items``) do not pass through ``.cpu()``, which
      crashes RecBole's itemcoverage, giniindex, averagepopularity and tailpercentage.

    Every request is kept, also those without a positive; :meth:`get_data_struct` selects.

    Args:
        config: needs metrics, topk, device, eval_args, LABEL_FIELD.
        n_items: catalogue size including the padding row; coverage metrics need it.
        item_counter: interactions per item in training data, mapping or tensor ``[n_items]``; popularity
            metrics need it.
    """

    def __init__(self, config, n_items: int | None = None, item_counter=None):
        super().__init__(config)
        # Whatever the metrics are, rec.topk says which requests have a positive.
        setattr(self.register, "rec.topk", True)
        self.n_items = n_items
        self.item_counter = _as_counter(item_counter)
        for need, value, argument in (
            ("data.num_items", n_items, "n_items"),
            ("data.candidate_items", n_items, "n_items"),
            ("data.count_items", item_counter, "item_counter"),
        ):
            if self.register.need(need) and value is None:
                raise ConfigError(f"metrics {list(config['metrics'])} need `{argument}`: pass it, or drop the metric")
        self._warned = False
        self.reset()

    def reset(self):
        self.data_struct = RequestRows()
        self.candidate_items = torch.zeros(self.n_items or 0, dtype=torch.bool)

    def collect(self, scores, candidates, mask, labels, n_positives=None, rows=None, gains=None):
        """Add one batch of requests; tensors may be on any device.

        Args:
            scores: ``[B, n]`` final ranking scores; any finite number where ``mask`` is True.
            candidates: LongTensor ``[B, n]`` item ids.
            mask: BoolTensor ``[B, n]``, True = real candidate.
            labels: ``[B, n]`` of 0/1.
            n_positives: LongTensor ``[B]``, all positives of a request; default: the retrieved ones.
            rows: LongTensor ``[B]``, number of the request in its dataset; optional, see :meth:`load`.
            gains: ``[B, n]`` ≥ 0, what each candidate is worth, for metrics of gains; None = the labels.
        """
        if len(scores) == 0:
            return
        scores = scores.detach()
        scores = scores if scores.dtype == torch.float64 else scores.float()
        device = self.device = scores.device
        candidates, mask = candidates.to(device), mask.to(device)
        labels = (labels.to(device) > 0) & mask
        gains = labels if gains is None else gains.to(device) * labels
        _check_finite(scores, mask)
        retrieved = labels.sum(dim=1)
        n_positives = retrieved if n_positives is None else n_positives.to(device).long()
        if (n_positives < retrieved).any():
            raise DataError("n_positives is smaller than the number of positive candidates of a request")

        n = scores.shape[1]
        if max(self.topk) > n and not self._warned:
            self._warned = True
            getLogger(__name__).warning(f"topk {max(self.topk)} exceeds {n} candidates: missing places count as misses")
        extra = (0, max(n, max(self.topk)) + 1 - n)
        scores = F.pad(scores.masked_fill(~mask, float("-inf")), extra, value=float("-inf"))
        candidates = F.pad(candidates.masked_fill(~mask, 0), extra)
        labels = F.pad(labels, extra)
        positive_u, positive_i = labels.nonzero(as_tuple=True)
        self.eval_batch_collect(scores, {self.config["LABEL_FIELD"]: labels}, positive_u, positive_i)

        if self.register.need("rec.gains"):
            self._collect_gains(scores, F.pad(gains.float(), extra))
        if self.register.need("rec.items"):
            positions = self.data_struct.pop_chunk("rec.items")
            self.data_struct.update_tensor("rec.items", candidates.gather(1, positions.to(device)))
        if self.register.need("data.candidate_items"):
            self.candidate_items[candidates[retrieved > 0].flatten().cpu()] = True
        self.data_struct.update_tensor("request.positives", n_positives)
        rows = torch.full_like(n_positives, -1) if rows is None else rows
        self.data_struct.update_tensor("request.row", rows)

    def _collect_gains(self, scores, gains):
        """Gains ``[B, 2, max K]`` of the best by ``scores``, and the largest ones."""
        k = max(self.topk)
        top = gains.gather(1, scores.topk(k, dim=1).indices)
        self.data_struct.update_tensor("rec.gains", torch.stack([top, gains.topk(k, dim=1).values], dim=1))

    def state(self) -> dict[str, Tensor]:
        """All that was collected, as plain CPU tensors that can be pickled and gathered."""
        return {**self.data_struct.joined(), "candidate_items": self.candidate_items}

    def load(self, states):
        """Replace everything by the collected requests of several states.

        Requests with a ``row`` are put in the order of their rows and counted once, so any sharding (also one
        that repeats requests to fill up ranks) gives exactly the result of a single process.
        """
        self.reset()
        for state in states:
            state = dict(state)
            self.candidate_items |= state.pop("candidate_items")
            for name, value in state.items():
                self.data_struct.update_tensor(name, value)

    def requests(self) -> dict[str, Tensor]:
        """Everything collected, one row per request, ordered by request row if rows were given."""
        tables = self.data_struct.joined()
        rows = tables.get("request.row")
        if rows is None or (rows < 0).all():
            return tables
        if (rows < 0).any():
            raise DataError("some requests were added with `rows` and some without: give them always or never")
        order = torch.from_numpy(np.unique(rows.numpy(), return_index=True)[1])
        if torch.equal(order, torch.arange(len(rows))):
            return tables
        return {name: value[order] for name, value in tables.items()}

    def get_data_struct(self, end_to_end: bool = False) -> DataStruct:
        """What RecBole's Evaluator reads.

        By default: the requests with a positive among their candidates. With ``end_to_end``: the requests
        with any positive, and ``rec.topk`` alone, whose last column then counts the positives that were not
        retrieved, too.
        """
        tables, struct = self.requests(), DataStruct()
        topk, positives = tables["rec.topk"], tables["request.positives"]  # [R, max K + 1], [R]
        if end_to_end:
            keep = positives > 0
            with_missed = torch.cat((topk[:, :-1], positives.to(topk.dtype).unsqueeze(1)), dim=1)
            struct.set("rec.topk", with_missed[keep])
            struct.set("request.row", tables["request.row"][keep])
            return struct
        keep = topk[:, -1] > 0
        for name, value in tables.items():
            struct.set(name, value if keep.all() else value[keep])
        if "rec.meanrank" in struct:
            # RecBole sums these over all requests, in the precision it gets.
            struct.set("rec.meanrank", struct.get("rec.meanrank").double())
        if "rec.score" in struct:
            real = struct.get("rec.score") > float("-inf")
            struct.set("rec.score", struct.get("rec.score")[real])
            if "data.label" in struct:
                struct.set("data.label", struct.get("data.label")[real].float())
        struct.set("data.num_items", self.n_items)
        struct.set("data.count_items", self.item_counter)
        struct.set("data.candidate_items", int(self.candidate_items[1:].sum()))
        return struct


def _as_counter(item_counter) -> dict[int, int] | None:
    if item_counter is None or hasattr(item_counter, "items"):
        return item_counter
    return {item: int(count) for item, count in enumerate(item_counter) if item > 0 and count > 0}


def _check_finite(scores: Tensor, mask: Tensor):
    bad = ~torch.isfinite(scores) & mask
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise DataError(
            f"the model scored {int(bad.sum())} of {int(mask.sum())} candidates NaN or infinite "
            f"(first: request {row} of the batch, candidate {position}): training diverged? Try a lower "
            "learning_rate or `precision: fp32`"
        )
