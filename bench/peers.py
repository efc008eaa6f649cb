"""What else answers a request: plain PyTorch, `torch.compile`, ONNX Runtime, the samplers of FMRec and DiffuRec.

All take histories on the host, padded beforehand (their time is not that of padding), and leave lists on the host.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fave_fast.compiled import CompiledOneStep, Mode
from fave_fast.config import FlowConfig
from fave_fast.flow import InferenceNoise, one_step
from fave_fast.model import FAVE
from fave_fast.one_step import OneStep

Grid = npt.NDArray[np.int64]  # [B, L], left-padded with 0
Lists = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
Answer = Callable[[Grid], Lists]

# Package to what it is called and how it is had.
PACKAGES = {
    "faiss": ("FAISS", "pip install faiss-cpu"),
    "flashinfer": ("FlashInfer", "pip install flashinfer-python; CUDA only"),
    "onnxruntime": ("ONNX Runtime", "pip install onnx onnxruntime"),
    "openvino": ("OpenVINO", "pip install onnx openvino"),
    "onnx": ("ONNX", "pip install onnx; without it neither ONNX Runtime nor OpenVINO gets the network"),
    "onnxscript": ("ONNX Script", "pip install onnxscript; PyTorch writes no ONNX without it"),
}


def absent(*packages: str) -> dict[str, str]:
    """Which of `packages` are not here: the peer's name to the reason."""
    return {
        PACKAGES[package][0]: f"not installed: {PACKAGES[package][1]}"
        for package in packages
        if importlib.util.find_spec(package) is None
    }


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class OnePass(nn.Module):
    """The endpoint of eq. (25) in plain PyTorch."""

    def __init__(self, model: FAVE, flow: FlowConfig) -> None:
        super().__init__()
        self.model, self.flow, self.noise = model, flow, InferenceNoise.draw(model, flow)

    def forward(self, history: Tensor) -> Tensor:
        """[B, D] of int64 [B, L]."""
        prior = self.noise.prior(self.model, self.flow, history)
        return one_step(self.model, history, prior, self.noise.lambdas(history))


class Eager:
    """A module as it comes: copy in, operation after operation, copy out."""

    def __init__(self, step: nn.Module, device: torch.device) -> None:
        self.step, self.device = step, device

    @torch.no_grad()
    def __call__(self, grid: Grid) -> Lists:
        scores, items = self.step(torch.from_numpy(grid).to(self.device))
        return scores.float().cpu().numpy(), items.cpu().numpy()


class Captured:
    """A module in a CUDA graph of one batch size, copies included: no launch from Python is left."""

    @torch.no_grad()
    def __init__(self, step: nn.Module, batch: int, length: int) -> None:
        self._host = torch.ones(batch, length, dtype=torch.int64).pin_memory()
        self._grid = self._host.cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                found = step(self._grid)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        scores, items = found
        self._out = (
            torch.empty_like(scores, device="cpu").pin_memory(),
            torch.empty_like(items, device="cpu").pin_memory(),
        )
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._grid.copy_(self._host, non_blocking=True)
            for host, part in zip(self._out, step(self._grid), strict=True):
                host.copy_(part, non_blocking=True)

    def __call__(self, grid: Grid) -> Lists:
        self._host.copy_(torch.from_numpy(grid))
        self._graph.replay()
        torch.cuda.current_stream().synchronize()
        scores, items = self._out
        return scores.float().numpy(), items.numpy()


def compiled(model: FAVE, flow: FlowConfig, k: int, length: int, mode: str, batch: int) -> tuple[Answer, float]:
    """The one step by `torch.compile`, its own CUDA graphs where the mode has them, and the seconds of compiling."""
    peer = CompiledOneStep(OneStep(model, flow, InferenceNoise.draw(model, flow), k), length, cast(Mode, mode))
    started = time.perf_counter()
    peer.warmup([batch])
    seconds = time.perf_counter() - started

    def answer(grid: Grid) -> Lists:
        history = torch.from_numpy(grid)
        scores, items = peer(history, history)
        return scores.numpy(), items.numpy()

    return answer, seconds


def overlap(found: Lists, expected: Lists) -> float:
    """The mean share of items that two sets of lists have in common."""
    pairs = zip(found[1], expected[1], strict=True)
    return float(np.mean([len(np.intersect1d(one, other)) / len(one) for one, other in pairs]))


def faiss_flat(table: Tensor, device: str) -> Any:
    """FAISS's exact inner-product index of the items 1 to N, float32 on the CPU, float16 on a GPU."""
    import faiss

    vectors = table[1:].float().cpu().numpy()
    if device == "cpu":
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), vectors.shape[1], config)
    index.add(vectors)
    return index


def faiss_ivf(table: Tensor, lists: int) -> Any:
    """FAISS's approximate index on the CPU: items in `lists` cells, of which a search reads `index.nprobe`."""
    import faiss

    vectors = table[1:].float().cpu().numpy()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // (40 * lists))])  # 40 vectors a cell, as FAISS asks for
    index.add(vectors)
    return index


def why_no_faiss_gpu() -> str | None:
    """Why FAISS has no index on a GPU here, or None."""
    if importlib.util.find_spec("faiss") is None:
        return "not installed: pip install faiss-gpu-cu12"
    import faiss

    return (
        None if hasattr(faiss, "GpuIndexFlatIP") else f"faiss {version('faiss-cpu') or ''} here is built for CPUs alone"
    )
