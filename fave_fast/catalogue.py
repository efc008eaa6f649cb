"""Which items there are at one time, by number: those of training, those added since, and without those removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fave_fast.data import IdMap, canonical_id
from fave_fast.errors import InputError
from fave_fast.ops.registry import why_no_extension

if TYPE_CHECKING:
    from fave_fast import _C

ItemId = int | str
History = Sequence[ItemId] | npt.NDArray[np.integer]
Ints = npt.NDArray[np.int64]
Items = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """One version of the catalogue; a change makes another.

    Attributes:
        trained: the ids of items 1 to N of the checkpoint.
        names: the ids of the items added since, in the order of their numbers N + 1, N + 2, ...
        added: the same, to look up.
        order: int64, the place in `names` of each id of `added`.
        popularity: int64 [items + 1], how often each was trained on; 0 at the padding and for added items.
        gone: bool [items + 1]: removed, and the padding.
        version: how many changes there were.
    """

    trained: IdMap
    names: tuple[ItemId, ...]
    added: IdMap
    order: Ints
    popularity: Ints
    gone: npt.NDArray[np.bool_]
    version: int

    @classmethod
    def of(cls, trained: IdMap, popularity: Ints, version: int = 0) -> Catalogue:
        """The catalogue of a checkpoint; popularity int64 [N + 1]."""
        gone = np.zeros(len(trained) + 1, dtype=np.bool_)
        gone[0] = True
        return cls(trained, (), IdMap.from_ids([]), np.zeros(0, np.int64), popularity, gone, version)

    def __len__(self) -> int:
        """The highest number given to an item so far."""
        return len(self.gone) - 1

    def numbers_ever(self, ids: Sequence[object] | npt.NDArray[np.integer]) -> Ints:
        """Numbers of `ids`, int64; 0 where no item ever had the id.

        Raises:
            DataError: something that cannot be an id.
        """
        numbers = self.trained.index(ids) + 1
        if self.names:
            missing = np.flatnonzero(numbers == 0)
            places = self.added.index([ids[at] for at in missing.tolist()])
            found = places >= 0
            numbers[missing[found]] = len(self.trained) + 1 + self.order[places[found]]
        return numbers

    def numbers(self, ids: Sequence[object] | npt.NDArray[np.integer]) -> Ints:
        """Numbers of `ids`, int64; 0 where the catalogue does not hold one.

        Raises:
            DataError: something that cannot be an id.
        """
        numbers = self.numbers_ever(ids)
        if self._some_are_gone:
            numbers[self.gone[numbers]] = 0
        return numbers

    @cached_property
    def _some_are_gone(self) -> bool:
        return bool(self.gone[1:].any())

    def number(self, histories: Sequence[History]) -> tuple[Items, Ints, Ints]:
        """Known items by number: int32 [T], end to end; int64 [B + 1], where each history begins and the last ends;
        and int64 [B], how many unknown items each had.

        Lists of ints, and of texts where the ids are texts, are numbered by the extension, of which 64 histories of 50
        items take 33 us where NumPy takes 256 (texts 94 and 3,673). Other histories, and those with an added item, are
        NumPy's.

        Raises:
            DataError: something that cannot be an id.
            TypeError: a history that is no sequence.
        """
        found = None if self._numbering is None else self._numbering.number(histories)
        if found is not None:
            return found
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        unknown = np.zeros(len(histories), dtype=np.int64)
        numbers = self.numbers(_end_to_end(histories))
        if np.count_nonzero(numbers) < len(numbers):
            owners = np.repeat(np.arange(len(histories)), lengths)
            unknown = np.bincount(owners[numbers == 0], minlength=len(histories))
            numbers = numbers[numbers != 0]
            lengths -= unknown
        offsets = np.zeros(len(histories) + 1, dtype=np.int64)
        lengths.cumsum(out=offsets[1:])
        return numbers.astype(np.int32), offsets, unknown

    @cached_property
    def _numbering(self) -> _C.Numbering | None:
        if why_no_extension() is not None:
            return None
        return self.trained.numbering(self.gone[: len(self.trained) + 1], complete=not self.names)

    def ids(self, numbers: npt.NDArray[np.integer]) -> list[Any]:
        """The ids of items `numbers`, in lists of its shape."""
        if not self.names:
            return self.trained.take(numbers - 1)
        known = len(self.trained)
        added = numbers > known
        found = np.empty(numbers.shape, dtype=np.object_)
        found[~added] = self.trained.take(numbers[~added] - 1)
        found[added] = [self.names[number - known - 1] for number in numbers[added].tolist()]
        ids: list[Any] = found.tolist()
        return ids

    def with_items(self, ids: Sequence[ItemId]) -> tuple[Catalogue, Ints]:
        """The next version, which holds `ids` too, and their numbers; an id that had a number gets that one.

        Raises:
            DataError: something that cannot be an id.
            InputError: an id stands twice.
        """
        ids = _each_once(ids)
        numbers = self.numbers_ever(ids)
        new = np.flatnonzero(numbers == 0)
        numbers[new] = len(self) + 1 + np.arange(len(new))
        names = (*self.names, *(ids[at] for at in new.tolist()))
        added = IdMap.from_ids(names)
        order = np.empty(len(names), dtype=np.int64)
        order[added.index(list(names))] = np.arange(len(names))
        popularity = np.concatenate((self.popularity, np.zeros(len(new), np.int64)))
        gone = np.concatenate((self.gone, np.zeros(len(new), np.bool_)))
        gone[numbers] = False
        return replace(
            self, names=names, added=added, order=order, popularity=popularity, gone=gone, version=self.version + 1
        ), numbers

    def without_items(self, ids: Sequence[ItemId]) -> tuple[Catalogue, Ints]:
        """The next version, which lacks `ids`, and their numbers.

        Raises:
            DataError: something that cannot be an id.
            InputError: an id that the catalogue does not hold.
        """
        numbers = self.numbers(ids)
        if (numbers == 0).any():
            raise InputError(f"item {ids[int(np.argmin(numbers))]!r} cannot be removed: the catalogue does not hold it")
        gone = self.gone.copy()
        gone[numbers] = True
        return replace(self, gone=gone, version=self.version + 1), numbers


def _end_to_end(histories: Sequence[History]) -> list[ItemId] | npt.NDArray[np.integer]:
    """All ids of all histories; NumPy's arrays of whole numbers stay arrays."""
    arrays = [one for one in histories if isinstance(one, np.ndarray) and one.dtype.kind in "iu"]
    if arrays and len(arrays) == len(histories):
        return np.concatenate(arrays)
    return list(chain.from_iterable(histories))


def _each_once(ids: Sequence[ItemId]) -> list[ItemId]:
    """`ids` in canonical form."""
    seen: dict[ItemId, None] = {}
    for item in map(canonical_id, ids):
        if item in seen:
            raise InputError(f"item {item!r} stands twice among those to add; expected each once")
        seen[item] = None
    return list(seen)
