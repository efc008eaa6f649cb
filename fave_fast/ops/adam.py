"""One step of Adam with the gradients clipped by their joint norm, on the state of a `torch.optim.Adam`.

With g the gradients of all tensors scaled by min(1, clip / (||g|| + 1e-6)), decay lambda and step k:

    g += lambda p,   m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2
    p -= rate / (1 - beta1^k) m / (sqrt(v / (1 - beta2^k)) + eps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels
from fave_fast.ops.tuning import tile_shapes


class ClippedAdam:
    """Steps of `optimiser`, whose one group's parameters are float32 and contiguous.

    The state is the optimiser's own, in its memory: it can be saved, loaded and stepped by either in turn. With the
    triton backend a step can be captured in a CUDA graph: `addresses` before, `take` captured, `bind` once behind.

    Args:
        optimiser: with a tensor as its learning rate for the triton backend; neither amsgrad nor maximize.
        clip: largest norm.
        backend: auto, reference or triton.

    Raises:
        BackendError: the backend cannot run here.
        ValueError: an optimiser that this does not implement.
    """

    def __init__(self, optimiser: torch.optim.Adam, clip: float, backend: str = "auto") -> None:
        (group,) = optimiser.param_groups
        if group["amsgrad"] or group["maximize"]:
            raise ValueError("the optimiser has amsgrad or maximize; expected plain Adam")
        self.optimiser, self.clip = optimiser, clip
        self.parameters: list[Tensor] = group["params"]
        first = self.parameters[0]
        beyond = {}
        if not isinstance(group["lr"], Tensor):
            beyond["triton"] = "its kernels read the learning rate from a tensor, and the optimiser has a number"
        elif any(one.dtype != torch.float32 or not one.is_contiguous() for one in self.parameters):
            beyond["triton"] = "its kernels take contiguous float32 parameters"
        self._run = OP.resolve(backend, first.device, first.dtype, beyond)
        self._tables: _Tables | None = None

    def addresses(self) -> Tensor:
        """Memory int64 [T] in which a captured step reads where its gradients lie.

        It is taken before the capture: what is taken within one may have held something else earlier in the graph,
        which every replay writes again.
        """
        return torch.zeros(len(self.parameters), dtype=torch.int64, device=self.parameters[0].device)

    def take(self, addresses: Tensor | None = None) -> None:
        """One step from the parameters' `grad`; captured, with memory of `addresses`.

        Raises:
            ValueError: a gradient is not contiguous, or the step is captured without memory for its addresses.
        """
        self._run(self, addresses)

    def bind(self, addresses: Tensor, gradients: list[Tensor | None]) -> None:
        """Tell a captured step where its gradients lie: those of the parameters, in order, as they were captured."""
        addresses.copy_(_addresses(gradients))


def _reference(adam: ClippedAdam, addresses: Tensor | None) -> None:
    torch.nn.utils.clip_grad_norm_(adam.parameters, adam.clip)
    adam.optimiser.step()


class _Tables:
    """What the kernels read about the tensors, which stays from step to step."""

    def __init__(self, adam: ClippedAdam, block: int) -> None:
        parameters, state = adam.parameters, adam.optimiser.state
        device = parameters[0].device
        for one in parameters:
            if len(state[one]) == 0:
                state[one]["step"] = torch.zeros((), device=device)
                state[one]["exp_avg"] = torch.zeros_like(one)
                state[one]["exp_avg_sq"] = torch.zeros_like(one)
            # An optimiser that is not capturable counts, or loads its count, on the host.
            state[one]["step"] = state[one]["step"].to(device)
        self.steps = [state[one]["step"] for one in parameters]
        held = [[one.detach() for one in parameters]]
        held += [[state[one][name] for one in parameters] for name in ("exp_avg", "exp_avg_sq")]
        self.held = held
        addresses = torch.stack([_addresses(part) for part in held])
        self.state, self.aligned = addresses.to(device), _aligned(addresses)
        sizes = [one.numel() for one in parameters]
        self.sizes = torch.tensor(sizes, device=device)
        blocks = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, block)]
        self.blocks = torch.tensor(blocks, device=device)
        self.parts = torch.empty(len(blocks), device=device)


def _aligned(addresses: Tensor) -> bool:
    """Whether vectors of 16 bytes may be read there."""
    return bool((addresses % 16 == 0).all())


def _addresses(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor([0 if one is None else one.data_ptr() for one in tensors], dtype=torch.int64)


def _run_triton(adam: ClippedAdam, addresses: Tensor | None) -> None:
    from fave_fast.kernels import adam as kernels

    (group,) = adam.optimiser.param_groups
    device = adam.parameters[0].device
    shapes = tile_shapes("adam", "update", device)
    if adam._tables is None:
        adam._tables = _Tables(adam, shapes["BLOCK"])
    tables = adam._tables
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    gradients = [one.grad for one in adam.parameters]
    if any(one is not None and not one.is_contiguous() for one in gradients):
        raise ValueError("a gradient is not contiguous")
    steps = [step for step, gradient in zip(tables.steps, gradients, strict=True) if gradient is not None]
    if not steps:
        return
    here = _addresses(gradients)
    if not capturing:
        addresses = here.to(device)
    elif addresses is None:
        raise ValueError("a captured step has no memory for its gradients' addresses; expected that of `addresses`")
    torch._foreach_add_(steps, 1.0)
    kernels.clipped_adam(
        addresses, tables.state, tables.sizes, tables.blocks, tables.parts, steps[0], group["lr"],
        clip=adam.clip, betas=group["betas"], log_betas=tuple(map(math.log, group["betas"])), eps=group["eps"],
        decay=group["weight_decay"], aligned=tables.aligned and _aligned(here), shapes=shapes,
    )  # fmt: skip


Run = Callable[[ClippedAdam, Tensor | None], None]

OP: Op[Run] = Op(
    "adam",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("reference", _reference),
    ),
)
