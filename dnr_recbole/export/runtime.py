"""Scoring with onnxruntime in the place of torch."""

from __future__ import annotations

from pathlib import Path
from typing import List, Union

import numpy as np
import torch

from dnr_recbole.data.slate import Slate
from dnr_recbole.errors import CheckpointError, ConfigError
from dnr_recbole.export.graph import OUTPUTS

_REQUESTS = 64  # scored at a time: models that look at many lists hold all of them at once


def require_packages() -> None:
    """Raises:
    ConfigError: the packages of the extra ``export`` are not there.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'dnr_recbole[export]'") from None


class OnnxScorer:
    """slate → ranking scores float32 ``[R, n]``, on the CPU, with as many threads as torch has.

    Args:
        source: of :func:`~dnr_recbole.export.onnx_file.export_artefact`: its path, or its content.

    Attributes:
        inputs: names of a slate's tensors that it reads.
        metadata: what the file says of itself.

    Raises:
        CheckpointError: it is missing, damaged, or no export of this package.
    """

    def __init__(self, source: Union[str, Path, bytes]):
        require_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3  # errors only
        shown = "the exported model" if isinstance(source, bytes) else f"'{source}'"
        try:
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise CheckpointError(f"cannot read {shown}: {error.strerror}") from error
        except Exception as error:  # onnxruntime has an exception for each of its states
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{shown} is no ONNX model that can be read: {reason}") from error
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        self.inputs: List[str] = [value.name for value in self._session.get_inputs()]
        if tuple(value.name for value in self._session.get_outputs()) != OUTPUTS:
            raise CheckpointError(f"{shown} is no export of a reranker: its outputs are not {', '.join(OUTPUTS)}")

    def __call__(self, slate: Slate) -> np.ndarray:
        return self.run(slate, OUTPUTS[0])

    def run(self, slate: Slate, output: str) -> np.ndarray:
        """One of :data:`~dnr_recbole.export.graph.OUTPUTS`, ``[R, n]``."""
        parts = []
        for start in range(0, len(slate), _REQUESTS):
            part = slate.select(slice(start, start + _REQUESTS))
            parts.append(self._session.run([output], {name: getattr(part, name).numpy() for name in self.inputs})[0])
        return np.concatenate(parts)
