"""Operations over the whole catalogue: one file an op, with its contract, its reference and its choice of backend."""

from typing import Any

from fave_fast.ops import rank_count as _rank_count
from fave_fast.ops import score_topk as _score_topk
from fave_fast.ops.exclusions import Exclusions
from fave_fast.ops.registry import BACKENDS, Op

OPS: tuple[Op[Any], ...] = (_rank_count.OP, _score_topk.OP)

rank_count = _rank_count.rank_count
score_topk = _score_topk.score_topk

__all__ = ["BACKENDS", "OPS", "Exclusions", "rank_count", "score_topk"]
