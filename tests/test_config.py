"""Configuration: order, parsing, and one clear line for every wrong input."""

import json
import os
import pickle
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from recbole.model.general_recommender import BPR

from dnr_recbole.config import Config
from dnr_recbole.config_schema import Definitions, Loader, implied, load_properties, properties_dir, recbole_keys
from dnr_recbole.errors import ConfigError, DnrError, UnknownNameError
from dnr_recbole.keys import as_markdown, describe_keys
from dnr_recbole.registry import get_reranker


def make(*argv, **config_dict):
    return Config(config_dict=config_dict, argv=list(argv))


@pytest.fixture
def write(tmp_path):
    def _write(text, name="user.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


# ---------------------------------------------------------------------- defaults and order


def test_defaults_are_a_whole_run():
    config = Config()
    assert (config["model"], config["dataset"], config["backbone"]) == ("DNR", "ml-100k", "PRM")
    assert config["normalize_all"] is False  # RecBole's own ml-100k.yaml says True
    assert os.path.isfile(os.path.join(config["data_path"], "ml-100k.inter"))
    assert config["MODEL_TYPE"].name == "GENERAL" and config["MODEL_INPUT_TYPE"].name == "LISTWISE"
    assert config["device"] == torch.device("cpu") or torch.cuda.is_available()
    assert config["ip"] is None and "ip" not in config  # defined, without a value
    with pytest.raises(ConfigError, match="key 'absent' is read, but no property file of DNR defines it"):
        config["absent"]


def test_later_sources_win(write):
    first, second = write("epochs: 2\nseed: 1\n", "a.yaml"), write("epochs: 3\n", "b.yaml")
    config = Config(config_file_list=[first, second])
    assert (config["epochs"], config["seed"]) == (3, 1)
    config = Config(config_file_list=[first], config_dict={"epochs": 4})
    assert config["epochs"] == 4
    config = Config(config_file_list=[first], config_dict={"epochs": 4}, argv=["--epochs=5"])
    assert config["epochs"] == 5


def test_model_file_over_overall_and_dnr_over_backbone():
    backbone, dnr = (
        load_properties(properties_dir() / "model" / f"{m}.yaml", "reranker").defaults for m in ("PRM", "DNR")
    )
    assert Config(model="PRM")["score_fusion"] == backbone["score_fusion"]
    config = Config(model="DNR")
    assert config["n_layers"] == backbone["n_layers"] and config["score_fusion"] == dnr["score_fusion"]
    with pytest.raises(ConfigError, match="unknown key 'lambda_c'"):
        Config(model="PRM", config_dict={"lambda_c": 0.4})


def test_explicit_arguments_beat_the_command_line():
    config = Config(model="PRM", argv=["--model=DNR"])
    assert config["model"] == "PRM"


def test_names_of_models_in_any_case_and_as_classes():
    assert Config(model="prm")["model"] == Config(model=get_reranker("PRM"))["model"] == "PRM"
    assert make("--retriever=lightgcn")["retriever"] == "LightGCN"
    assert Config(model=BPR)["embedding_size"] == 64  # RecBole's own file


def test_config_files_on_the_command_line(write):
    assert make(f"--config_files={write('epochs: 7')}")["epochs"] == 7


def test_empty_file_has_no_keys(write):
    assert Config(config_file_list=[write("")]).as_dict() == Config().as_dict()
    assert Config(config_file_list=write("# nothing\n"))["epochs"] == Config()["epochs"]


def test_sys_argv_and_the_callers_objects_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--epochs=9", "-x"])
    resolvers = len(yaml.FullLoader.yaml_implicit_resolvers["0"])
    given = {"topk": 6, "epochs": "3", "retriever_args": {"epochs": 1}, "metrics": "NDCG"}
    before = json.dumps(given)
    assert Config(config_dict=given)["epochs"] == 3
    assert json.dumps(given) == before
    assert len(yaml.FullLoader.yaml_implicit_resolvers["0"]) == resolvers


def test_own_copy_of_ml_100k_is_preferred(tmp_path):
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\n")
    assert make(f"--data_path={tmp_path}")["data_path"] == str(folder)


# ---------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--epochs=3"], "epochs", 3),
        (["--epochs", "3"], "epochs", 3),
        (["--learning_rate=1e-3"], "learning_rate", 0.001),
        (["--learning_rate", "1E-2"], "learning_rate", 0.01),
        (["--weight_decay=0"], "weight_decay", 0.0),
        (["--resume"], "resume", True),
        (["--resume", "--epochs=2"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--use_gpu=False"], "use_gpu", False),
        (["--result_file=a=b=c"], "result_file", "a=b=c"),
        (["--result_file=2024"], "result_file", "2024"),
        (["--result_file=null"], "result_file", None),
        (["--topk=1,6", "--valid_metric=NDCG@1"], "topk", [1, 6]),
        (["--topk=[1, 6]"], "topk", [1, 6]),
        (["--topk=6"], "topk", [6]),
        (["--metrics=NDCG,MAP"], "metrics", ["NDCG", "MAP"]),
        (["--protocol=EXPOSED"], "protocol", "exposed"),
        (["--score_normalization=none"], "score_normalization", "none"),
        (["--score_fusion=rank"], "score_fusion", "rank"),
        (["--score_fusion=residual+Concat + rank"], "score_fusion", "rank+concat+residual"),
        (["--user_inter_num_interval=[20,inf)"], "user_inter_num_interval", "[20,inf)"),
        (["--user_inter_num_interval=[20,30]"], "user_inter_num_interval", "[20,30]"),
        (["--clip_grad_norm={max_norm: 5}"], "clip_grad_norm", {"max_norm": 5}),
        (["--label_threshold", "-1"], "label_threshold", -1.0),
        (["--gpu_id=0,1"], "gpu_id", "0,1"),
        (["--seed=1", "--seed=1"], "seed", 1),
    ],
)
def test_command_line(argv, key, value):
    got = make(*argv)[key]
    assert got == value and type(got) is type(value)


def test_text_is_never_evaluated(tmp_path):
    target = tmp_path / "hacked"
    code = f"__import__('os').system('touch {target}')"
    assert make(f"--result_file={code}")["result_file"] == code
    assert make(result_file=code)["result_file"] == code
    with pytest.raises(ConfigError):
        make(f"--epochs={code}")
    assert not target.exists()


def test_yaml_files_cannot_build_objects(write):
    with pytest.raises(ConfigError, match="not valid YAML"):
        Config(config_file_list=[write("seed: !!python/object/apply:os.getcwd []")])


def test_texts_in_config_dict_stand_for_values():
    config = make(learning_rate="1e-2", resume="True", topk="[1, 3]", valid_metric="NDCG@3")
    assert (config["learning_rate"], config["resume"], config["topk"]) == (0.01, True, [1, 3])


# ---------------------------------------------------------------------- refusals, one line each

REFUSED = [
    (["--epoch=3"], r"unknown key 'epoch' \(from the command line\): did you mean epochs"),
    (["--lambda_cc=3"], "unknown key 'lambda_cc'.*did you mean lambda_c"),
    (["--xyzzy=3"], "unknown key 'xyzzy'.*--help"),
    (["--retriever_args.epoch=3"], "unknown key 'retriever_args.epoch': did you mean epochs"),
    (["--epochs.x=3"], "epochs.x .*no mapping"),
    (["--epochs=0"], r"epochs=0 \(from the command line\): must be an integer >= 1"),
    (["--epochs=2.5"], "epochs=2.5.*must be an integer"),
    (["--epochs=many"], "epochs='many'.*must be an integer"),
    (["--epochs=true"], "epochs=True.*must be an integer"),
    (["--epochs"], "--epochs needs a value: an integer >= 1"),
    (["--train_batch_size=0"], "train_batch_size=0.*>= 1"),
    (["--eval_batch_size=-1"], "eval_batch_size=-1.*>= 1"),
    (["--learning_rate=0"], "learning_rate=0.*must be a number > 0"),
    (["--learning_rate=.nan"], "learning_rate=nan"),
    (["--learning_rate=.inf"], "learning_rate=inf"),
    (["--weight_decay=-0.1"], "weight_decay=-0.1.*>= 0"),
    (["--seed=x"], "seed='x'.*integer"),
    (["--learner=adamm"], "learner='adamm'.*must be one of adam, adamw, sgd"),
    (["--stopping_step=-1"], "stopping_step=-1"),
    (["--use_gpu=maybe"], "use_gpu='maybe'.*true or false"),
    (["--lambda_c=1.5"], "lambda_c=1.5.*must be a number >= 0 and <= 1"),
    (["--dropout=1"], "dropout=1.*< 1"),
    (["--dataset=dataset/ml-1m"], "dataset='dataset/ml-1m'.*data_path"),
    (["--protocol=leaky"], "protocol='leaky'.*one of exposed, retrieved"),
    (["--nproc=0"], "nproc=0"),
    (["--score_fusion=ranks"], "score_fusion='ranks'.*one of none, .*joined by \\+ .but none."),
    (["--score_fusion=rank+ranks"], "score_fusion='rank.ranks'.*'ranks' is none of none, weight"),
    (["--score_fusion=rank+"], "score_fusion='rank.'.*'' is none of"),
    (["--score_fusion=rank+concat+rank"], "score_fusion=.*'rank' stands there twice$"),
    (["--score_fusion=none+rank"], "score_fusion=.*'none' cannot be joined"),
    (["--topk=0"], "topk=.0.*>= 1"),
    (["--topk=a"], "topk=.*list of integers"),
    (["--topk=[]"], "topk="),
    (["--topk=51"], "topk=.51.*n_candidates=50"),
    (["--slate_size=51"], "slate_size=51.*at most n_candidates=50"),
    (["--n_candidates=4", "--topk=1", "--valid_metric=NDCG@1"], "slate_size=6.*n_candidates=4"),
    (["--metrics=NDGC"], "metrics=.*no metric 'NDGC': did you mean NDCG"),
    (["--metrics=[]"], "metrics="),
    (["--metrics=NDCG,LogLoss"], "metrics="),
    (["--valid_metric=Foo@6"], "valid_metric='Foo@6'.*must be one of metrics"),
    (["--valid_metric=NDCG"], "valid_metric='NDCG'.*must end in @k.*NDCG@6"),
    (["--valid_metric=NDCG@10"], "valid_metric='NDCG@10'.*topk=.1, 6."),
    (["--valid_metric=GAUC@6"], "valid_metric='GAUC@6'.*no cut-off: write GAUC"),
    (["--eval_args.order=RO"], "eval_args=.*cannot be honoured here: use protocol, split"),
    (["--train_neg_sample_args.sample_num=4"], "retriever_args.train_neg_sample_args"),
    (["epochs=3"], "unexpected argument 'epochs=3'"),
    (["-e", "3"], "unexpected argument '-e'"),
    (["--epochs=3", "--epochs=4"], "--epochs is given twice: 3 and 4"),
    (["--retriever_args.epochs=0"], r"epochs=0 \(from retriever_args\).*>= 1"),
    (["--retriever_args.embedding_size=big"], "embedding_size='big'"),
    (["--plugins=no_such_module_anywhere"], "plugins: module 'no_such_module_anywhere' cannot be imported"),
    (["--train_neg_sample_args=5"], "train_neg_sample_args=5.*a mapping"),
]


@pytest.mark.parametrize("argv, message", REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_refused_in_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(*argv)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_password_is_no_key():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as refused:
        make("--mlflow_tracking_uri=https://me:s3cret@host/mlflow")
    assert "s3cret" not in str(refused.value)
    assert make("--mlflow_tracking_uri=https://me@host")["mlflow_tracking_uri"] == "https://me@host"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model=PRN"], "unknown reranker 'PRN': did you mean PRM"),
        (["--model=BPR"], "'BPR' is a retriever, set it with the key 'retriever'"),
        (["--retriever=PRM"], "'PRM' is a reranker, set it with the key 'model'"),
        (["--retriever=LightGCM"], "unknown retriever 'LightGCM': did you mean .*LightGCN"),
        (["--backbone=nothing_like_it"], "unknown reranker 'nothing_like_it': known: "),
    ],
)
def test_unknown_models(argv, message):
    with pytest.raises(UnknownNameError, match=message) as caught:
        make(*argv)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_bad_files(write, tmp_path):
    for text, message in [
        ("epochs: [1", "not valid YAML"),
        ("- epochs\n- 3\n", "must hold 'key: value' lines, not a list"),
        ("just text", "must hold 'key: value' lines, not a str"),
        ("3: 4", "must hold 'key: value' lines"),
        ("epochs: 0", r"epochs=0 \(from .*user.yaml\)"),
        ("epocs: 1", r"unknown key 'epocs' \(from .*user.yaml\): did you mean epochs"),
        ("learning_rate: '0.1'", "learning_rate='0.1'"),
        ("user_inter_num_interval: 50", r"user_inter_num_interval=50.*must be text such as \[20,inf\)"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            Config(config_file_list=[write(text)])
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="absent.yaml' cannot be read: No such file"):
        Config(config_file_list=[str(tmp_path / "absent.yaml")])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        Config(config_file_list=[str(tmp_path)])


def test_wrong_model_argument():
    with pytest.raises(ConfigError, match="must be the name or the class of a model"):
        Config(model=int)


# ---------------------------------------------------------------------- stage 1


def test_retriever_config():
    config = make(
        "--retriever=BPR", "--retriever_args.epochs=5", "--epochs=9", "--embedding_size=16", "--seed=7",
        "--n_candidates=20", "--retriever_args.learning_rate=1e-2", "--user_inter_num_interval=[5,inf)",
    )  # fmt: skip
    stage1 = config.retriever_config()
    assert stage1["model"] == "BPR" and stage1.retriever_config() is stage1
    assert (stage1["epochs"], stage1["learning_rate"]) == (5, 0.01)
    assert stage1["embedding_size"] == 64, "the reranker's embedding size is not the retriever's"
    assert (stage1["seed"], stage1["user_inter_num_interval"]) == (7, "[5,inf)")
    assert stage1["topk"] == [20] and stage1["valid_metric"] == "Recall@20"
    assert config["epochs"] == 9


def test_keys_of_the_retriever_alone_may_stand_at_the_top():
    config = make("--retriever=SLIMElastic", "--l1_ratio=0.5")
    assert config.retriever_config()["l1_ratio"] == 0.5
    with pytest.raises(ConfigError, match="unknown key 'l1_ratio'"):
        make("--l1_ratio=0.5")


def test_retriever_args_merge_over_a_file(write):
    config = Config(config_file_list=[write("retriever_args: {epochs: 5}")], argv=["--retriever_args.seed=3"])
    assert config["retriever_args"] == {"epochs": 5, "seed": 3}


@pytest.mark.parametrize("retriever", ["MF", "DualTower", "BPR", "LightGCN", "EASE", "ItemKNN", "Pop", "MultiVAE"])
def test_retrievers_have_a_config(retriever):
    stage1 = make(f"--retriever={retriever}").retriever_config()
    assert stage1["model"] == retriever and stage1["MODEL_INPUT_TYPE"] is not None


# ---------------------------------------------------------------------- as data


@pytest.mark.parametrize("argv", [[], ["--model=PRM", "--retriever=LightGCN", "--retriever_args.n_layers=1"]])
def test_as_dict_is_plain_and_makes_the_same_config(argv):
    config = make(*argv)
    saved = json.loads(json.dumps(config.as_dict(), allow_nan=False))
    again = Config(config_dict=saved)
    assert again.as_dict() == config.as_dict()
    assert again.retriever_config().as_dict() == config.retriever_config().as_dict()
    assert config["data_path"] == again["data_path"]


def test_pickles():
    config = pickle.loads(pickle.dumps(Config()))
    assert config.as_dict() == Config().as_dict()


def test_search_space_belongs_to_the_model():
    space = Config(model="DNR").search_space()
    assert {"learning_rate", "lambda_c", "n_layers"} <= set(space)
    assert "lambda_c" not in Config(model="PRM").search_space()


# ---------------------------------------------------------------------- models from outside


def test_plugin_module_with_its_own_properties(tmp_path, monkeypatch):
    (tmp_path / "MyRanker.yaml").write_text("depth: {default: 2, type: int, min: 1, search: [1, 2], help: layers}")
    (tmp_path / "my_plugin.py").write_text(
        "from dnr_recbole.registry import get_reranker, register_reranker\n"
        "@register_reranker\n"
        "class MyRanker(get_reranker('PRM')):\n"
        "    properties_file = 'MyRanker.yaml'\n"
        "@register_reranker\n"
        "class NoFile(get_reranker('PRM')):\n"
        "    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = make("--plugins=my_plugin", "--model=myranker", "--depth=3")
    assert config["model"] == "MyRanker" and config["depth"] == 3 and config.search_space()["depth"] == [1, 2]
    assert Config(model="NoFile", config_dict={"plugins": ["my_plugin"]})["epochs"] >= 1
    with pytest.raises(ConfigError, match="depth=0"):
        make("--plugins=my_plugin", "--model=MyRanker", "--depth=0")


# ---------------------------------------------------------------------- devices


def _data_parallel_worker(rank, port, folder):
    config = Config(
        config_dict={
            "local_rank": rank,
            "world_size": 2,
            "nproc": 2,
            "port": port,
            "ip": "127.0.0.1",
            "use_gpu": False,
        }
    )
    total = torch.ones(1) * (rank + 1)
    torch.distributed.all_reduce(total)
    facts = [config["rank"], config["world_size"], config["single_spec"], str(config["device"]), total.item()]
    facts.append(config.retriever_config()["single_spec"])
    facts.append(config["show_progress"])
    Path(folder, f"{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_process_group_on_cpu():
    try:
        config = make(local_rank=0, world_size=1, port=free_port(), ip="127.0.0.1", use_gpu=False)
        assert torch.distributed.get_backend() == "gloo"
        assert config["single_spec"] is False and config["device"] == torch.device("cpu")
        assert config.retriever_config()["single_spec"] is False  # shares the group
        assert "local_rank" not in config.as_dict() and "port" not in config.as_dict()
    finally:
        torch.distributed.destroy_process_group()


def test_other_ranks_are_silent(monkeypatch):
    group = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: group.update(kwargs))
    config = make(local_rank=1, world_size=2, nproc=2, use_gpu=False, port="1234")
    assert group == {"backend": "gloo", "rank": 1, "world_size": 2, "init_method": "tcp://localhost:1234"}
    assert (config["state"], config["show_progress"], config["verbose"]) == ("error", False, False)


@pytest.mark.slow
def test_data_parallel_on_cpu(tmp_path):
    port = free_port()
    torch.multiprocessing.spawn(_data_parallel_worker, (port, str(tmp_path)), nprocs=2)
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert facts == [[0, 2, False, "cpu", 3.0, False, True], [1, 2, False, "cpu", 3.0, False, False]]


def test_single_process():
    config = make(use_gpu=False)
    assert config["single_spec"] is True and (config["rank"], config["world_size"]) == (0, 1)
    assert config["device"] == torch.device("cpu")


# ---------------------------------------------------------------------- the property files themselves

FILES = sorted(properties_dir().rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(properties_dir())) for f in FILES])
def test_property_file_is_valid(path):
    if path.name == "recbole.yaml":
        assert len(recbole_keys()) > 50
        return
    properties = load_properties(path, None if path.name == "overall.yaml" else "source")
    for key in properties.keys.values():
        assert key.help, f"{path.name}: {key.name} has no help"
        if isinstance(key.search, list):
            for value in key.search:
                key.check(value, str(path))


def test_every_registered_model_has_a_config():
    from dnr_recbole.registry import list_models

    for info in list_models("reranker"):
        assert Config(model=info.name)["model"] == info.name


def test_every_key_the_code_reads_is_declared():
    from dnr_recbole.config_schema import recbole_properties_dir
    from dnr_recbole.registry import recbole_retrievers

    declared = (
        set(recbole_keys()) | set(Config().final_config_dict) | set(Config().retriever_config().final_config_dict)
    )
    for path in FILES:
        declared |= set(yaml.load(path.read_text(), Loader=Loader) or {})
    for path in (recbole_properties_dir() / "model").glob("*.yaml"):
        if path.stem.lower() in recbole_retrievers():
            declared |= set(yaml.load(path.read_text(), Loader=Loader) or {})
    declared |= {"key"}  # placeholder in docstrings
    package = properties_dir().parent / "dnr_recbole"
    for path in package.rglob("*.py"):
        read = set(re.findall(r"(?:config|settings)\[\"(\w+)\"\]", path.read_text()))
        assert read <= declared, f"{path}: {sorted(read - declared)} declared nowhere in properties/"


def test_keys_show_what_a_run_would_have():
    rows = {row.key: row for row in describe_keys(make("--model=DNR", "--backbone=PIER", "--retriever=BPR"))}
    assert rows["lambda_c"].range == "a number >= 0 and <= 1" and rows["lambda_c"].help
    assert rows["epochs"].default == 12, "ml-100k's, and not stage 1's 20 or RecBole's 300"
    assert rows["topk"].default == [1, 6] and rows["learner"].range.startswith("one of adam")
    assert set(load_properties(properties_dir() / "model" / "PIER.yaml", "reranker").keys) <= set(rows)
    assert rows["retriever_args.epochs"].default == 20 and "retriever_args.train_neg_sample_args" in rows
    assert "train_neg_sample_args" not in rows and "valid_metric_bigger" not in rows
    assert "lambda_c" not in {row.key for row in describe_keys(make("--model=PRM"))}


def test_the_page_of_keys_is_made_from_the_definitions():
    page = (properties_dir().parent / "docs" / "keys.md").read_text()
    made = as_markdown(describe_keys(Config()))
    assert set(made.splitlines()) - set(page.splitlines()) == set(), "see `dnr-recbole keys --format=markdown`"
    assert made in page


def test_errors_share_a_base():
    assert issubclass(ConfigError, DnrError) and issubclass(UnknownNameError, DnrError)


def test_a_size_sets_other_keys_below_what_the_user_gives():
    config = make("--model=PRM", "--size=published", "--n_heads=4")
    assert (config["n_layers"], config["n_heads"], config["use_pv"]) == (2, 4, True)
    assert config["size"] == "published" and make("--model=PRM")["n_layers"] == 1
    assert make("--model=DNR", "--size=deep")["n_layers"] == 10, "the backbone's"
    again = Config(config_dict=config.as_dict())
    assert again.as_dict() == config.as_dict()


@pytest.mark.parametrize(
    "sets, words",
    [
        ("{a: {width: 1}}", "'width', which is no key"),
        ("{a: {depth: x}}", "must be an int"),
        ("{b: {}}", "some of its choices"),
    ],
)
def test_a_wrong_set_is_named(tmp_path, sets, words):
    (tmp_path / "M.yaml").write_text(
        "depth: {default: 1, type: int, help: d}\n"
        f"size: {{default: a, type: choice, choices: [a], sets: {sets}, help: s}}\n"
    )
    with pytest.raises(ConfigError, match=words):
        definitions = Definitions()
        definitions.add(tmp_path / "M.yaml", "reranker")
        implied(definitions.keys, definitions.defaults)
