from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fave_fast.data import Interactions, load_interactions
from fave_fast.errors import DataError
from fave_fast.readers import FORMATS, read_log

Rows = list[tuple[int | str, int | str, int | float]]


def assert_same(found: Interactions, expected: Interactions) -> None:
    for name in ("items", "offsets", "times"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert (found.item_ids, found.user_ids, found.name) == (expected.item_ids, expected.user_ids, expected.name)


def write(folder: Path, rows: Rows) -> list[Path]:
    """The rows as log.inter, .csv, .tsv, .parquet and .jsonl, and the text ones compressed too."""
    frame = pl.DataFrame(
        {
            "user_id": pl.Series([str(user) for user, _, _ in rows]),
            "item_id": pl.Series([str(item) for _, item, _ in rows]),
            "timestamp": pl.Series([time for _, _, time in rows], strict=False),
        }
    )
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "log.inter").write_text(header + "".join(f"{user}\t{item}\t{time}\n" for user, item, time in rows))
    frame.write_csv(folder / "log.csv")
    frame.write_csv(folder / "log.tsv", separator="\t")
    numeric = [name for at, name in enumerate(frame.columns[:2]) if all(isinstance(row[at], int) for row in rows)]
    frame.with_columns(pl.col(numeric).cast(pl.Int64)).write_parquet(folder / "log.parquet")
    lines = [json.dumps({"user_id": user, "item_id": item, "timestamp": time}) + "\n" for user, item, time in rows]
    (folder / "log.jsonl").write_text("".join(lines))
    paths = [folder / f"log.{ending}" for ending in ("inter", "csv", "tsv", "parquet", "jsonl")]
    for path in [path for path in paths if path.suffix != ".parquet"]:
        paths.append(path.with_suffix(path.suffix + ".gz"))
        paths[-1].write_bytes(gzip.compress(path.read_bytes()))
    return paths


STAMPS = st.one_of(st.integers(-5, 5), st.integers(0, 2**40), st.floats(-4, 4, width=16))
# The atomic file has no quoting, so neither tabs nor line ends are in ids.
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
IDS = st.one_of(
    st.integers(-3, 30), st.text(LETTERS, min_size=1, max_size=3), st.sampled_from(["07", '"', "a,b", "-0"])
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(IDS, IDS, STAMPS), min_size=1, max_size=12))
def test_formats_agree(tmp_path: Path, rows: Rows) -> None:
    first, *others = [load_interactions(path, keep_times=True) for path in write(tmp_path, rows)]
    for other in others:
        assert_same(other, first)
        assert len(other.decisions) == len(first.decisions)
    naive: dict[str, list[tuple[float, int, str]]] = {}
    for number, (user, item, time) in enumerate(rows):
        naive.setdefault(str(user), []).append((time, number, str(item)))
    for at, user in enumerate(first.user_ids.ids):
        expected = [item for _, _, item in sorted(naive[str(user)])]
        assert [str(item) for item in first.item_ids.take(first.history(at) - 1)] == expected


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=5), st.randoms())
def test_npz_agrees_with_text(tmp_path: Path, sequences: list[list[int]], random: object) -> None:
    sequences = [*sequences, [1, 2, 3, 4, 5]]
    flat = np.concatenate(sequences).astype(np.int32)
    np.savez(tmp_path / "log.npz", items=flat, offsets=np.cumsum([0, *map(len, sequences)]), num_items=5)
    rows: Rows = [(user, item, at) for user, row in enumerate(sequences, 1) for at, item in enumerate(row, 1)]
    random.shuffle(rows)  # type: ignore[attr-defined]
    expected = load_interactions(tmp_path / "log.npz", keep_times=True)
    for path in write(tmp_path, rows):
        assert_same(load_interactions(path, keep_times=True), expected)


def test_npz_catalogue_holds_items_that_never_occur(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", items=np.array([2, 4]), offsets=np.array([0, 0, 2]), num_items=5)
    data = load_interactions(tmp_path / "a.npz")
    assert (data.num_items, data.user_ids.ids, data.items.tolist()) == (5, [2], [2, 4])
    assert "1 users without any interaction: left out" in data.decisions


# files as their publishers ship them


def histories(data: Interactions) -> dict[int | str, list[int | str]]:
    return {user: data.item_ids.take(data.history(at) - 1) for at, user in enumerate(data.user_ids.ids)}


def test_movielens(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n196\t51\t5\t881250900\n")
    data = load_interactions(tmp_path / "u.data", keep_times=True)
    assert histories(data) == {186: [302], 196: [51, 242]}
    assert data.times is not None
    assert data.times.tolist() == [891717742, 881250900, 881250949]
    assert data.decisions == ("1 rows are earlier than the same user's row before (first: line 3): sorted",)


def test_amazon(tmp_path: Path) -> None:
    review = {"reviewerID": "A1", "asin": "0000031852", "reviewText": 'a "b"\n{}', "helpful": [0, 1], "overall": 5.0}
    rows = [
        {**review, "unixReviewTime": 1355616000, "reviewTime": "12 16, 2012"},
        {**review, "asin": "B00", "unixReviewTime": 1355615999},
    ]
    path = tmp_path / "reviews_Beauty_5.json.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    data = load_interactions(path)
    assert histories(data) == {"A1": ["B00", "0000031852"]}
    assert data.name == "reviews_Beauty_5"
    assert read_log(path).frame.equals(read_log(path, "amazon").frame)


def test_steam(tmp_path: Path) -> None:
    lines = [
        {"username": "Chaos Syren", "hours": 0.1, "product_id": "725280", "date": "2017-12-17", "early_access": False},
        {"username": "Chaos Syren", "product_id": "328100", "date": "2017-12-16", "text": 'it\'s "fine"\n'},
        {"username": "é'", "product_id": "328100", "date": "2018-01-02", "compensation": None},
    ]
    path = tmp_path / "steam_reviews.json"
    path.write_text("".join("{" + ", ".join(f"u{k!r}: {v!r}" for k, v in line.items()) + "}\n" for line in lines))
    data = load_interactions(path, keep_times=True)
    assert histories(data) == {"Chaos Syren": [328100, 725280], "é'": [328100]}
    assert data.times is not None
    days = ("2017-12-16", "2017-12-17", "2018-01-02")
    assert data.times.tolist() == [datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp() for day in days]


def test_steam_line_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "a.json").write_text(
        f"{{'username': open({str(trap)!r}, 'w'), 'product_id': 1, 'date': '2020-01-01'}}\n"
    )
    with pytest.raises(DataError, match=r"line 1: .* cannot be parsed; expected a Python dict"):
        read_log(tmp_path / "a.json", "steam")
    assert not trap.exists()


# columns, times, decisions


def table(tmp_path: Path, text: str, name: str = "a.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_columns_by_alias_and_by_name(tmp_path: Path) -> None:
    path = table(tmp_path, "movieId,rating,userId,timestamp,when\n7,5,1,20,1\n8,5,1,10,2\n")
    assert histories(load_interactions(path)) == {1: [8, 7]}
    assert histories(load_interactions(path, columns={"time": "when"})) == {1: [7, 8]}
    assert histories(load_interactions(path, columns={"item": "rating", "time": "when"})) == {1: [5, 5]}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("texts", "seconds"),
    [
        (["1970-01-02", "1970-01-01"], [0, 86400]),
        (["1970-01-01 00:01:00", "1970-01-01 00:00:30"], [30, 60]),
        (["1970-01-01T00:01:00Z", "1970-01-01T01:00:00.5+01:00", "1970-01-01"], [0, 0.5, 60]),
        (["1.5", "1e1"], [1.5, 10]),
        (["1609459200123456789", "1609459200123456788"], [1609459200123456788, 1609459200123456789]),
    ],
)
def test_dates_and_numbers(tmp_path: Path, ending: str, texts: list[str], seconds: list[float]) -> None:
    frame = pl.DataFrame({"user": "u", "item": range(len(texts)), "time": texts})
    path = tmp_path / f"a.{ending}"
    {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[ending](path)
    times = load_interactions(path, keep_times=True).times
    assert times is not None
    assert times.tolist() == seconds


def test_parquet_dates_have_the_same_seconds(tmp_path: Path) -> None:
    moments = [datetime(1970, 1, 1, 0, 0, 2), datetime(1970, 1, 1, 0, 0, 1, 500_000)]
    for unit in ("ms", "us", "ns"):
        frame = pl.DataFrame({"user": [1, 1], "item": [1, 2], "time": pl.Series(moments, dtype=pl.Datetime(unit))})
        frame.write_parquet(tmp_path / "a.parquet")
        times = load_interactions(tmp_path / "a.parquet", keep_times=True).times
        assert times is not None
        assert times.tolist() == [1.5, 2.0]


def test_without_timestamps_the_file_order_counts(tmp_path: Path) -> None:
    path = table(tmp_path, "user,item\n2,9\n1,5\n2,3\n")
    data = load_interactions(path)
    assert histories(data) == {1: [5], 2: [9, 3]}
    assert data.decisions == ("no timestamp column: rows taken in the file's order",)
    with pytest.raises(DataError, match="no timestamp column; expected one"):
        load_interactions(path, keep_times=True)


def test_every_decision_is_counted_with_its_first_line(tmp_path: Path) -> None:
    path = table(tmp_path, 'user,item,time\n1,"a\nb",5\n1,c,5\n1,d,4\n1,c,5\n2,c,1\n2,d,2\n3,c,1\n\n\n')
    data = load_interactions(path, drop_repeats=True, min_count=2)
    assert data.decisions == (
        "1 rows are earlier than the same user's row before (first: line 5): sorted",
        "2 rows share user and timestamp with the row before (first: line 4): kept in the file's order",
        "1 rows repeat an earlier row's user, item and timestamp (first: line 6): kept",
        "1 repeats of an item by the same user dropped, the first of each kept",
        "2-core: 1 users, 1 items and 2 interactions removed",
    )
    assert histories(data) == {1: ["d", "c"], 2: ["c", "d"]}


def test_empty_k_core_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the 3-core is empty"):
        load_interactions(table(tmp_path, "user,item\n1,2\n1,3\n"), min_count=3)


def test_line_of_json_counts_empty_lines(tmp_path: Path) -> None:
    row = '{"user": 1, "item": 2, "time": 3}\n'
    data = load_interactions(table(tmp_path, row + "\n" + row, "a.jsonl"))
    assert "(first: line 3)" in data.decisions[0]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "a.csv", tmp_path / "a.jsonl"
    csv.write_bytes(b"\xef\xbb\xbfuser,item,time\r\n1,x,2\r\n1,y,1\r\n")
    jsonl.write_bytes(b'\xef\xbb\xbf{"user": 1, "item": "x", "time": 2}\r\n{"user": "1", "item": "y", "time": 1.0}\r\n')
    assert_same(load_interactions(csv, keep_times=True), load_interactions(jsonl, keep_times=True))


def test_types_mixed_in_json_name_the_same_ids(tmp_path: Path) -> None:
    rows = [1, 1.0, "1", "x", 12345678901234567890]
    text = "".join(json.dumps({"user": user, "item": 1}) + "\n" for user in rows)
    data = load_interactions(table(tmp_path, text, "a.jsonl"))
    assert data.user_ids.ids == ["1", "12345678901234567890", "x"]
    assert np.diff(data.offsets).tolist() == [3, 1, 1]


# bad input

HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"
J = '{"user": 1, "item": 2, "time": 3}\n'
TEXT_FAULTS = [
    ("a.csv", "", "the file is empty"),
    ("a.csv.gz", gzip.compress(b"", mtime=0), "the file is empty"),
    ("a.csv", "\n\n", "no header|no user column"),
    ("a.csv", "user,item,time\n", "no rows"),
    ("a.inter", HEAD, "no rows"),
    ("a.jsonl", "\n \n", "no rows; expected a JSON object"),
    ("a.csv", "name,item,time\n1,2,3\n", "no user column among 'name', 'item', 'time'; expected user_id or user"),
    ("a.inter", "user_id:token\tthing:token\n1\t2\n", "no item column among 'user_id', 'thing'"),
    ("a.csv", "user,user,item\n1,2,3\n", "line 1: column 'user' occurs more than once"),
    ("a.csv", "user,item,time\n1,2,3\n1,2\n", "line 3: found 2 fields; expected 3 fields"),
    ("a.csv", "user,item,time,x\n1,2,3,4\n1,2,3\n", "line 3: found 3 fields; expected 4 fields"),
    ("a.csv", "user,item,time\n1,2,3,4\n", "line 2: found 4 fields; expected 3 fields"),
    ("a.csv", "user,item,time\n1,2,3\n\n1,2,3\n", "line 3: found 0 fields"),
    ("a.inter", HEAD + "1\t2\t3\n1\t2\n", "line 3: found 2 fields"),
    ("a.inter", HEAD + "1\t2\t3\t4\n", "line 2: found 4 fields"),
    ("u.data", "1\t2\t3\n", "line 1: found 3 fields; expected 4 fields .user, item, rating, timestamp."),
    ("u.data", "1\t2\t3\t4\n1\t2\t3\tx\n", "line 2: timestamp is 'x'; expected a finite number"),
    ("a.csv", "user,item,time\n,2,3\n", "line 2: user is ''"),
    ("a.csv", 'user,item,time\n1,"",3\n', "line 2: item is ''"),
    ("a.csv", "user,item,time\n1,2,\n", "line 2: time is ''; expected a finite number or an ISO date"),
    ("a.csv", "user,item,time\n1,2,3\n1,2,soon\n", "line 3: time is 'soon'; expected a finite number"),
    ("a.csv", "user,item,time\n1,2,nan\n", "line 2: time is 'nan'"),
    ("a.csv", "user,item,time\n1,2,3\n1,2,-inf\n", "line 3: time is '-inf'"),
    ("a.csv", "user,item,time\n1,2,1e999\n", "line 2: time is '1e999'"),
    ("a.csv", "user,item,time\n1,2,2020-01-01\n1,2,5\n", "line 3: time is '5'; expected an ISO date, as in"),
    ("a.csv", "user,item,time\n1,2,2020-02-30\n", "line 2: time is '2020-02-30'"),
    ("a.csv", b"user,item,time\n1,2,3\n1,\xff,3\n", "line 3: byte 3 is not UTF-8"),
    ("a.jsonl", b'{"user": 1, "item": "\xff"}\n', "line 1: byte 22 is not UTF-8"),
    ("a.csv", 'user,item,time\n1,2,3\n1,"2,3\n', "line 3: unexpected end of data"),
    ("a.csv", b"\x00\x01\x02\x03\n\x04", "no user column"),
    ("a.csv.gz", b"user,item\n1,2\n", "damaged gzip data"),
    (
        "a.csv.gz",
        gzip.compress(b"user,item\n" + bytes(str(list(range(9999))), "ascii"), mtime=0)[:-900],
        "damaged gzip",
    ),
    ("a.jsonl", J + '{"user": 1,\n', "line 2: '{\"user\": 1,' cannot be parsed; expected a JSON object"),
    ("a.jsonl", J + "[1, 2]\n", "line 2: found a list; expected a JSON object"),
    ("a.jsonl", J + "7\n", "line 2: found a int; expected a JSON object"),
    ("a.jsonl", "hello\n", "line 1: 'hello' cannot be parsed"),
    ("a.jsonl", J + '{"user": 1, "time": 3}\n', "line 2: no 'item' among 'user', 'time'"),
    ("a.jsonl", '{"u": 1, "item": 3}\n', "no user column among 'u', 'item'"),
    ("a.jsonl", J + '{"user": null, "item": 2, "time": 3}\n', "line 2: user is None"),
    ("a.jsonl", J + '{"user": true, "item": 2, "time": 3}\n', "line 2: user is True"),
    ("a.jsonl", '{"user": "x", "item": 2}\n{"user": false, "item": 2}\n', "line 2: user is False"),
    ("a.jsonl", '{"user": 1.5, "item": 2}\n', "line 1: user is 1.5"),
    ("a.jsonl", '{"user": "x", "item": 2}\n{"user": 1.5, "item": 2}\n', "line 2: user is 1.5"),
    ("a.jsonl", '{"user": [1], "item": 2}\n', r"line 1: user is \[1\]"),
    ("a.jsonl", '{"user": "x", "item": 2}\n{"user": {"a": 1}, "item": 2}\n', "line 2: user is {'a': 1}"),
    ("a.jsonl", '{"user": "\\ud800", "item": 2}\n', r"line 1: user is '\\ud800'"),
    ("a.jsonl", '{"user": 1, "item": 2, "time": NaN}\n', "line 1: .* cannot be parsed"),
    ("a.jsonl", '{"user": 1, "item": 2, "time": true}\n', "line 1: time is True"),
    ("a.jsonl", "[" * 100_000 + "\n", "line 1: .* cannot be parsed"),
    ("a.json", "{'username': 'a', 'product_id': 1}\n", "no time column among 'username', 'product_id'; expected date"),
    ("a.json", "{'username': 'a', 'product_id': 1, 'date': 'May'}\n", "line 1: date is 'May'"),
    ("a.parquet", b"PAR1 and no more", "not readable as parquet"),
    ("a.npz", b"PK and no more", "not an .npz file"),
    ("a.txt", "user,item\n1,2\n", "unknown ending '.txt'; expected .inter"),
    ("a", "user,item\n1,2\n", "unknown ending ''"),
]


@pytest.mark.parametrize(("name", "content", "message"), TEXT_FAULTS)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_interactions(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "; expected" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"user": [1, None], "item": [1, 2], "time": [1, 2]}, "row 2: user is None"),
        ({"user": [1, 2], "item": [1.0, 2.5], "time": [1, 2]}, "row 2: item is 2.5"),
        ({"user": [True, False], "item": [1, 2]}, "row 1: user is True"),
        ({"user": ["a", ""], "item": [1, 2]}, "row 2: user is ''"),
        ({"user": [1, 2], "item": [1, 2], "time": [1.0, float("nan")]}, "row 2: time is nan"),
        ({"user": [1, 2], "item": [1, 2], "time": [float("inf"), 1.0]}, "row 1: time is inf"),
        ({"user": [1, 2], "time": [1, 2]}, "no item column among 'user', 'time'"),
        ({"user": [], "item": []}, "no rows"),
    ],
)
def test_a_bad_parquet_file_is_refused_by_row(tmp_path: Path, values: dict[str, list[object]], message: str) -> None:
    pl.DataFrame(values).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load_interactions(tmp_path / "a.parquet")


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pl.DataFrame({"user": range(999), "item": range(999)}).write_parquet(buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue()[:-100])
    with pytest.raises(DataError, match="not readable as parquet"):
        load_interactions(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": None}, "no array 'offsets' among"),
        ({"offsets": [0, 3, 2, 4]}, "offsets do not ascend from 0 to 4"),
        ({"offsets": [0, 2, 5]}, "offsets do not ascend from 0 to 4"),
        ({"offsets": [1, 2, 4]}, "offsets do not ascend from 0 to 4"),
        ({"offsets": []}, "dtype float64|do not ascend"),
        ({"items": [], "offsets": [0, 0]}, "dtype float64|no interactions"),
        ({"items": [1, 2, 0, 3]}, r"items\[2\] is 0; expected an item from 1 to num_items = 3"),
        ({"items": [1, 2, 4, 3]}, r"items\[2\] is 4"),
        ({"items": [1.0, 2.0, 3.0, 3.0]}, "'items' has dtype float64"),
        ({"items": [[1, 2], [3, 1]]}, "have shapes"),
        ({"num_items": [3]}, "have shapes"),
        ({"items": [{}, 1, 2, 3]}, "'items' is no plain array; expected one that loads without pickle"),
    ],
)
def test_a_bad_npz_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    values = {"items": [1, 2, 3, 1], "offsets": [0, 2, 4], "num_items": 3, **changes}
    np.savez(tmp_path / "a.npz", **{name: np.array(value) for name, value in values.items() if value is not None})
    with pytest.raises(DataError, match=message):
        load_interactions(tmp_path / "a.npz")


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, items=np.arange(1, 2000), offsets=np.array([0, 1999]), num_items=2000)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"\xff" * 40 + whole[240:])
    with pytest.raises(DataError, match="'items' is damaged"):
        load_interactions(path)


def test_missing_file_directory_format_and_columns(tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: load_interactions(tmp_path / "none.csv"), "cannot read the log: No such file or directory"),
        (lambda: load_interactions(tmp_path), "a directory; expected a file"),
        (lambda: load_interactions(path, format="excel"), "unknown format 'excel'; expected auto or one of inter"),
        (lambda: load_interactions(path, columns={"who": "user"}), "column roles who; expected user, item or time"),
        (lambda: load_interactions(path, columns={"user": "who"}), "no user column among .*; expected who"),
        (lambda: load_interactions(path, columns={"time": "when"}), "no time column among .*; expected when"),
        (lambda: load_interactions(path, format="steam", columns={"user": "u"}), "columns were named"),
    ]
    path = table(tmp_path, "user,item\n1,2\n")
    for call, message in calls:
        with pytest.raises(DataError, match=message):
            call()


@pytest.mark.parametrize("format", FORMATS)
def test_nonsense_is_refused_by_every_format(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(np.random.default_rng(0).bytes(3000))
    with pytest.raises(DataError, match=r"a\.bin: "):
        load_interactions(path, format=format)
