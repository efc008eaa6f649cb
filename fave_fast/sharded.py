"""A catalogue split over the ranks of a `torch.distributed` group: each scans its own items, the lists are merged.

A request is one broadcast (what is asked), one sum of the histories' embeddings, which lie on the ranks that own them,
and one exchange of the local lists, 8 bytes a place. Each rank encodes the histories itself: that is cheaper than to
wait for another's endpoint. Lists are, bit for bit, those of one process with the whole table, wherever the backend
gives an item the same score in any table (triton and cpp do).

    torchrun --nproc-per-node 4 serve_my_lists.py

    recommender = ShardedRecommender(checkpoints.load("model.pt"), device=f"cuda:{local_rank}")
    if recommender.rank == 0:
        print(recommender.recommend([["item-17", "item-4"]]))
        recommender.close()
    else:
        recommender.follow()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fave_fast.catalogue import Catalogue, ItemId
from fave_fast.checkpoint import Checkpoint
from fave_fast.engine import Floats, Ints, Recommender, merge_drawn
from fave_fast.errors import Closed, InputError, RankLost
from fave_fast.graphs import Histories
from fave_fast.model import FAVE
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.encoder import EncoderWeights, InputPath, encode_ids
from fave_fast.ops.score_topk import OP as SCORE_TOPK
from fave_fast.ops.score_topk import beyond_kernels

_IDLE = timedelta(days=365)  # that a rank waits for a request
_INT31 = (1 << 31) - 1
_HEADER = 8  # words: of a request, its `Asked` as numbers; all 0 at the end


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
    """

    rows: Tensor
    first: int
    items: int
    group: dist.ProcessGroup
    timeout: float

    def embeddings(self, ids: Tensor) -> Tensor:
        """The embeddings [T, D] of items `ids` [T], from whichever ranks hold them; zeros for 0. A collective.

        Raises:
            RankLost: another rank does not answer.
        """
        found = self.rows[self.local(ids)]
        # Whole numbers are summed, all but one of them 0, so that every bit arrives, the sign of a zero included.
        words = found.view(torch.int32 if found.element_size() * found.shape[1] % 4 == 0 else torch.uint8)
        self._collective("the histories' embeddings", dist.all_reduce, words)
        return found

    def score_topk(
        self, queries: Tensor, k: int, exclude: Exclusions | None, deny: Tensor | None, *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The K best items of the whole catalogue for each query, as `ops.score_topk`. A collective.

        Args:
            queries: [B, D], the same on all ranks.
            k: K.
            exclude: numbers of the whole catalogue that are no candidates, row by row.
            deny: [n + 1] bool for this rank's rows.
            backend: of the local scan.

        Returns:
            Scores float32 [B, K] and item numbers int64 [B, K] on every rank; -inf and 0 where a list ends early.

        Raises:
            RankLost: another rank does not answer.
            BackendError: the backend cannot run here.
        """
        here = Exclusions(self.local(exclude.ids), exclude.offsets) if exclude is not None else None
        if len(self.rows) > 1:
            scores, ids = score_topk(queries, self.rows, k, here, deny, backend=backend)
        else:
            scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
            ids = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        keys = pack_keys(scores, torch.where(ids > 0, ids + (self.first - 1), 0))
        every = keys.new_empty(self.group.size(), *keys.shape)
        self._collective("the lists", dist.all_gather, list(every), keys)
        best = every.transpose(0, 1).flatten(1).topk(k, dim=1).values
        return unpack_keys(best)

    def local(self, ids: Tensor) -> Tensor:
        """Numbers among `rows`; 0 for items of other ranks."""
        local = ids - (self.first - 1)
        return torch.where((local > 0) & (local < len(self.rows)), local, 0)

    def _collective(self, what: str, call: Callable[..., Any], *tensors: Tensor | list[Tensor]) -> None:
        with naming_the_loss(f"while {what} were exchanged", self.timeout):
            call(*tensors, group=self.group)


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
    except RuntimeError as error:  # gloo's and NCCL's errors have no class of their own
        reason = str(error).strip().splitlines()[0]
        raise RankLost(
            f"a rank ended, or said nothing for {timeout:g} s, {when}; expected all ranks to live: start all anew "
            f"({reason})"
        ) from error


@dataclass(frozen=True)
class ShardedStep:
    """`graphs.Step` over a sharded table: every rank calls it with the same arguments and gets the same lists.

    Attributes:
        weights: of a model whose embedding is this step's staging memory: the rows of one request's tokens.
        path: as in `Step`.
        table: this rank's part of the catalogue.
        backend: of encoder and scan.
    """

    weights: EncoderWeights
    path: InputPath
    table: ShardedTable
    backend: str

    def __call__(
        self, ids: Tensor, offsets: Tensor, exclude: Exclusions | None, k: int, deny: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores float32 [B, K] and ids int64 [B, K]; a collective.

        Args:
            ids: int32 or int64 [T], packed histories, oldest first: numbers of the whole catalogue.
            offsets: int64 [B + 1].
            exclude: as in `ShardedTable.score_topk`.
            k: K.
            deny: as in `ShardedTable.score_topk`.

        Raises:
            RankLost: another rank does not answer.
        """
        ids, offsets = _newest(ids, offsets, self.weights.model.config.max_length)
        rows = self.table.embeddings(ids)
        # The encoder reads rows by number: here token t is item t + 1 of a table of tokens.
        staged = torch.cat((rows.new_zeros(1, rows.shape[1]), rows))
        self.weights.model.item_embedding.weight = nn.Parameter(staged, requires_grad=False)
        tokens = torch.arange(1, len(ids) + 1, dtype=torch.int32, device=ids.device)
        endpoint = encode_ids(self.weights, self.path, tokens, offsets, backend=self.backend)
        return self.table.score_topk(endpoint, k, exclude, deny, backend=self.backend)


def _newest(ids: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The histories cut to their newest `longest` items."""
    lengths = offsets.diff()
    if not bool((lengths > longest).any()):
        return ids, offsets
    from_end = offsets[1:].repeat_interleave(lengths) - torch.arange(len(ids), device=ids.device)
    kept = nn.functional.pad(lengths.clamp_max(longest).cumsum(0), (1, 0))
    return ids[from_end <= longest], kept


class ShardedRecommender(Recommender):
    """`Recommender` over the ranks of the default group, which `torchrun` and `dist.init_process_group` made.

    Every rank makes one. Rank 0 answers, from one thread or several; the others `follow` until rank 0 calls `close`.
    The catalogue is that of the checkpoint: it does not change.

    A rank that ends, or hangs for `timeout` seconds in a request, raises `RankLost` on the others, then and on every
    later call: start all ranks anew.
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
    ) -> None:
        """Put this rank's part of the table on `device`; a collective.

        Args:
            checkpoint: the same on all ranks.
            sizes: items of each rank, in the order of their numbers; by default about equally many.
            timeout: seconds, at most, that a rank waits for the others within a request.
            device: of this rank.
            dtype: as in `Recommender`.
            backend: as in `Recommender`.

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
        super().__init__(checkpoint, device=device, dtype=dtype, backend=backend)
        self._room = items
        on_time = timedelta(seconds=timeout)
        with naming_the_loss("while the groups were made", timeout):
            self._waiting = _group("gloo", _IDLE)
            self._talking = _group("gloo", on_time)
            exchange = self._talking if self.device.type == "cpu" else _group("nccl", on_time)
        self._sharded = ShardedTable(self._table, self._start + 1, items, exchange, timeout)
        self._turn = threading.Lock()
        self._ended: Exception | None = None  # why nothing more can be asked

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
        while (asked := self._receive()) is not None:
            self._answer(asked)

    def close(self) -> None:
        """Let the followers go; on rank 0. Again is no error."""
        with self._turn:
            if self.rank == 0 and self._ended is None:
                self._ended = Closed("the recommender is closed; expected a request before that")
                self._broadcast(torch.zeros(_HEADER, dtype=torch.int64), self._waiting)

    def warmup(self, k: int = 20, batches: Sequence[int] = ()) -> float:
        """Nothing is captured: 0 seconds."""
        return 0.0

    def add_items(self, ids: Sequence[ItemId], embeddings: Any) -> int:
        """Not to be had: `InputError`."""
        raise InputError("the catalogue of a sharded recommender does not change; expected a new one on all ranks")

    def remove_items(self, ids: Sequence[ItemId]) -> int:
        """Not to be had: `InputError`."""
        return self.add_items(ids, None)

    def swap(self, checkpoint: Checkpoint) -> int:
        """Not to be had: `InputError`."""
        return self.add_items((), None)

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
        numbers = torch.zeros(0, dtype=torch.int64) if denied is None else denied.nonzero().flatten()
        ids, offsets = (torch.from_numpy(part).long() for part in histories)
        asked = _Asked(ids, offsets, numbers, min(k, self._room), exclude, denied is not None, seeds)
        with self._turn:
            if self.rank != 0:
                raise RuntimeError(f"rank {self.rank} was asked; expected rank 0 to be, and the others to follow")
            if self._ended is not None:
                raise self._ended
            table = self._sharded.rows
            # What a named backend refuses is refused before the other ranks hear of it.
            SCORE_TOPK.resolve(
                self.backend, table.device, table.dtype, beyond_kernels(table.shape[1], asked.k, len(table))
            )
            try:
                self._broadcast(asked.header(), self._waiting)
                self._broadcast(asked.payload(), self._talking)
                scores, items = self._answer(asked)
            except Exception as error:  # whatever it was, the ranks may now be at different places
                self._ended = error
                raise
        return scores.cpu().numpy(), items.cpu().numpy()

    def _receive(self) -> _Asked | None:
        header = torch.zeros(_HEADER, dtype=torch.int64)
        self._broadcast(header, self._waiting)
        if not bool(header.any()):
            return None
        payload = torch.empty(int(header[:3].sum()), dtype=torch.int64)
        self._broadcast(payload, self._talking)
        return _Asked.of(header, payload)

    def _broadcast(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        with naming_the_loss("while a request was passed on", self.timeout):
            work = dist.broadcast(tensor, 0, group=group, async_op=True)
            assert work is not None
            # Followers wait as long as nobody asks, which is the group's own time; whoever asks does not.
            work.wait(timedelta(seconds=self.timeout) if self.rank == 0 else _IDLE)

    @torch.no_grad()
    def _answer(self, asked: _Asked) -> tuple[Tensor, Tensor]:
        """Do the part of this rank; the same lists on every one."""
        ids, offsets = asked.ids.to(self.device), asked.offsets.to(self.device)
        seen = Exclusions(ids, offsets) if asked.exclude else None
        deny = None
        if asked.deny:
            deny = torch.zeros(self._size + 1, dtype=torch.bool)
            deny[self._sharded.local(asked.denied)] = True
            deny = deny.to(self.device)
        drawn = []
        for seed in asked.seeds:
            step = self._step(seed)
            sharded = ShardedStep(step.weights, step.path, self._sharded, self.backend)
            drawn.append(sharded(ids, offsets, seen, asked.k, deny))
        return drawn[0] if len(drawn) == 1 else merge_drawn(drawn, asked.k)


@dataclass(frozen=True)
class _Asked:
    """A request as it goes from rank 0 to the others: numbers of the whole catalogue, on the CPU."""

    ids: Tensor
    offsets: Tensor
    denied: Tensor
    k: int
    exclude: bool
    deny: bool
    seeds: range

    def header(self) -> Tensor:
        """int64 [8], with the lengths of the payload's parts first."""
        lengths = (len(self.ids), len(self.offsets), len(self.denied))
        return torch.tensor([*lengths, self.k, self.exclude, self.deny, self.seeds.start, self.seeds.stop])

    def payload(self) -> Tensor:
        """int64, all parts end to end."""
        return torch.cat((self.ids, self.offsets, self.denied))

    @classmethod
    def of(cls, header: Tensor, payload: Tensor) -> _Asked:
        """What `header` and `payload` hold."""
        tokens, bounds, denied, k, exclude, deny, first, end = header.tolist()
        ids, offsets, numbers = torch.split(payload, [tokens, bounds, denied])
        return cls(ids, offsets, numbers, k, bool(exclude), bool(deny), range(first, end))


def _group(backend: str, timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group
