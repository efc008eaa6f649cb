"""Exact top 20 beside matmul + topk and the bare matrix product; `python -m bench.score_topk [ITEMS ...]`.

"triton, bytes" is the scan of the table in one byte an element, whose lists are compared with those of the table; its
share of lists that took the table's scan after all is printed. FlashInfer's top_k on the scores is measured where it is
installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.measure import COLD, Row, shown, time_us
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.score_topk import BYTES_LEAST_ITEMS, BYTES_MOST_ROWS, OP, beyond_kernels, workspace_bytes
from fave_fast.ops.tiles import Sizes

D, K = 128, 20
CASES = (
    (12_101, (1, 512)),
    (1_000_000, (1, 128, 512)),
    (10_000_000, (1, 8, 16, 64, 512)),
)
WITH_EXCLUSIONS = ((12_101, 1), (12_101, 512), (1_000_000, 1), (1_000_000, 512))
CHECKED = 32  # rows of a batch, its last ones
EXCLUDED = 50  # ids a row, a full history
SLOW = 10**9  # scores from which on a peer is timed a few times only, its launches not in a graph


def flashinfer_top_k() -> Callable[[Tensor, int], object] | None:
    try:
        from flashinfer import top_k
    except ImportError:
        return None
    found: Callable[[Tensor, int], object] = top_k
    return found


def catalogue(n: int) -> Tensor:
    """A random table [n + 1, D] in bfloat16, made in parts: its float32 form need not fit beside it."""
    source = torch.Generator("cuda").manual_seed(0)
    items = torch.empty(n + 1, D, dtype=torch.bfloat16, device="cuda")
    for part in items.split(1 << 20):
        part.copy_(torch.randn(part.shape, device="cuda", generator=source))
    return items


def exclusions(batch: int, n: int) -> Exclusions:
    source = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(1, n + 1, (batch * EXCLUDED,), device="cuda", generator=source)
    return Exclusions(ids, torch.arange(batch + 1, device="cuda") * EXCLUDED)


def buffers(
    queries: Tensor, items: Tensor, exclude: Exclusions | None, table_bytes: ByteTable | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    out = (
        torch.full((len(queries), K), torch.nan, device="cuda"),
        torch.zeros(len(queries), K, dtype=torch.int64, device="cuda"),
    )
    size = workspace_bytes(queries, items, K, 0 if exclude is None else len(exclude.ids), table_bytes)
    return out, torch.empty(size, dtype=torch.uint8, device="cuda")


def check(batch: int, items: Tensor, exclude: Exclusions | None, backend: str) -> None:
    """Ours equals the reference where sums are exact: on the signs of the embeddings."""
    queries = torch.randn(batch, D, device="cuda").sign().to(items.dtype)
    signs = items.sign()
    out, workspace = buffers(queries, signs, exclude)
    score_topk(queries, signs, K, exclude, out=out, workspace=workspace, backend=backend)
    start = max(0, batch - CHECKED)
    some = None if exclude is None else exclude.rows(start, batch)
    scores, ids = score_topk(queries[start:], signs, K, some, backend="reference")
    if not (torch.equal(out[0][start:], scores) and torch.equal(out[1][start:], ids)):
        raise AssertionError(f"lists of {batch} rows among {len(items) - 1} items are not the reference's")


def packed(items: Tensor) -> ByteTable | None:
    """The table in bytes, where the kernels would scan them."""
    return ByteTable.pack(items) if len(items) - 1 >= BYTES_LEAST_ITEMS else None


def by_bytes(queries: Tensor, items: Tensor, table_bytes: ByteTable) -> Callable[[], None]:
    """The call, after a look at its lists: those of the table, to the bit."""
    out, workspace = buffers(queries, items, None, table_bytes)

    def call() -> None:
        score_topk(queries, items, K, out=out, workspace=workspace, table_bytes=table_bytes, backend="triton")

    call()
    scores, ids = score_topk(queries, items, K, backend="triton")
    if not (torch.equal(out[1], ids) and torch.equal(out[0].view(torch.int32), scores.view(torch.int32))):
        raise AssertionError(f"lists of {len(queries)} rows by bytes are not those of the table")
    share = table_bytes.fallback_share
    print(f"N {len(items) - 1}, B {len(queries)}: {share:.2%} of lists by bytes so far fell back", file=sys.stderr)
    return call


def measure(batch: int, items: Tensor, clock: str = COLD, table_bytes: ByteTable | None = None) -> Iterator[Row]:
    """Ours, by each backend that takes the sizes, with and without exclusions and by bytes; its peers."""
    n = len(items) - 1
    queries = torch.randn(batch, D, device="cuda").to(items.dtype)
    refused = OP.refusals(queries.device, queries.dtype) | beyond_kernels(Sizes(batch, D, K, n), queries.device)
    backends = [name for name in ("triton", "cpp") if refused[name] is None]
    kinds: list[tuple[str, str, Exclusions | None]] = [(name, name, None) for name in backends]
    if (n, batch) in WITH_EXCLUSIONS:
        kinds += [(f"{name}, {EXCLUDED} excluded a row", name, exclusions(batch, n)) for name in backends]
    case = f"B {batch}, N {n}, bfloat16"
    size: dict[str, Any] = {
        "floor_bytes": (n + batch) * D * items.dtype.itemsize + batch * K * 12,
        "floor_operations": 2 * batch * n * D,
        "clock": clock,
    }
    for who, backend, some in kinds:
        check(batch, items, some, backend)
        out, workspace = buffers(queries, items, some)

        def ours(
            some: Exclusions | None = some,
            out: tuple[Tensor, Tensor] = out,
            workspace: Tensor = workspace,
            backend: str = backend,
        ) -> None:
            score_topk(queries, items, K, some, out=out, workspace=workspace, backend=backend)

        yield Row("score_topk", case, who, time_us(ours, clock=clock), **size)
        del out, workspace, ours
    if table_bytes is not None and batch <= BYTES_MOST_ROWS:
        read = {"floor_bytes": n * (D + 4) + 2 * batch * D + batch * K * 12}
        yield Row(
            "score_topk",
            case,
            "triton, bytes",
            time_us(by_bytes(queries, items, table_bytes), clock=clock),
            **size | read,
        )
    slow = batch * n > SLOW
    repeats = 5 if slow else 30
    scores = torch.empty(batch, n, dtype=items.dtype, device="cuda")
    alone = time_us(lambda: torch.mm(queries, items[1:].T, out=scores), repeats, not slow, clock)
    yield Row("score_topk", case, "torch.mm alone", alone, **size)
    peer = time_us(lambda: torch.mm(queries, items[1:].T, out=scores).topk(K), repeats, not slow, clock)
    yield Row("score_topk", case, "torch.mm + topk", peer, **size)
    top_k = flashinfer_top_k()
    if top_k is not None:
        other = time_us(lambda: top_k(torch.mm(queries, items[1:].T, out=scores), K), repeats, not slow, clock)
        yield Row("score_topk", case, "torch.mm + FlashInfer top_k", other, **size)


def measurements(wanted: Sequence[int]) -> Iterator[Row]:
    """Of all cases with catalogues of these sizes; of all of them if none is named."""
    for n, batches in CASES:
        if wanted and n not in wanted:
            continue
        items = catalogue(n)
        table_bytes = packed(items)
        for batch in batches:
            yield from measure(batch, items, table_bytes=table_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.score_topk", description=__doc__.splitlines()[0])
    parser.add_argument("items", nargs="*", type=int, metavar="ITEMS", help="catalogues of the cases (default: all)")
    wanted = parser.parse_args().items
    if unknown := set(wanted) - {n for n, _ in CASES}:
        parser.error(f"no case has {unknown.pop()} items; expected some of {', '.join(str(n) for n, _ in CASES)}")
    gpu = torch.cuda.get_device_name()
    rows = shown(measurements(wanted), gpu)
    if flashinfer_top_k() is None:
        print("FlashInfer is not installed: its top_k is not measured")
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()
