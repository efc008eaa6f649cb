"""From a log of interactions to histories, targets and training windows.

A data set is one flat array of item indices, user after user, and where each user begins. Everything else (histories,
windows, exclusions) is a pair of flat positions into it, cut out when a batch needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from fave_fast.config import DataConfig
from fave_fast.errors import CheckpointError, DataError
from fave_fast.readers import Log, read_log

if TYPE_CHECKING:
    from fave_fast import _C

Ints = npt.NDArray[np.int64]
Items = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Times = npt.NDArray[np.int64] | npt.NDArray[np.float64]

_CANONICAL = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
_INT64 = np.iinfo(np.int64)


def canonical_id(raw: object) -> int | str:
    """One id in its canonical form: an int where a whole number within int64 is meant, else text."""
    if isinstance(raw, (float, np.floating)) and float(raw).is_integer():
        raw = int(raw)
    if isinstance(raw, (int, np.integer)) and not isinstance(raw, bool):
        number = int(raw)
        return number if _INT64.min <= number <= _INT64.max else str(number)
    if isinstance(raw, str) and raw:
        if _CANONICAL.fullmatch(raw) and _INT64.min <= int(raw) <= _INT64.max:
            return int(raw)
        return raw
    raise DataError(f"id {raw!r}; expected a whole number or a text that is not empty")


def _canonical_all(raw: Iterable[object]) -> Ints | list[int | str]:
    """`_canonical` of each id; an array, without a Python step per id, where all are plain ints."""
    if isinstance(raw, np.ndarray) and raw.dtype.kind in "iu" and np.can_cast(raw.dtype, np.int64):
        return raw.astype(np.int64)
    values = raw if isinstance(raw, (list, tuple)) else list(raw)
    if set(map(type, values)) <= {int}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    return [canonical_id(value) for value in values]


@dataclass(frozen=True, eq=False)
class IdMap:
    """The original ids of positions 0..n-1, sorted: numbers by value, texts by code point.

    Users are 0..U-1 as they are; item i of 1..N stands at position i - 1 (index 0 is padding). A map holds whole
    numbers if every id is one within int64 written canonically (no leading zero, no plus), else texts. "12", 12 and
    12.0 name the same id; booleans, other floats and anything else are refused with a `DataError`.

    Built by `from_ids` or `from_tensors`; `numbers` is the int64 array or None, `texts` the texts if it is None.
    """

    numbers: Ints | None
    texts: tuple[str, ...] = ()

    @classmethod
    def from_ids(cls, ids: Iterable[object]) -> IdMap:
        """The map of all distinct `ids`, in any order.

        Raises:
            DataError: an id that is neither a whole number nor a text that UTF-8 can hold.
        """
        values = _canonical_all(ids)
        if isinstance(values, np.ndarray):
            return cls(np.unique(values))
        if all(isinstance(value, int) for value in values):
            return cls(np.unique(np.array(values, dtype=np.int64)))
        texts = tuple(sorted({str(value) for value in values}))
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"an id holds {error.object[error.start]!r}; expected text that UTF-8 can hold") from None
        return cls(None, texts)

    def __len__(self) -> int:
        return len(self.texts) if self.numbers is None else len(self.numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IdMap):
            return NotImplemented
        if self.numbers is None or other.numbers is None:
            return self.numbers is other.numbers and self.texts == other.texts
        return np.array_equal(self.numbers, other.numbers)

    __hash__ = None  # type: ignore[assignment]

    @property
    def ids(self) -> list[int | str]:
        """All ids, by position."""
        return self.take(np.arange(len(self)))

    def id_at(self, index: int) -> int | str:
        """The id at a position."""
        return self.texts[index] if self.numbers is None else int(self.numbers[index])

    def take(self, indices: npt.NDArray[np.integer]) -> list[Any]:
        """The ids at `indices`, as Python's own in lists of its shape."""
        found: list[Any] = (self._texts if self.numbers is None else self.numbers)[indices].tolist()
        return found

    def subset(self, indices: Ints) -> IdMap:
        """The map of the ids at ascending `indices`; texts stay texts, so that filters never reorder."""
        if self.numbers is None:
            return IdMap(None, tuple(self.texts[index] for index in indices.tolist()))
        return IdMap(self.numbers[indices])

    @cached_property
    def _texts(self) -> npt.NDArray[np.object_]:
        return np.array(self.texts, dtype=np.object_)

    @cached_property
    def _lookup(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self.texts)}

    def index(self, raw: Sequence[object] | npt.NDArray[np.integer]) -> Ints:
        """Positions of the ids `raw`, int64 [len(raw)]; -1 where the map does not know one.

        Raises:
            DataError: something that cannot be an id.
        """
        values = _canonical_all(raw)
        if self.numbers is None:
            texts = values.tolist() if isinstance(values, np.ndarray) else values
            return np.array([self._lookup.get(str(value), -1) for value in texts], dtype=np.int64)
        if isinstance(values, np.ndarray):
            return self._index_numbers(values)
        known = np.array([isinstance(value, int) for value in values], dtype=np.bool_)
        found = np.full(len(values), -1, dtype=np.int64)
        numbers = [value for value in values if isinstance(value, int)]
        found[known] = self._index_numbers(np.array(numbers, dtype=np.int64))
        return found

    def _index_numbers(self, values: Ints) -> Ints:
        assert self.numbers is not None
        if not len(self.numbers):
            return np.full(len(values), -1, dtype=np.int64)
        if self._positions is not None:
            # 3,200 ids take 15 us, and 180 by search among 12,101. Even a difference that overflows falls outside.
            found: Ints = self._positions.take(values - self.numbers[0] + 1, mode="clip")
            return found
        at = np.minimum(np.searchsorted(self.numbers, values), len(self.numbers) - 1)
        return np.where(self.numbers[at] == values, at, -1)

    @cached_property
    def _positions(self) -> Ints | None:
        """The position of each number from the least to the greatest, -1 between them and at both ends.

        None if they lie far apart.
        """
        assert self.numbers is not None
        span = int(self.numbers[-1]) - int(self.numbers[0]) + 1
        if span > 4 * len(self.numbers):
            return None
        positions = np.full(span + 2, -1, dtype=np.int64)
        positions[self.numbers - self.numbers[0] + 1] = np.arange(len(self.numbers))
        return positions

    def numbering(self, gone: Mask, *, complete: bool) -> _C.Numbering:
        """Numbers histories in C++.

        Args:
            gone: [n + 1], whether item number i, whose id is at position i - 1, is gone.
            complete: there are no other items.
        """
        from fave_fast import _C

        if self.numbers is None:
            return _C.Numbering(ids=None, positions=None, texts=self._lookup, gone=gone, complete=complete)
        positions = self._positions if len(self.numbers) else None
        return _C.Numbering(ids=self.numbers, positions=positions, texts=None, gone=gone, complete=complete)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """{"ints": int64 [n]}, or {"utf8": uint8 [bytes], "offsets": int64 [n + 1]}."""
        if self.numbers is not None:
            return {"ints": torch.from_numpy(self.numbers.copy())}
        encoded = [text.encode() for text in self.texts]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        utf8 = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
        return {"utf8": torch.from_numpy(utf8), "offsets": torch.from_numpy(_offsets(lengths))}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> IdMap:
        """The map that `to_tensors` wrote.

        Raises:
            CheckpointError: other keys, dtypes or shapes, bad offsets, bytes that are no UTF-8, or ids out of order.
        """
        kinds = {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()}
        if kinds == {"ints": (torch.int64, 1)}:
            numbers = tensors["ints"].cpu().numpy().copy()
            if np.any(numbers[1:] <= numbers[:-1]):
                raise CheckpointError("id map: the ids do not ascend")
            return cls(numbers)
        if kinds != {"utf8": (torch.uint8, 1), "offsets": (torch.int64, 1)}:
            raise CheckpointError(f"id map: found {kinds}; expected ints, or utf8 and offsets, one-dimensional")
        buffer = tensors["utf8"].cpu().numpy().tobytes()
        offsets = tensors["offsets"].cpu().numpy()
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(buffer) or np.any(offsets[1:] <= offsets[:-1]):
            raise CheckpointError(f"id map: the offsets do not ascend from 0 to {len(buffer)}, the number of bytes")
        bounds = offsets.tolist()
        try:
            texts = tuple(buffer[a:b].decode() for a, b in pairwise(bounds))
        except UnicodeDecodeError:
            raise CheckpointError("id map: an id is not UTF-8") from None
        if any(a >= b for a, b in pairwise(texts)):
            raise CheckpointError("id map: the ids do not ascend")
        return cls(None, texts)


@dataclass(frozen=True, eq=False)
class Interactions:
    """A data set: item indices, user after user, each user's in time order.

    4 bytes an interaction for the item, 8 more while times are kept (only the global-time split needs them), and 8 a
    user for the offsets, ids aside: 100 M interactions of 1 M users take 0.41 GB, 1.21 GB with times. Training windows
    cost nothing until an epoch's order is drawn.
    """

    items: Items  # [M], 1..N
    offsets: Ints  # [U + 1]; user u owns items[offsets[u]:offsets[u + 1]]
    item_ids: IdMap  # item i is at position i - 1
    user_ids: IdMap
    times: Times | None  # [M]; seconds since 1970 where the log has dates, else the log's own numbers
    name: str  # the file's stem
    decisions: tuple[str, ...]  # what was done to the log and how often, in words

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """N, the size of the catalogue."""
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        """M."""
        return len(self.items)

    def history(self, user: int) -> Items:
        """All items of a user, a view."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def load_interactions(
    path: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    min_count: int = 0,
    drop_repeats: bool = False,
    keep_times: bool = False,
) -> Interactions:
    """Read a log, sort it by user and time, filter it, and number its users and items.

    Rows that share user and time keep the file's order. Repeats are dropped before the k-core is taken.

    Args:
        path: the log; see `readers.read_log` for formats and `columns`.
        format: one of `readers.FORMATS`, or "auto".
        columns: names of the "user", "item" and "time" columns where they are not the usual ones.
        min_count: iterative k-core; 0 and 1 keep all.
        drop_repeats: keep only the first time a user meets an item.
        keep_times: keep the timestamps, which `split` needs for "global-time".

    Raises:
        DataError: the log cannot be read, has no timestamps though `keep_times` asks for them, or nothing is left.
    """
    path = Path(path)
    log = read_log(path, format, columns)
    if keep_times and "timestamp" not in log.frame.columns:
        raise DataError(f"{path}: the log has no timestamp column; expected one, as the global-time split is by time")
    data = _number(log, (path.with_suffix("") if path.suffix == ".gz" else path).stem)
    data = _filtered(data if keep_times else replace(data, times=None), drop_repeats, min_count)
    if not data.num_interactions:
        raise DataError(f"{path}: the {min_count}-core is empty; expected a smaller min_count or a larger log")
    return data


def _offsets(lengths: npt.NDArray[np.integer] | Mask) -> Ints:
    """0 and the running sums of `lengths`."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _owners(offsets: Ints) -> Items:
    """The user of each position, int32 [M]."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))


def _codes(column: pl.Series) -> tuple[IdMap, pl.Series]:
    """The map of a column's ids and each row's position in it."""
    unique = column.unique().sort()
    if column.dtype == pl.String:
        return IdMap(None, tuple(unique)), column.cast(pl.Enum(unique)).to_physical().cast(pl.Int32)
    ids = IdMap(unique.to_numpy())
    return ids, pl.Series(ids.index(column.to_numpy()), dtype=pl.Int32)


def _number(log: Log, name: str) -> Interactions:
    """The log with ids numbered and rows sorted, the file's order deciding ties."""
    user_ids, users = _codes(log.frame["user"])
    if log.catalogue is None:
        item_ids, items = _codes(log.frame["item"])
    else:
        item_ids = IdMap(np.arange(1, log.catalogue + 1))
        items = (log.frame["item"] - 1).cast(pl.Int32)
    rows = pl.DataFrame({"user": users, "item": items + 1}).with_row_index("row")
    decisions = list(log.decisions)
    if "timestamp" in log.frame.columns:
        rows = rows.with_columns(log.frame["timestamp"])
        late = rows.select((pl.col("timestamp") < pl.col("timestamp").shift(1).over("user")).arg_true()).to_series()
        if len(late):
            first = log.place(late[0])
            decisions.append(f"{len(late)} rows are earlier than the same user's row before (first: {first}): sorted")
        rows = rows.sort("user", "timestamp", maintain_order=True)
        decisions += _ties(rows, log)
    else:
        rows = rows.sort("user", maintain_order=True)
    lengths = np.bincount(rows["user"].to_numpy(), minlength=len(user_ids))
    return Interactions(
        items=rows["item"].to_numpy(),
        offsets=_offsets(lengths),
        item_ids=item_ids,
        user_ids=user_ids,
        times=rows["timestamp"].to_numpy() if "timestamp" in rows.columns else None,
        name=name,
        decisions=tuple(decisions),
    )


def _ties(rows: pl.DataFrame, log: Log) -> list[str]:
    """Decisions on sorted rows that share user and timestamp, and on exact duplicates among them."""
    same = (pl.col("user") == pl.col("user").shift(1)) & (pl.col("timestamp") == pl.col("timestamp").shift(1))
    ties = rows.filter(same)["row"]
    if not len(ties):
        return []
    first = log.place(int(ties.min()))  # type: ignore[arg-type]
    words = [
        f"{len(ties)} rows share user and timestamp with the row before (first: {first}): kept in the file's order"
    ]
    again = rows.filter(~pl.struct("user", "item", "timestamp").is_first_distinct())["row"]
    if len(again):
        first = log.place(int(again.min()))  # type: ignore[arg-type]
        words.append(f"{len(again)} rows repeat an earlier row's user, item and timestamp (first: {first}): kept")
    return words


def _filtered(data: Interactions, without_repeats: bool, min_count: int) -> Interactions:
    if without_repeats:
        keep = drop_repeats(data.items, data.offsets)
        count = data.num_interactions - int(keep.sum())
        data = _keep(data, keep)
        data = _decide(data, f"{count} repeats of an item by the same user dropped, the first of each kept")
    if min_count > 1:
        before = data
        data = _keep(data, k_core(data.items, data.offsets, min_count))
        used = np.bincount(data.items, minlength=data.num_items + 1)[1:] > 0
        numbers = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
        data = replace(data, items=numbers[data.items], item_ids=data.item_ids.subset(np.flatnonzero(used)))
        users, items, rows = (
            getattr(before, what) - getattr(data, what) for what in ("num_users", "num_items", "num_interactions")
        )
        data = _decide(data, f"{min_count}-core: {users} users, {items} items and {rows} interactions removed")
    return data


def _decide(data: Interactions, decision: str) -> Interactions:
    return replace(data, decisions=(*data.decisions, decision))


def _keep(data: Interactions, keep: Mask) -> Interactions:
    """The interactions where `keep` is true, and the users who have any; the catalogue stays."""
    lengths = np.bincount(_owners(data.offsets)[keep], minlength=data.num_users)
    return replace(
        data,
        items=data.items[keep],
        offsets=_offsets(lengths[lengths > 0]),
        user_ids=data.user_ids.subset(np.flatnonzero(lengths)),
        times=None if data.times is None else data.times[keep],
    )


def drop_repeats(items: Items, offsets: Ints) -> Mask:
    """True [M] where a user meets an item for the first time."""
    keys = _owners(offsets).astype(np.int64) * (int(items.max(initial=0)) + 1) + items
    order = np.argsort(keys, kind="stable")
    first = np.ones(len(items), dtype=np.bool_)
    first[order[1:]] = np.diff(keys[order]) > 0
    return first


def k_core(items: Items, offsets: Ints, min_count: int) -> Mask:
    """True [M] for the largest part in which every user and every item has at least `min_count` interactions."""
    kept = np.arange(len(items))
    users = _owners(offsets)
    while True:
        enough = np.bincount(users)[users] >= min_count
        enough &= np.bincount(items)[items] >= min_count
        if enough.all():
            break
        kept, users, items = kept[enough], users[enough], items[enough]
    mask = np.zeros(int(offsets[-1]), dtype=np.bool_)
    mask[kept] = True
    return mask


@dataclass(frozen=True)
class Split:
    """Which interactions are trained on and which are targets, as flat positions into `Interactions.items`."""

    train_end: Ints  # [U]; user u's training part is items[offsets[u]:train_end[u]]
    val: Ints  # [V] positions of validation targets, ascending; a target's history is items[offsets[u]:position]
    test: Ints  # [T] likewise
    description: str  # the protocol in words
    decisions: tuple[str, ...]  # counted, in words


def split(data: Interactions, config: DataConfig) -> Split:
    """Training parts and targets by `config.split`.

    leave-one-out: a user's last interaction is the test target, the second last the validation target, the rest is the
    training part; users with fewer than 3 interactions have no targets and are trained on whole.

    global-time: two cut-offs at quantiles of the timestamps; an interaction at a cut-off falls after it, so that equal
    stamps stay together. The training part lies before the first; a user's first interaction from the first cut-off up
    to the second is the validation target, the first one from the second on the test target, each only if anything of
    the user's comes before it.

    Raises:
        DataError: the global-time split without times, or a split that leaves no training window or no targets.
    """
    result = _leave_one_out(data) if config.split == "leave-one-out" else _global_time(data, config)
    windows = len(Windows(data.offsets, result.train_end))
    for count, what in ((windows, "training windows"), (len(result.val), "validation targets")):
        _some(count, what, data, result)
    _some(len(result.test), "test targets", data, result)
    unseen = int((training_popularity(data, result)[1:] == 0).sum())
    words = f"{unseen} of {data.num_items} items never seen in training: they stay candidates"
    return replace(result, decisions=(*result.decisions, words)) if unseen else result


def _some(count: int, what: str, data: Interactions, result: Split) -> None:
    if not count:
        raise DataError(
            f"{data.name}: the split leaves no {what} ({result.description}); found {data.num_users} users with "
            f"{data.num_interactions} interactions, expected longer histories"
        )


def _leave_one_out(data: Interactions) -> Split:
    ends = data.offsets[1:]
    long = np.diff(data.offsets) >= 3
    short = data.num_users - int(long.sum())
    return Split(
        train_end=np.where(long, ends - 2, ends),
        val=ends[long] - 2,
        test=ends[long] - 1,
        description="leave-one-out: last item test, second last validation, rest training",
        decisions=(f"{short} users with fewer than 3 interactions: no targets, trained on whole",) if short else (),
    )


def _global_time(data: Interactions, config: DataConfig) -> Split:
    if data.times is None:
        raise DataError(f"{data.name}: no timestamps were kept; expected them, as the global-time split is by time")
    total = data.num_interactions
    after = [
        max(round(total * share), 1) for share in (config.val_fraction + config.test_fraction, config.test_fraction)
    ]
    at = [max(total - count, 0) for count in after]
    first, second = np.partition(data.times, at)[at]
    train_end = data.offsets[:-1] + _count_before(data, first)
    val_end = data.offsets[:-1] + _count_before(data, second)
    val = train_end[(train_end > data.offsets[:-1]) & (train_end < val_end)]
    test = val_end[(val_end > data.offsets[:-1]) & (val_end < data.offsets[1:])]
    decisions = tuple(
        f"{data.num_users - len(targets)} of {data.num_users} users without a {what} target"
        for what, targets in (("validation", val), ("test", test))
        if len(targets) < data.num_users
    )
    words = (
        f"global-time: training before {first}, validation target the user's first item from {first} up to {second}, "
        f"test target the first from {second} on"
    )
    return Split(train_end, val, test, words, decisions)


def _count_before(data: Interactions, cut: np.int64 | np.float64) -> Ints:
    """How many of each user's interactions are earlier than `cut`, int64 [U]."""
    assert data.times is not None
    before: Ints = np.diff(_offsets(data.times < cut)[data.offsets])
    return before


class Windows:
    """All training samples: every position of a training part that has something before it is a target.

    Samples are numbered 0..len-1, user after user, and looked up by number: O(log U) each, nothing stored but a count
    per user.
    """

    def __init__(self, offsets: Ints, train_end: Ints) -> None:
        self._starts = offsets[:-1]
        self._numbers = _offsets(np.maximum(train_end - self._starts - 1, 0))

    def __len__(self) -> int:
        return int(self._numbers[-1])

    def positions(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Flat start of the user's sequence and flat position of the target, int64 [B] each.

        The history of a sample is items[start:target].
        """
        users = np.searchsorted(self._numbers, numbers, side="right") - 1
        starts = self._starts[users]
        return starts, starts + 1 + numbers - self._numbers[users]


def gather_histories(items: Items, starts: Ints, ends: Ints, max_length: int) -> Ints:
    """The last `max_length` items of items[start:end] for each row, left-padded with 0.

    Returns:
        int64 [B, L'] with L' the longest of the batch after the cut, at least 1.
    """
    lengths = np.minimum(ends - starts, max_length)
    width = max(int(lengths.max(initial=0)), 1)
    positions = ends[:, None] + np.arange(-width, 0)
    real = positions >= starts[:, None]
    histories = np.zeros(real.shape, dtype=np.int64)
    histories[real] = items[positions[real]]
    return histories


def history_exclusions(items: Items, starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """The whole of items[start:end] for each row, end to end: int64 ids, and int64 [B + 1] where each row begins."""
    lengths = ends - starts
    offsets = _offsets(lengths)
    positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return items[positions].astype(np.int64), offsets


def training_popularity(data: Interactions, split: Split) -> Ints:
    """How often each item occurs in the training parts, int64 [N + 1]; 0 at the padding."""
    inside = np.arange(data.num_interactions) < np.repeat(split.train_end, np.diff(data.offsets))
    return np.bincount(data.items[inside], minlength=data.num_items + 1)
