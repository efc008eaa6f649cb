"""The one step of eq. (25) and the exact top K as one module of plain PyTorch operations, for compilers and exports."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from fave_fast.config import FlowConfig
from fave_fast.errors import InputError
from fave_fast.flow import InferenceNoise, anchor_positions
from fave_fast.model import FAVE
from fave_fast.ops.encoder import input_constants
from fave_fast.profiling import ranged

_MIN_GROUP = 8
_MAX_GROUP = 256
_LOW = (1 << 32) - 1


class OneStep(nn.Module):
    """Histories to lists: `flow.encode`, then `ops.score_topk`, with nothing that depends on the data's values.

    It holds all scores [B, N], float32. Frozen: weights and noise are copied when it is made, and later changes of the
    model do not reach it.
    """

    table: Tensor
    left_out: Tensor
    shift: Tensor
    scale: Tensor | None
    anchor: Tensor

    @torch.no_grad()
    def __init__(self, model: FAVE, flow: FlowConfig, noise: InferenceNoise, k: int, length: int | None = None) -> None:
        """Copy what serving needs of `model`, on its device, in its dtype.

        Args:
            model: in eval mode.
            flow: which prior.
            noise: what is drawn.
            k: K, at least 1; may exceed N.
            length: L of the histories; by default the model's longest.

        Raises:
            ValueError: a model in training mode, k below 1, or a length that the model does not take.
            InputError: a model with another `conditioning` than eq. (9)'s.
        """
        super().__init__()
        length = model.config.max_length if length is None else length
        if model.training:
            raise ValueError("the model is in training mode; expected model.eval()")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        if model.config.conditioning != "add":
            raise InputError(f"the model has conditioning {model.config.conditioning!r}; expected 'add' (eq. 9)")
        if not 1 <= length <= model.config.max_length:
            raise ValueError(f"length is {length}; expected 1 to {model.config.max_length}")
        self.num_items, self.k, self.length = model.num_items, k, length
        self.embedding_norm = copy.deepcopy(model.embedding_norm)
        self.network = _Encoder(model, length)
        self.group = _group_size(model.num_items, k)
        # Whole groups; and torch.mm of 512 queries takes 579 us for 1,000,003 items, 406 for 1,000,000 (H200, bf16).
        width = -(-(model.num_items + 1) // self.group) * self.group
        table = model.item_embedding.weight
        ids = torch.arange(width, device=table.device)
        self.register_buffer("table", F.pad(table, (0, 0, 0, width - len(table))))
        self.register_buffer("left_out", (ids == 0) | (ids > model.num_items))
        # Rounded once; in 16 bits they stay float32.
        dtype = torch.float64 if noise.lam.dtype == torch.float64 else torch.float32
        shift, scale = (
            None if part is None else part[-length:].to(dtype) for part in input_constants(model, flow, noise)
        )
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("anchor", noise.anchor.float().clone())
        self.requires_grad_(False).eval()

    def forward(self, history: Tensor, exclude: Tensor, deny: Tensor) -> tuple[Tensor, Tensor]:
        """The K best items of each row, out of the items 1 to N; the contract is that of `ops.score_topk`.

        Args:
            history: int64 [B, L], ids from 0 to N, left-padded with 0.
            exclude: int64 [B, E], ids that are no candidates in the row; what is outside the catalogue (0, the padding,
                say) changes nothing.
            deny: bool [N + 1], True for items that are no candidates in any row.

        Returns:
            Scores [B, K] float32, the higher first and of equal ones the lower id, and ids [B, K] int64; where fewer
            than K candidates remain, -inf and 0.
        """
        return self.best(self.encode(history), exclude, deny)

    @ranged("fave/encoder")
    def encode(self, history: Tensor) -> Tensor:
        """The endpoint [B, D] of histories [B, L]."""
        embedded = self.embedding_norm(F.embedding(history, self.table))
        e = embedded.to(self.shift.dtype) + self.shift
        if self.scale is not None:
            positions = anchor_positions(history, self.anchor.expand(history.shape[0]))
            items = history.gather(1, positions[:, None])
            e = e + self.scale * F.embedding(items, self.table)
        endpoint: Tensor = self.network.encode(e.to(self.table.dtype), history != 0).endpoint
        return endpoint

    @ranged("fave/topk")
    def best(self, queries: Tensor, exclude: Tensor, deny: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` from the endpoints [B, D] on."""
        width, most = self.table.shape[0], min(self.k, self.num_items)
        scores = _product(queries, self.table)
        left_out = self.left_out | F.pad(deny, (0, width - 1 - self.num_items))
        scores = torch.where(left_out | scores.isnan(), -torch.inf, scores)
        inside = (exclude > 0) & (exclude <= self.num_items)
        scores = scores.scatter(1, torch.where(inside, exclude, 0), -torch.inf)
        scores = scores.view(scores.shape[0], -1, self.group)
        # The K first groups, by (maximum, place), hold the K first items: each group before an item's own, by that
        # order, has an item before it. Ranking all items at once would take a 64-bit key for each.
        groups = _first(scores.amax(2), None, min(most, scores.shape[1]), scores.shape[1])[1]
        ids = groups[:, :, None] * self.group + torch.arange(self.group, device=groups.device)
        scores = scores.gather(1, groups[:, :, None].expand(-1, -1, self.group))
        scores, ids = _first(scores.flatten(1), ids.flatten(1), most, width)
        ids = torch.where(scores == -torch.inf, 0, ids)
        missing = self.k - most
        return F.pad(scores, (0, missing), value=-torch.inf), F.pad(ids, (0, missing))


class _Encoder(FAVE):
    """A copy of what `FAVE.encode` reads for histories of one length; nothing in it is as long as the catalogue."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, model: FAVE, length: int) -> None:
        with torch.device("meta"):
            super().__init__(model.config, 0)
        del self.item_embedding, self.embedding_norm, self.time_embedding, self.history_decoder
        self.blocks = copy.deepcopy(model.blocks)
        self.final_norm = copy.deepcopy(model.final_norm)
        # A compiler would write the cosines and sines into every kernel that rotates, and round them in its own way.
        tables = model.rotary(length, model.item_embedding.weight.device)
        for name, table in zip(("cos", "sin"), tables or (None, None), strict=True):
            self.register_buffer(name, table)

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The tables of the one length."""
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)


def _product(queries: Tensor, table: Tensor) -> Tensor:
    """Inner products [B, W] in float32, never rounded to a 16-bit format on the way."""
    if queries.dtype in (torch.bfloat16, torch.float16):
        if queries.device.type == "cuda":
            # max-autotune makes one row's product a sum over D, whose result has 16 bits in spite of out_dtype (2.11).
            if torch.compiler.is_compiling() and statically_known_true(queries.shape[0] == 1):
                return (queries.float()[:, None] * table.float()).sum(-1)
            return torch.mm(queries, table.T, out_dtype=torch.float32)
        return queries.float() @ table.float().T
    return (queries @ table.T).float()


def _group_size(items: int, k: int) -> int:
    """The power of two that makes the groups and the chosen groups' items about equally many."""
    return min(max(1 << round(math.log2(max(1, items // k)) / 2), _MIN_GROUP), _MAX_GROUP)


def _first(scores: Tensor, ids: Tensor | None, k: int, bound: int) -> tuple[Tensor, Tensor]:
    """The first k of each row of float32 scores [B, C] by (score descending, id ascending), and their ids [B, k].

    Ids are int64 [B, C] from 0 to `bound` - 1, below 2^32, and differ within a row; None stands for the columns.
    """
    # topk leaves the order of equal scores open, so it ranks pairs of which no two are equal. Their lower half counts
    # down from `bound`, so that zeros, on which a compiler tries its kernels (AOTInductor), name an id that there is.
    if ids is None:
        ids = torch.arange(scores.shape[1], device=scores.device)
    keys = (_ordered(scores).long() << 32) + (bound - 1 - ids)
    keys = keys.topk(k, dim=1).values
    return _unordered((keys >> 32).int()), bound - 1 - (keys & _LOW)


def _ordered(scores: Tensor) -> Tensor:
    """float32 without NaN -> int32 in the same order; 0 and -0 are equal."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(ordered: Tensor) -> Tensor:
    """`_ordered` back: int32 -> float32."""
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
