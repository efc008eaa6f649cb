"""rank_count beside the bare matrix product and the reference; `python -m bench.rank_count`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import Row, shown, time_us
from fave_fast.ops import Exclusions, rank_count

D = 128
CASES = ((64, 12_101), (132, 12_101), (512, 12_101), (22_363, 12_101), (64, 1_000_003), (512, 1_000_003))
FP32_CASES = ((512, 12_101), (22_363, 12_101))
EXCLUDED = 8  # ids a row, as many as a mean history of Beauty


def inputs(batch: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Exclusions]:
    """Random queries, table, targets, and the ids that each row leaves out."""
    source = torch.Generator("cuda").manual_seed(0)
    queries = torch.randn(batch, D, device="cuda", generator=source).to(dtype)
    items = torch.randn(n + 1, D, device="cuda", generator=source).to(dtype)
    targets = torch.randint(1, n + 1, (batch,), device="cuda", generator=source)
    ids = torch.randint(1, n + 1, (batch * EXCLUDED,), device="cuda", generator=source)
    return queries, items, targets, Exclusions(ids, torch.arange(batch + 1, device="cuda") * EXCLUDED)


def measure(batch: int, n: int, dtype: torch.dtype) -> Iterator[Row]:
    """Ours with and without exclusions, the products alone, and the reference; ours must equal it first."""
    queries, items, targets, exclude = inputs(batch, n, dtype)
    out, workspace = torch.empty_like(targets), torch.empty(2, batch, device="cuda")
    whole = queries.sign(), items.sign()  # exact in any order of summation
    for some in (None, exclude):
        expected = rank_count(*whole, targets, some, backend="reference")
        if not torch.equal(rank_count(*whole, targets, some, backend="triton"), expected):
            raise AssertionError(f"ranks of {batch} rows among {n} items are not the reference's")
    case = f"B {batch}, N {n}, {str(dtype).removeprefix('torch.')}"
    size = {"floor_bytes": (n + batch) * D * dtype.itemsize, "floor_operations": 2 * batch * n * D}

    def ours(some: Exclusions | None) -> None:
        rank_count(queries, items, targets, some, out=out, workspace=workspace, backend="triton")

    yield Row("rank_count", case, "triton", time_us(lambda: ours(None)), **size)
    yield Row("rank_count", case, "triton, 8 excluded a row", time_us(lambda: ours(exclude)), **size)
    # cuBLAS is several times slower where N is no multiple of 8.
    even = F.pad(items[1:], (0, 0, 0, -n % 8))
    narrow = torch.empty(batch, len(even), dtype=dtype, device="cuda")
    yield Row("rank_count", case, "torch.mm", time_us(lambda: torch.mm(queries, even.T, out=narrow)), **size)
    if dtype != torch.float32:
        del narrow
        yield Row(
            "rank_count",
            case,
            "torch.mm to float32",
            time_us(lambda: torch.mm(queries, even.T, out_dtype=torch.float32), repeats=20),
            **size,
        )
    slow = time_us(lambda: rank_count(queries, items, targets, backend="reference"), repeats=10)
    yield Row("rank_count", case, "reference", slow, **size)


def main() -> None:
    gpu = torch.cuda.get_device_name()
    cases = [(*case, torch.bfloat16) for case in CASES] + [(*case, torch.float32) for case in FP32_CASES]
    rows = shown((row for case in cases for row in measure(*case)), gpu)
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()
