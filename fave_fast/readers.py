"""From a file to a table of user, item and timestamp.

Polars reads and checks whole columns. Only where it refuses a file or finds a value it cannot take is the file scanned
again row by row, which either names the faulty line or, where polars was the stricter of the two, gives the table.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl

from fave_fast.errors import DataError

FORMATS = ("inter", "csv", "parquet", "jsonl", "npz", "movielens", "amazon", "steam")
_ENDINGS = {
    ".inter": "inter",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npz": "npz",
    ".data": "movielens",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
# Usual column names; the first that a file has is taken.
_ALIASES: dict[str, tuple[str, ...]] = {
    "user": ("user_id", "user", "userId", "reviewerID", "username", "uid", "visitorid", "session_id"),
    "item": ("item_id", "item", "itemId", "asin", "product_id", "movieId", "itemid", "iid"),
    "time": ("timestamp", "time", "ts", "unixReviewTime", "date", "datetime", "event_time"),
}
_FIXED: dict[str, dict[str, str]] = {
    "movielens": {"user": "user", "item": "item", "time": "timestamp"},
    "amazon": {"user": "reviewerID", "item": "asin", "time": "unixReviewTime"},
    "steam": {"user": "username", "item": "product_id", "time": "date"},
}
_MOVIELENS_FIELDS: tuple[str, ...] = ("user", "item", "rating", "timestamp")
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)

Columns = dict[str, str]  # "user", "item" and, where there is one, "time" to the file's name of the column
Row = tuple[int, tuple[object, ...]]  # line or row from 1; user, item and, where there is one, timestamp


@dataclass(frozen=True)
class Log:
    """A log in the file's order.

    `frame` has `user` and `item`, Int64 if all are whole numbers in canonical form, else String; and, unless the file
    has none, `timestamp`, Int64 or Float64, in seconds since 1970 (UTC) where the file has dates. No nulls.
    """

    frame: pl.DataFrame
    decisions: tuple[str, ...]
    place: Callable[[int], str]  # where the file has row 0, 1, ...: "line 17"
    catalogue: int | None = None  # items are 1..catalogue, whether or not each occurs; None: those that occur


def read_log(path: str | Path, format: str = "auto", columns: Mapping[str, str] | None = None) -> Log:
    """Read an interaction log; text formats also with a further ending .gz.

    Args:
        path: the file.
        format: "inter" (RecBole atomic file: tab-separated, header of name:type), "csv" (tab-separated if the file
            ends in .tsv), "parquet", "jsonl" (one object a line), "npz" (arrays items, offsets, num_items; users are
            1..U and the position is the time), "movielens" (u.data), "amazon" (review JSON lines), "steam" (a Python
            literal a line); or "auto", by the ending, and for JSON by the first line.
        columns: the file's names for "user", "item" and "time" where they are not the usual ones.

    Raises:
        DataError: the file cannot be read as that format; the message names the line and what was expected there.
    """
    path = Path(path)
    if format not in ("auto", *FORMATS):
        raise DataError(f"{path}: unknown format {format!r}; expected auto or one of {', '.join(FORMATS)}")
    _check_readable(path)
    if format == "auto":
        format = _guess(path)
    given = dict(columns or {})
    if unknown := sorted(set(given) - set(_ALIASES)):
        raise DataError(f"{path}: column roles {', '.join(unknown)}; expected user, item or time")
    if given and format not in ("inter", "csv", "parquet", "jsonl"):
        raise DataError(f"{path}: columns were named, but those of the format {format} are fixed; expected none")
    if format == "npz":
        return _read_npz(path)
    if format == "parquet":
        return _read_parquet(path, given)
    if format in ("jsonl", "amazon", "steam"):
        return _read_objects(path, format, _FIXED.get(format, given))
    return _read_table(path, format, _FIXED.get(format, given))


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: a directory; expected a file")
    try:
        with _open(path) as file:
            empty = not file.read(1)
    except _GZIP_ERRORS as error:
        raise DataError(f"{path}: damaged gzip data ({error}); expected a whole .gz file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the log: {error.strerror}; expected a readable file") from None
    if empty:
        raise DataError(f"{path}: the file is empty; expected an interaction log")


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _guess(path: Path) -> str:
    try:
        format = _ENDINGS[_ending(path)]
    except KeyError:
        endings = ", ".join(_ENDINGS)
        raise DataError(f"{path}: unknown ending {_ending(path)!r}; expected {endings} or a format by name") from None
    if format != "jsonl":
        return format
    first = next((line for _, line in _lines(path) if line.strip()), "")
    for parse, name, keys in ((json.loads, "amazon", {"reviewerID", "asin"}), (ast.literal_eval, "steam", set())):
        try:
            value = parse(first)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return name if isinstance(value, dict) and keys <= value.keys() else "jsonl"
    return "jsonl"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their ends.

    Raises:
        DataError: a line that is not UTF-8, or damaged gzip data.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number}: byte {error.start + 1} is not UTF-8; expected UTF-8 text") from None
    except _GZIP_ERRORS as error:
        raise DataError(f"{path}: after line {number}: damaged gzip data ({error}); expected a whole file") from None


def _choose(path: Path, found: Sequence[str], given: Mapping[str, str]) -> Columns:
    """Which of the columns `found` are the user, the item and the time."""
    chosen: Columns = {}
    for role, aliases in _ALIASES.items():
        wanted = (given[role],) if role in given else aliases
        name = next((alias for alias in wanted if alias in found), None)
        if name is not None:
            chosen[role] = name
        elif role in given or role != "time":
            raise DataError(
                f"{path}: no {role} column among {', '.join(map(repr, found))}; expected {' or '.join(wanted)}"
            )
    return chosen


def _ids(column: pl.Series) -> pl.Series | None:
    """Ids as Int64 or String, or None if a row has to be looked at by itself."""
    if column.null_count():
        return None
    if column.dtype.is_float():
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 2.0**63)
        return column.cast(pl.Int64) if whole.all() else None
    if not (column.dtype.is_integer() or column.dtype in (pl.String, pl.Categorical, pl.Enum)):
        return None
    numbers = column.cast(pl.Int64, strict=False) if column.dtype.is_integer() else None
    if numbers is not None and not numbers.null_count():
        return numbers
    texts = column.cast(pl.String)
    numbers = texts.cast(pl.Int64, strict=False)
    if not numbers.null_count() and (numbers.cast(pl.String) == texts).all():
        return numbers
    return None if (texts == "").any() else texts


def _stamps(column: pl.Series) -> pl.Series | None:
    """Timestamps as Int64, or Float64 if any has a fraction, or None if a row has to be looked at by itself."""
    if column.null_count():
        return None
    if column.dtype == pl.String:
        parsed = next((parsed for parsed in _parsed_texts(column) if not parsed.null_count()), None)
        return None if parsed is None else _stamps(parsed)
    if column.dtype in (pl.Date, pl.Datetime):
        micros = column.cast(pl.Datetime("us")).dt.epoch("us")
        return micros // 1_000_000 if (micros % 1_000_000 == 0).all() else micros / 1_000_000
    if column.dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        return None if whole.null_count() else whole
    if not column.dtype.is_float() or not column.is_finite().all():
        return None
    column = column.cast(pl.Float64)
    return column.cast(pl.Int64) if ((column == column.floor()) & (column.abs() < 2.0**63)).all() else column


def _parsed_texts(column: pl.Series) -> Iterator[pl.Series]:
    yield column.cast(pl.Int64, strict=False)
    yield column.cast(pl.Float64, strict=False)
    for form in ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"):
        yield column.str.to_datetime(form, time_unit="us", strict=False)


def _tidy(raw: pl.DataFrame, columns: Columns) -> pl.DataFrame | None:
    """`raw`'s columns as `Log.frame` has them, or None if a row has to be looked at by itself."""
    parts = {"user": _ids(raw[columns["user"]]), "item": _ids(raw[columns["item"]])}
    if "time" in columns:
        parts["timestamp"] = _stamps(raw[columns["time"]])
    whole = {name: part for name, part in parts.items() if part is not None}
    return pl.DataFrame(whole) if len(whole) == len(parts) and raw.height else None


def _scan(path: Path, rows: Iterator[Row], columns: Columns, unit: str) -> pl.DataFrame:
    """The frame from single rows.

    Raises:
        DataError: the first faulty row, by number.
    """
    ids: dict[str, list[str]] = {"user": [], "item": []}
    stamps: list[int | float] = []
    dates: bool | None = None
    number = 0
    for number, values in rows:
        where = f"{path}: {unit} {number}"
        for role, value in zip(ids, values, strict=False):
            ids[role].append(_id_text(value, f"{where}: {columns[role]}"))
        if "time" in columns:
            stamp, dated = _stamp(values[2], f"{where}: {columns['time']}", dates)
            dates = dated
            stamps.append(stamp)
    if not number:
        raise DataError(f"{path}: no rows; expected one {unit} for each interaction")
    raw = pl.DataFrame({columns[role]: pl.Series(texts, dtype=pl.String) for role, texts in ids.items()})
    if "time" in columns:
        kind = pl.Int64 if all(isinstance(stamp, int) for stamp in stamps) else pl.Float64
        raw = raw.with_columns(pl.Series(columns["time"], stamps, dtype=kind))
    frame = _tidy(raw, columns)
    assert frame is not None
    return frame


def _id_text(value: object, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value and not any("\ud800" <= char <= "\udfff" for char in value):
        return value
    raise DataError(f"{where} is {value!r}; expected a whole number or a text that is not empty")


def _stamp(value: object, where: str, dates: bool | None) -> tuple[int | float, bool]:
    """A timestamp as a number, and whether it was a date; `dates` says what the rows before had."""
    kind = {None: "a finite number or an ISO date", False: "a finite number", True: "an ISO date"}[dates]
    expected = kind if dates is None else f"{kind}, as in the rows before"
    stamp = _number(value)
    dated = stamp is None
    if stamp is None:
        stamp = _date_seconds(value)
    if isinstance(stamp, int) and not -(2**63) <= stamp < 2**63:
        stamp = float(str(stamp))
    if stamp is None or not math.isfinite(stamp) or dates not in (None, dated):
        raise DataError(f"{where} is {value!r}; expected {expected}")
    return stamp, dated


def _number(value: object) -> int | float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or "_" in value:
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None


def _date_seconds(value: object) -> int | float | None:
    """Seconds since 1970, a date without a zone taken as UTC; None if `value` is no date."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return None
    moment = value if value.tzinfo else value.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    whole = since.days * 86_400 + since.seconds
    return whole + since.microseconds / 1_000_000 if since.microseconds else whole


def _log(path: Path, frame: pl.DataFrame, rows: Callable[[], Iterator[Row]], unit: str) -> Log:
    decisions = () if "timestamp" in frame.columns else ("no timestamp column: rows taken in the file's order",)
    return Log(frame, decisions, lambda row: f"{unit} {next(itertools.islice(rows(), row, None))[0]}")


def _read_table(path: Path, format: str, given: Mapping[str, str]) -> Log:
    """Delimited text. Fields are quoted in csv only."""
    separator = "," if format == "csv" and _ending(path) != ".tsv" else "\t"
    records = _records(path, separator, quoted=format == "csv")
    names = _MOVIELENS_FIELDS if format == "movielens" else tuple(next(records, (1, []))[1])
    if format == "inter":
        names = tuple(name.split(":")[0] for name in names)
        given = {role: name.split(":")[0] for role, name in given.items()}
    if not names:
        raise DataError(f"{path}: no header; expected column names in the first line")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path}: line 1: column {repeated!r} occurs more than once; expected distinct names")
    columns = _choose(path, names, given)

    def rows() -> Iterator[Row]:
        places = [names.index(name) for name in columns.values()]
        start = 0 if format == "movielens" else 1
        for number, fields in itertools.islice(_records(path, separator, quoted=format == "csv"), start, None):
            if len(fields) != len(names):
                expected = f"{len(names)} fields ({', '.join(names)})"
                raise DataError(f"{path}: line {number}: found {len(fields)} fields; expected {expected}")
            yield number, tuple(fields[place] for place in places)

    frame = _fast_table(path, format, separator, names, columns)
    return _log(path, _scan(path, rows(), columns, "line") if frame is None else frame, rows, "line")


def _records(path: Path, separator: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Fields of each record and the line it begins at; empty lines at the end are left out."""
    blank: list[tuple[int, list[str]]] = []
    for record in _quoted(path, separator) if quoted else ((n, line.split("\t")) for n, line in _lines(path)):
        if record[1] in ([], [""]):
            blank.append((record[0], []))
            continue
        yield from blank
        blank.clear()
        yield record


def _quoted(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line + "\n" for _, line in _lines(path)), delimiter=separator, strict=True)
    begins = 1
    try:
        for fields in reader:
            yield begins, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {begins}: {error}; expected delimited text with closed quotes") from None


def _fast_table(path: Path, format: str, separator: str, names: Sequence[str], columns: Columns) -> pl.DataFrame | None:
    try:
        raw = pl.read_csv(
            _source(path),
            separator=separator,
            quote_char='"' if format == "csv" else None,
            has_header=format != "movielens",
            new_columns=list(names),
            infer_schema=False,
        )
    except (pl.exceptions.PolarsError, *_GZIP_ERRORS):
        return None
    # Polars fills the fields a row lacks with null, as it does an empty field: only the scan can tell them apart.
    if raw.width != len(names) or raw[raw.columns[-1]].null_count():
        return None
    return _tidy(raw, columns)


def _source(path: Path) -> Path | bytes:
    if path.suffix != ".gz":
        return path
    with gzip.open(path) as file:
        return file.read()


def _read_objects(path: Path, format: str, given: Mapping[str, str]) -> Log:
    """One object a line: JSON, or for "steam" a Python literal, which is parsed and never evaluated."""
    parse, kind = (ast.literal_eval, "a Python dict") if format == "steam" else (_json, "a JSON object")
    objects = _objects(path, parse, kind)
    number, first = next(objects, (0, {}))
    if not number:
        raise DataError(f"{path}: no rows; expected {kind} on each line")
    columns = _choose(path, tuple(first), given)

    def rows() -> Iterator[Row]:
        for number, value in _objects(path, parse, kind):
            for name in columns.values():
                if name not in value:
                    keys = ", ".join(map(repr, value))
                    raise DataError(f"{path}: line {number}: no {name!r} among {keys}; expected it on every line")
            yield number, tuple(value[name] for name in columns.values())

    frame = None if format == "steam" else _fast_objects(path, columns)
    return _log(path, _scan(path, rows(), columns, "line") if frame is None else frame, rows, "line")


def _json(text: str) -> object:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _objects(path: Path, parse: Callable[[str], object], kind: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = parse(line.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise DataError(f"{path}: line {number}: {line[:60]!r} cannot be parsed; expected {kind}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number}: found a {type(value).__name__}; expected {kind}")
        yield number, value


def _fast_objects(path: Path, columns: Columns) -> pl.DataFrame | None:
    try:
        raw = pl.read_ndjson(_source(path), infer_schema_length=None)
    except (pl.exceptions.PolarsError, *_GZIP_ERRORS):
        return None
    if not set(columns.values()) <= set(raw.columns):
        return None
    # A column that mixes types comes back as text: what may have been a boolean, a fraction or an object is scanned,
    # and so is what may have been half of a surrogate pair, which polars 2.1 reads as U+0000.
    doubtful = r"^(true|false|[\[{].*|-?[0-9]+[.eE].*)$|[\x{0}\x{fffd}]"
    for column in raw.select(columns.values()):
        if column.dtype == pl.String and column.str.contains(doubtful).any():
            return None
    return _tidy(raw, columns)


def _read_parquet(path: Path, given: Mapping[str, str]) -> Log:
    try:
        columns = _choose(path, tuple(pl.read_parquet_schema(path)), given)
        raw = pl.read_parquet(path, columns=list(columns.values()))
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not readable as parquet ({reason}); expected a whole parquet file") from None

    def rows() -> Iterator[Row]:
        return enumerate(raw.select(columns.values()).iter_rows(), start=1)

    frame = _tidy(raw, columns)
    return _log(path, _scan(path, rows(), columns, "row") if frame is None else frame, rows, "row")


def _read_npz(path: Path) -> Log:
    items, offsets, catalogue = (_npz_array(path, name) for name in ("items", "offsets", "num_items"))
    if items.ndim != 1 or offsets.ndim != 1 or catalogue.ndim != 0:
        shapes = f"{items.shape}, {offsets.shape}, {catalogue.shape}"
        raise DataError(f"{path}: items, offsets, num_items have shapes {shapes}; expected (M,), (U + 1,), ()")
    offsets = offsets.astype(np.int64)
    lengths = offsets[1:] - offsets[:-1]
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(items) or (lengths < 0).any():
        raise DataError(f"{path}: offsets do not ascend from 0 to {len(items)}; expected one start a user and the end")
    if not len(items):
        raise DataError(f"{path}: no interactions; expected at least one")
    wrong = np.flatnonzero((items < 1) | (items > catalogue))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(f"{path}: items[{at}] is {items[at]}; expected an item from 1 to num_items = {catalogue}")
    frame = pl.DataFrame(
        {
            "user": np.repeat(np.arange(1, len(offsets)), lengths),
            "item": items.astype(np.int64),
            "timestamp": np.arange(1, len(items) + 1) - np.repeat(offsets[:-1], lengths),
        }
    )
    decisions = ["no timestamps in an .npz: the position in the user's sequence is the time"]
    if empty := int((lengths == 0).sum()):
        decisions.append(f"{empty} users without any interaction: left out")
    return Log(frame, tuple(decisions), lambda row: f"items[{row}]", int(catalogue))


def _npz_array(path: Path, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an .npz file; expected numpy's zipped arrays items, offsets and num_items")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if name not in arrays:
                raise DataError(f"{path}: no array {name!r} among {', '.join(arrays)}; expected it")
            array: np.ndarray[tuple[int, ...], np.dtype[np.integer]] = arrays[name]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: array {name!r} is damaged ({error}); expected a whole .npz file") from None
    except DataError:
        raise
    except ValueError:
        raise DataError(f"{path}: array {name!r} is no plain array; expected one that loads without pickle") from None
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: array {name!r} has dtype {array.dtype}; expected whole numbers")
    return array
