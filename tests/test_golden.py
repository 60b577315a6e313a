"""Results do not change without the version of their stage: what is stored under a version stays true."""

import json

import golden
import golden_weights
import pytest
import torch

from dnr_recbole.config_schema import STAGES
from dnr_recbole.identity import CODE_VERSIONS
from dnr_recbole.registry import list_models


def compare(found, expected, where):
    """The same structure; texts and whole numbers equal, other numbers to what CPUs and versions of torch differ by."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            compare(found[name], expected[name], f"{where}, {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected)):
            compare(a, b, f"{where}, {number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("stage", STAGES)
def test_results_change_with_their_version_only(stage):
    stored = json.loads(golden.FILE.read_text())[stage]
    hint = f"raise CODE_VERSIONS['{stage}'] in dnr_recbole/identity.py and run python tests/golden.py"
    assert stored["version"] == CODE_VERSIONS[stage], hint
    found = json.loads(json.dumps(golden.STAGES[stage]()))
    compare(found, stored["numbers"], f"{stage}: {hint}")


@pytest.mark.parametrize("info", list_models("reranker"), ids=lambda info: info.name)
def test_weights_of_earlier_versions_load_and_score_as_they_did(info):
    weights, expected = golden_weights.stored(info.name)
    model = golden_weights.made(info.name, seed=2)
    model.load_state_dict(weights)
    for name, found in golden_weights.scores(model).items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
