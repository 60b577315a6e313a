"""Troubles that people have with their files and keys; each ends in the right data or in one line that says why not."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from input_helpers import HEADER, N_ITEMS, N_USERS, Inputs, items, log, users
from places import ROOT
from recbole.model.general_recommender import Pop

from dnr_recbole import compat, registry
from dnr_recbole.cli import main
from dnr_recbole.config import Config
from dnr_recbole.data.candidates import build_candidates
from dnr_recbole.data.columns import parse_intervals
from dnr_recbole.data.features import build_catalogue
from dnr_recbole.data.interactions import PART_FIELD, Interactions
from dnr_recbole.data.loading import data_files, load_recbole_dataset
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.retriever.training import train_retriever

ALL = len(log())
ITEM = "item_id:token\ttitle:token\tcolor:token"


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Inputs(tmp_path / "data")
    made.write("plain")
    return made


@pytest.fixture
def load(inputs):
    def load(name="plain", **keys):
        return load_recbole_dataset(Config(model="PRM", dataset=name, config_dict=inputs.keys(**keys)))

    return load


def refused(load, message, *arguments, **keys):
    with pytest.raises(DnrError, match=message) as caught:
        load(*arguments, **keys)
    assert "\n" not in str(caught.value) and caught.value.exit_code != 0


def features(dataset, side="item"):
    return dataset.features[side, 64]


def same_log(dataset):
    """Nothing is lost, and ids are given in the order of the log."""
    rows = log()
    assert (len(dataset.inter_feat), dataset.user_num, dataset.item_num) == (ALL, N_USERS + 1, N_ITEMS + 1)
    frame = dataset.inter_feat
    assert dataset.field2id_token[dataset.uid_field][frame[dataset.uid_field]].tolist() == [r[0] for r in rows]
    assert dataset.field2id_token[dataset.iid_field][frame[dataset.iid_field]].tolist() == [r[1] for r in rows]
    assert frame[dataset.time_field].tolist() == [r[3] for r in rows]


# ---------------------------------------------------------------------- side files


SIDE_FILES = {
    "quotes": [("item", ITEM, [(i, '"half' if n in (5, 40) else "plain", "red") for n, i in enumerate(items())])],
    "half": [("item", ITEM, [(i, "x", "red") for i in items()[1::2]])],
    "one_user": [("user", "user_id:token\tage:token", [("u07", "30")])],
    "more": [("item", ITEM, [(i, "x", "red") for i in [*items(), "i98", "i99"]])],
    "dash": [("item", "item_id:token\tprice:float", [(i, "—" if n == 7 else n) for n, i in enumerate(items())])],
    "region": [
        ("item", "item_id:token\tregion:token", [(i, f"r{n % 4}") for n, i in enumerate(items())]),
        ("user", "user_id:token\tregion:token", [(u, f"r{n % 3}") for n, u in enumerate(users())]),
    ],
    "strangers": [("item", ITEM, [(f"{n}", "x", "red") for n in range(1000)])],
}


@pytest.fixture
def sided(inputs):
    for name, files in SIDE_FILES.items():
        inputs.write(name)
        for suffix, header, rows in files:
            inputs.write(name, suffix, header, rows)


@pytest.mark.parametrize("name", SIDE_FILES)
def test_side_files_that_nobody_asked_for_are_not_read(sided, load, name):
    same_log(load(name))


def test_side_files_do_not_decide_about_the_log_with_features_either(sided, load, caplog):
    caplog.set_level("INFO")
    shapes = {"quotes": (0, 3), "half": (0, 2), "one_user": (1, 0), "more": (0, 2), "region": (3, 4)}
    for name, (user, item) in shapes.items():
        dataset = load(name, use_features=True, state="INFO")
        same_log(dataset)
        assert features(dataset, "user").shape == (N_USERS + 1, user)
        assert features(dataset).shape == (N_ITEMS + 1, item)
    for counted in ("30 of 60 items have features", "1 of 40 users have", "60 of 60 items have", "2 lines are of"):
        assert counted in caplog.text, counted
    refused(load, r"dash.item', line 9: 'price' is no number: '—'", "dash", use_features=True)
    refused(load, r"0 % of the ids match \(0 of the log's 60 items", "strangers", use_features=True)


def test_features_stand_beside_their_own_ids(sided, inputs, load):
    dataset = load("region", use_features=True)
    for side, names, n_values in (("user", users(), 3), ("item", items(), 4)):
        table, tokens = features(dataset, side), dataset.field2id_token[f"{side}_id"]
        assert not table[0].any() and (table[1:].sum(1) == 1).all()
        for row, token in enumerate(tokens[1:], start=1):
            assert table[row].argmax() == names.index(token) % n_values, token
    half = features(load("half", use_features=True))
    listed = np.isin(dataset.field2id_token["item_id"], items()[1::2])
    assert (half.any(1).numpy() == listed).all()


def test_use_features_changes_neither_retriever_nor_candidates(inputs, sided):
    built = []
    for on in (False, True):
        keys = inputs.keys(use_features=on, retriever="MF", retriever_args={"epochs": 1, "embedding_size": 4})
        config = Config(model="PRM", dataset="more", config_dict=keys)
        dataset = load_recbole_dataset(config)
        interactions = Interactions.from_recbole(dataset, config)
        retrieval = train_retriever(config, dataset, interactions)
        catalogue = build_catalogue(config, dataset, interactions, retrieval)
        assert catalogue.item_features.shape == (N_ITEMS + 1, 2 if on else 0)
        built.append((retrieval, build_candidates(config, interactions, retrieval)))
    (first, table), (second, other) = built
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))
    for name, tensor in table.to_tensors().items():
        assert torch.equal(tensor, other.to_tensors()[name]), name


def test_runs_that_share_a_dataset_get_their_own_features(inputs, sided, load):
    dataset = load("region")
    interactions = Interactions.from_recbole(dataset, dataset.config)
    retrieval = train_retriever(dataset.config, dataset, interactions)
    for keys, width in (({"use_features": True}, 4), ({}, 0), ({"use_features": True, "max_feature_vocabulary": 3}, 0)):
        config = Config(model="PRM", dataset="region", config_dict=inputs.keys(**keys))
        assert build_catalogue(config, dataset, interactions, retrieval).item_features.shape == (N_ITEMS + 1, width)


def test_filter_by_side_files_when_asked_for(sided, load, caplog):
    caplog.set_level("INFO")
    dataset = load("half", filter_inter_by_user_or_item=True, state="INFO")
    left = sum(row[1] in set(items()[1::2]) for row in log())
    assert (len(dataset.inter_feat), dataset.item_num) == (left, N_ITEMS // 2 + 1)
    assert f"800 interactions, 40 users, 60 items -> {left} interactions, 40 users, 30 items" in caplog.text
    same_log(load("more", filter_inter_by_user_or_item=True))  # items that only the side file knows get no id
    found = load("region", filter_inter_by_user_or_item=True, val_interval={"region": ["r1"]}).inter_feat
    assert 0 < len(found) < ALL / 4
    titles = {"load_col": {"item": ["color"]}, "val_interval": {"title": ["x"]}}  # a column to filter by is no feature
    dataset = load("half", filter_inter_by_user_or_item=True, use_features=True, **titles)
    assert len(dataset.inter_feat) == left and features(dataset).shape[1] == 1
    refused(load, "val_interval.title: no such column in the .inter file", "half", val_interval={"title": ["x"]})
    refused(load, "filter_inter_by_user_or_item needs .*plain.user' or .item", filter_inter_by_user_or_item=True)


class FeatureRetriever(Pop):
    uses_features = True
    seen = None

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        FeatureRetriever.seen = dataset.item_feat


def test_a_retriever_that_reads_side_files_gets_them_without_new_ids(inputs, sided, load, monkeypatch):
    monkeypatch.setitem(registry._retrievers, "FeatureRetriever", FeatureRetriever)
    keys = inputs.keys(retriever="FeatureRetriever")
    for name, n_listed in (("more", N_ITEMS), ("half", N_ITEMS // 2)):
        config = Config(model="PRM", dataset=name, config_dict=keys)
        assert [p.suffix for p in data_files(config)["source"]] == [".inter", ".item"]
        dataset = load_recbole_dataset(config)
        same_log(dataset)
        train_retriever(config, dataset)
        seen = FeatureRetriever.seen
        assert len(seen) == N_ITEMS + 1 and int((seen["color"] > 0).sum()) == n_listed
    refused(load, "can hold one column named 'region'", "region", retriever="FeatureRetriever")
    refused(load, "no id of the .item file is in the log", "strangers", retriever="FeatureRetriever")
    refused(load, "retriever FeatureRetriever needs .*plain.user' or .item", retriever="FeatureRetriever")


def test_repeated_ids_of_a_side_file_are_counted(inputs, load, caplog):
    inputs.write("twice")
    inputs.write("twice", "item", ITEM, [(i, "x", "red") for i in items()] + [("i00", "y", "blue")])
    assert features(load("twice", use_features=True)).shape[1] == 2  # x and red
    assert "twice.item': ids repeat (1 times, first on line 62)" in caplog.text


def test_vectors(inputs, load):
    inputs.write("vectors")
    rows = [(i, f"{n / 7:.3f} {-n}") for n, i in enumerate(items())]
    inputs.write("vectors", "item", "item_id:token\temb:float_seq", rows)
    dataset = load("vectors", use_features=True)
    assert features(dataset).shape == (N_ITEMS + 1, 2)
    assert torch.allclose(features(dataset)[1:].mean(0), torch.zeros(2), atol=1e-6)
    row = dataset.field2id_token["item_id"].tolist().index("i59")
    assert features(dataset)[row, 0] > 1.6 and features(dataset)[row, 1] < -1.6
    inputs.write("vectors", "item", "item_id:token\temb:float_seq", [*rows[:3], ("i03", "1 2 3"), *rows[4:]])
    refused(load, "vectors.item', line 5: 'emb' has 3 numbers, and 2 in the first line", "vectors", use_features=True)
    assert features(load("vectors", use_features=True, seq_len={"emb": 2})).shape == (N_ITEMS + 1, 2)


# ---------------------------------------------------------------------- files as programs write them


def test_byte_order_mark(inputs, load):
    inputs.write("bom", encoding="utf-8-sig")
    same_log(load("bom"))


def test_another_encoding(inputs, load):
    inputs.write("latin")
    inputs.write("latin", "item", ITEM, [(i, "café", "red") for i in items()], "latin-1")
    same_log(load("latin"))
    refused(load, r"latin.item' cannot be read as utf-8 \(line 2.*set the key encoding", "latin", use_features=True)
    same_log(load("latin", use_features=True, encoding="latin-1"))


def test_more_cells_than_names(inputs, load):
    inputs.write("longer", rows=[(*row, 7) for row in log()])
    refused(load, r"longer.inter', line 2: 5 cells under 4 names.*and on 799 further lines", "longer")


@pytest.mark.parametrize("features", [False, True])
def test_columns_of_other_names(inputs, load, features):
    inputs.write("renamed", header="userId:token\tmovieId:token\tstars:float\twhen:float")
    inputs.write("renamed", "item", ITEM.replace("item_id", "movieId"), [(i, "x", "red") for i in items()])
    names = {"USER_ID_FIELD": "userId", "ITEM_ID_FIELD": "movieId", "RATING_FIELD": "stars", "TIME_FIELD": "when"}
    dataset = load("renamed", use_features=features, **names)
    same_log(dataset)
    assert dataset.inter_feat["stars"].tolist() == [row[2] for row in log()]
    refused(load, "has no column 'rating' .*set RATING_FIELD", "renamed", **{**names, "RATING_FIELD": "rating"})


def test_ids_that_look_like_missing_values(inputs, load):
    odd = {"i00": "NA", "i01": "null", "i02": "nan", "i03": '"x', "i04": "007", "i05": "[PAD]x", "i06": " i6"}
    inputs.write("odd", rows=[(u, odd.get(i, i), *rest) for u, i, *rest in log()])
    dataset = load("odd")
    assert set(odd.values()) < set(dataset.field2id_token["item_id"]) and dataset.item_num == N_ITEMS + 1


# ---------------------------------------------------------------------- own split


def split_files(inputs, rows=None):
    rows = sorted(rows or log(), key=lambda row: row[3])
    parts = {"past": rows[:600], "tune": rows[600:700], "final": rows[700:]}
    for part, lines in parts.items():
        inputs.write("own", f"{part}.inter", rows=lines)
    return rows, list(parts)


def test_own_split(inputs, load, caplog):
    caplog.set_level("INFO")
    rows, names = split_files(inputs)
    dataset = load("own", benchmark_filename=names, state="INFO")
    assert dataset.inter_feat[PART_FIELD].dtype == np.int8
    assert dataset.inter_feat[PART_FIELD].tolist() == [0] * 600 + [1] * 100 + [2] * 100
    assert dataset.field2id_token["user_id"][dataset.inter_feat["user_id"]].tolist() == [row[0] for row in rows]
    assert "own.tune.inter': 100 interactions" in caplog.text


def test_own_split_is_filtered_and_its_part_stays_with_its_line(inputs):
    rows, names = split_files(inputs)
    keys = inputs.keys(benchmark_filename=names, val_interval={"rating": "[3,5]"}, rm_dup_inter="first")
    config = Config(model="PRM", dataset="own", config_dict=keys)
    dataset = load_recbole_dataset(config)
    kept = [(row, 0 if n < 600 else 1 if n < 700 else 2) for n, row in enumerate(rows) if row[2] >= 3]
    assert dataset.inter_feat[PART_FIELD].tolist() == [part for _, part in kept]
    interactions = Interactions.from_recbole(dataset, config)
    tokens = dataset.field2id_token["user_id"][interactions.user], dataset.field2id_token["item_id"][interactions.item]
    part_of = {(user, item): part for (user, item, *_), part in kept}
    assert [part_of[pair] for pair in zip(*tokens)] == interactions.part.tolist()
    train_retriever(config, dataset, interactions)  # stage 1 does not choke on the column


def test_own_split_is_three_files_of_one_kind(inputs, load):
    _, names = split_files(inputs)
    for wrong in (names[:2], [*names, "x"], [names[0]] * 3):
        refused(load, "benchmark_filename=.*must be three names", "own", benchmark_filename=wrong)
    refused(load, "own.late.inter' does not exist", "own", benchmark_filename=[*names[:2], "late"])
    refused(load, "set benchmark_filename to read own.final.inter, own.past.inter, own.tune.inter", "own")
    more = HEADER + "\tdevice:token"
    inputs.write("own", "final.inter", more, [(*row, "tv") for row in log()[:9]])
    refused(load, "differ in the columns device", "own", benchmark_filename=names, load_col=None)
    assert len(load("own", benchmark_filename=names).inter_feat) == 709


# ---------------------------------------------------------------------- keys


NO_INTERVALS = ["50", "50,inf", "[50", "50)", "[50;inf)", "[9,3]", "(5,5)", "[a,b]", "[nan,1]", "[1,2],"]


@pytest.mark.parametrize("text", NO_INTERVALS)
@pytest.mark.parametrize("key", ["user_inter_num_interval", "item_inter_num_interval", "val_interval"])
def test_what_is_no_interval_is_refused_before_any_file_is_read(tmp_path, key, text):
    keys = {key: {"rating": text} if key == "val_interval" else text, "data_path": str(tmp_path), "dataset": "none"}
    with pytest.raises(ConfigError, match=rf"{key}.*='.*': is no interval; write \[\d+,inf\) for all"):
        data_files(Config(model="PRM", config_dict=keys))


def test_intervals():
    inf = float("inf")
    assert parse_intervals("[20,inf)", "k") == [("[", 20, inf, ")")]
    assert parse_intervals(" (0, 1.5] ; [3,3]", "k") == [("(", 0, 1.5, "]"), ("[", 3, 3, "]")]
    assert parse_intervals([3, 5], "k") == [("[", 3, 5, "]")] and parse_intervals(None, "k") is None


def test_every_filter_says_what_it_leaves(inputs, load, caplog):
    caplog.set_level("INFO")
    rows = log()
    more = [(*row, "tv" if n % 3 else "", n if n % 5 else "") for n, row in enumerate([*rows, *rows[:50]])]
    inputs.write("again", header=HEADER + "\tdevice:token\tdwell:float", rows=more)
    dataset = load(
        "again", rm_dup_inter="first", val_interval={"rating": "[2,5]", "device": ["tv"], "dwell": "[100,inf)"},
        item_inter_num_interval="[3,inf)", state="INFO",
    )  # fmt: skip
    left = [row for n, row in enumerate(rows) if row[2] >= 2 and n % 3 and n % 5 and n >= 100]
    counts = f"{len(left)} interactions, {len({r[0] for r in left})} users, {len({r[1] for r in left})} items"
    assert "again.inter': 850 interactions, 40 users, 60 items" in caplog.text
    assert "rm_dup_inter=first: 850 interactions, 40 users, 60 items -> 800 interactions, 40 users" in caplog.text
    assert f"800 interactions, 40 users, 60 items -> {counts}" in caplog.text
    assert f"item_inter_num_interval=[3,inf): {counts} -> {len(dataset.inter_feat)} interactions" in caplog.text


def test_equal_times_keep_the_order_of_the_file(inputs, load):
    rows = [(u, i, 1 + n % 5, 7) for n, (u, i, *_) in enumerate(log() + log())]
    inputs.write("ties", rows=rows)
    for keep, offset in (("first", 0), ("last", ALL)):
        assert load("ties", rm_dup_inter=keep).inter_feat["rating"].tolist() == [r[2] for r in rows[offset:][:ALL]]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"load_col": {"item": ["item_id", "colour"]}}, "load_col.item: .* has no column 'colour': did you mean color"),
        ({"unload_col": {"item": ["titel"]}}, "unload_col.item: .* has no column 'titel': did you mean title"),
        ({"load_col": {"inter": ["ratings"], "item": "*"}}, "load_col.inter: .*'ratings': did you mean rating"),
        ({"load_col": {"items": ["color"]}}, "load_col.items: no such file is read: did you mean item"),
        ({"load_col": {"item": 3}}, "load_col.item=3: must be a list of column names"),
        ({"load_col": {"inter": "*"}}, "use_features needs .*with columns that load_col names"),
        ({"val_interval": {"ratings": "[1,2]"}}, "val_interval.ratings: no such column .*there are item_id, rating"),
        ({"val_interval": {"user_id": "[1,2]"}}, "val_interval.user_id=.*has type token, so write a list"),
        ({"val_interval": {"rating": ["3", "4", "5"]}}, "val_interval.rating=.*is no interval"),
        ({"seq_len": {"title": 0}}, "seq_len.title=0: must be an integer >= 1"),
    ],
)
def test_names_and_values_that_would_have_no_effect(sided, load, keys, message):
    refused(load, message, "half", use_features=True, **keys)


def test_chosen_columns(sided, load):
    width = {None: 2, ("item_id", "color"): 1, ("color",): 1}
    for columns, n in width.items():
        chosen = {"load_col": {"item": list(columns)}} if columns else {"unload_col": {"item": []}}
        assert features(load("half", use_features=True, **chosen)).shape[1] == n
    assert features(load("half", use_features=True, unload_col={"item": ["title"]})).shape[1] == 1


def test_data_files(inputs, sided):
    def files(name="region", **keys):
        found = data_files(Config(model="PRM", dataset=name, config_dict=inputs.keys(**keys)))
        return {scope: [path.name for path in paths] for scope, paths in found.items()}

    assert files() == {"source": ["region.inter"], "reranker": []}
    sides = ["region.user", "region.item"]
    assert files(use_features=True) == {"source": ["region.inter"], "reranker": sides}
    filtering = files(filter_inter_by_user_or_item=True)
    assert filtering == {"source": ["region.inter", *sorted(sides)], "reranker": []}
    only = {"user": "*", "item": []}
    assert files(use_features=True, load_col=only)["reranker"] == ["region.user"]
    assert data_files(Config(model="PRM", dataset="synthetic")) == {"source": [], "reranker": []}


# Keys of RecBole whose effect this package cannot have; everything else is honoured, and tested elsewhere.
NOT_HONOURED = {
    "save_dataset": True, "dataset_save_path": "x.pth", "save_dataloaders": True, "dataloaders_save_path": "x.pth",
    "transform": "mask_itemseq", "threshold": {"rating": 3}, "numerical_features": ["price"],
    "discretization": {"price": {"method": "LD"}}, "additional_feat_suffix": ["ent"], "unused_col": {"inter": ["x"]},
    "entity_kg_num_interval": "[2,inf)", "relation_kg_num_interval": "[2,inf)", "alias_of_user_id": ["friend"],
    "alias_of_item_id": ["also"], "alias_of_entity_id": ["x"], "alias_of_relation_id": ["x"],
    "preload_weight": {"iid": "emb"}, "normalize_field": ["rating"], "normalize_all": True, "MAX_ITEM_LIST_LENGTH": 9,
    "ITEM_LIST_LENGTH_FIELD": "n", "LIST_SUFFIX": "_l", "POSITION_FIELD": "p", "HEAD_ENTITY_ID_FIELD": "h",
    "TAIL_ENTITY_ID_FIELD": "t", "RELATION_ID_FIELD": "r", "ENTITY_ID_FIELD": "e", "kg_reverse_r": True,
}  # fmt: skip


@pytest.mark.parametrize("key", NOT_HONOURED)
def test_keys_that_cannot_be_honoured_are_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"{key}=.*cannot be honoured here: .{{20,}}"):
        Config(model="PRM", dataset="plain", config_dict={key: NOT_HONOURED[key]})
    with pytest.raises(ConfigError, match=f"{key}=.*cannot be honoured here: .{{20,}}"):
        Config(model="PRM", dataset="plain", config_dict={"retriever_args": {key: NOT_HONOURED[key]}})


def test_missing_optional_packages(inputs, monkeypatch):
    found = compat.importlib.util.find_spec
    absent = ("wandb", "faiss", "networkx", "community", "kmeans_pytorch")
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    needed = [("wandb", {"log_wandb": True}), ("faiss-cpu", {"retriever": "NCL"}), ("networkx", {"retriever": "NNCF"})]
    needed.append(("kmeans-pytorch", {"retriever": "LDiffRec", "retriever_args": {"n_cate": 2}}))
    configs = [(name, Config(model="PRM", dataset="plain", config_dict=inputs.keys(**keys))) for name, keys in needed]
    for package, config in configs:
        with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed: pip install"):
            compat.require_packages(config)
    compat.require_packages(Config(model="PRM", dataset="plain", config_dict=inputs.keys(retriever="LDiffRec")))


# ---------------------------------------------------------------------- pickles


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("content", ["hostile", "garbage"])
def test_no_pickle_is_opened(inputs, load, tmp_path, content):
    trap, saved = tmp_path / "trap", tmp_path / "saved"
    saved.mkdir()
    data = pickle.dumps(Hostile(str(trap))) if content == "hostile" else b"no pickle"
    for name in ("plain-Dataset.pth", "plain-AtomicDataset.pth", "plain-for-PRM-dataloader.pth"):
        (saved / name).write_bytes(data)
    same_log(load(checkpoint_dir=str(saved)))
    refused(load, "dataset_save_path=.*cannot be honoured", dataset_save_path=str(saved / "plain-Dataset.pth"))
    assert not trap.exists()
    if content == "hostile":  # the trap works
        pickle.loads(data).close()
        assert trap.exists()


# ---------------------------------------------------------------------- the command


def command(inputs, tmp_path, *arguments):
    root = ROOT
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    keys = inputs.keys(model="PRM", checkpoint_dir=str(tmp_path / "saved"))
    given = [f"--{key}={str(value).replace(' ', '')}" for key, value in keys.items() if key != "state"]
    return subprocess.run(
        [sys.executable, str(root / "run_dnr.py"), *given, *arguments], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip


def test_the_command_with_side_files_and_other_names(inputs, tmp_path):
    inputs.write("renamed", header=HEADER.replace("user_id", "userId").replace("item_id", "movieId"))
    inputs.write("renamed", "item", ITEM.replace("item_id", "movieId"), [(i, '"a', "red") for i in items()[::2]])
    fields = ["--USER_ID_FIELD=userId", "--ITEM_ID_FIELD=movieId"]
    result = command(inputs, tmp_path, "--dataset=renamed", *fields, "--use_features=True")
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-3000:]
    assert "800 interactions, 40 users, 60 items" in text and "30 of 60 items have features" in text


def test_the_command_refuses_in_one_line_before_training(inputs, tmp_path, capsys):
    given = [f"--{key}={str(value).replace(' ', '')}" for key, value in inputs.keys(model="PRM").items()]
    assert main(["run", "--dataset=plain", *given, "--user_inter_num_interval=50"]) == 2
    assert capsys.readouterr().err.startswith("error: user_inter_num_interval='50': is no interval; write [50,inf)")
    assert not list((tmp_path / "saved").glob("**/*"))
