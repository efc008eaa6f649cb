"""Everything at once for minutes, every answer checked.

    python -m bench.soak --seconds 600 --device cuda --dtype bf16

Threads ask one `Recommender` directly (1 to 512 histories) and through a `MicroBatcher`, with all kinds of histories
and options, cancellations and ids that are none, while another adds and removes items. Each answer is recomputed in
float64 for the catalogue of its version, in plain PyTorch on the same device, from the weights that the engine holds:

- a score is the inner product of endpoint and item, give or take (2 r + 2^-23 D) |endpoint| |item|: the engine is held
  to twice the endpoint's error of plain PyTorch in its dtype, whose largest, relative, among `CALIBRATION` histories is
  r; the rest bounds the product's sum in float32;
- no item that the list lacks and might hold beats its last by more; a list is short only where nothing is left;
- scores fall, of equal items the lower id comes first (the random checkpoint has twins for that), no item appears
  twice, and none of the history (where asked), denied, removed or unknown;
- a history without a known item gets the most popular, in order, exactly;
- versions never go back; with a backend named on a GPU, the same request gives the same bits in any company.

The first third of the time, at most a minute, warms up. Of the samples of resident host memory and of device memory
after it, the least of the last third is compared with the least of the first: growth beyond `BOUNDS_MIB` fails, as does
any error or a thread that hangs. Exit code 0 or 1; the last line is one JSON object.

On a CPU take fp32: PyTorch's bf16 product there keeps memory for each shape it meets (torch 2.13, `linear` alone, 1,200
random numbers of rows: from 231 to 616 MiB), which counts as growth.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fave_fast import checkpoint as checkpoints
from fave_fast.batching import MicroBatcher, Statistics
from fave_fast.checkpoint import Checkpoint
from fave_fast.cli import resolve_device, whole_number
from fave_fast.config import Config
from fave_fast.data import IdMap
from fave_fast.engine import ItemId, Recommendation, Recommender
from fave_fast.errors import InputError, Overloaded
from fave_fast.flow import InferenceNoise, encode
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops import BACKENDS

ITEMS = 12_101
CALIBRATION = 256
CHANGED = 16  # items of a change of the catalogue
POOL = 512  # items to add, which the checkpoint lacks
REMOVED_SHARE = 0.05  # of the checkpoint's items, which are removed and added again
VERSIONS = 8  # that checks may lag behind
PROBES = 16  # histories that are asked for again and again
LENGTHS = ((0, 0, 0.03), (1, 10, 0.52), (11, 50, 0.3), (51, 200, 0.15))  # from, to, share
BOUNDS_MIB = {"host": 64.0, "allocated": 16.0, "reserved": 64.0, "device": 64.0}
HANG_SECONDS = 120.0

Answers = list[Recommendation]


def random_checkpoint(items: int = ITEMS, seed: int = 0) -> Checkpoint:
    """Random weights with the default configuration; every tenth item has the embedding of the one before it."""
    config = Config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAVE(config.model, items)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    table = weights["item_embedding.weight"]
    table[10::10] = table[9:-1:10][: len(table[10::10])]
    popularity = torch.from_numpy(np.random.default_rng(seed).geometric(0.02, items + 1))
    popularity[0] = 0
    return Checkpoint(
        config=config,
        weights=weights,
        item_ids=IdMap.from_ids(range(5_000_000, 5_000_000 + 3 * items, 3)),
        user_ids=IdMap.from_ids([0]),
        popularity=popularity,
        facts={},
        sample_users=torch.zeros(0, dtype=torch.int64),
        sample_items=torch.zeros(0, dtype=torch.int64),
        sample_offsets=torch.zeros(1, dtype=torch.int64),
    )


@dataclass(frozen=True)
class Ask:
    """One history and what is wanted for it."""

    history: list[ItemId]
    k: int
    exclude_history: bool
    deny: tuple[ItemId, ...]
    probe: int | None = None


@dataclass(frozen=True, eq=False)
class Universe:
    """All items there ever are: those of the checkpoint, then a pool to add from, by number from 1."""

    ids: list[ItemId]
    trained: int  # how many are of the checkpoint
    popularity: np.ndarray  # int64 [U + 1]
    number_of: dict[ItemId, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Universe:
        trained = checkpoint.item_ids.ids
        pool: list[ItemId] = [_new_id(trained, at) for at in range(POOL)]
        popularity = np.concatenate((checkpoint.popularity.numpy(), np.zeros(POOL, dtype=np.int64)))
        ids = [*trained, *pool]
        return cls(ids, len(trained), popularity, {item: number for number, item in enumerate(ids, 1)})


def _new_id(ids: Sequence[ItemId], at: int) -> ItemId:
    last = ids[-1]
    return last + 1 + at if isinstance(last, int) else f"{last}~{at:09d}"


class Catalogue:
    """What one version of the recommender holds; a removed item is as unknown as one that never was."""

    def __init__(
        self, universe: Universe, version: int, present: np.ndarray, original: np.ndarray, table: Tensor
    ) -> None:
        """By number [U + 1]: bool, whether it is there and has the checkpoint's embedding; embeddings on the CPU."""
        self.universe, self.version, self.table = universe, version, table
        self.present, self.original = present, original
        self.ids = [universe.ids[number - 1] for number in np.flatnonzero(present).tolist()]
        order = np.argsort(-universe.popularity, kind="stable")
        self.by_popularity = [universe.ids[number - 1] for number in order[present[order]].tolist()]
        self.absent = torch.from_numpy(~present)
        self.bits: dict[tuple[object, ...], tuple[list[ItemId], list[float]]] = {}

    def number(self, item: ItemId) -> int:
        """0 for an item that is not there."""
        number = self.universe.number_of.get(item, 0)
        return number if self.present[number] else 0

    def numbers(self, items: Sequence[ItemId]) -> list[int]:
        """Of those that are there."""
        return [number for number in map(self.number, items) if number]

    def added(self, version: int, ids: Sequence[ItemId], embeddings: np.ndarray) -> Catalogue:
        numbers = [self.universe.number_of[item] for item in ids]
        present, original, table = self.present.copy(), self.original.copy(), self.table.clone()
        present[numbers], original[numbers] = True, False
        table[numbers] = torch.from_numpy(embeddings).to(table.dtype)
        return Catalogue(self.universe, version, present, original, table)

    def removed(self, version: int, ids: Sequence[ItemId]) -> Catalogue:
        present = self.present.copy()
        present[[self.universe.number_of[item] for item in ids]] = False
        return Catalogue(self.universe, version, present, self.original, self.table)


class Book:
    """The catalogues of all versions that an answer may still come from."""

    def __init__(self, first: Catalogue) -> None:
        self._changed = threading.Condition()
        self._catalogues = {first.version: first}
        self._held: Counter[int] = Counter()
        self.latest = first

    @contextlib.contextmanager
    def holding(self) -> Iterator[int]:
        """Keep all versions from the latest on, which is given, until the answers were checked."""
        with self._changed:
            version = self.latest.version
            self._held[version] += 1
        try:
            yield version
        finally:
            with self._changed:
                self._held[version] -= 1
                self._prune()

    def publish(self, catalogue: Catalogue) -> None:
        with self._changed:
            if catalogue.version <= self.latest.version:
                raise AssertionError(f"version {catalogue.version} came after {self.latest.version}")
            self._catalogues[catalogue.version] = self.latest = catalogue
            self._prune()

    def at(self, version: int) -> Catalogue:
        """The catalogue of a version; a change is in force a moment before it is known here."""
        with self._changed:
            if not self._changed.wait_for(lambda: version in self._catalogues, HANG_SECONDS):
                raise AssertionError(f"an answer is of version {version}, which no change returned")
            return self._catalogues[version]

    def wait_for_room(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self._catalogues) < VERSIONS, seconds)

    def _prune(self) -> None:
        self._held = +self._held
        oldest = min(self._held, default=self.latest.version)
        self._catalogues = {key: value for key, value in self._catalogues.items() if key >= oldest}
        self._changed.notify_all()


class Reference:
    """Checks answers in float64."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, bitwise: bool) -> None:
        self.flow = checkpoint.config.flow
        self.length = checkpoint.config.model.max_length
        self.bitwise = bitwise
        model = checkpoint.build_model().to(device, dtype)
        noise = InferenceNoise.draw(model, self.flow)
        self.device = device
        self.first = model.item_embedding.weight.detach().cpu()
        self._model = copy.deepcopy(model).double()
        self._noise = InferenceNoise(*(getattr(noise, name).double() for name in ("keep", "anchor", "gaussian", "lam")))
        self._version: int | None = None
        self._norms = torch.empty(0)
        self.lock = threading.Lock()
        self._rows = 128 if device.type == "cuda" else 32
        self.error = self._calibrate(model, noise)
        self.slack = 2 * self.error + 2.0**-23 * model.config.d
        self._twins = _twins(self.first, checkpoint.item_ids.ids)

    @torch.no_grad()
    def _calibrate(self, model: FAVE, noise: InferenceNoise) -> float:
        draw = np.random.default_rng(1)
        histories = draw.integers(1, len(self.first), (CALIBRATION, self.length))
        histories[np.arange(self.length) < draw.integers(0, self.length, CALIBRATION)[:, None]] = 0
        errors = []
        for part in np.split(histories, CALIBRATION // 32):
            exact = encode(self._model, self.flow, self._noise, part)
            usual = encode(model, self.flow, noise, part).double()
            errors.append(float(((usual - exact).norm(dim=1) / exact.norm(dim=1)).max()))
        return max(errors)

    def check(self, catalogue: Catalogue, asks: Sequence[Ask], answers: Answers) -> None:
        """Raise AssertionError where an answer is not one that `catalogue` allows."""
        modelled = []
        for ask, answer in zip(asks, answers, strict=True):
            numbers = catalogue.numbers(ask.history)
            _require(answer.unknown == len(ask.history) - len(numbers), "counts unknown items", ask, answer)
            _require(answer.popular == (not numbers), "is the most popular, or not", ask, answer)
            self._check_list(catalogue, ask, answer)
            if numbers:
                modelled.append((ask, answer, numbers))
        for start in range(0, len(modelled), self._rows):
            self._check_scores(catalogue, modelled[start : start + self._rows])

    def _check_list(self, catalogue: Catalogue, ask: Ask, answer: Recommendation) -> None:
        if answer.popular:
            denied = set(ask.deny)
            items = [item for item in catalogue.by_popularity[: ask.k + len(denied)] if item not in denied][: ask.k]
            counts = [float(catalogue.universe.popularity[catalogue.number(item)]) for item in items]
            _require((answer.items, answer.scores) == (items, counts), "is not the most popular", ask, answer)
            return
        places = {item: place for place, item in enumerate(answer.items)}
        _require(len(places) == len(answer.items) == len(answer.scores), "holds an item twice", ask, answer)
        _require(len(places) <= ask.k, "is too long", ask, answer)
        _require(all(map(catalogue.number, places)), "holds an item that is not there", ask, answer)
        left_out = {*ask.deny, *(ask.history if ask.exclude_history else ())}
        _require(not places.keys() & left_out, "holds an item to be left out", ask, answer)
        _require(all(a >= b for a, b in zip(answer.scores, answer.scores[1:], strict=False)), "rises", ask, answer)
        for place, item in enumerate(answer.items):
            if place and answer.scores[place - 1] == answer.scores[place]:
                before = catalogue.number(answer.items[place - 1])
                _require(before < catalogue.number(item), "has equal scores out of order", ask, answer)
            for twin in self._twins.get(item, ()) if catalogue.original[catalogue.number(item)] else ():
                if catalogue.original[catalogue.number(twin)] and twin not in left_out:
                    _require(places.get(twin, ask.k) < place, f"lacks {twin} before {item}", ask, answer)
        if self.bitwise and ask.probe is not None:
            key = (ask.probe, ask.k, ask.exclude_history, ask.deny)
            kept = catalogue.bits.setdefault(key, (answer.items, answer.scores))
            _require(kept == (answer.items, answer.scores), f"has other bits than once before: {kept}", ask, answer)

    @torch.no_grad()
    def _check_scores(self, catalogue: Catalogue, part: Sequence[tuple[Ask, Recommendation, list[int]]]) -> None:
        longest = max(len(answer.items) for _, answer, _ in part)
        history = np.zeros((self._rows, self.length), dtype=np.int64)
        rows = np.zeros((self._rows, max(longest, 1)), dtype=np.int64)
        scores = np.zeros(rows.shape)
        last = np.full(self._rows, np.inf)
        users, left_out = [], []
        for user, (ask, answer, numbers) in enumerate(part):
            recent = numbers[-self.length :]
            history[user, self.length - len(recent) :] = recent
            rows[user, : len(answer.items)] = catalogue.numbers(answer.items)
            scores[user, : len(answer.items)] = answer.scores
            last[user] = answer.scores[-1] if len(answer.items) == ask.k else -np.inf
            without = catalogue.numbers(ask.deny) + (numbers if ask.exclude_history else [])
            left_out += without
            users += [user] * len(without)
        device = self.device
        with self.lock:
            table = self._table(catalogue)
            endpoint = encode(self._model, self.flow, self._noise, history)
            exact = endpoint @ table.T
            slack = self.slack * endpoint.norm(dim=1, keepdim=True) * self._norms
            chosen = torch.from_numpy(rows).to(device)
            wrong = (exact.gather(1, chosen) - torch.from_numpy(scores).to(device)).abs() - slack.gather(1, chosen)
            wrong = wrong.masked_fill_(chosen == 0, -torch.inf).amax(1)
            least = (exact - slack).scatter_(1, chosen, -torch.inf)  # that an item's score in the engine can be
            least.masked_fill_(catalogue.absent.to(device), -torch.inf)
            least[torch.tensor(users, dtype=torch.int64), torch.tensor(left_out, dtype=torch.int64)] = -torch.inf
            better = least.amax(1) - torch.from_numpy(last).to(device)
            off, beaten = torch.stack((wrong, better)).tolist()
        for user, (ask, answer, _) in enumerate(part):
            _require(off[user] <= 0, f"has a score that is off by {off[user]:.3g} more than it may", ask, answer)
            # -inf - -inf where nothing is left is NaN
            lacks = beaten[user] > 0
            _require(not lacks, f"lacks an item that is better by {beaten[user]:.3g} more than it may", ask, answer)

    def _table(self, catalogue: Catalogue) -> Tensor:
        if self._version != catalogue.version:
            self._model.item_embedding.weight = nn.Parameter(
                catalogue.table.to(self.device).double(), requires_grad=False
            )
            self._norms = self._model.item_embedding.weight.norm(dim=1)
            self._version = catalogue.version
        return self._model.item_embedding.weight


def _twins(table: Tensor, ids: Sequence[ItemId]) -> dict[ItemId, list[ItemId]]:
    """For each item the lower ones of the same embedding."""
    groups: dict[bytes, list[ItemId]] = {}
    twins = {}
    for item, row in zip(ids, table[1:].view(torch.uint8).numpy(), strict=True):
        group = groups.setdefault(row.tobytes(), [])
        if group:
            twins[item] = list(group)
        group.append(item)
    return twins


def _require(ok: bool, what: str, ask: Ask, answer: Recommendation) -> None:
    if not ok:
        raise AssertionError(f"a list {what}: {answer} for {ask}")


@dataclass
class Tally:
    """What happened so far, counted by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def add(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, whose first error ends everything."""

        def run() -> None:
            try:
                work()
            except BaseException:
                with self.lock:
                    self.errors.append(traceback.format_exc())
                self.stop.set()

        return run


class Callers:
    """Draws requests, asks them and has the answers checked."""

    def __init__(
        self,
        recommender: Recommender,
        batchers: Sequence[MicroBatcher],
        book: Book,
        reference: Reference,
        tally: Tally,
        largest: int,
    ) -> None:
        self.recommender, self.batchers, self.book, self.reference = recommender, batchers, book, reference
        self.tally, self.largest = tally, largest
        self.removed: deque[ItemId] = deque(maxlen=1000)
        draw = np.random.default_rng(2)
        self.probes = [self._history(draw) for _ in range(PROBES)]

    def work(self, seed: int) -> None:
        draw = np.random.default_rng((3, seed))
        while not self.tally.stop.is_set():
            with self.book.holding() as version:
                asks, answers = self._direct(draw) if draw.random() < 0.5 else self._batched(draw)
                self._check(version, asks, answers)

    def _check(self, least: int, asks: Sequence[Ask], answers: Answers) -> None:
        by_version: dict[int, tuple[list[Ask], Answers]] = {}
        for ask, answer in zip(asks, answers, strict=True):
            if answer.version < least:
                raise AssertionError(
                    f"version {least} was in force before a request; its answer is of {answer.version}"
                )
            found = by_version.setdefault(answer.version, ([], []))
            found[0].append(ask)
            found[1].append(answer)
        for version, (some, theirs) in by_version.items():
            self.reference.check(self.book.at(version), some, theirs)
        self.tally.add(checked=len(answers), popular=sum(answer.popular for answer in answers))

    def _direct(self, draw: np.random.Generator) -> tuple[list[Ask], Answers]:
        first = self._ask(draw, None)
        count = round(self.largest ** draw.random())
        asks = [
            replace(self._ask(draw, first.deny), k=first.k, exclude_history=first.exclude_history) for _ in range(count)
        ]
        histories = [_as_text(ask.history) if draw.random() < 0.05 else ask.history for ask in asks]
        deny = first.deny or None
        answers = self.recommender.recommend(histories, first.k, first.exclude_history, deny)
        self.tally.add(direct_calls=1, direct_answers=len(answers))
        return asks, answers

    def _batched(self, draw: np.random.Generator) -> tuple[list[Ask], Answers]:
        batcher = self.batchers[int(draw.random() < 0.25)]
        deny = tuple(batcher.deny or ())
        asks: list[Ask] = []
        pending: list[tuple[Ask, Future[Recommendation], bool]] = []
        answers: Answers = []
        for _ in range(int(draw.integers(1, 33))):
            ask = self._ask(draw, deny)
            try:
                if draw.random() < 0.2:
                    answers.append(batcher.recommend(ask.history, k=ask.k, exclude_history=ask.exclude_history))
                    asks.append(ask)
                    continue
                bad = draw.random() < 0.02
                history = [*ask.history, 0.5] if bad else ask.history
                future = batcher.submit(history, k=ask.k, exclude_history=ask.exclude_history)  # type: ignore[arg-type]
            except Overloaded:
                self.tally.add(refused=1)
                continue
            if draw.random() < 0.15:
                future.cancel()
            pending.append((ask, future, bad))
        for ask, future, bad in pending:
            try:
                answer = future.result(HANG_SECONDS)
            except CancelledError:
                self.tally.add(cancelled=1)
                continue
            except InputError:
                if not bad:
                    raise
                self.tally.add(bad=1)
                continue
            if bad:
                raise AssertionError(f"an id that is none got an answer: {answer}")
            asks.append(ask)
            answers.append(answer)
        self.tally.add(batched_answers=len(answers))
        return asks, answers

    def _ask(self, draw: np.random.Generator, deny: tuple[ItemId, ...] | None) -> Ask:
        if deny is None:
            kind = draw.random()
            deny = (
                tuple(self.batchers[1].deny or ()) if kind < 0.2 else () if kind < 0.7 else tuple(self._ids(draw, 40))
            )
        k = int(draw.choice((1, 5, 20, 20, 20, 50, 100)))
        exclude = bool(draw.random() < 0.7)
        if draw.random() < 0.2:
            probe = int(draw.integers(PROBES))
            return Ask(self.probes[probe], k, exclude, deny, probe)
        return Ask(self._history(draw), k, exclude, deny)

    def _history(self, draw: np.random.Generator) -> list[ItemId]:
        low, high, _ = LENGTHS[draw.choice(len(LENGTHS), p=[share for _, _, share in LENGTHS])]
        history = self._ids(draw, int(draw.integers(low, high + 1)))
        if len(history) > 1 and draw.random() < 0.3:
            history[len(history) // 2 :] = history[: len(history) - len(history) // 2]
        return history

    def _ids(self, draw: np.random.Generator, count: int) -> list[ItemId]:
        ids = self.book.latest.ids
        found = [ids[at] for at in draw.integers(len(ids), size=count).tolist()]
        removed = list(self.removed)
        for at in np.flatnonzero(draw.random(count) < 0.06).tolist():
            gone = removed and draw.random() < 0.5
            found[at] = removed[int(draw.integers(len(removed)))] if gone else f"never-{draw.integers(10**9)}"
        return found


def _as_text(history: Sequence[ItemId]) -> list[ItemId]:
    return [str(item) for item in history]


def change_catalogue(callers: Callers, every: float) -> None:
    """Add items, give some other embeddings and remove some, `every` so many seconds, again and again the same ones."""
    recommender, book, tally = callers.recommender, callers.book, callers.tally
    draw, universe = np.random.default_rng(4), book.latest.universe
    scale = float(callers.reference.first.float().std())
    old = draw.permutation(universe.trained)[: int(REMOVED_SHARE * universe.trained)]
    moving = [universe.ids[at] for at in (*old.tolist(), *range(universe.trained, len(universe.ids)))]
    while not tally.stop.wait(every):
        if not book.wait_for_room(every):
            continue
        ids = [moving[at] for at in draw.choice(len(moving), min(CHANGED, len(moving)), replace=False).tolist()]
        there = [item for item in ids if book.latest.number(item)]
        if there and draw.random() < 0.5:
            version = recommender.remove_items(there)
            book.publish(book.latest.removed(version, there))
            callers.removed.extend(there)
            tally.add(removed=len(there))
        else:
            embeddings = draw.normal(0, scale, (len(ids), callers.reference.first.shape[1])).astype(np.float32)
            version = recommender.add_items(ids, embeddings)
            book.publish(book.latest.added(version, ids, embeddings))
            tally.add(added=len(ids) - len(there), changed=len(there))
        if recommender.catalogue.version != version:
            raise AssertionError(f"a change returned {version}; the version is {recommender.catalogue.version}")


@dataclass(frozen=True)
class Memory:
    """MiB in use at a time, in seconds from the start."""

    seconds: float
    host: float
    allocated: float = 0.0
    reserved: float = 0.0
    device: float = 0.0

    @classmethod
    def now(cls, started: float, device: torch.device) -> Memory:
        with open("/proc/self/statm") as file:  # noqa: PTH123 (opened every few seconds)
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        values = [resident]
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            values += [torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total - free]
        return cls(round(time.monotonic() - started, 1), *(round(value / 2**20, 1) for value in values))


def growth(series: Sequence[Memory], warm: float) -> dict[str, float]:
    """MiB from the least of the first third of the samples after `warm` seconds to the least of the last third."""
    after = [sample for sample in series if sample.seconds >= warm]
    third = max(1, len(after) // 3)
    if not after:
        return {}
    return {
        name: round(
            min(getattr(sample, name) for sample in after[-third:])
            - min(getattr(sample, name) for sample in after[:third]),
            1,
        )
        for name in BOUNDS_MIB
    }


def first_catalogue(recommender: Recommender, reference: Reference) -> Catalogue:
    """What the recommender holds before any change."""
    universe = Universe.of(recommender.checkpoint)
    table = torch.zeros(len(universe.ids) + 1, reference.first.shape[1], dtype=reference.first.dtype)
    table[: universe.trained + 1] = reference.first
    present = np.arange(len(table)) <= universe.trained
    present[0] = False
    return Catalogue(universe, recommender.catalogue.version, present, present, table)


def soak(
    recommender: Recommender,
    reference: Reference,
    *,
    seconds: float,
    threads: int,
    change_every: float,
    largest: int,
    alone: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run it; what was found, ready for JSON, with "ok".

    Unless `alone`, other processes use the device: how much of its memory is taken is not judged.
    """
    tally, book = Tally(), Book(first_catalogue(recommender, reference))
    deny = [*recommender.checkpoint.item_ids.ids[5:200:7], "never-there"]
    batchers = [MicroBatcher(recommender, max_queue=64 * threads, deny=denied) for denied in (None, deny)]
    callers = Callers(recommender, batchers, book, reference, tally, largest)
    jobs: list[Callable[[], None]] = [lambda seed=seed: callers.work(seed) for seed in range(threads)]  # type: ignore[misc]
    if change_every > 0:
        jobs.append(lambda: change_catalogue(callers, change_every))
    workers = [threading.Thread(target=tally.guarded(job), daemon=True) for job in jobs]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    series = _watch(tally, reference, started, seconds, say)
    elapsed = time.monotonic() - started
    patience = time.monotonic() + HANG_SECONDS
    for worker in workers:
        worker.join(max(0.0, patience - time.monotonic()))
    if any(worker.is_alive() for worker in workers):
        tally.errors.append("a thread hangs; its stack is on stderr")
        faulthandler.dump_traceback(all_threads=True)
    else:
        for batcher in batchers:
            batcher.close()
    return _report(tally, recommender, batchers, series, min(60.0, seconds / 3), elapsed, alone)


def _watch(
    tally: Tally, reference: Reference, started: float, seconds: float, say: Callable[[str], None]
) -> list[Memory]:
    """Sample memory until the time is over or something failed."""
    step, series = max(0.5, seconds / 120), []
    while not tally.stop.wait(min(step, max(0.0, started + seconds - time.monotonic()))):
        with reference.lock:  # between checks
            series.append(Memory.now(started, reference.device))
        if len(series) % 12 == 0:
            say(f"{series[-1]}, {tally.counts['checked']:,} answers")
        if series[-1].seconds >= seconds:
            tally.stop.set()
    return series


def _report(
    tally: Tally,
    recommender: Recommender,
    batchers: Sequence[MicroBatcher],
    series: Sequence[Memory],
    warm: float,
    elapsed: float,
    alone: bool,
) -> dict[str, Any]:
    grown = growth(series, warm)
    if not alone:
        grown.pop("device", None)
    errors = list(tally.errors)
    errors += [f"{name} memory grew by {mib} MiB" for name, mib in grown.items() if mib > BOUNDS_MIB[name]]
    if not tally.counts["checked"]:
        errors.append("nothing was checked")
    return {
        "ok": not errors,
        "errors": errors,
        "seconds": round(elapsed, 1),
        "counts": dict(sorted(tally.counts.items())),
        "answers_per_s": round(tally.counts["checked"] / elapsed),
        "engine_batches": dict(recommender.batches),
        "batchers": [_batcher_report(batcher.statistics) for batcher in batchers],
        "growth_mib": grown,
        "bounds_mib": BOUNDS_MIB,
        "memory_mib": {name: [getattr(sample, name) for sample in series] for name in ("seconds", *BOUNDS_MIB)},
    }


def _batcher_report(found: Statistics) -> dict[str, Any]:
    report = {name: getattr(found, name) for name in ("requests", "batches", "failed", "cancelled", "refused")}
    report |= {"longest_wait_us": round(found.longest_wait_us, 1), "batch_sizes": dict(found.batch_sizes)}
    return report | {"waits_us": dict(found.waits_us)}


def return_freed_memory() -> None:
    """Have the C library give large blocks back when they are freed; its heaps, one a thread, would keep them."""
    with contextlib.suppress(AttributeError, OSError):  # another library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
        mallopt(-8, 2)  # M_ARENA_MAX


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ckpt", metavar="FILE", help=f"none: random weights, {ITEMS:,} items")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=whole_number(1), default=16)
    parser.add_argument("--largest", type=whole_number(1), default=512, help="histories of a direct call, at most")
    parser.add_argument("--change-every", type=float, default=0.25, help="seconds; 0: the catalogue stays")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--beside-others", action="store_true", help="other processes use the device's memory, too")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return_freed_memory()
    device, dtype = resolve_device(arguments.device), DTYPES[arguments.dtype]
    checkpoint = random_checkpoint() if arguments.ckpt is None else checkpoints.load(arguments.ckpt)
    recommender = Recommender(checkpoint, device=device, dtype=dtype, backend=arguments.backend)
    reference = Reference(checkpoint, dtype, device, device.type == "cuda" and arguments.backend != "auto")
    print(f"warm-up {recommender.warmup():.1f} s", flush=True)
    print(f"PyTorch's error in {arguments.dtype}: {reference.error:.2e} of the endpoint", flush=True)
    result = soak(
        recommender,
        reference,
        seconds=arguments.seconds,
        threads=arguments.threads,
        change_every=arguments.change_every,
        largest=arguments.largest,
        alone=not arguments.beside_others,
    )
    for error in result["errors"]:
        print(error, file=sys.stderr)
    print(json.dumps({"dtype": arguments.dtype, "device": str(device), "error": reference.error, **result}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
