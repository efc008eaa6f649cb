"""The one step in C++ (`csrc/step.cpp`): numbered histories to lists by one call.

What `encode_ids` and then `score_topk` of the cpp backend give, to the same bits, without the Python between and around
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fave_fast.ops import native
from fave_fast.ops.encoder import OP as ENCODER
from fave_fast.ops.encoder import EncoderWeights, InputPath
from fave_fast.ops.score_topk import OP as SCORE_TOPK
from fave_fast.ops.score_topk import beyond_kernels
from fave_fast.ops.tiles import Sizes
from fave_fast.profiling import ranged

if TYPE_CHECKING:
    from fave_fast import _C


class TimedLists(NamedTuple):
    """Lists, and the seconds that they took."""

    scores: npt.NDArray[np.float32]  # [B, K]
    items: npt.NDArray[np.int64]  # [B, K]
    encoder: float
    topk: float


@dataclass(frozen=True)
class NativeStep:
    """Weights, input path and catalogue as C++ reads them: where they lie, so that changes in place are seen.

    Attributes:
        native: holds them.
    """

    native: _C.Step

    @classmethod
    def of(cls, weights: EncoderWeights, path: InputPath, backend: str) -> NativeStep | None:
        """The step of a model on a CPU; None where `backend` is not cpp for both ops, or stands for another.

        Raises:
            BackendError: `backend` cannot run here.
        """
        table = weights.model.item_embedding.weight.detach()
        if table.device.type != "cpu" or weights.native is None:
            return None
        beyond = beyond_kernels(Sizes(1, table.shape[1], 1, len(table) - 1), table.device)
        for op, reasons in ((ENCODER, weights.beyond), (SCORE_TOPK, beyond)):
            if op.choose(backend, table.device, table.dtype, reasons).backend != "cpp":
                return None
        from fave_fast import _C

        made = _C.Step(weights.native.encoder, native.array(table.contiguous()), *path.arrays, path.anchor)
        return cls(made)

    @ranged("fave/step")
    def __call__(
        self,
        ids: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        k: int,
        exclude: bool,
        deny: Tensor | None = None,
    ) -> TimedLists:
        """Answer a request.

        Args:
            ids: int32 [T], histories end to end, oldest first: from 0 to N.
            offsets: int64 [B + 1], where each begins and the last ends.
            k: K, at most `score_topk_cpu.MAX_K`.
            exclude: leave each history's own items out.
            deny: as in `score_topk`.

        Raises:
            ValueError: an id outside the table, or offsets that do not rise.
        """
        denied = None if deny is None else deny.numpy()
        return TimedLists(*self.native.run(ids, offsets, k, exclude, denied, native.threads()))
