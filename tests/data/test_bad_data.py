"""Missing, damaged and unsuitable datasets give one line each, no traceback of pandas and no wrong result."""

from urllib.error import URLError

import pandas as pd
import pytest

from dnr_recbole.config import Config
from dnr_recbole.data.loading import data_files, load_recbole_dataset
from dnr_recbole.errors import ConfigError, DataError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ROWS = [f"u{u}\ti{(u * 3 + t) % 15}\t{1 + (u + t) % 5}\t{100 + t}" for u in range(6) for t in range(8)]


class Folder:
    """A data_path with one dataset `tiny`, and how to load it."""

    def __init__(self, root):
        self.root, self.path = root, root / "tiny"
        self.path.mkdir()
        self.write([HEADER, *ROWS])

    def write(self, lines, name="tiny.inter"):
        text = lines if isinstance(lines, str) else "\n".join(lines) + "\n"
        (self.path / name).write_bytes(text.encode() if isinstance(text, str) else text)

    def load(self, dataset="tiny", **keys):
        keys = {
            "data_path": str(self.root),
            "checkpoint_dir": str(self.root / "saved"),
            "n_candidates": 10,
            **keys,
        }
        return load_recbole_dataset(Config(dataset=dataset, config_dict=keys))

    def refused(self, message, **keys):
        with pytest.raises(DataError, match=message) as caught:
            self.load(**keys)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_good_data(folder):
    dataset = folder.load()
    assert isinstance(dataset.inter_feat, pd.DataFrame) and len(dataset.inter_feat) == len(ROWS)
    assert set(dataset.inter_feat["rating"]) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_ml_100k_comes_with_recbole(folder):
    config = Config(dataset="ml-100k", config_dict={"data_path": str(folder.root)})
    files = data_files(config)
    assert [path.name for path in files["source"]] == ["ml-100k.inter"] and files["reranker"] == []
    assert config["normalize_all"] is False


# ---------------------------------------------------------------------- missing


def test_unknown_dataset_says_where_to_put_it(folder):
    folder.refused(
        r"dataset 'tinny' is not in '.*tinny': did you mean tiny\?.*put the atomic file '.*tinny.inter'",
        dataset="tinny",
    )
    folder.refused("dataset 'qqq' is not in .*: put the atomic file", dataset="qqq")


def test_known_dataset_without_network(folder, monkeypatch):
    from recbole.data.dataset import dataset as module

    def offline(url):
        raise URLError("Name or service not known")

    monkeypatch.setattr(module, "decide_download", offline)
    folder.refused(r"'ml-1m' is not in .* cannot be downloaded \(Name or service not known\): put", dataset="ml-1m")
    assert not (folder.root / "ml-1m").exists()


def test_declined_download(folder, monkeypatch):
    from recbole.data.dataset import dataset as module

    monkeypatch.setattr(module, "decide_download", lambda url: False)
    folder.refused("download was declined", dataset="ml-1m")


def test_broken_download(folder, monkeypatch):
    from recbole.data.dataset import dataset as module

    def broken(url, path):
        raise RuntimeError("Stopped downloading due to interruption.")

    monkeypatch.setattr(module, "decide_download", lambda url: True)
    monkeypatch.setattr(module, "download_url", broken)
    folder.refused("Stopped downloading", dataset="ml-1m")
    folder.refused(r"ml-1m.inter' does not exist \('.*' holds nothing\)", dataset="ml-1m")


def test_folder_without_interactions(folder):
    (folder.path / "tiny.inter").rename(folder.path / "other.inter")
    folder.refused(r"tiny.inter' does not exist \('.*' holds other.inter\): put the atomic file")


# ---------------------------------------------------------------------- damaged


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "tiny.inter' is empty"),
        ([HEADER], "has a header, but no interactions"),
        (
            [HEADER.replace(":token", "").replace(":float", ""), *ROWS],
            "line 1: column 'user_id' must be written name:type",
        ),
        (
            [HEADER.replace("\t", ","), *ROWS],
            r"line 1: column 'user_id:token,item_id:token,.*' must be .* separated by '\\t'",
        ),
        (
            [HEADER.replace("rating:float", "rating:number"), *ROWS],
            "column 'rating:number' must be written name:type",
        ),
        (
            [HEADER.replace("rating:float", "rating:token"), *ROWS],
            "column 'rating' must have type float, not token",
        ),
        (
            [HEADER.replace("user_id:token", "user_id:float"), *ROWS],
            "column 'user_id' must have type token, not float",
        ),
        (
            [HEADER.replace("timestamp", "time"), *ROWS],
            "no column 'timestamp' .*rating, time.*set TIME_FIELD .*or to null",
        ),
        (
            [HEADER.replace("rating", "stars"), *ROWS],
            "no column 'rating' .*set RATING_FIELD to the right one or to null",
        ),
        (
            [HEADER.replace("item_id", "movie"), *ROWS],
            "no column 'item_id' .*set ITEM_ID_FIELD to the right one$",
        ),
        ([HEADER, *ROWS[:5], "u1\ti2\t3", *ROWS[5:]], "line 7: 3 cells under 4 names"),
        ([HEADER, *ROWS[:5], "u1\ti2\t\t5", "u1\ti3\t\t5"], r"line 7: 'rating' is missing.*1 further line"),
        ([HEADER, *ROWS, "u1"], r"line 50: 1 cell under 4 names \(is the file truncated\?\)"),
        ([HEADER, *ROWS[:2], "\ti2\t3\t5"], "line 4: 'user_id' is missing"),
        ([HEADER, *ROWS[:3], "u1\ti2\t3\t5\t6\t7"], r"line 5: 6 cells under 4 names \(a '\\t' inside a cell"),
        ([HEADER, *ROWS[:3], "u1\ti2\tgood\t5"], "line 5: 'rating' is no number: 'good'"),
        ([HEADER, *ROWS[:3], "u1\ti2\tinf\t5"], "line 5: 'rating' is no number: 'inf'"),
        ([HEADER, *ROWS[:3], "u1\ti2\t3\t2020-01-01"], "line 5: 'timestamp' is no number: '2020-01-01'"),
        ([HEADER, *ROWS[:3], "u1\ti2\tnan\t5"], "line 5: 'rating' is no number: 'nan'"),
    ],
)
def test_damaged_interactions(folder, lines, message):
    folder.write(lines)
    folder.refused(message)


def test_binary_file(folder):
    (folder.path / "tiny.inter").write_bytes(b"\x80\x81\xff\x00" * 10)
    folder.refused("tiny.inter' cannot be read")


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "tiny.item' is empty"),
        (["item_id\tgenre", "i1\ta"], "tiny.item', line 1: column 'item_id' must be written name:type"),
        (["item_id:token\tyear:float", "i1\tlast year"], "tiny.item', line 2: 'year' is no number: 'last year'"),
        (["item_id:float", "1"], "tiny.item', line 1: column 'item_id' must have type token, not float"),
        (["movie:token", "1"], r"no column 'item_id' \(it has movie\): .* ITEM_ID_FIELD"),
        (["item_id:token\tyear:float", "i1\t5", "\t6"], "tiny.item', line 3: 'item_id' is missing"),
    ],
)
def test_damaged_features(folder, lines, message):
    folder.write(lines, "tiny.item")
    folder.refused(message, use_features=True)
    assert len(folder.load().inter_feat) == len(ROWS)  # nothing reads the file


# ---------------------------------------------------------------------- unsuitable


def test_dataset_without_times_or_ratings_when_the_user_says_so(folder):
    folder.write(["user_id:token\titem_id:token", *["\t".join(row.split("\t")[:2]) for row in ROWS]])
    folder.refused("no column 'rating'")
    dataset = folder.load(RATING_FIELD=None, TIME_FIELD=None)
    assert len(dataset.inter_feat) == len(ROWS)


def test_nothing_left_after_filtering(folder):
    folder.refused(
        r"no user is left after filtering \(user_inter_num_interval=\[99,inf\)\)",
        user_inter_num_interval="[99,inf)",
    )
    folder.refused("no user is left", val_interval={"rating": "[9,inf)"})


def test_needed_columns_are_read_whatever_load_col_says(folder):
    for chosen in ({"inter": ["user_id", "item_id"]}, {}, {"inter": []}, None):
        assert {"rating", "timestamp"} <= set(folder.load(load_col=chosen).inter_feat)
    with pytest.raises(DataError, match="unload_col.inter names rating, which this run needs"):
        folder.load(unload_col={"inter": ["rating"]})


def test_normalised_ratings_are_refused(folder):
    for keys in ({"normalize_all": True}, {"normalize_field": ["rating"]}):
        with pytest.raises(ConfigError, match="label_threshold and the split need ratings and times as they are"):
            folder.load(**keys)


def test_fewer_items_than_candidates(folder):
    folder.refused("has 15 items, fewer than n_candidates=50", n_candidates=50)
