"""Recommender: histories of original ids in, lists of original ids out, by one forward pass and an exact top-K."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fave_fast import checkpoint as checkpoints
from fave_fast.catalogue import Catalogue, History, ItemId
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config
from fave_fast.errors import InputError
from fave_fast.flow import InferenceNoise
from fave_fast.graphs import BATCHES, CapturedParts, CapturedStep, Histories, OnStep, Step, StepGraphs
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops import Exclusions
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.encoder import OP as ENCODER
from fave_fast.ops.encoder import EncoderWeights, InputPath, encode_ids
from fave_fast.ops.score_topk import OP as SCORE_TOPK
from fave_fast.ops.score_topk_cpu import MAX_K

__all__ = ["ItemId", "Recommendation", "Recommender"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_logger = logging.getLogger(__name__)


class Recommendation(NamedTuple):
    """One user's list, best first. It is shorter than K where fewer items are left to recommend."""

    items: list[ItemId]
    scores: list[float]  # inner products; how often an item was trained on where `popular`
    unknown: int  # items of the history that the catalogue does not hold: skipped
    popular: bool  # no item of the history is known: the most popular items instead
    version: int = 0  # of the catalogue; the list knows no other


class Recommender:
    """A trained model, ready to answer.

    Answers depend on nothing but the history, the options, the seed and the version of the catalogue.

    Several threads may call it. On a GPU `warmup` captures the one step as CUDA graphs; a request of more histories or
    items than one graph holds is answered by several, one after another. Without it, and for requests that no graphs
    answer (`batches` counts them by reason), the same kernels run one by one, with the same bits.

    Attributes:
        batches: on a GPU, how many graphs ran ("captured"), and how many requests ran without, by the reason.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        backend: str = "auto",
        table_bytes: bool = False,
    ) -> None:
        """Put the model on `device` in `dtype` (or its name, fp32 or bf16).

        With `table_bytes` the table is kept in one byte an element, too: large catalogues answer small batches sooner,
        with the same lists (`fave_fast.ops.byte_table`). On a CPU each change of the catalogue then takes the time to
        make the bytes of the whole table.

        Raises:
            InputError: a name that is no dtype of ours.
            BackendError: `backend` was asked for by name and cannot run here, or nothing scans bytes here.
            CheckpointError: weights and configuration do not fit.
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
            dtype = DTYPES[dtype]
        self.checkpoint = checkpoint
        self.config: Config = checkpoint.config
        self.backend = backend
        self._model = self._build(checkpoint).to(device, dtype).eval()
        for op in (SCORE_TOPK, ENCODER):
            op.resolve(backend, self.device, dtype)
        self._on_gpu = self.device.type == "cuda"
        self._room = len(self._table) - 1
        self._catalogue = Catalogue.of(checkpoint.item_ids, checkpoint.popularity.numpy())
        self._by_popularity = _popular_first(self._catalogue)
        self._weights = EncoderWeights.pack(self._model)
        self._bytes = ByteTable.pack(self._table) if table_bytes else None
        self._steps: dict[int, Step] = {}  # by seed
        self._graphs: StepGraphs | None = None
        self._gate = _Gate()
        self._counting = threading.Lock()
        self.batches: Counter[str] = Counter()
        self.on_step: OnStep | None = None  # hears each batch's, on a CPU

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        backend: str = "auto",
        table_bytes: bool = False,
    ) -> Recommender:
        """Load a checkpoint written by `fave_fast.train`.

        Raises:
            CheckpointError: the file is no whole checkpoint of a version that can be read.
            BackendError: `backend` was asked for by name and cannot run here, or nothing scans bytes here.
        """
        return cls(checkpoints.load(path), device=device, dtype=dtype, backend=backend, table_bytes=table_bytes)

    def _build(self, checkpoint: Checkpoint) -> FAVE:
        """The network, on the CPU."""
        return checkpoint.build_model()

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._table.device

    @property
    def fallback_share(self) -> float:
        """Of all lists by `table_bytes`, how many took the whole table's scan after all. Waits for a GPU."""
        return 0.0 if self._bytes is None else self._bytes.fallback_share

    @property
    def catalogue(self) -> Catalogue:
        """The present version of the catalogue."""
        return self._catalogue

    @property
    def _table(self) -> Tensor:
        """[N + 1, D] with N what there is room for; rows without an item are NaN, which no list ever holds."""
        return self._model.item_embedding.weight.detach()

    def warmup(self, k: int = 20, batches: Sequence[int] = BATCHES) -> float:
        """Capture the one step for lists of up to `k` items as CUDA graphs, if this is a GPU with its kernels.

        Returns:
            Seconds that it took; 0 where nothing is captured.
        """
        if not self._on_gpu:
            return 0.0
        started = time.perf_counter()
        with self._gate.alone:
            k, step = min(k, self._room), self._step(self.config.flow.seed)
            reason = step.why_not_captured(k)
            if reason is not None:
                _logger.info("no CUDA graphs: %s", reason)
                return 0.0
            self._graphs = None  # gives its memory back before the next takes its own
            self._graphs = StepGraphs(step, k, batches)
        return time.perf_counter() - started

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
        *,
        batch_size: int = 512,
        n_samples: int | None = None,
        seed: int | None = None,
    ) -> list[Recommendation]:
        """The K best next items of each history.

        Args:
            histories: original item ids, oldest first; only the last L count, all of them are excluded. Arrays of whole
                numbers and lists of ints, or of texts where the ids are texts, are the fastest.
            k: length of the lists, K.
            exclude_history: never recommend an item of the user's own history.
            deny: original ids that nobody gets; unknown ones change nothing.
            batch_size: histories in one forward pass.
            n_samples: endpoints drawn a history, an item's score being its best; more make lists more diverse when
                `flow.lambda_at_inference` is "sample" or rho is small. None: the checkpoint's configuration.
            seed: of whatever is drawn. None: the checkpoint's configuration.

        Raises:
            InputError: k, batch_size or n_samples below 1, or an id that is neither a whole number nor text.
        """
        samples = self.config.flow.n_samples if n_samples is None else n_samples
        for name, value in (("k", k), ("batch_size", batch_size), ("n_samples", samples)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected a whole number of at least 1")
        first = self.config.flow.seed if seed is None else seed
        with self._gate.shared:
            catalogue = self._catalogue
            numbered, unknown = _number(catalogue, histories)
            denied = self._deny_bitmap(catalogue, deny)
            has_items = numbered.offsets[1:] > numbered.offsets[:-1]
            (known,) = has_items.nonzero()
            results: list[Recommendation] = [None] * len(histories)  # type: ignore[list-item]
            for start in range(0, len(known), batch_size):
                rows = known[start : start + batch_size]
                batch = _rows(numbered, rows)
                scores, items = self._best(batch, k, exclude_history, denied, range(first, first + samples))
                best, values = catalogue.ids(np.maximum(items, 1)), scores.tolist()
                if np.count_nonzero(items[:, -1:]) < len(rows):  # a list ends early
                    counts = np.count_nonzero(items, axis=1).tolist()
                    best, values = (
                        [row[:count] for row, count in zip(part, counts, strict=True)] for part in (best, values)
                    )
                missing, version = unknown[rows].tolist(), catalogue.version
                answers = map(Recommendation, best, values, missing, repeat(False), repeat(version))
                for row, answer in zip(rows.tolist(), answers, strict=True):
                    results[row] = answer
            if len(known) < len(histories):
                popular = self._most_popular(catalogue, k, denied)
                for row in np.flatnonzero(~has_items).tolist():
                    results[row] = Recommendation(*popular, int(unknown[row]), True, catalogue.version)
        return results

    def best_items(
        self, ids: npt.NDArray[np.int32], offsets: Ints, k: int = 20, exclude_history: bool = True
    ) -> tuple[Floats, Ints]:
        """`recommend` for callers who keep item numbers: no ids are looked up.

        Args:
            ids: int32 [T], histories end to end, oldest first: numbers from 1 to N (`catalogue.numbers`), unchecked.
            offsets: int64 [B + 1], where each history begins and the last ends; none is empty.
            k: K.
            exclude_history: never recommend an item of the user's own history.

        Returns:
            Scores float32 [B, K] and item numbers int64 [B, K], best first; 0 where a list ends early.

        Raises:
            InputError: k below 1, another dtype, or a history without items.
        """
        if k < 1:
            raise InputError(f"k is {k}; expected a whole number of at least 1")
        if ids.dtype != np.int32 or offsets.dtype != np.int64:
            raise InputError(f"ids are {ids.dtype} and offsets {offsets.dtype}; expected int32 and int64")
        if not _all_hold_items(offsets):
            raise InputError("a history has no items; expected at least one in each")
        with self._gate.shared:
            seed = self.config.flow.seed
            return self._best(Histories(ids, offsets), k, exclude_history, None, range(seed, seed + 1))

    def encode(self, histories: Sequence[History]) -> tuple[Tensor, Exclusions]:
        """Each history's endpoint, for an index elsewhere; where that can leave nothing out, see `fave_fast.sketch`.

        Returns:
            f of eq. (25), [B, D] in the model's dtype on its device, and the histories' known items by number.

        Raises:
            InputError: an id that is neither a whole number nor text, or a history without a known item.
        """
        with self._gate.shared, torch.no_grad():
            numbered, _ = _number(self._catalogue, histories)
            empty = np.flatnonzero(numbered.offsets[1:] == numbered.offsets[:-1]).tolist()
            if empty:
                raise InputError(f"history {empty[0]} has no item of the catalogue; expected at least one in each")
            step = self._step(self.config.flow.seed)
            ids, offsets = (torch.from_numpy(part).to(self.device) for part in numbered)
            backend = step.encoder_backend(len(histories))
            return encode_ids(step.weights, step.path, ids, offsets, backend=backend), Exclusions(ids, offsets)

    def embeddings(self) -> Tensor:
        """[N + 1, D], a copy: row n is item n of `catalogue`, NaN where that is gone; row 0 is the padding."""
        with self._gate.shared:
            return self._table[: len(self._catalogue) + 1].clone()

    def add_items(self, ids: Sequence[ItemId], embeddings: Any) -> int:
        """Take items into the catalogue, or give items that it has other embeddings, between two requests.

        New items were never trained on, so that they come last for a history without a known item. Where the table is
        full it moves to a larger one, and captured graphs are captured again.

        Args:
            ids: original ids.
            embeddings: [len(ids), D] floating point, finite: a tensor or what `torch.as_tensor` takes.

        Returns:
            The catalogue's new version.

        Raises:
            InputError: an id that is no id or stands twice, or embeddings of another shape or that are not finite.
        """
        rows = torch.as_tensor(embeddings).to(self._table)
        expected = (len(ids), self._table.shape[1])
        if rows.shape != expected:
            raise InputError(f"embeddings are {list(rows.shape)}; expected {list(expected)}, one row an item")
        if not bool(rows.isfinite().all()):
            raise InputError("embeddings hold NaN or infinity; expected finite numbers")
        with self._gate.alone:
            catalogue, numbers = self._catalogue.with_items(ids)
            if len(catalogue) > self._room:
                self._grow(len(catalogue))
            self._write(numbers, rows)
            return self._turn_to(catalogue)

    def remove_items(self, ids: Sequence[ItemId]) -> int:
        """Take items out of the catalogue between two requests: no later list holds them, no history knows them.

        Items that only should not be recommended for a while are better denied, and keep their meaning in histories.

        Returns:
            The catalogue's new version.

        Raises:
            InputError: an id that the catalogue does not hold.
        """
        with self._gate.alone:
            catalogue, numbers = self._catalogue.without_items(ids)
            self._write(numbers, self._table.new_full((1, 1), torch.nan))
            return self._turn_to(catalogue)

    def swap(self, checkpoint: Checkpoint) -> int:
        """Serve another checkpoint from the next request on: weights and catalogue at once, into the same memory.

        Captured graphs stay, unless the new catalogue is too large for the table.

        Returns:
            The catalogue's new version.

        Raises:
            InputError: the checkpoint's model is not of the same configuration.
            CheckpointError: its weights and configuration do not fit.
        """
        if (checkpoint.config.model, checkpoint.config.flow) != (self.config.model, self.config.flow):
            raise InputError("the checkpoint has another model or flow configuration; expected the one that is served")
        other = checkpoint.build_model().to(self._table)
        rows = other.item_embedding.weight.detach()
        with self._gate.alone, torch.no_grad():
            if len(rows) > len(self._table):
                self._grow(len(rows) - 1)
            theirs = dict(other.named_parameters())
            for name, weight in self._model.named_parameters():
                if "item_embedding" not in name and "history_decoder" not in name:
                    weight.copy_(theirs[name])
            self._table[: len(rows)] = rows
            self._table[len(rows) :] = torch.nan
            self._refresh_bytes()
            self._weights.refresh()
            for step in self._steps.values():
                step.path.refresh(self._model)
            self.checkpoint, self.config = checkpoint, checkpoint.config
            popularity = checkpoint.popularity.numpy()
            return self._turn_to(Catalogue.of(checkpoint.item_ids, popularity, self._catalogue.version + 1))

    @torch.no_grad()
    def _write(self, numbers: Ints, rows: Tensor) -> None:
        places = torch.from_numpy(numbers).to(self.device)
        self._table[places] = rows
        self._refresh_bytes(places)

    def _turn_to(self, catalogue: Catalogue) -> int:
        if self._on_gpu:
            torch.cuda.current_stream(self.device).synchronize()  # graphs run on a stream of their own
        self._catalogue = catalogue
        self._by_popularity = _popular_first(catalogue)
        return catalogue.version

    def _grow(self, items: int) -> None:
        """Move the table to one with room for `items` and an eighth more."""
        self._room = items + max(1024, items // 8)
        table = self._table.new_full((self._room + 1, self._table.shape[1]), torch.nan)
        table[: len(self._table)] = self._table
        graphs, self._graphs = self._graphs, None
        self._model.item_embedding.weight = nn.Parameter(table, requires_grad=False)
        had_bytes, self._bytes = self._bytes is not None, None
        self._renew_steps()  # nothing of the old table: its memory goes back before the next takes its own
        if had_bytes:
            self._bytes = ByteTable.pack(table)
            self._renew_steps()
        if graphs is not None:
            self._graphs = StepGraphs(self._step(self.config.flow.seed), graphs.k, graphs.batches)

    def _deny_bitmap(self, catalogue: Catalogue, deny: Iterable[ItemId] | None) -> Tensor | None:
        if deny is None:
            return None
        denied = torch.zeros(len(self._table), dtype=torch.bool)
        denied[torch.from_numpy(catalogue.numbers(list(deny)))] = True
        return denied.to(self.device)

    def _step(self, seed: int) -> Step:
        step = self._steps.get(seed)
        if step is None:
            flow = self.config.flow
            path = InputPath.pack(self._model, flow, InferenceNoise.draw(self._model, flow, seed))
            step = Step(self._weights, path, self.backend, self._bytes)
            if seed == flow.seed:  # a caller's own seeds may be many: not kept
                self._steps[seed] = step
        return step

    def _renew_steps(self) -> None:
        """Steps of the table and the bytes that there are now."""
        self._steps = {seed: replace(step, table_bytes=self._bytes) for seed, step in self._steps.items()}

    def _refresh_bytes(self, numbers: Tensor | None = None) -> None:
        """After rows `numbers`, or all, have changed."""
        refreshed = None if self._bytes is None else self._bytes.refreshed(self._table, numbers)
        if refreshed is not self._bytes:  # on a GPU it is the same, in place
            self._bytes = refreshed
            self._renew_steps()

    def _best(
        self, histories: Histories, k: int, exclude: bool, denied: Tensor | None, seeds: range
    ) -> tuple[Floats, Ints]:
        """Scores [B, K] and item numbers [B, K], best first, 0 where a list ends early."""
        k = min(k, self._room)
        if self._on_gpu:
            found = self._captured(histories, k, denied, seeds)
            self._count(found)
            if not isinstance(found, str):
                scores, items = found.run(histories, exclude)
                return (scores, items) if items.shape[1] == k else (scores[:, :k], items[:, :k])
        on_step = None if self._on_gpu else self.on_step
        native = self._step(seeds[0]).native if len(seeds) == 1 and k <= MAX_K else None
        if native is not None:
            lists = native(*histories, k, exclude, denied)
            if on_step is not None:
                on_step(lists.encoder, lists.topk)
            return lists.scores, lists.items
        with torch.no_grad():
            ids, offsets = (torch.from_numpy(part).to(self.device) for part in histories)
            seen = Exclusions(ids, offsets) if exclude else None
            drawn = [self._step(seed)(ids, offsets, seen, k, denied, on_step=on_step) for seed in seeds]
            best = drawn[0] if len(drawn) == 1 else merge_drawn(drawn, k)
        return best[0].cpu().numpy(), best[1].cpu().numpy()

    def _count(self, found: CapturedStep | CapturedParts | str) -> None:
        reason, runs = (found, 1) if isinstance(found, str) else ("captured", found.runs)
        with self._counting:
            self.batches[reason] += runs

    def _captured(
        self, histories: Histories, k: int, denied: Tensor | None, seeds: range
    ) -> CapturedStep | CapturedParts | str:
        """The graph that holds the request, or those that hold its parts, or why none do."""
        if self._graphs is None:
            return "not warmed up"
        if len(seeds) > 1 or seeds[0] != self.config.flow.seed:
            return "samples or a seed of its own"
        if denied is not None:
            return "denied items"
        if k > self._graphs.k:
            return "k above the captured one"
        graphs = self._graphs.fitting(histories) or self._graphs.split(histories)
        return graphs or "more histories or items than captured"

    def _most_popular(self, catalogue: Catalogue, k: int, denied: Tensor | None) -> tuple[list[ItemId], list[float]]:
        order = self._by_popularity
        if denied is not None:
            order = order[~denied.cpu().numpy()[order]]
        order = order[:k]
        return catalogue.ids(order), catalogue.popularity[order].astype(float).tolist()


class _Gate:
    """Requests go through together; a change of the catalogue goes alone, before requests that come after it.

    Attributes:
        shared: `with gate.shared` for a request.
        alone: `with gate.alone` for a change.
        changed: of `lock`, which is taken without it where nobody waits: half a microsecond sooner.
    """

    def __init__(self) -> None:
        self.shared = _Shared(self)
        self.alone = _Alone(self)
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.inside = 0
        self.waiting = 0
        self.closed = False


class _Shared:
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        gate = self._gate
        with gate.lock:
            while gate.closed or gate.waiting:
                gate.changed.wait()
            gate.inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gate = self._gate
        with gate.lock:
            gate.inside -= 1
            if gate.waiting:
                gate.changed.notify_all()


class _Alone:
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        gate = self._gate
        with gate.lock:
            gate.waiting += 1
            try:
                while gate.closed or gate.inside:
                    gate.changed.wait()
                gate.closed = True
            finally:
                gate.waiting -= 1  # an interrupt must not leave the gate waiting

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gate = self._gate
        with gate.lock:
            gate.closed = False
            gate.changed.notify_all()


def _popular_first(catalogue: Catalogue) -> Ints:
    """The numbers of all items, the most popular first, equal ones by number; without what is gone."""
    order = np.argsort(-catalogue.popularity, kind="stable")
    return order[~catalogue.gone[order]]


def _all_hold_items(offsets: Ints) -> bool:
    if len(offsets) == 2:  # as the comparison of arrays takes 1.8 us
        return bool(offsets.item(0) < offsets.item(1))
    return not np.count_nonzero(offsets[1:] <= offsets[:-1])


def _number(catalogue: Catalogue, histories: Sequence[History]) -> tuple[Histories, Ints]:
    """Known items by number, and how many unknown items each history had."""
    try:
        ids, offsets, unknown = catalogue.number(histories)
    except (TypeError, ValueError) as error:
        raise InputError(f"a history holds an id that is neither a whole number nor text: {error}") from None
    return Histories(ids, offsets), unknown


def _rows(histories: Histories, rows: Ints) -> Histories:
    """The histories of ascending `rows`, between which all others are empty."""
    if len(rows) == len(histories.offsets) - 1:
        return histories
    start, end = histories.offsets[rows[0]], histories.offsets[rows[-1] + 1]
    offsets = np.append(histories.offsets[rows], end) - start
    return Histories(histories.ids[start:end], offsets)


def merge_drawn(drawn: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The K best of several lists [B, K], each item with its best score; equal scores by lower item number."""
    scores, items = (torch.cat(part, dim=1) for part in zip(*drawn, strict=True))
    for by_item in (False, True):  # in the end by item, an item's best score first
        order = (items if by_item else scores).sort(dim=1, descending=not by_item, stable=True).indices
        scores, items = scores.gather(1, order), items.gather(1, order)
    repeated = torch.zeros_like(items, dtype=torch.bool)
    repeated[:, 1:] = items[:, 1:] == items[:, :-1]
    scores = scores.masked_fill(repeated, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores, items = scores.gather(1, order), items.gather(1, order)
    return scores, items.masked_fill(scores == -torch.inf, 0)
