"""What sums, exponentials and angles are computed in, whatever the dtype of the weights."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where that is float64."""
    return x if x.dtype == torch.float64 else x.float()
