"""The scoring of a reranker as one graph of tensor operations, traced once for all sizes."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from typing import Any, Dict, Iterator, List

import torch
from torch import Tensor, nn

from dnr_recbole.artefact import Artefact
from dnr_recbole.data.slate import MISSING, Slate
from dnr_recbole.errors import DnrError
from dnr_recbole.lists import best_first
from dnr_recbole.model.abstract_reranker import AbstractReranker

OPSET = 18  # the first with an exclusive or of integers
OUTPUTS = ("ranking_scores", "ranking")
# What a slate holds when a model serves, and the names of its sizes.
AXES: Dict[str, Dict[int, str]] = {
    "users": {0: "requests"},
    "history": {0: "requests", 1: "history_items"},
    "history_mask": {0: "requests", 1: "history_items"},
    "candidates": {0: "requests", 1: "candidates"},
    "mask": {0: "requests", 1: "candidates"},
    "scores": {0: "requests", 1: "candidates"},
    "features": {0: "requests", 1: "candidates"},
}


class Scoring(nn.Module):
    """A reranker as a function of tensors."""

    def __init__(self, model: AbstractReranker, names: List[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor):
        """Those of a slate, in the order of ``names`` → ranking scores ``[B, n]``, positions best first ``[B, n]``."""
        slate = Slate(**dict(zip(self.names, tensors)))
        scores = self.model.predict(slate)
        return scores, best_first(scores, slate.mask)


def require_exportable(model: AbstractReranker) -> None:
    """Raises:
    DnrError: the model declares that its scoring is no graph.
    """
    if model.export_refusal:
        raise DnrError(f"{type(model).__name__} cannot be exported: {model.export_refusal}")


def random_slate(artefact: Artefact, batch: int, n: int, history: int, seed: int = 0) -> Slate:
    """Requests of ``n`` candidates that the model could be asked, on its device: shorter lists, short and empty
    histories, scores that are missing."""
    g = torch.Generator().manual_seed(seed)
    preprocessor, n_items = artefact.preprocessor, artefact.catalogue["n_items"]
    length = torch.randint(1, n + 1, (batch, 1), generator=g)
    length[-1] = n
    mask = (torch.arange(n) < length).gather(1, torch.rand(batch, n, generator=g).argsort(1))
    history_mask = torch.arange(history) < torch.randint(0, history + 1, (batch, 1), generator=g)
    first = torch.randint(0, n_items, (batch, 1), generator=g)
    candidates = (first + torch.arange(n)) % (n_items - 1) + 1  # the same twice would tie
    scores = torch.rand(batch, n, len(preprocessor.columns.scores), generator=g)
    if scores.shape[-1] > 1:
        scores = scores.masked_fill(torch.rand(scores.shape, generator=g) < 0.1, MISSING)
    scores = scores * mask.unsqueeze(-1)
    width = preprocessor.log_features.width
    features = torch.randn(batch, n, width, generator=g) * mask.unsqueeze(-1)
    return Slate(
        users=torch.randint(0, artefact.catalogue["n_users"], (batch,), generator=g),
        history=torch.randint(1, n_items, (batch, history), generator=g) * history_mask,
        history_mask=history_mask,
        candidates=candidates * mask,
        mask=mask,
        scores=scores.squeeze(-1),  # stays where there are several
        features=features if width else None,
    ).to(artefact.device)


def traced(artefact: Artefact) -> bytes:
    """The graph as the bytes of an ONNX model; all the inputs of a slate, read or not.

    Raises:
        DnrError: the model says that it is no graph, or a part of it cannot be written as one.
    """
    require_exportable(artefact.model)
    name, out = type(artefact.model).__name__, io.BytesIO()
    slate = random_slate(artefact, 3, 7, artefact.preprocessor.history_length)
    inputs = {key: getattr(slate, key) for key in AXES if getattr(slate, key) is not None}
    axes = {**{key: AXES[key] for key in inputs}, **{key: AXES["candidates"] for key in OUTPUTS}}
    # This exporter takes a second where the other, of torch.export, takes twenty and knows no stable sort.
    chosen: Dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        chosen["dynamo"] = False
    with _quiet(), _missing_operations(), torch.no_grad():
        try:
            torch.onnx.export(
                Scoring(artefact.model, list(inputs)).eval(), tuple(inputs.values()), out,  # type: ignore[arg-type]
                input_names=list(inputs),
                output_names=list(OUTPUTS), dynamic_axes=axes, opset_version=OPSET, **chosen,
            )  # fmt: skip
        except Exception as error:  # the exporter has an exception for each of its parts, and models have their own
            reason = " ".join(str(error).split())[:200]
            raise DnrError(f"{name} cannot be written as ONNX: {reason}; export_refusal declares that") from error
    return out.getvalue()


# ---------------------------------------------------------------------- what the exporter lacks


def _argsort(g, values, *options):
    """``argsort`` with and without ``stable``: TopK of all, whose ties go to the lower index as a stable sort's do."""
    from torch.onnx import symbolic_helper

    dim, descending = (symbolic_helper._get_const(option, "i", "argsort") for option in options[-2:])
    size = g.op("Gather", g.op("Shape", values), g.op("Constant", value_t=torch.tensor([dim])), axis_i=0)
    return g.op("TopK", values, size, axis_i=dim, largest_i=int(bool(descending)), sorted_i=1, outputs=2)[1]


def _xor(g, first, second):
    """Of integers."""
    return g.op("BitwiseXor", first, second)


@contextlib.contextmanager
def _missing_operations() -> Iterator[None]:
    """Operations of the rerankers that the exporter does not know, as long as the block lasts."""
    operations = {"aten::argsort": _argsort, "aten::__xor_": _xor}
    for name, symbolic in operations.items():
        torch.onnx.register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in operations:
            torch.onnx.unregister_custom_op_symbolic(name, OPSET)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings of what becomes a constant: the comparison with torch tells what must not."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
