"""Writing an artefact's scoring as an ONNX file that says what it is, compared with torch before it is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from dnr_recbole._version import __version__
from dnr_recbole.artefact import Artefact, weights_digest
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.export.graph import AXES, random_slate, traced
from dnr_recbole.export.runtime import OnnxScorer, require_packages
from dnr_recbole.files import atomic_write
from dnr_recbole.ranking import predict

QUANTISATIONS = ("int8",)
TOLERANCE = 1e-4  # of a score, absolute below 1 and relative above
_MAX_BYTES = 2**31 - 2**20  # what one file of the format holds
# A model that chooses among lists may choose another where two are equally good to seven digits.
_MAY_DIFFER = 0.1  # share of requests
_MEANING = {
    "users": "user rows: from 1 in the order of vocabulary.parquet without unknown_user, which stands for all others",
    "history": "item rows, oldest first, 0 behind the last",
    "history_mask": "where history is real",
    "candidates": "item rows: from 1 in the order of vocabulary.parquet without unknown_item; 0 at padding",
    "mask": "where candidates are real, at least one in each request",
    "scores": "the retriever's, as preprocessor.json calibrates them, 0 at padding, -1 where one of several is missing",
    "features": "as preprocessor.json encodes them",
}


@dataclass(frozen=True)
class Exported:
    """An ONNX model.

    Attributes:
        content: of the file.
        inputs: names of the tensors that it reads.
        differing: share of invented requests whose scores are not torch's to :data:`TOLERANCE`.
        difference: the largest difference of a score from torch's, over all of them.
    """

    content: bytes
    inputs: List[str]
    differing: float
    difference: float


def export_artefact(artefact: Artefact, quantise: Optional[str] = None) -> Exported:
    """The scoring of an artefact as an ONNX model.

    Args:
        quantise: ``int8`` keeps weights as 8-bit integers; scores then differ from torch's.

    Raises:
        ConfigError: a package is missing, or there is no such quantisation.
        DnrError: the model cannot be exported, for a reason that it declares or because the graph does not score as
            torch does.
    """
    if quantise not in (None, *QUANTISATIONS):
        raise ConfigError(f"quantise={quantise}: must be {' or '.join(QUANTISATIONS)}")
    require_packages()
    size = sum(value.numel() * value.element_size() for value in artefact.model.state_dict().values())
    if size > _MAX_BYTES:
        raise DnrError(f"the tables of this model take {size / 2**30:.1f} GiB, and one ONNX file holds 2")
    content = _described(traced(artefact), artefact, quantise)
    if quantise:
        content = _quantised(content)
    scorer = OnnxScorer(content)
    differing, difference = _compared(artefact, scorer)
    if (not quantise and differing > _MAY_DIFFER) or not np.isfinite(difference):
        reason = "8 bits are too few for its weights" if quantise else "a size or a branch is fixed in it"
        raise DnrError(
            f"the graph of this {type(artefact.model).__name__} does not score as the model does (up to "
            f"{difference:.2g} apart in {differing:.0%} of the requests): {reason}"
        )
    return Exported(content, scorer.inputs, differing, difference)


def write_export(path: str, exported: Exported) -> None:
    """Write the file, whole or not at all.

    Raises:
        DnrError: it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(exported.content)
    except OSError as error:
        raise DnrError(f"cannot write '{path}': {error.strerror or error}") from error


def _described(content: bytes, artefact: Artefact, quantise: Optional[str]) -> bytes:
    """Without the inputs that nothing reads, and with what the file is."""
    import onnx

    model = onnx.load_model_from_string(content)
    read = _names_read(model.graph)
    unread = [value for value in model.graph.input if value.name not in read]
    for value in unread:
        model.graph.input.remove(value)
    for key, value in _metadata(artefact, [value.name for value in model.graph.input], quantise).items():
        model.metadata_props.add(key=f"dnr_recbole.{key}", value=value if isinstance(value, str) else json.dumps(value))
    model.producer_name, model.producer_version = "dnr_recbole", __version__
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _names_read(graph) -> set:
    """Every value that a node reads, those of branches included."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                names |= _names_read(inner) if inner.node else set()
    return names


def _metadata(artefact: Artefact, inputs: List[str], quantise: Optional[str]) -> Dict[str, Any]:
    model, preprocessor = artefact.model, artefact.preprocessor
    return {
        "version": __version__,
        "model": type(model).__name__,
        "backbone": artefact.config["backbone"] if type(model).wraps_backbone else "",
        "weights_sha256": weights_digest(model),
        "quantise": quantise or "",
        "inputs": {name: {"axes": list(AXES[name].values()), "meaning": _MEANING[name]} for name in inputs},
        "scores": preprocessor.columns.scores,
        "features": preprocessor.columns.features,
        "unknown_user": preprocessor.users.unknown,
        "unknown_item": preprocessor.items.unknown,
        "candidates": preprocessor.n_candidates,
        "history_items": preprocessor.history_length,
        "slate_size": model.slate_size,
    }


def _quantised(content: bytes) -> bytes:
    """Weights as int8, what they meet quantised as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _without_warnings(), tempfile.TemporaryDirectory(prefix="dnr_recbole-") as folder:
        whole, ready, small = (Path(folder, f"{name}.onnx") for name in ("whole", "ready", "small"))
        whole.write_bytes(content)
        quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(str(ready), str(small), weight_type=QuantType.QInt8)
        return small.read_bytes()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The quantiser warns of every tensor that is no weight."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _compared(artefact: Artefact, scorer: OnnxScorer) -> Tuple[float, float]:
    """Share of requests of several sizes whose scores are not torch's, and the largest difference of one; infinite
    where one of both is no number."""
    history, n = artefact.preprocessor.history_length, artefact.preprocessor.n_candidates
    differing, largest = [], 0.0
    for seed, size in enumerate([(1, 1, 1), (3, 2, history), (28, n, history)]):
        slate = random_slate(artefact, *size, seed=seed + 1)
        expected, found, mask = predict(artefact, slate), scorer(slate.to("cpu")), slate.mask.cpu().numpy()
        apart = np.where(mask, np.nan_to_num(np.abs(found - expected), nan=np.inf, posinf=np.inf), 0.0)
        differing.append((apart > TOLERANCE * np.maximum(np.abs(expected), 1)).any(1))
        largest = max(largest, float(apart.max()))
    return float(np.concatenate(differing).mean()), largest
