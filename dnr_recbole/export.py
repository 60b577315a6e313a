"""A reranker as an ONNX graph, and ranking with one (extra ``export``).

The graph maps the tensors of a :class:`~dnr_recbole.data.slate.Slate` to ranking scores: inputs are named as its
fields (only those that the model reads), the number of requests B and of candidates n are free, the history has its
length H, and the output ``ranking`` ``[B, n]`` is what :meth:`AbstractReranker.predict` gives. What turns ids and raw
scores into these tensors stays in the artefact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from dnr_recbole._version import __version__
from dnr_recbole.artefact import Artefact
from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import ConfigError
from dnr_recbole.files import atomic_write
from dnr_recbole.model.abstract_reranker import AbstractReranker

TOLERANCE = 1e-4  # between the scores of the graph and of the model, of their largest
_OPSET = 17
_OF_REQUEST = ("users", "history", "history_mask")
_NEEDED = "pip install 'dnr_recbole[export]'"


class _Scores(nn.Module):
    """``predict`` of tensors by position; parameters are those of the model."""

    def __init__(self, model: AbstractReranker, names: List[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """``[B, n]``."""
        return self.model.predict(Slate(**dict(zip(self.names, tensors))))


def to_onnx(artefact: Artefact) -> bytes:
    """The file's content, checked against the model on requests of other sizes.

    Raises:
        ConfigError: the model cannot be exported (the message says why), or the extra is not installed.
    """
    model = artefact.model
    if model.export_refusal:
        raise ConfigError(f"{_name(artefact)} cannot be exported: {model.export_refusal}")
    onnx = _need("onnx")
    example = random_requests(artefact, 3, max(12, model.slate_size + 2), seed=0)
    names = [each.name for each in dataclasses.fields(Slate) if getattr(example, each.name) is not None]
    free = {name: {0: "B"} if name in _OF_REQUEST else {0: "B", 1: "n"} for name in [*names, "ranking"]}
    options: Dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # tracing: torch.export specialises some of the models, and takes 20 times as long
    with tempfile.TemporaryDirectory(prefix="dnr_recbole-onnx-") as folder, _quiet(), torch.no_grad():
        out = os.path.join(folder, "model.onnx")
        torch.onnx.export(
            _Scores(model, names).eval(), tuple(getattr(example, name) for name in names), out, opset_version=_OPSET,
            input_names=names, output_names=["ranking"], dynamic_axes=free, **options,
        )  # fmt: skip
        graph = onnx.load(out)
    with torch.no_grad():
        scores = model.predict(example)[example.mask]
    described = {
        "dnr_recbole": __version__,
        "model": _name(artefact),
        "slate_size": model.slate_size,
        "ranks": bool((scores == scores.round()).all()),  # a model that makes lists gives n … 1
        "scores": artefact.preprocessor.columns.scores,
        "features": artefact.preprocessor.columns.features,
    }
    onnx.helper.set_model_props(graph, {"dnr_recbole": json.dumps(described)})
    content = graph.SerializeToString()
    worst, _ = difference(artefact, OnnxScorer(content))
    if not worst <= TOLERANCE:
        raise ConfigError(f"{_name(artefact)} cannot be exported: its graph differs from it by {worst:.1e}")
    return content


def export(artefact: Artefact, path: str, quantise: bool = False) -> Tuple[float, float]:
    """Write the graph, whole or not at all.

    Args:
        quantise: weights of matrix products in int8 (onnxruntime's dynamic quantisation).

    Returns:
        :func:`difference` of the written graph.
    """
    content = to_onnx(artefact)
    if quantise:
        content = _quantised(content)
    with atomic_write(path) as file:
        file.write(content)
    return difference(artefact, OnnxScorer(content))


class OnnxScorer:
    """Ranks with a graph: a :data:`~dnr_recbole.ranking.Scorer`.

    Args:
        content: the file's content.
        threads: of onnxruntime; 0 = its choice.
    """

    def __init__(self, content: bytes, threads: int = 0):
        runtime = _need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.names = [each.name for each in self.session.get_inputs()]
        described = json.loads(self.session.get_modelmeta().custom_metadata_map.get("dnr_recbole", "{}"))
        self.least = max(2, described.get("slate_size", 0))  # a graph's lists have K places
        self.ranks = described.get("ranks", False)

    def __call__(self, slate: Slate) -> np.ndarray:
        """Slate → ranking scores float32 ``[R, n]``."""
        n = slate.mask.shape[1]
        inputs: Dict[str, np.ndarray] = {}
        for name in self.names:
            values = getattr(slate, name).numpy()
            if name not in _OF_REQUEST and n < self.least:
                values = np.pad(values, [(0, 0), (0, self.least - n), *[(0, 0)] * (values.ndim - 2)])
            inputs[name] = values
        scores = self.session.run(None, inputs)[0][:, :n]
        return scores - max(0, self.least - n) if self.ranks else scores


def difference(artefact: Artefact, scorer: OnnxScorer) -> Tuple[float, float]:
    """Graph against model on random requests of several sizes.

    Returns:
        the largest difference of scores, as a share of the largest score; the share of requests in the same order.
    """
    worst, same = 0.0, []
    for seed, (requests, n) in enumerate([(1, 2), (4, 7), (9, 12), (2, 25)], 1):
        slate = random_requests(artefact, requests, n, seed)
        with torch.inference_mode():
            wanted = artefact.model.predict(slate).float().numpy()
        found, mask = scorer(slate), slate.mask.numpy()
        largest = max(1.0, float(np.abs(wanted[mask]).max()))
        worst = max(worst, float(np.abs(wanted - found)[mask].max()) / largest)
        orders = [np.argsort(-values, axis=1, kind="stable") for values in (wanted, found)]
        same += list((orders[0] == orders[1]).all(1))
    return worst, float(np.mean(same))


def random_requests(artefact: Artefact, requests: int, n: int, seed: int) -> Slate:
    """Requests with the tensors that the model is served with: lists and histories of any length, gaps in scores."""
    rng, preprocessor = np.random.default_rng(seed), artefact.preprocessor
    n_items, length = artefact.catalogue["n_items"], preprocessor.history_length
    kinds, width = len(preprocessor.calibrations), preprocessor.log_features.width
    real = rng.integers(1, n + 1, requests)
    real[0] = n
    mask = np.arange(n) < real[:, None]
    history_mask = np.arange(length) < rng.integers(0, length + 1, requests)[:, None]
    scores = rng.random((requests, n, kinds), dtype=np.float32)
    scores[..., 1:][rng.random((requests, n, kinds - 1)) < 0.2] = -1.0
    scores = scores * mask[..., None]
    slate = Slate(
        users=torch.from_numpy(rng.integers(0, artefact.catalogue["n_users"], requests)),
        history=torch.from_numpy(rng.integers(1, max(n_items, 2), (requests, length)) * history_mask),
        history_mask=torch.from_numpy(history_mask),
        candidates=torch.from_numpy(rng.integers(1, max(n_items, 2), (requests, n)) * mask),
        mask=torch.from_numpy(mask),
        scores=torch.from_numpy(scores[..., 0].copy() if kinds == 1 else scores),
    )
    if width:
        features = rng.random((requests, n, width), dtype=np.float32) * mask[..., None]
        slate = dataclasses.replace(slate, features=torch.from_numpy(features))
    return slate


def _quantised(content: bytes) -> bytes:
    quantization = _need("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="dnr_recbole-onnx-") as folder:
        plain, small = os.path.join(folder, "plain.onnx"), os.path.join(folder, "small.onnx")
        Path(plain).write_bytes(content)
        with _quiet():
            quantization.quantize_dynamic(plain, small, weight_type=quantization.QuantType.QInt8)
        return Path(small).read_bytes()


def _name(artefact: Artefact) -> str:
    return type(artefact.model).__name__


def _need(module: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"export needs {module.partition('.')[0]}: {_NEEDED}") from error


@contextlib.contextmanager
def _quiet():
    """Without the exporter's remarks on tracing, which :func:`difference` answers."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
