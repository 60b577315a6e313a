"""Import paths of earlier versions."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from dnr_recbole._deprecated import MOVED

# What each former module defined for others, and where it stands.
NAMES = [
    ("evaluator.metrics", "register_metric", "metrics"),
    ("model.affinity", "register_weights", "model.inputs.affinity"),
    ("model.affinity", "register_statistic", "model.inputs.affinity"),
    ("model.affinity", "Affinity", "model.inputs.affinity"),
    ("model.interaction", "HistoryInteraction", "model.inputs.interaction"),
    ("model.layers", "Attention", "model.blocks.attention"),
    ("model.layers", "Dropout", "model.blocks.dropout"),
    ("model.layers", "MeanHistory", "model.blocks.tables"),
    ("model.layers", "SideTable", "model.blocks.tables"),
    ("model.layers", "TransformerBlock", "model.blocks.attention"),
    ("model.layers", "attend", "model.blocks.attention"),
    ("model.layers", "item_table", "model.blocks.tables"),
    ("model.layers", "mlp", "model.blocks.nets"),
    ("model.list_evaluator", "ListEvaluator", "model.blocks.list_evaluator"),
    ("model.list_evaluator", "gather_lists", "lists"),
    ("model.list_evaluator", "pages", "lists"),
    ("model.list_layers", "AttentionBlock", "model.blocks.attention"),
    ("model.list_layers", "UserItemToken", "model.blocks.nets"),
    ("model.list_layers", "best_first", "lists"),
    ("model.list_layers", "last_state", "lists"),
    ("model.list_layers", "scan", "model.blocks.nets"),
    ("model.normalise", "min_max", "lists"),
    ("model.position_input", "PositionInput", "model.inputs.position_input"),
    ("model.residual_slope", "fit_slope", "model.inputs.residual_slope"),
    ("model.score_fusion", "ScoreFusion", "model.inputs.score_fusion"),
    ("model.score_fusion", "score_ranks", "lists"),
]


@pytest.mark.parametrize("former, name, now", NAMES)
def test_a_former_path_leads_to_the_new_one_and_says_so(former, name, now):
    new = getattr(importlib.import_module(f"dnr_recbole.{now}"), name)
    module = importlib.import_module(f"dnr_recbole.{former}")
    with pytest.warns(
        DeprecationWarning, match=rf"dnr_recbole.{former}.{name} is dnr_recbole.{now}.{name} now"
    ) as seen:
        assert getattr(module, name) is new
    assert [warning.filename for warning in seen] == [__file__]


def test_every_former_module_is_tested():
    assert {f"dnr_recbole.{former}" for former, _, _ in NAMES} == set(MOVED)


def test_a_plugin_of_an_earlier_version_is_imported_with_one_warning():
    code = "from dnr_recbole.model.layers import mlp; import dnr_recbole.model.affinity as a; print(mlp.__module__)"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dnr_recbole.model.blocks.nets"]
    said = [line for line in done.stderr.splitlines() if "DeprecationWarning: dnr_recbole" in line]
    assert len(said) == 1 and said[0].startswith("<string>:1:")


def test_what_a_former_module_never_had_is_an_error():
    module = importlib.import_module("dnr_recbole.model.layers")
    with pytest.raises(
        AttributeError, match="'dnr_recbole.model.layers', of an earlier version, has no attribute 'no'"
    ):
        module.no  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dnr_recbole.model.layer")


def test_a_renamed_decorator_registers_under_a_warning():
    from dnr_recbole.data.candidates import PROTOCOLS, protocol

    try:
        with pytest.warns(DeprecationWarning, match="candidates.protocol is dnr_recbole.data.candidates.register_prot"):
            protocol("former")(print)
        assert PROTOCOLS["former"] is print
    finally:
        PROTOCOLS.pop("former", None)


@pytest.mark.parametrize(
    "module, names",
    [
        ("data.candidates", "CandidateTable shuffle_candidates build_candidates register_protocol"),
        ("data.requests", "TRAIN VALID TEST SPLIT_NAMES register_split split_users split_last_lists blocks ranges"),
        ("requestlog.building", "build Built Maker choose_split EMPTY KNOWLEDGE IN_MEMORY"),
        ("artefact", "Artefact Content FORMAT load_artefact save_artefact artefact_of_run artefact_digest model_card"),
        ("config_schema", "Key Keys Definitions Properties Loader STAGES RESERVED closest read_yaml load_properties"),
        ("testing", "RerankerContract random_slate random_catalogue build model_config train_one_batch DEVICE"),
    ],
)
def test_modules_that_were_divided_still_give_all_their_names(module, names):
    found = importlib.import_module(f"dnr_recbole.{module}")
    assert set(names.split()) <= set(dir(found))
