"""The cache: round trip, misses, damage, failure to write."""

import errno
import json

import numpy as np
import pytest
import torch

from dnr_recbole.errors import CacheError
from dnr_recbole.identity import digest
from dnr_recbole.retriever import cache as module
from dnr_recbole.retriever.cache import Cache
from dnr_recbole.retriever.calibration import calibration_from_dict

KEY = {"stage": "test", "fraction": 0.8, "sizes": [1, 2], "none": None}
TENSORS = {
    "a": torch.arange(6).view(2, 3),
    "b": torch.tensor([0.5, float("-inf")]),
    "c": torch.tensor([True]),
}


def test_round_trip(tmp_path):
    cache = Cache(tmp_path / "deep" / "cache")
    assert cache.load(KEY) is None
    assert cache.store(KEY, TENSORS, {"note": "naïve"})
    tensors, meta = cache.load_entry(KEY)
    assert meta == {"note": "naïve"}
    assert tensors.keys() == TENSORS.keys() == cache.load(KEY).keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) and tensors[k].dtype == TENSORS[k].dtype for k in TENSORS)
    assert json.loads((cache.path(KEY) / "manifest.json").read_text("utf-8"))["key"]["fraction"] == 0.8
    assert [p.name for p in cache.root.iterdir()] == [cache.path(KEY).name]  # no temporary left


def test_a_changed_key_misses(tmp_path):
    cache = Cache(tmp_path)
    cache.store(KEY, TENSORS)
    for name, value in {"fraction": 0.7, "sizes": [2, 1], "none": 0, "new": 1}.items():
        assert cache.load({**KEY, name: value}) is None


def test_equal_keys_have_equal_hashes():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": np.int64(1)})


def test_a_view_is_stored_without_its_storage(tmp_path):
    cache = Cache(tmp_path)
    cache.store(KEY, {"view": torch.zeros(10**6)[:2]})
    assert (cache.path(KEY) / "tensors.pt").stat().st_size < 10**5


@pytest.mark.parametrize("name", ["tensors.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "garble", "remove"])
def test_damage_is_reported_with_the_file_and_the_cure(tmp_path, name, damage):
    cache = Cache(tmp_path)
    cache.store(KEY, TENSORS)
    file = cache.path(KEY) / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"\x80" + content[1:])
    with pytest.raises(CacheError, match=f"{name}.*use_cache=False"):
        cache.load(KEY)


def test_storing_twice_keeps_the_first(tmp_path):
    cache = Cache(tmp_path)
    assert cache.store(KEY, TENSORS) and cache.store(KEY, {"a": torch.zeros(1)})
    assert torch.equal(cache.load(KEY)["a"], TENSORS["a"])


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "file_digest", full)
    cache = Cache(tmp_path)
    assert not cache.store(KEY, TENSORS)
    assert list(tmp_path.iterdir()) == [] and cache.load(KEY) is None


@pytest.mark.parametrize(
    "change", [{"meta": {"slope": -1.0}}, {"key": {**KEY, "fraction": 0.7}}, {"tensors": "0" * 64}, {"format": 1}]
)
def test_an_edited_manifest_is_not_believed(tmp_path, change):
    """Such as one with a calibration turned upside down."""
    cache = Cache(tmp_path)
    cache.store(KEY, TENSORS, {"slope": 1.0})
    path = cache.path(KEY) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CacheError, match="manifest.json does not match its checksum"):
        cache.load(KEY)


def test_a_calibration_that_turns_the_order_is_none():
    good = calibration_from_dict({"kind": "logistic", "center": 0.0, "scale": 1.0, "slope": 2.0, "bias": 0.0})
    assert good(torch.tensor([0.0, 1.0])).diff() > 0
    for change in ({"slope": -2.0}, {"slope": 0.0}, {"scale": -1.0}, {"bias": float("nan")}, {"center": float("inf")}):
        with pytest.raises(ValueError):
            calibration_from_dict({**good.to_dict(), **change})
    falling, unsorted, outside = ([0, 1], [0.9, 0.1]), ([1, 0], [0.1, 0.9]), ([0, 1], [0.1, 1.9])
    for knots, values in (falling, unsorted, outside, ([], []), ([0], [0.1, 0.2])):
        with pytest.raises(ValueError):
            calibration_from_dict({"kind": "isotonic", "knots": knots, "values": values})
