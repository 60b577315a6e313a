"""Rows of a table against a reference: by hand, in simulation, and in the table's own words."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from places import ROOT
from scipy import stats

from dnr_recbole.errors import DataError
from dnr_recbole.evaluator.per_request import PerRequest
from dnr_recbole.experiment.differences import difference
from dnr_recbole.experiment.request_files import file_entry, request_file
from dnr_recbole.experiment.table import table


def values(users, ndcg, **more):
    """Values of one run: request r is of ``users[r]``."""
    identity = np.stack([np.arange(len(users)), users, np.ones(len(users), int)], axis=1)
    return PerRequest("x.parquet", {}, identity, {"ndcg@6": np.array(ndcg, float), **more})


def test_a_difference_by_hand():
    """User 7 has 0.4 and 0.2 more in the first seed, 8 has 0.1 and, in the second, 0.3, 9 has 0.1 less."""
    row = {1: values([7, 7, 8, 8], [0.9, 0.5, 0.4, np.nan]), 2: values([8, 9], [0.5, 0.1]), 3: values([1], [1])}
    reference = {1: values([7, 7, 8, 8], [0.5, 0.3, 0.3, np.nan]), 2: values([8, 9], [0.2, 0.2])}
    found = difference(row, reference, "ndcg@6")
    assert (found.seeds, found.n_users, found.n_requests) == ([1, 2], 3, 5)
    assert found.mean == pytest.approx((0.3 + 0.2 - 0.1) / 3)
    # One of 27 resamples is all of one user, and 1/27 > 2.5 %.
    assert (found.low, found.high) == (pytest.approx(-0.1), pytest.approx(0.3))
    assert found.p_users == pytest.approx(4 / 8)  # signs of ranks 1, 2, 3: sums 0 and 1 of 8, both sides
    assert found.ranks_above and found.p_seeds is None
    swapped = difference(reference, row, "ndcg@6")
    assert swapped.mean == pytest.approx(-found.mean) and swapped.p_users == found.p_users and not swapped.ranks_above


def test_requests_without_a_user_are_no_single_one():
    found = difference({1: values([0, 0, 5], [0.9, 0.5, 0.4])}, {1: values([0, 0, 5], [0.5, 0.3, 0.3])}, "ndcg@6")
    assert found.n_users == 3 and found.mean == pytest.approx((0.4 + 0.2 + 0.1) / 3)


def test_seeds_are_tested_from_five_on():
    generator = np.random.default_rng(0)
    users = [1, 1, 1, 2, 3, 4]
    runs = [{s: values(users, generator.random(6)) for s in range(5)} for _ in range(2)]
    # The mean over users, each of whom counts once.
    means = [[v.metrics["ndcg@6"] @ [1 / 3, 1 / 3, 1 / 3, 1, 1, 1] / 4 for v in of.values()] for of in runs]
    found = difference(*runs, "ndcg@6", seeds=True)
    assert found.p_seeds == pytest.approx(stats.ttest_rel(*means).pvalue)
    assert found.mean_seeds == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    assert difference(*runs, "ndcg@6").p_seeds is None
    del runs[1][4]
    assert difference(*runs, "ndcg@6", seeds=True).p_seeds is None


def test_the_interval_covers_the_truth():
    """In 95 % of the draws, where users differ and each seed evaluates 45 of 60; not if each draw counts alone."""
    truth, seeds, requests, covered, naive = 0.03, 5, 2, [], []
    for draw in range(200):
        generator = np.random.default_rng(draw)
        effect = truth + 0.1 * generator.standard_normal(60)
        row, reference, apart, apart_reference = {}, {}, {}, {}
        for seed in range(seeds):
            users = np.repeat(np.sort(generator.choice(60, 45, replace=False)), requests)
            base = generator.random(len(users))
            gain = effect[users] + 0.05 * generator.standard_normal(len(users))
            row[seed], reference[seed] = values(users, base + gain), values(users, base)
            apart[seed], apart_reference[seed] = (values(users + 100 * seed, v) for v in (base + gain, base))
        for hits, pair in ((covered, (row, reference)), (naive, (apart, apart_reference))):
            found = difference(*pair, "ndcg@6")
            hits.append(found.low <= truth <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.98
    assert np.mean(naive) < 0.75
    page = " ".join((ROOT / "docs/compare.md").read_text(encoding="utf-8").split())
    told = re.search(r"covered the truth in ([\d.]+) %, pooled by user in ([\d.]+) %", page).groups()
    # Rounding, which machines do in their own ways, may decide about a draw: 0.5 % of them.
    assert [float(each) for each in told] == pytest.approx([100 * np.mean(naive), 100 * np.mean(covered)], abs=0.5)


def test_what_cannot_be_compared_is_refused():
    row = {1: values([7, 7, 8], [0.9, 0.5, 0.4])}
    for reference, message in (
        ({2: row[1]}, "no seed in common"),
        ({1: values([7, 7], [0.9, 0.5])}, "request 2 is only in"),
        ({1: values([7, 8, 8], [0.9, 0.5, 0.4])}, "request 1 is of user 7 .* of user 8"),
        ({1: values([7, 7, 8], [0.9, np.nan, 0.4])}, "candidates differ"),
    ):
        with pytest.raises(DataError, match=message):
            difference(row, reference, "ndcg@6")
    with pytest.raises(DataError, match="map@6 has no values per request; there are ndcg@6"):
        difference(row, row, "map@6")
    lone = {1: values([7, 7], [0.9, 0.5])}
    with pytest.raises(DataError, match="fewer than two users"):
        difference(lone, lone, "ndcg@6")


class Lab:
    """A results file whose values per request are given."""

    users = np.repeat(np.arange(1, 101), 2)

    def __init__(self, folder):
        self.plan, self.results, self.lines = folder / "plan.yaml", folder / "rows.jsonl", []
        self.base = np.random.default_rng(0).random(200)

    def write(self, name, gain=0.0, users=None):
        users = self.users if users is None else users
        path = request_file(str(self.results), name)
        columns = {"request": np.arange(len(users)), "user": users, "positives": np.ones(len(users), int)}
        content = pyarrow.table({**columns, "ndcg@6": (self.base + gain)[: len(users)]})
        (self.results.parent / "rows.requests").mkdir(exist_ok=True)
        meta = {"dnr_recbole": json.dumps({"format": 1, "dataset": "made-up"})}
        pyarrow.parquet.write_table(content.replace_schema_metadata(meta), path)
        return file_entry(str(self.results), path)

    def add(self, row, gain=0.0, seed=1, valid=0.5, users=None, **more):
        entry = self.write(f"{row}{seed}", gain, users)
        self.lines.append({
            "setting": "default", "row": row, "seed": seed, "searched": {}, "best_valid_score": valid,
            "test": {"ndcg@6": 0.5}, "probes": {"random": {"ndcg@6": 0.1}}, "ms_per_request": 0.1,
            "requests": entry, "probe_requests": {"random": self.write(f"probe{seed}", -self.base)}, **more,
        })  # fmt: skip

    def table(self, **plan):
        rows = {line["row"]: {} for line in self.lines}
        seeds = sorted({line["seed"] for line in self.lines})
        self.plan.write_text(yaml.safe_dump({"rows": rows, "seeds": seeds, **plan}, sort_keys=False))
        self.results.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        text = table(str(self.plan), str(self.results)).splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text if line.startswith("|")]
        shown = {line[0].strip("*").replace(" †", ""): dict(zip(cells[0], line)) for line in cells[2:]}
        return shown, "\n".join(line for line in text if not line.startswith("|"))


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def noise(size, mean, seed=0):
    """Gains of 200 requests with exactly this mean over the 100 users."""
    made = size * np.random.default_rng(seed).standard_normal(200)
    return made - made.mean() + mean


def test_planted_differences_are_marked_and_holm_goes_over_the_table(lab):
    gains = {"better": noise(0.1, 0.1), "hardly": noise(0.1, 0.012, 1), "same": 0.0, "worse": noise(0.17, -0.04, 2)}
    lab.add("base", valid=0.6)
    for name, gain in gains.items():
        lab.add(name, gain)
    rows, notes = lab.table()
    head = "ndcg@6 − base"
    assert rows["base"][head] == "reference" and rows["base"]["p (users)"] == ""
    by_user = {name: (gain * np.ones(200)).reshape(100, 2).mean(1) for name, gain in gains.items()}
    p = {name: stats.wilcoxon(d).pvalue for name, d in by_user.items() if name != "same"}
    # Five comparisons with the probe, from the smallest p on: random and better, then worse, hardly, same.
    assert p["better"] < p["worse"] < p["hardly"] and 2 * p["hardly"] > 0.05 > p["hardly"]
    assert rows["random"]["p (users)"] == rows["better"]["p (users)"].replace("▲", "▼") == "< 0.0001 ▼"
    assert rows["worse"]["p (users)"] == f"{3 * p['worse']:.4f} ▼"
    assert rows["hardly"]["p (users)"] == f"{2 * p['hardly']:.4f} ≈"
    assert rows["same"]["p (users)"] == "1.0000 ≈" and rows["same"][head] == "+0.00 [+0.00, +0.00]"
    mean, low, high = (float(x.strip("[,]")) for x in rows["better"][head].split())
    assert mean == pytest.approx(10) and low < 10 < high
    margin = 196 * by_user["better"].std() / 10
    assert (low, high) == (pytest.approx(10 - margin, abs=0.15), pytest.approx(10 + margin, abs=0.15))
    for said in ("≈: no difference seen", "reference base (the best row on validation)", "5 comparisons",
                 "100 of them with 200 evaluated requests in 1 seed(s)", "95 % bootstrap"):  # fmt: skip
        assert said in notes
    rows, notes = lab.table(reference="random", alpha=0.001)
    assert rows["random"]["ndcg@6 − random"] == "reference" and rows["base"]["p (users)"] == "< 0.0001 ▲"
    assert "random (named in the plan)" in notes and "99.9 % bootstrap" in notes


def test_ranks_and_mean_that_disagree_are_no_direction(lab):
    gain = np.repeat(np.where(np.arange(100) < 80, 0.01, -0.2) + 1e-5 * np.arange(100), 2)
    lab.add("base", valid=0.6)
    lab.add("skewed", gain)
    rows, notes = lab.table()
    assert rows["skewed"]["p (users)"].endswith("◆") and rows["skewed"]["ndcg@6 − base"].startswith("-3.")
    assert "◆: significant, but most users lie on one side" in notes


def test_seeds_have_a_column_where_they_share_the_users(lab):
    for seed in range(1, 6):
        lab.add("base", noise(0.1, 0.01 * seed, seed), seed, 0.6)
        lab.add("up", noise(0.1, 0.01 * seed + 0.1 + 0.001 * seed, 10 + seed), seed)
    rows, notes = lab.table(seed_key="init_seed")
    means = 0.1 + 0.001 * np.arange(1, 6)
    assert stats.ttest_1samp(means, 0).pvalue < 1e-4 and rows["up"]["p (seeds)"] == "< 0.0001 ▲"
    assert rows["up"]["ndcg@6 − base"].startswith("+10.30 ") and "paired t-test over 5 seeds" in notes
    assert "p (seeds)" not in lab.table(seed_key="seed")[0]["up"]
    lab.lines = [line for line in lab.lines if line["seed"] < 5]
    rows, notes = lab.table(seed_key="init_seed")
    assert "p (seeds)" not in rows["up"] and "No test over seeds: it needs 5" in notes


@pytest.mark.parametrize(
    "damage, reason",
    [
        ("cut", "is not as it was written"),
        ("gone", "is missing"),
        ("folder", "cannot be read: Is a directory"),
        ("foreign", "is damaged or no file of values per request"),
        ("unnamed", "names no file of values per request"),
        ("odd", "names no file of values per request"),
    ],
)
def test_a_line_without_its_file_is_shown_but_not_tested(lab, damage, reason):
    for name, gain in (("base", 0.0), ("better", noise(0.1, 0.1)), ("lost", noise(0.1, 0.1))):
        lab.add(name, gain, valid=0.6 if name == "base" else 0.5)
    sound, _ = lab.table()
    path, line = lab.results.parent / "rows.requests" / "lost1.parquet", lab.lines[2]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "foreign":
        path.write_text("request,user")
        line["requests"] = file_entry(str(lab.results), str(path))
    elif damage == "unnamed":
        del line["requests"]
    else:
        line["requests"] = {"file": 3}
    rows, notes = lab.table()
    assert rows["lost"]["ndcg@6"] == sound["lost"]["ndcg@6"] and rows["lost"]["ndcg@6 − base"] == "not tested"
    assert rows["better"] == sound["better"], "p is small enough that one comparison less does not show"
    assert any("Not tested: lost, because seed 1: " in text and reason in text for text in notes.splitlines())
    rows, notes = lab.table(reference="lost")
    assert set(rows["better"]) == {"", "ndcg@6", "s / epoch", "ms / request", "seeds"}
    assert "the reference lost has no values per request: seed 1: " in notes and reason in notes


def test_a_seed_that_is_lost_is_named(lab):
    for seed in (1, 2):
        lab.add("base", 0.0, seed, 0.6)
        lab.add("up", noise(0.1, 0.1 * seed, seed), seed)
    (lab.results.parent / "rows.requests" / "up2.parquet").unlink()
    rows, notes = lab.table()
    assert rows["up"]["ndcg@6 − base"].startswith("+10.00 ")
    assert "up is tested on seed 1 only: seed 2: " in notes and "up2.parquet is missing" in notes
    assert "200 to 400 evaluated requests in 1 to 2 seed(s)" in notes
    lab.lines.pop()
    assert "up is tested on seed 1 only: seed 2: no run" in lab.table()[1]


def test_rows_about_other_requests_are_not_tested(lab):
    lab.add("base", valid=0.6)
    lab.add("up", noise(0.1, 0.1))
    lab.add("others", users=np.arange(1, 201))
    rows, notes = lab.table()
    assert rows["others"]["ndcg@6 − base"] == "not tested" and rows["up"]["p (users)"] == "< 0.0001 ▲"
    assert "Not tested: others, because request 1 is of user 2 " in notes and "2 comparisons" in notes


def test_a_reference_or_metric_that_is_not_there_is_said(lab):
    lab.add("base", valid=0.6)
    lab.add("up", noise(0.1, 0.1))
    rows, notes = lab.table(rows={"base": {}, "up": {}, "later": {}}, reference="later")
    assert "the reference later has no finished run here" in notes and "p (users)" not in rows["up"]
    _, notes = lab.table(test_metric="MAP@6")
    assert "Not tested: random, up, because map@6 has no values per request; there are ndcg@6" in notes
    for line in lab.lines:
        line["valid_score_bigger"] = False
    assert lab.table()[0]["up"]["ndcg@6 − up"] == "reference"
    for line in lab.lines:
        del line["requests"], line["probe_requests"]
    rows, notes = lab.table()
    assert "p (users)" not in rows["up"]
    assert "2 lines were made before values per request were kept: differences are not tested there." in notes
