"""GRU4Rec: right padding and empty histories."""

from __future__ import annotations

import torch

from dnr_recbole.testing import build


def test_state_equals_that_of_the_unpadded_history():
    model = build("GRU4Rec", n_layers=2)
    vectors = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 3, 1, 0])
    mask = torch.arange(7) < lengths.unsqueeze(1)
    garbage = vectors.masked_fill(~mask.unsqueeze(-1), 1e3)
    with torch.no_grad():
        state = model.user_state(torch.zeros(4, dtype=torch.long), garbage, mask)
        for row, length in enumerate(lengths.tolist()):
            if length:
                alone = model.project(model.gru(vectors[row : row + 1, :length])[1][-1])[0]
            else:
                alone = model.embedder.mean_history.empty
            torch.testing.assert_close(state[row], alone)
