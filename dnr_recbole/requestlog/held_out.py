"""A small sample of held-out requests, as a user would write them: for a look at what a model does."""

from __future__ import annotations

from typing import Dict, Optional

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dnr_recbole.data.dataset import RerankDataset
from dnr_recbole.requestlog.preprocessor import Preprocessor

SAMPLE = 200  # requests


def sample_rows(test: RerankDataset) -> Tensor:
    """Rows of the table (LongTensor) of at most :data:`SAMPLE` test requests, evenly spaced."""
    return test.rows[torch.linspace(0, len(test) - 1, min(SAMPLE, len(test))).long().unique()]


def sample_frame(
    preprocessor: Preprocessor, test: RerankDataset, scores: Tensor, features: Optional[Dict[str, np.ndarray]] = None
) -> pd.DataFrame:
    """The requests :func:`sample_rows` in the canonical long form, with external ids and each request's history.

    Args:
        scores: ``[R, n, S]`` of these rows as they came, before calibration and rescaling; NaN = missing.
        features: the log's own, object ``[R, n]`` by name, as they came; None = missing.
    """
    slate = test.table.slate(sample_rows(test))
    users, items = (np.array(v.texts(), dtype=object) for v in (preprocessor.users, preprocessor.items))
    mask = slate.mask.numpy()
    owner = np.nonzero(mask)[0]
    history = [list(items[h[m].numpy()]) for h, m in zip(slate.history, slate.history_mask)]
    frame = {
        "request_id": [f"sample-{i}" for i in owner],
        "user_id": users[slate.users.numpy()[owner]],
        "item_id": items[slate.candidates.numpy()[mask]],
        **dict(zip(preprocessor.columns.scores, scores.numpy()[mask].T)),
        **{name: list(values[mask]) for name, values in (features or {}).items()},
        "label": slate.labels.numpy()[mask].astype(np.int8),
        "history": [history[i] for i in owner],
    }
    if slate.shown is not None:
        frame["exposed"] = slate.shown.numpy()[mask]
    return pd.DataFrame(frame)
