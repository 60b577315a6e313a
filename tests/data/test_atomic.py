"""The reader of atomic files against a slow reference, and what it refuses, with the place of the damage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnr_recbole.data import atomic
from dnr_recbole.data.atomic import AtomicFile, Format
from dnr_recbole.errors import ConfigError, DataError

# Everything that other readers take for quotes, comments, missing values, line ends or byte-order marks.
ODD = ['"', '""', '"a', 'b"', "'", "NA", "null", "nan", "None", "", " ", "#", "\\", ",", ";", "007", "1e3", "-", "é"]
ODD += ["—", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff", "😀", "\x1a", "True", "a b", " x "]
CELL = st.one_of(st.sampled_from(ODD), st.text("ab\"' 01", max_size=4))


@st.composite
def tables(draw):
    width = draw(st.integers(2, 4))
    return draw(st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1, max_size=6))


def write(path, lines, end="\n", last=True, encoding="utf-8", bom=False):
    text = end.join(lines) + (end if last else "")
    path.write_bytes((("\ufeff" if bom else "") + text).encode(encoding))
    return path


def same(frame, table):
    """Cells are equal; a missing one is NaN."""
    for row, cells in zip(frame.itertuples(index=False), table):
        for got, cell in zip(row, cells):
            assert got == cell if cell else (isinstance(got, float) and math.isnan(got)), (got, cell)
    assert len(frame) == len(table)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("atomic") / "x.item"


@settings(max_examples=150, deadline=None)
@given(
    table=tables(),
    separator=st.sampled_from(["\t", "|", "::", "→", "~"]),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    bom=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "gb18030"]),
    block=st.sampled_from([1, 7, 1 << 24]),
)
def test_every_cell_as_it_is_written(path, table, separator, end, last, bom, encoding, block):
    lines = [separator.join(f"c{i}:token" for i in range(len(table[0])))] + [separator.join(row) for row in table]
    write(path, lines, end, last, encoding, bom)
    before, atomic._BLOCK = atomic._BLOCK, block
    try:
        same(AtomicFile(path, Format(separator, encoding=encoding)).frame(), table)
    finally:
        atomic._BLOCK = before


@settings(max_examples=100, deadline=None)
@given(table=tables(), data=st.data())
def test_a_cell_too_many_or_too_few(path, table, data):
    wrong, more = data.draw(st.integers(0, len(table) - 1)), data.draw(st.booleans())
    width = len(table[0])
    table[wrong] = table[wrong] + ["x"] if more else table[wrong][:-1]
    write(path, ["\t".join(f"c{i}:token" for i in range(width))] + ["\t".join(["i", *row[1:]]) for row in table])
    cells = len(table[wrong]) if more or width > 2 else 1
    with pytest.raises(DataError, match=f"x.item', line {wrong + 2}: {cells} cells? under {width} names"):
        AtomicFile(path).frame()


NUMBERS = ["1", "-0.5", "+3", "1e3", ".5", "5.", " 7 ", "978300760", "0.1", "1e-320", "123456789012345678901", ""]
NO_NUMBERS = ["nan", "inf", "-Infinity", "NA", "—", "1,5", "1_0", "0x10", "True", "٣", "1e999", "-", "e", " "]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(NUMBERS * 4 + NO_NUMBERS), min_size=1, max_size=8))
def test_numbers(path, cells):
    write(path, ["item_id:token\tprice:float", *(f"i{n}\t{cell}" for n, cell in enumerate(cells))])
    bad = [n for n, cell in enumerate(cells) if cell in NO_NUMBERS]
    if bad:
        with pytest.raises(DataError, match=f"line {bad[0] + 2}: 'price' is no number: '") as caught:
            AtomicFile(path).frame()
        assert f"'{cells[bad[0]]}'" in str(caught.value)
        assert ("further line" in str(caught.value)) == (len(bad) > 1)
        return
    price = AtomicFile(path).frame()["price"]
    assert price.dtype == np.float64
    np.testing.assert_array_equal(price, [float(cell) if cell else np.nan for cell in cells])
    if "" in cells:
        with pytest.raises(DataError, match=f"line {cells.index('') + 2}: 'price' is missing"):
            AtomicFile(path).frame(required=["price"])


def test_columns_that_are_not_asked_for_may_hold_anything(path):
    write(path, ["item_id:token\tprice:float\tv:float_seq", "1\t—\tx"])
    assert AtomicFile(path).frame(["item_id"]).to_dict("list") == {"item_id": ["1"]}


def test_sequences(path):
    write(path, ["a:token_seq\tb:float_seq", "x  y\t1 2.5", "\t", "NA\t-1"])
    frame = AtomicFile(path).frame()
    assert [list(cell) for cell in frame["a"]] == [["x", "y"], [], ["NA"]]
    assert [list(cell) for cell in frame["b"]] == [[1, 2.5], [], [-1]] and frame["b"][1].dtype == np.float64
    frame = AtomicFile(path, Format(seq_len={"a": 1})).frame()
    assert [list(cell) for cell in frame["a"]] == [["x"], [], ["NA"]]
    write(path, ["a:token\tb:float_seq", "i\t1 2", "i\t1 two", "i\tnan"])
    with pytest.raises(DataError, match=r"line 3: 'b' has a value that is no number: 'two' \(and on 1 further line\)"):
        AtomicFile(path).frame()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty: its first line must name the columns"),
        (b"\n", "is empty"),
        (b"a:token\ta:float\n1\t2\n", "line 1: two columns are named 'a'"),
        (b"a:token\t:float\n1\t2\n", "line 1: column ':float' must be written name:type"),
        (b"a:token\tb\n1\t2\n", "line 1: column 'b' must be written name:type"),
        (b"a:token\tb:token\n1\t2\n\n3\t4\n", r"line 3: the line is empty \(1 cell under 2 names\)"),
        (b"a:token\tb:token\r\n1\t2\r\n\r\n3\t4\r\n", "line 3: the line is empty"),
        (b"a:token\tb:token\n1\t2\n3", r"line 3: 1 cell under 2 names \(is the file truncated\?\)"),
        (b"a:token\tb:token\n1\t2\r3\t4\n", "line 2: a carriage return that does not end the line"),
        (b"a:token\tb:token\r1\t2\r", "line 1: a carriage return"),
        (b"a:token\tb:token\n1\t2\n3\t\x00\n", "line 3: a NUL byte"),
        (b"a:token\tb:token\n1\t2\n3\tcaf\xe9\n", r"as utf-8 \(line 3, byte 26: 0xe9\): set the key encoding, e.g."),
        ("a:token\tb:token\n".encode("utf-16"), r"as utf-8 \(line 1, byte 1: 0xff\): set encoding=utf-16"),
    ],
)
def test_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        AtomicFile(path).frame()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_encodings(path):
    write(path, ["a:token\tb:token", "x\tcafé"], encoding="latin-1")
    assert AtomicFile(path, Format(encoding="latin-1")).frame()["b"].tolist() == ["café"]
    for encoding in ("rot13", "no-such"):
        with pytest.raises(ConfigError, match=f"encoding='{encoding}' is unknown"):
            Format.of({"field_separator": "\t", "seq_separator": " ", "encoding": encoding, "seq_len": None})
    with pytest.raises(DataError, match="cannot be read as utf-16"):
        AtomicFile(path, Format(encoding="utf-16"))
    # A character that a block boundary cuts.
    text = "a:token\tb:token\n" + "é\t€\n" * 20
    path.write_bytes(text.encode() + b"\xff\t1\n")
    before, atomic._BLOCK = atomic._BLOCK, 5
    try:
        with pytest.raises(DataError, match=rf"line 22, byte {len(text.encode()) + 1}: 0xff"):
            AtomicFile(path)
    finally:
        atomic._BLOCK = before


def test_empty_lines_at_the_end_are_no_lines(path):
    for end in ("\n", "\r\n"):
        write(path, ["a:token\tb:token", "1\t2", "", ""], end)
        assert len(AtomicFile(path).frame()) == 1
    write(path, ["a:token\tb:token"])
    assert AtomicFile(path).frame().empty


@pytest.mark.parametrize("key", ["field_separator", "seq_separator"])
@pytest.mark.parametrize("value", ["", "\n", "a\r"])
def test_separators(key, value):
    keys = {"field_separator": "\t", "seq_separator": " ", "encoding": None, "seq_len": None}
    with pytest.raises(ConfigError, match=f"{key}=.*must be at least one character, and no line break"):
        Format.of({**keys, key: value})


def test_a_folder_or_no_file(tmp_path):
    for place in (tmp_path, tmp_path / "none.inter"):
        with pytest.raises(DataError, match="cannot be read: "):
            AtomicFile(place)
