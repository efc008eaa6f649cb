"""Tile shapes of the Triton kernels, pinned per GPU in `kernels/tuning/<gpu>.json`.

Nothing is timed when a kernel is called: a tile shape that changed between two runs could change the last bit of a
result. `python -m bench.tune` measures the candidates on the GPU at hand and writes its file; a GPU without one, and
every entry that its file lacks, gets the values of `generic.json`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re

import torch

Shapes = dict[str, int]  # a kernel's compile-time sizes, num_warps and num_stages among them


def file_name(gpu: str) -> str:
    """The tuning file of a GPU by its name: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def _table(name: str) -> dict[str, dict[str, Shapes]]:
    file = importlib.resources.files("fave_fast.kernels") / "tuning" / name
    result: dict[str, dict[str, Shapes]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return result


@functools.cache
def tile_shapes(op: str, variant: str, device: torch.device) -> Shapes:
    """The sizes for `variant` of `op` on `device`: its GPU's, else the generic ones.

    Raises:
        KeyError: `generic.json` has no such op or variant.
    """
    if device.type == "cuda":
        pinned = _table(file_name(torch.cuda.get_device_name(device))).get(op, {})
        if variant in pinned:
            return pinned[variant]
    return _table("generic.json")[op][variant]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors `device` has, to share a catalogue's tiles out among."""
    # Without a GPU, in the interpreter: some, so that tiles are shared out there too.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a kernel on `device` can start while the kernel before it still runs: from compute capability 9.0 on.

    A kernel that is launched so (`launch_pdl`) waits for the one before it before it reads or writes device memory: who
    waits for it has waited for all before. What precedes it on the stream has to be a kernel: nothing promises that it
    waits for a copy.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
