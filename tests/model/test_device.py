"""Every reranker on a device of its own: nothing in its code makes a tensor on the CPU."""

from __future__ import annotations

import pytest
import torch
from fake_device import DEVICE, FakeDevice

from dnr_recbole.registry import list_models
from dnr_recbole.testing import build, random_slate, training_steps

CASES = [(m.name, {}) for m in list_models("reranker") if m.name != "DNR"] + [
    ("PRM", dict(use_pv=True, pv_epochs=1, pv_folds=2)),
    ("Seq2Slate", dict(decoding="beam")),
    ("DiffuRec", dict(targets="catalogue", chains=2)),
    ("SASRec", dict(pretrain_epochs=1)),
    ("DNR", dict(lambda_e=1)),
    ("DNR", dict(lambda_e=0, lx_condition="label")),
]  # fmt: skip


def use(model, slate) -> None:
    """Serve and train: one batch of each."""
    with torch.no_grad():
        assert model.predict(slate.without_labels()).device == DEVICE
        model.generate(slate.without_labels())
    model.train().set_epoch(0)
    for stage in model.pretraining():
        torch.autograd.backward(stage.loss(slate), inputs=stage.parameters)
    groups = model.parameter_groups()
    for step in training_steps(model, slate):
        if step.loss.requires_grad:
            torch.autograd.backward(step.loss, inputs=[p for g in step.groups for p in groups[g]])


@pytest.mark.parametrize("name, keys", CASES, ids=str)
def test_every_tensor_is_made_on_the_device(name, keys):
    model, slate = build(name, **keys), random_slate(short=True)
    with FakeDevice(guess=name == "DNR") as device:
        use(device.move_model(model), slate._map(device.move))


@pytest.mark.parametrize("mistake", ["made in the code", "kept beside the buffers"])
def test_a_tensor_on_the_cpu_is_found(mistake):
    model, slate = build("PRM"), random_slate()
    constant = torch.ones(12)
    criterion = model.criterion
    model.criterion = lambda logits, slate: criterion(
        logits + (torch.ones(12) if mistake == "made in the code" else constant), slate
    )
    with FakeDevice() as device, pytest.raises((RuntimeError, AssertionError), match="device|FakeTensor"):
        use(device.move_model(model), slate._map(device.move))
