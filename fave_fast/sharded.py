"""A catalogue split over the ranks of a `torch.distributed` group: each scans its own items, the lists are merged.

A request is one broadcast (what is asked), one sum of the histories' embeddings, which lie on the ranks that own them,
and one exchange of the local lists, 8 bytes a place. Each rank encodes the histories itself: that is cheaper than to
wait for another's endpoint. Lists are, bit for bit, those of one process with the whole table, wherever the backend
gives an item the same score in any table (triton and cpp do).

On GPUs `warmup` captures all of that but the broadcast as CUDA graphs, NCCL's exchanges included; requests for them go
by shared memory instead where all ranks are on one host (`mailbox.py`). PyTorch's watchdog does not see captured
exchanges, and would end the process for others: each rank waits for its own device, at most `timeout` seconds.

    torchrun --nproc-per-node 4 serve_my_lists.py

    recommender = ShardedRecommender(checkpoints.load("model.pt"), device=f"cuda:{local_rank}")
    if recommender.rank == 0:
        recommender.warmup()
        print(recommender.recommend([["item-17", "item-4"]]))
        recommender.close()
    else:
        recommender.follow()
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from fave_fast.catalogue import Catalogue, History, ItemId
from fave_fast.checkpoint import Checkpoint
from fave_fast.engine import Floats, Ints, Recommender, merge_drawn
from fave_fast.errors import Closed, InputError, RankLost
from fave_fast.graphs import (
    BATCHES,
    CapturedParts,
    CapturedStep,
    Histories,
    OnStep,
    Step,
    StepGraphs,
    end_to_end,
    items_held,
)
from fave_fast.mailbox import Mailbox, Posted
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.encoder import Plan, encode_ids
from fave_fast.ops.registry import why_no_triton
from fave_fast.ops.score_topk import OP as SCORE_TOPK
from fave_fast.ops.score_topk import beyond_kernels
from fave_fast.ops.tiles import Sizes
from fave_fast.ranks import DONE, hear, say

_logger = logging.getLogger(__name__)
_IDLE = timedelta(days=365)  # that a rank waits for a request
_INT31 = (1 << 31) - 1
# Into one tensor; torch 2.13 gave it another name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_FIRST = 512  # words of a request's first message: its header, and as much of its payload as fits
_HEADER = 10
_END, _ASK, _WARM_UP = range(3)  # the first word: what is asked for
_NONE = torch.zeros(0, dtype=torch.int64)
_PASSING_ON = "while a request was passed on"
_WATCHDOG = 3  # times the timeout: PyTorch's watchdog ends the process, so that ours has to be earlier


def even_sizes(items: int, ranks: int) -> list[int]:
    """How many items each rank holds; the first ones hold one more where it does not come out even."""
    return [items // ranks + (rank < items % ranks) for rank in range(ranks)]


@dataclass(frozen=True)
class ShardedTable:
    """The part of the catalogue that this rank holds.

    Attributes:
        rows: [n + 1, D]: the padding, then the embeddings of items `first` to `first + n - 1`.
        first: number of the first item held here.
        items: N, of all ranks together; below 2^31 - 1.
        group: of all ranks.
        timeout: seconds after which a rank that says nothing counts as lost.
        table_bytes: of `rows`, or None.
    """

    rows: Tensor
    first: int
    items: int
    group: dist.ProcessGroup
    timeout: float
    table_bytes: ByteTable | None = None

    def staged(self, ids: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The embeddings of each history's newest items, from whichever ranks hold them. A collective.

        Args:
            ids: int32 or int64 [T], packed histories, oldest first: numbers of the whole catalogue.
            offsets: int32 or int64 [B + 1].
            width: how many of each history.

        Returns:
            [1 + B * width, D]: zeros, then those of each history, the newest first, zeros where it has fewer; and int32
            [T], where each of `ids` is there, 0 where it is older than that.

        Raises:
            RankLost: another rank does not answer.
        """
        kernels = self._kernels
        if kernels is None:
            newest, places = newest_items(ids, offsets, width)
            found = torch.cat((self.rows.new_zeros(1, self.rows.shape[1]), self.rows[self.local(newest)]))
        else:
            found = self.rows.new_empty(1 + (len(offsets) - 1) * width, self.rows.shape[1])
            places = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
            kernels.stage(ids, offsets, _words(self.rows), _words(found), places, first=self.first, width=width)
        # Whole numbers are summed, all but one of them 0, so that every bit arrives, the sign of a zero included.
        self._collective("the histories' embeddings", dist.all_reduce, _words(found[1:]))
        return found, places

    def score_topk(
        self,
        queries: Tensor,
        k: int,
        exclude: Exclusions | None,
        deny: Tensor | None,
        *,
        out: tuple[Tensor, Tensor] | None = None,
        workspace: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """The K best items of the whole catalogue for each query, as `ops.score_topk`. A collective.

        Args:
            queries: [B, D], the same on all ranks.
            k: K.
            exclude: numbers of the whole catalogue that are no candidates, row by row.
            deny: [n + 1] bool for this rank's rows.
            out: as in `ops.score_topk`.
            workspace: of the local scan.
            backend: of the local scan.

        Returns:
            Scores float32 [B, K] and item numbers int64 [B, K] on every rank; -inf and 0 where a list ends early.

        Raises:
            RankLost: another rank does not answer.
            BackendError: the backend cannot run here.
        """
        here = Exclusions(self.local(exclude.ids), exclude.offsets) if exclude is not None else None
        if len(self.rows) > 1:
            scores, ids = score_topk(
                queries, self.rows, k, here, deny,
                workspace=workspace, table_bytes=self.table_bytes, backend=backend,
            )  # fmt: skip
        else:
            scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
            ids = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        kernels = self._kernels
        if kernels is None:
            keys = pack_keys(scores, torch.where(ids > 0, ids + (self.first - 1), 0))
        else:
            keys = torch.empty_like(ids)
            kernels.pack_keys(scores, ids, keys, first=self.first)
        every = keys.new_empty(self.group.size(), *keys.shape)
        self._collective("the lists", _all_gather, every.view(-1, k), keys)
        if kernels is None or len(every) * k > kernels.MOST_MERGED:
            best = unpack_keys(every.transpose(0, 1).flatten(1).topk(k, dim=1).values)
            return best if out is None else (out[0].copy_(best[0]), out[1].copy_(best[1]))
        out = (scores, ids) if out is None else out
        kernels.merge(every, *out)
        return out

    @cached_property
    def _kernels(self) -> Any:
        """The kernels' module where they run, else None."""
        if self.rows.device.type != "cuda" or why_no_triton() is not None or _words(self.rows).dtype != torch.int32:
            return None
        return importlib.import_module("fave_fast.kernels.sharded")

    def settle(self) -> None:
        """Wait for this rank's device, which may wait for another's.

        Raises:
            RankLost: it takes too long.
        """
        if self.rows.device.type != "cuda":
            return
        latest = time.monotonic() + self.timeout
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.rows.device))
        with naming_the_loss("while the lists were made", self.timeout):
            while not done.query():  # type: ignore[no-untyped-call]
                if time.monotonic() > latest:
                    raise TimeoutError("the device waits")
                time.sleep(2e-5)

    def abort(self) -> None:
        """Give up on the other ranks, so that this one's device waits for them no longer."""
        if self.rows.device.type == "cuda":
            # It may itself wait for the device, and nobody for it.
            threading.Thread(target=self.group.abort, daemon=True).start()

    def local(self, ids: Tensor) -> Tensor:
        """Numbers among `rows`; 0 for items of other ranks."""
        if self._kernels is not None and ids.device == self.rows.device:
            out = torch.empty_like(ids)
            self._kernels.local_numbers(ids, out, first=self.first, rows=len(self.rows))
            return out
        local = ids - (self.first - 1)
        return torch.where((local > 0) & (local < len(self.rows)), local, 0)

    def _collective(self, what: str, call: Callable[..., Any], *tensors: Tensor) -> None:
        with naming_the_loss(f"while {what} were exchanged", self.timeout):
            call(*tensors, group=self.group)


def newest_items(ids: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The newest `width` items of each history, int [B * width], 0 where it has fewer, and for each of `ids` its place.

    Places count from 1; 0 where an item is older than that. Shapes depend on nothing but the arguments'.
    """
    ages = torch.arange(width, device=ids.device)
    place = offsets[1:, None] - 1 - ages
    present = place >= offsets[:-1, None]
    newest = torch.where(present, ids[place.clamp_min(0)], 0).flatten()
    numbers = torch.arange(1, len(newest) + 1, dtype=torch.int32, device=ids.device)
    nowhere = torch.where(present, place, len(ids)).flatten().long()
    places = numbers.new_zeros(len(ids) + 1).scatter_(0, nowhere, numbers)
    return newest, places[:-1]


def pack_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """One int64 for a score and an id from 0 to 2^31 - 2, so that the larger key is the better: score, then lower id.

    The lowest bit says that a zero is negative, which must not count in the order and yet arrive.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # -0 + 0 is 0
    ordered = bits ^ ((bits >> 31) & _INT31)  # floats as whole numbers of the same order
    negative_zero = (scores == 0) & scores.signbit()
    return (ordered << 32) | ((_INT31 - ids) << 1) | negative_zero


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 scores and int64 ids of `pack_keys`."""
    ordered = keys >> 32
    scores = (ordered ^ ((ordered >> 31) & _INT31)).int().view(torch.float32)
    scores = torch.where((keys & 1) == 1, -0.0, scores)
    return scores, _INT31 - ((keys & 0xFFFFFFFF) >> 1)


@contextmanager
def naming_the_loss(when: str, timeout: float) -> Iterator[None]:
    """What a collective raises as `RankLost`."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:  # gloo's and NCCL's errors have no class of their own
        reason = str(error).strip().splitlines()[0]
        raise RankLost(
            f"a rank ended, or said nothing for {timeout:g} s, {when}; expected all ranks to live: start all anew "
            f"({reason})"
        ) from error


@dataclass(frozen=True, kw_only=True)
class ShardedStep(Step):
    """`graphs.Step` over a sharded table: every rank calls it with the same arguments and gets the same lists.

    The embedding of its weights' model is staging memory: the rows of one request's items.

    Attributes:
        shard: this rank's part of the catalogue.
        width: how many of a history's newest items are exchanged, at least what the longest one has or the model reads.
    """

    shard: ShardedTable
    width: int
    only_kernels: ClassVar[bool] = False

    @property
    def table(self) -> Tensor:
        """The rows of this rank [n + 1, D]."""
        return self.shard.rows

    def __call__(
        self,
        ids: Tensor,
        offsets: Tensor,
        exclude: Exclusions | None,
        k: int,
        deny: Tensor | None = None,
        *,
        plan: Plan | None = None,
        endpoint: Tensor | None = None,
        out: tuple[Tensor, Tensor] | None = None,
        workspace: Tensor | None = None,
        overlap: bool = False,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores float32 [B, K] and ids int64 [B, K]; a collective, without a wait for the device.

        Args:
            ids: int32 or int64 [T], packed histories, oldest first: numbers of the whole catalogue.
            offsets: int32 or int64 [B + 1].
            exclude: as in `ShardedTable.score_topk`.
            k: K.
            deny: as in `ShardedTable.score_topk`.
            plan: as in `Step`.
            endpoint: as in `Step`.
            out: as in `Step`.
            workspace: as in `Step`.
            overlap: changes nothing: a collective waits for what precedes it.
            on_step: hears nothing: the collectives' waits are nobody's part.

        Raises:
            RankLost: another rank does not answer.
        """
        users = len(offsets) - 1
        plan = plan or self.plan(users)
        if plan is not None:
            plan.refill(offsets)
        # The encoder reads rows by number: here an item's is its place among all that are exchanged, from 1.
        rows, places = self.shard.staged(ids, offsets, self.width)
        self.weights.model.item_embedding.weight = nn.Parameter(rows, requires_grad=False)
        endpoint = encode_ids(
            self.weights, self.path, places, offsets,
            plan=plan, out=endpoint, backend=self.encoder_backend(users),
        )  # fmt: skip
        return self.shard.score_topk(endpoint, k, exclude, deny, out=out, workspace=workspace, backend=self.backend)


class ShardedRecommender(Recommender):
    """`Recommender` over the ranks of the default group, which `torchrun` and `dist.init_process_group` made.

    Every rank makes one. Rank 0 answers, from one thread or several; the others `follow` until rank 0 calls `close`.
    The catalogue is that of the checkpoint: it does not change.

    A rank that ends, or hangs for `timeout` seconds in a request, raises `RankLost` on the others, then and on every
    later call: start all ranks anew. On a GPU the process's current device becomes this rank's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        sizes: Sequence[int] | None = None,
        timeout: float = 10.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        backend: str = "auto",
        table_bytes: bool = False,
    ) -> None:
        """Put this rank's part of the table on `device`; a collective.

        Args:
            checkpoint: the same on all ranks.
            sizes: items of each rank, in the order of their numbers; by default about equally many.
            timeout: seconds, at most, that a rank waits for the others within a request.
            device: of this rank.
            dtype: as in `Recommender`.
            backend: as in `Recommender`.
            table_bytes: as in `Recommender`.

        Raises:
            InputError: sizes that are not one for each rank, or do not add up to the catalogue.
            RankLost: another rank does not come.
        """
        ranks, items = dist.get_world_size(), len(checkpoint.item_ids)
        sizes = even_sizes(items, ranks) if sizes is None else list(sizes)
        if len(sizes) != ranks or min(sizes) < 0 or sum(sizes) != items:
            raise InputError(f"sizes are {sizes}; expected {ranks} from 0 that add up to {items:,} items")
        self.rank, self.timeout = dist.get_rank(), timeout
        self._start = sum(sizes[: self.rank])
        self._size = sizes[self.rank]
        if (place := torch.device(device)).type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # where kernels and NCCL go
        super().__init__(checkpoint, device=device, dtype=dtype, backend=backend, table_bytes=table_bytes)
        self._room = items
        on_time = timedelta(seconds=timeout)
        with naming_the_loss("while the groups were made", timeout):
            self._waiting = _group("gloo", _IDLE)
            self._talking = _group("gloo", on_time)
            exchange = _group("nccl", _WATCHDOG * on_time) if self._on_gpu else self._talking
        self._sharded = ShardedTable(self._table, self._start + 1, items, exchange, timeout, self._bytes)
        self._turn = threading.RLock()
        self._ended: Exception | None = None  # why nothing more can be asked
        self._mailbox: Mailbox | None = None
        self._listeners: list[threading.Thread] = []  # of rank 0, one for each other rank
        self._lost: RuntimeError | None = None  # what a listener heard
        self._coming: tuple[Tensor, dist.Work] | None = None  # a follower's next broadcast, and what waits for it

    def _build(self, checkpoint: Checkpoint) -> FAVE:
        """The network with this rank's rows alone, and without the decoder that only training needs."""
        weights = dict(checkpoint.weights)
        whole = weights.pop("item_embedding.weight")
        model = FAVE(checkpoint.config.model, 1)
        rows = torch.cat((whole[:1], whole[self._start + 1 : self._start + 1 + self._size]))
        model.item_embedding = nn.Embedding(rows.shape[0], rows.shape[1], padding_idx=0, _weight=rows)
        model.history_decoder = None  # type: ignore[assignment]
        kept = {name: weight for name, weight in weights.items() if not name.startswith("history_decoder")}
        model.load_state_dict(kept | {"item_embedding.weight": rows})
        return model

    def follow(self) -> None:
        """Take part in rank 0's requests until it closes.

        Raises:
            RankLost: another rank does not answer.
        """
        if self.rank == 0:
            raise RuntimeError("rank 0 asks; expected follow on the other ranks")
        try:
            while (asked := self._next()) is not None:
                with self._aborting():
                    if isinstance(asked, Posted):
                        self._run(asked)
                    else:
                        self._do(asked)
        finally:
            self._graphs = None  # as in close

    def close(self) -> None:
        """Let the followers go; on rank 0. Again is no error."""
        with self._turn:
            self._graphs = None  # NCCL does not come to an end while a graph holds exchanges of it
            if self.rank == 0 and self._ended is None:
                self._ended = Closed("the recommender is closed; expected a request before that")
                self._broadcast(torch.zeros(_FIRST, dtype=torch.int64), self._waiting)
                for listener in self._listeners:
                    listener.join(self.timeout)

    def warmup(self, k: int = 20, batches: Sequence[int] = BATCHES) -> float:
        """As `Recommender.warmup`, on all ranks at once, when rank 0 calls it; elsewhere nothing."""
        if not self._on_gpu or self.rank != 0:
            return 0.0
        started, k = time.perf_counter(), min(k, self._room)
        reason = self._sharded_step(self.config.flow.seed, 1).why_not_captured(k)
        if reason is not None:
            _logger.info("no CUDA graphs: %s", reason)
            return 0.0
        self._ask(_Asked(_WARM_UP, torch.tensor(batches), _NONE, _NONE, k, False, False, range(0), 0))
        return time.perf_counter() - started

    def add_items(self, ids: Sequence[ItemId], embeddings: Any) -> int:
        """Not to be had: `InputError`."""
        raise InputError("the catalogue of a sharded recommender does not change; expected a new one on all ranks")

    def remove_items(self, ids: Sequence[ItemId]) -> int:
        """Not to be had: `InputError`."""
        return self.add_items(ids, None)

    def swap(self, checkpoint: Checkpoint) -> int:
        """Not to be had: `InputError`."""
        return self.add_items((), None)

    def encode(self, histories: Sequence[History]) -> tuple[Tensor, Exclusions]:
        """Not to be had: `InputError`."""
        raise InputError("a sharded recommender gives lists alone; expected a Recommender for endpoints and embeddings")

    def embeddings(self) -> Tensor:
        """Not to be had: `InputError`."""
        return self.encode(())[0]

    def _deny_bitmap(self, catalogue: Catalogue, deny: Iterable[ItemId] | None) -> Tensor | None:
        """[N + 1], of the whole catalogue, on the CPU."""
        if deny is None:
            return None
        denied = torch.zeros(self._room + 1, dtype=torch.bool)
        denied[torch.from_numpy(catalogue.numbers(list(deny)))] = True
        return denied

    def _best(
        self, histories: Histories, k: int, exclude: bool, denied: Tensor | None, seeds: range
    ) -> tuple[Floats, Ints]:
        k = min(k, self._room)
        with self._turn:
            if self._on_gpu:
                found = self._captured(histories, k, denied, seeds)
                self._count(found)
                if not isinstance(found, str):
                    scores, items = self._ask_captured(found, histories, exclude)
                    return scores[:, :k], items[:, :k]
            numbers = _NONE if denied is None else denied.nonzero().flatten()
            return self._ask(_Asked.for_lists(histories, numbers, k, exclude, denied is not None, seeds, 0))

    def _ask_captured(
        self, found: CapturedStep | CapturedParts, histories: Histories, exclude: bool
    ) -> tuple[Floats, Ints]:
        if isinstance(found, CapturedParts):
            return end_to_end(self._ask_for(Posted(part.batch, part.cut(histories), exclude)) for part in found.parts)
        return self._ask_for(Posted(found.batch, histories, exclude))

    def _ask_for(self, request: Posted) -> tuple[Floats, Ints]:
        """Let all ranks replay a graph, rank 0 among them."""
        if self._mailbox is None:
            k = cast(StepGraphs, self._graphs).k
            return self._ask(
                _Asked.for_lists(request.histories, _NONE, k, request.exclude, False, range(0), request.batch)
            )
        with self._asking():
            self._mailbox.post(request)
            return self._run(request)

    def _ask(self, asked: _Asked) -> tuple[Floats, Ints]:
        """Let all ranks do something, rank 0 among them."""
        with self._turn:
            table = self._sharded.rows
            sizes = Sizes(len(asked.offsets) - 1, table.shape[1], asked.k, len(table) - 1)
            # What a named backend refuses is refused before the other ranks hear of it.
            SCORE_TOPK.resolve(self.backend, table.device, table.dtype, beyond_kernels(sizes, table.device))
            with self._asking():
                first, rest = asked.messages()
                self._broadcast(first, self._waiting)
                if len(rest) > 0:
                    self._broadcast(rest, self._talking)
                return self._do(asked)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A block in which the other ranks are asked: an error in it is the last."""
        if self.rank != 0:
            raise RuntimeError(f"rank {self.rank} was asked; expected rank 0 to be, and the others to follow")
        if self._ended is not None:
            raise self._ended
        try:
            with self._aborting():
                if self._lost is not None:
                    with naming_the_loss("while nothing was asked", self.timeout):
                        raise self._lost
                yield
        except Exception as error:  # whatever it was, the ranks may now be at different places
            self._ended = error
            raise

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        try:
            yield
        except RankLost:
            self._sharded.abort()
            raise

    def _do(self, asked: _Asked) -> tuple[Floats, Ints]:
        """Do the part of this rank."""
        if asked.kind == _WARM_UP:
            self._capture(asked.ids.tolist(), asked.k)
            return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int64)
        if asked.batch > 0:
            histories = Histories(asked.ids.int().numpy(), asked.offsets.numpy())
            return self._run(Posted(asked.batch, histories, asked.exclude))
        return self._answer(asked)

    def _capture(self, batches: list[int], k: int) -> None:
        self._graphs = None  # gives its memory back before the next takes its own
        step = self._sharded_step(self.config.flow.seed, self.config.model.max_length)
        self._graphs = StepGraphs(step, k, batches, self.timeout)
        self._open_mailbox(max(batches))

    def _open_mailbox(self, batch: int) -> None:
        """For requests of up to so many histories; a collective."""
        with naming_the_loss("while shared memory was looked for", self.timeout):
            self._mailbox = Mailbox.open(batch, items_held(batch), self._talking)
        if self._mailbox is not None and self.rank == 0 and not self._listeners:
            others = range(1, dist.get_world_size())
            self._listeners = [threading.Thread(target=self._listen, args=(rank,), daemon=True) for rank in others]
            for listener in self._listeners:
                listener.start()

    def _listen(self, rank: int) -> None:
        """Until that rank says its last word, or ends without: who posts to shared memory would not notice."""
        try:
            hear(rank, self._waiting)
        except RuntimeError as error:
            self._lost = error

    def _run(self, request: Posted) -> tuple[Floats, Ints]:
        graphs = cast(StepGraphs, self._graphs)
        with naming_the_loss("while a captured step ran", self.timeout):
            return graphs.of(request.batch).run(request.histories, request.exclude)

    def _next(self) -> _Asked | Posted | None:
        """What rank 0 asks for next; None at its end."""
        if self._coming is None:
            first = torch.zeros(_FIRST, dtype=torch.int64)
            self._coming = first, self._start_broadcast(first, self._waiting)
        first, work = self._coming
        if self._mailbox is not None:
            posted = self._mailbox.next(until=work.is_completed)
            if posted is not None:
                return posted
        self._coming = None
        self._finish_broadcast(work)
        if int(first[0]) == _END:
            if self._mailbox is not None:
                say(DONE, 0, self._waiting)
            return None
        rest = torch.empty(_Asked.missing(first), dtype=torch.int64)
        if len(rest) > 0:
            self._broadcast(rest, self._talking)
        return _Asked.of(first, rest)

    def _broadcast(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        self._finish_broadcast(self._start_broadcast(tensor, group))

    def _start_broadcast(self, tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
        with naming_the_loss(_PASSING_ON, self.timeout):
            work: dist.Work | None = dist.broadcast(tensor, 0, group=group, async_op=True)
        assert work is not None
        return work

    def _finish_broadcast(self, work: dist.Work) -> None:
        with naming_the_loss(_PASSING_ON, self.timeout):
            # Followers wait as long as nobody asks, which is the group's own time; whoever asks does not.
            work.wait(timedelta(seconds=self.timeout) if self.rank == 0 else _IDLE)

    @torch.no_grad()
    def _answer(self, asked: _Asked) -> tuple[Floats, Ints]:
        """The same lists on every rank."""
        ids, offsets = asked.ids.to(self.device), asked.offsets.to(self.device)
        seen = Exclusions(ids, offsets) if asked.exclude else None
        deny = None
        if asked.deny:
            deny = torch.zeros(self._size + 1, dtype=torch.bool)
            deny[self._sharded.local(asked.denied)] = True
            deny = deny.to(self.device)
        width = min(int(asked.offsets.diff().max()), self.config.model.max_length)
        drawn = [self._sharded_step(seed, width)(ids, offsets, seen, asked.k, deny) for seed in asked.seeds]
        best = drawn[0] if len(drawn) == 1 else merge_drawn(drawn, asked.k)
        self._sharded.settle()
        return best[0].cpu().numpy(), best[1].cpu().numpy()

    def _sharded_step(self, seed: int, width: int) -> ShardedStep:
        step = self._step(seed)
        return ShardedStep(
            step.weights, step.path, step.backend, table_bytes=step.table_bytes, shard=self._sharded, width=width
        )


@dataclass(frozen=True)
class _Asked:
    """What all ranks shall do, as it goes from rank 0 to the others: numbers of the whole catalogue, on the CPU.

    Attributes:
        kind: `_ASK`, or `_WARM_UP`.
        ids: of the histories; for a warm-up the batch sizes.
        offsets: of the histories.
        denied: item numbers that nobody gets.
        k: K.
        exclude: whether a history's own items are left out.
        deny: whether there is a list of denied items.
        seeds: of what is drawn.
        batch: of the captured graph that answers; 0 where none does.
    """

    kind: int
    ids: Tensor
    offsets: Tensor
    denied: Tensor
    k: int
    exclude: bool
    deny: bool
    seeds: range
    batch: int

    @classmethod
    def for_lists(
        cls, histories: Histories, denied: Tensor, k: int, exclude: bool, deny: bool, seeds: range, batch: int
    ) -> _Asked:
        """The lists of histories."""
        ids, offsets = (torch.from_numpy(part).long() for part in histories)
        return cls(_ASK, ids, offsets, denied, k, exclude, deny, seeds, batch)

    def messages(self) -> tuple[Tensor, Tensor]:
        """int64 [`_FIRST`]: lengths and numbers, then the payload's beginning; and the payload's rest."""
        lengths = (len(self.ids), len(self.offsets), len(self.denied))
        numbers = (self.k, self.exclude, self.deny, self.seeds.start, self.seeds.stop, self.batch)
        payload = torch.cat((self.ids, self.offsets, self.denied))
        begun, rest = payload[: _FIRST - _HEADER], payload[_FIRST - _HEADER :]
        first = torch.zeros(_FIRST, dtype=torch.int64)
        first[:_HEADER] = torch.tensor([self.kind, *lengths, *numbers])
        first[_HEADER : _HEADER + len(begun)] = begun
        return first, rest

    @classmethod
    def missing(cls, first: Tensor) -> int:
        """How many words are not in the first message."""
        return max(0, int(first[1:4].sum()) - (_FIRST - _HEADER))

    @classmethod
    def of(cls, first: Tensor, rest: Tensor) -> _Asked:
        """What `messages` made."""
        kind, tokens, bounds, denied, k, exclude, deny, start, end, batch = first[:_HEADER].tolist()
        payload = torch.cat((first[_HEADER:], rest))[: tokens + bounds + denied]
        ids, offsets, numbers = torch.split(payload, [tokens, bounds, denied])
        return cls(kind, ids, offsets, numbers, k, bool(exclude), bool(deny), range(start, end), batch)


def _words(rows: Tensor) -> Tensor:
    """Rows [n, D] as whole numbers [n, ...] in the same memory."""
    return rows.view(torch.int32 if rows.element_size() * rows.shape[1] % 4 == 0 else torch.uint8)


def _group(backend: str, timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group
