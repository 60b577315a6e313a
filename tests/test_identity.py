"""Every key has a scope, and changes the identities of its own stage and of the later ones, and no other."""

from __future__ import annotations

import argparse

import pytest
import yaml

from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.config_schema import RESERVED, STAGES, Definitions, recbole_keys, recbole_properties_dir
from dnr_recbole.config_sources import define_for_all, define_model
from dnr_recbole.errors import ConfigError
from dnr_recbole.identity import VALUE_VERSIONS, content_digest, digest, identity
from dnr_recbole.registry import get_retriever, list_models, recbole_retrievers

BASE = {"model": "DNR", "dataset": "ml-100k"}
# Given together with the key, where it says nothing alone.
WITH = {
    "n_heads": {"embedding_size": 64},
    "topk": {"valid_metric": "NDCG@6"},
    "slate_size": {"topk": [1, 3], "valid_metric": "NDCG@3"},
    "score_fusion": {"adversarial": False},
}
VALUES = {
    "source": "log",
    "model": "PRM",
    "dataset": "ml-1m",
    "backbone": "SetRank",
    "retriever": "BPR",
    "retriever_args": {"epochs": 3},
    "metrics": ["NDCG", "MAP"],
    "topk": [2, 6],
    "valid_metric": "NDCG@1",
    "load_col": {"inter": ["user_id", "item_id", "rating"]},
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
    "val_interval": {"rating": "[1,5]"},
    "benchmark_filename": ["a", "b", "c"],
    "clip_grad_norm": {"max_norm": 1.0},
    "plugins": ["json"],
    "config_files": None,
    "USER_ID_FIELD": "u",
    "ITEM_ID_FIELD": "i",
    "RATING_FIELD": "r",
    "TIME_FIELD": "t",
    "seq_len": {"genre": 3},
    "unload_col": {"item": ["class"]},
    "field_separator": ",",
    "seq_separator": ";",
    "encoding": "latin-1",
    "slate_size": 5,
    "pv_hidden": [64],
    "rm_dup_inter": "last",
    "train_neg_sample_args": None,
    "normalize_field": None,
    "score_fusion": "add",
}


def other_value(key, value):
    """A value that differs from the given one, by the key's type."""
    if key.name in VALUES:
        return VALUES[key.name]
    if key.type == "choice":
        return next(choice for choice in key.choices if choice != value)
    if key.type == "bool":
        return not value
    if key.type == "int":
        return (value or 1) + 1 if key.max is None or (value or 1) + 1 <= key.max else value - 1
    if key.type in ("float", "number"):
        return (value or 0.5) * 0.5
    if key.type == "str":
        return "other"
    return None


def stages(config):
    return {stage: digest(part) for stage, part in identity(config, "evaluation").items()}


def user_keys():
    config = Config(config_dict=BASE)
    return sorted(
        name for name, key in config.schema.items() if key.origin == "user" and not key.instead and not key.stage1
    )


@pytest.mark.parametrize("name", user_keys())
def test_a_key_changes_the_identities_of_its_scope_and_of_no_other(name):
    key = Config(config_dict=BASE).schema[name]
    given = WITH.get(name, {"source": key.sources[0]} if key.sources[:1] == ["log"] else {})
    before = Config(config_dict={**BASE, **given})
    value = other_value(key, before[name])
    if value is None:
        pytest.skip(f"no second value of {name} is known to the test")
    after = Config(config_dict={**BASE, **given, name: value})
    if name != "data_path":
        assert after[name] != before[name]
    changed = {stage for stage, text in stages(after).items() if text != stages(before)[stage]}
    if key.scope not in STAGES:
        assert changed == set(), f"{name} is said to change no number"
        return
    assert key.scope in changed
    if name not in ("model", "dataset", "backbone", "source"):  # these bring keys of their own along
        assert all(STAGES.index(stage) >= STAGES.index(key.scope) for stage in changed)
        assert changed == {key.scope}, "each part of an identity holds its own keys; later stages contain it"


def test_code_behind_one_value_is_versioned_for_this_value_alone(monkeypatch):
    logistic, isotonic = (
        Config(config_dict={**BASE, "retriever_args": {"calibration": kind}}) for kind in ("logistic", "isotonic")
    )
    before = stages(logistic), stages(isotonic)
    monkeypatch.setitem(VALUE_VERSIONS, ("calibration", "isotonic"), 99)
    assert stages(logistic) == before[0]
    changed = {stage for stage, text in stages(isotonic).items() if text != before[1][stage]}
    assert changed == {"retriever"}


def test_few_keys_escape_that_test():
    config = Config(config_dict=BASE)
    escaped = [name for name in user_keys() if other_value(config.schema[name], config[name]) is None]
    assert set(escaped) <= {"config_files", "gpu_id", "normalize_field", "additional_feat_suffix", "wandb_project"} | {
        name for name in escaped if config.schema[name].type in ("list", "dict", "any")
    }
    assert len(escaped) < 20, escaped


def test_every_key_of_recbole_and_of_every_model_has_a_scope():
    for file in ("overall.yaml", "dataset/sample.yaml"):
        theirs = yaml.safe_load((recbole_properties_dir() / file).read_text())
        assert set(theirs) <= set(recbole_keys()), f"{file}: {sorted(set(theirs) - set(recbole_keys()))}"
    models = [info.cls for info in list_models()] + [get_retriever(name) for name in recbole_retrievers()]
    assert len(models) > 40
    for cls in models:
        definitions = Definitions()
        define_for_all(definitions, "ml-100k")
        define_model(definitions, cls)
        assert set(definitions.defaults) <= set(definitions.keys)
        assert all(key.scope for key in definitions.keys.values())


def test_settings_of_stage_1_are_the_same_whichever_way_they_are_given():
    plain = Config(config_dict={"model": "PRM", "retriever": "BPR"})
    spelt = Config(config_dict={"model": "PRM", "retriever": "bpr", "retriever_args": {"epochs": 20}})
    assert stages(plain) == stages(spelt)
    other = Config(config_dict={"model": "PRM", "retriever": "BPR", "retriever_args": {"epochs": 21}})
    assert stages(plain)["retriever"] != stages(other)["retriever"]


def test_a_reranker_s_keys_do_not_refit_the_retriever():
    plain = Config(config_dict={"model": "PRM"})
    for keys in (
        {"keep_empty_requests": True},
        {"learning_rate": 0.1},
        {"embedding_size": 8},
        {"max_requests_per_user": 3},
    ):
        changed = Config(config_dict={"model": "PRM", **keys})
        assert stages(plain)["retriever"] == stages(changed)["retriever"]
        assert stages(plain)["candidates"] == stages(changed)["candidates"]


def test_the_data_s_files_are_part_of_it_wherever_they_lie():
    config = Config(config_dict=BASE)
    here = identity(config, "training", {"source": {"a.inter": "1"}})
    there = identity(Config(config_dict={**BASE, "data_path": "elsewhere"}), "training", {"source": {"a.inter": "1"}})
    changed = identity(config, "training", {"source": {"a.inter": "2"}})
    assert digest(here) == digest(there) != digest(changed)


def test_the_user_s_own_models_are_part_of_it(tmp_path, monkeypatch):
    module = tmp_path / "own_model_for_identity.py"
    code = (
        "from dnr_recbole.registry import get_reranker, register_reranker\n"
        "@register_reranker\nclass OwnForIdentity(get_reranker('PRM')):\n    number = 1\n"
    )
    module.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config(config_dict={"model": "OwnForIdentity", "plugins": [module.stem]})
    before = stages(config)
    module.write_text(code.replace("number = 1", "number = 2"))
    changed = {stage for stage, text in stages(config).items() if text != before[stage]}
    assert changed == {"reranker"}


def test_a_subclass_of_dnr_is_one():
    """Its backbone's defaults come with it, and the log and the result name the backbone."""
    from dnr_recbole.dnr.framework import DNR
    from dnr_recbole.registry import _rerankers, register_reranker

    cls = register_reranker(type("MyDNR", (DNR,), {"__module__": __name__}))
    try:
        config = Config(config_dict={"model": "MyDNR", "backbone": "setrank", "lambda_c": 0.9})
        plain = Config(config_dict={"model": "SetRank"})
        assert config["backbone"] == "SetRank" and config["n_layers"] == plain["n_layers"] and config.model_class is cls
        assert config["score_fusion"] == Config(config_dict={"model": "DNR", "backbone": "SetRank"})["score_fusion"]
    finally:
        _rerankers.pop("MyDNR")


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_names_of_options_are_no_keys(name, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(f"{name}: {{default: 1, type: int, scope: reranker, help: none}}\n")
    with pytest.raises(ConfigError, match=f"'{name}' is an option of the commands and cannot be a key"):
        Definitions().add(file, "reranker")


def test_no_command_that_takes_keys_has_other_options(monkeypatch):
    """Read off the parser itself, so that a new option cannot be forgotten."""
    options = {}
    add = argparse.ArgumentParser.add_argument

    def spy(self, *names, **more):
        options.setdefault(self.prog.split()[-1], set()).update(name.lstrip("-") for name in names if name != "-h")
        return add(self, *names, **more)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", spy)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert {"tune", "keys", "compare"} <= set(options) and "search" in options["tune"]
    assert options["run"] | options["tune"] | options["keys"] <= RESERVED


def test_a_key_is_defined_once(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("embedding_size: {default: 8, type: int, help: again}\n")
    definitions = Definitions()
    define_for_all(definitions, "ml-100k")
    with pytest.raises(
        ConfigError, match="'embedding_size' is defined already; give nothing but default, help, search"
    ):
        definitions.add(file, "reranker")
    file.write_text("embedding_size: {default: 8, search: [8, 16]}\n")
    definitions.add(file, "reranker")
    assert definitions.defaults["embedding_size"] == 8 and definitions.keys["embedding_size"].search == [8, 16]


def test_content_digests():
    import torch

    assert content_digest({"a": 1, "b": [torch.ones(2)]}) == content_digest({"b": [torch.ones(2)], "a": 1})
    different = [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        (1, 1),
        {"1": 1},
        torch.ones(1),
        torch.ones(1, 1),
        torch.ones(1, dtype=torch.long),
        torch.zeros(0),
        torch.zeros(0, 2),
        torch.ones(1, dtype=torch.bfloat16),
        {"a": {"b": 1}},
        {"a": {}, "b": 1},
    ]
    assert len({content_digest(value) for value in different}) == len(different)
