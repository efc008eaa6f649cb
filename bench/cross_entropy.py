"""cross_entropy, forward and both gradients, beside PyTorch and the libraries; `python -m bench.cross_entropy`.

Liger-Kernel and cut-cross-entropy are measured where they are installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import Row, Time, shown, time_us
from fave_fast.ops import cross_entropy

B, D = 512, 128
CATALOGUES = (12_101, 100_000, 1_000_000)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(endpoint: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(endpoint, items[1:]).float(), targets - 1)


def libraries() -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        found["Liger-Kernel"] = lambda e, t, y: Liger.apply(e, t[1:], y - 1)[0]
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda e, t, y: linear_cross_entropy(e, t[1:], y - 1, filter_eps=None)
    except ImportError:
        pass
    return found


def gradients(loss: Loss, endpoint: Tensor, items: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    value = loss(endpoint, items, targets)
    return value.detach(), *torch.autograd.grad(value, (endpoint, items))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def timed(call: Callable[[], object], repeats: int) -> tuple[Time, str]:
    try:
        return time_us(call, repeats=repeats), ""
    except RuntimeError:
        torch.cuda.synchronize()
        return time_us(call, repeats=repeats, graph=False), ", no graph"


def measure(n: int) -> Iterator[Row]:
    source = torch.Generator("cuda").manual_seed(0)
    endpoint = torch.randn(B, D, device="cuda", generator=source).bfloat16().requires_grad_()
    items = (0.3 * torch.randn(n + 1, D, device="cuda", generator=source)).bfloat16().requires_grad_()
    targets = torch.randint(1, n + 1, (B,), device="cuda", generator=source)
    contenders: dict[str, Loss] = {
        "triton": lambda e, t, y: cross_entropy(e, t, y, backend="triton"),
        "eager": plain,
        "compiled": torch.compile(plain, fullgraph=True),
        "reference": lambda e, t, y: cross_entropy(e, t, y, backend="reference"),
        **libraries(),
    }
    exact = None
    if n <= 100_000:  # fp64 scores of a million items are 4 GB, and some copies of them
        wide = [one.detach().double().requires_grad_() for one in (endpoint, items)]
        exact = gradients(lambda e, t, y: F.cross_entropy(F.linear(e, t[1:]), y - 1), wide[0], wide[1], targets)
    size = {"floor_bytes": 2 * 2 * n * D, "floor_operations": 5 * 2 * B * n * D}
    allowed: list[float] = []
    for name in ("eager", *(name for name in contenders if name != "eager")):
        loss = contenders[name]
        gradients(loss, endpoint, items, targets)  # compiles and tunes
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = gradients(loss, endpoint, items, targets)
        used = (torch.cuda.max_memory_allocated() - before) >> 20
        if exact is not None:
            errors = [error(one, truth) for one, truth in zip(found, exact, strict=True)]
            allowed = allowed or [2 * one + 1e-6 for one in errors]
            if name == "triton" and any(one > most for one, most in zip(errors, allowed, strict=True)):
                raise AssertionError(f"errors {errors} at {n} items; at most {allowed}")
            print(name, n, "errors of loss and gradients", " ".join(f"{one:.1e}" for one in errors))
        del found
        slow = name not in ("triton", "eager", "compiled", "reference")
        time, note = timed(lambda loss=loss: gradients(loss, endpoint, items, targets), 5 if slow else 20)
        yield Row("cross_entropy", f"B {B}, N {n}, {used} MiB", name + note, time, **size)


def main() -> None:
    gpu = torch.cuda.get_device_name()
    rows = shown((row for n in CATALOGUES for row in measure(n)), gpu)
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()
