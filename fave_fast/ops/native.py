"""What every op in C++ needs: which instruction set, how many threads, and tensors as NumPy arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops.registry import why_no_extension

DTYPES = (torch.float32, torch.bfloat16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The check of an implementation in `fave_fast._C` that computes with the dtype it is given."""
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device.type}"
    return why_no_extension() or (None if dtype in DTYPES else f"it takes float32 and bfloat16, not {dtype}")


def isa() -> str:
    """The instruction set that FAVE_FAST_ISA names; empty for the fastest.

    Raises:
        BackendError: it cannot run here.
    """
    from fave_fast import _C

    name, offered = os.environ.get("FAVE_FAST_ISA", ""), _C.instruction_sets()
    if name and name not in offered:
        raise BackendError(f"FAVE_FAST_ISA is {name!r}; expected one of {', '.join(offered)}, which can run here")
    return name


def threads() -> int:
    """As many as PyTorch uses."""
    return torch.get_num_threads()


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """A CPU tensor's own memory; bfloat16 as uint16, which the extension takes it as."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def rows(matrix: Tensor) -> npt.NDArray[Any]:
    """A matrix whose rows lie as one piece each: its own memory where they do."""
    return array(matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous())
