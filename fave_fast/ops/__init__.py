"""The operations that have kernels: one file an op, with its contract, its reference and its choice of backend."""

from typing import Any

from fave_fast.ops import adam as _adam
from fave_fast.ops import attention as _attention
from fave_fast.ops import block as _block
from fave_fast.ops import cross_entropy as _cross_entropy
from fave_fast.ops import encoder as _encoder
from fave_fast.ops import input_modulation as _input_modulation
from fave_fast.ops import packed as _packed
from fave_fast.ops import rank_count as _rank_count
from fave_fast.ops import score_topk as _score_topk
from fave_fast.ops.exclusions import Exclusions
from fave_fast.ops.registry import BACKENDS, Op

OPS: tuple[Op[Any], ...] = (
    _adam.OP,
    _attention.OP,
    _block.OP,
    _block.NORM,
    _cross_entropy.OP,
    _encoder.OP,
    _input_modulation.OP,
    _packed.DECODER_HIDDEN,
    _packed.PACK_WINDOWS,
    _packed.PADDED_WEIGHTS,
    _packed.PICK,
    _packed.ROWS_OF,
    _rank_count.OP,
    _score_topk.OP,
)

ClippedAdam = _adam.ClippedAdam
attention = _attention.attention
attention_dual = _attention.attention_dual
block = _block.block
block_dual = _block.block_dual
cross_entropy = _cross_entropy.cross_entropy
sampled_cross_entropy = _cross_entropy.sampled_cross_entropy
input_modulation = _input_modulation.input_modulation
input_modulation_dual = _input_modulation.input_modulation_dual
pack_windows = _packed.pack_windows
pick = _packed.pick
rank_count = _rank_count.rank_count
score_topk = _score_topk.score_topk

__all__ = [
    "BACKENDS",
    "OPS",
    "ClippedAdam",
    "Exclusions",
    "attention",
    "attention_dual",
    "block",
    "block_dual",
    "cross_entropy",
    "input_modulation",
    "input_modulation_dual",
    "pack_windows",
    "pick",
    "rank_count",
    "sampled_cross_entropy",
    "score_topk",
]
