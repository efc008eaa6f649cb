"""Measure the kernels' tile shapes on the GPU at hand and pin the best in `kernels/tuning/<gpu>.json`.

    python -m bench.tune [OP ...] [--passes 1]

For every entry that an op's workload asks for, one size after the other is halved and doubled as long as that is
faster by more than `MARGIN`; a shape that does not compile, or whose result is not that of the shape before, is passed
over. Entries of other ops in the file stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench import block as block_bench
from bench import input_modulation as modulation_bench
from bench.encoder import Bench as EncoderBench
from bench.encoder import offsets_of
from bench.measure import time_us
from bench.rank_count import inputs as catalogue
from fave_fast.ops import cross_entropy, rank_count, score_topk, tuning
from fave_fast.ops.attention import attention, attention_dual, rotary_by_age
from fave_fast.ops.block import block, block_dual
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.encoder import encode
from fave_fast.ops.tuning import Shapes

FOLDER = Path(__file__).resolve().parent.parent / "kernels" / "tuning"
MARGIN = 0.02  # medians of the same kernel differ by one per cent and less from run to run
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6)}

Results = tuple[Tensor, ...]
Call = Callable[[], Results]
Entry = tuple[str, str]


@dataclass
class Pins:
    """Stands in for the tuning files: what is pinned so far, and which entries were asked for."""

    generic: dict[str, dict[str, Shapes]]
    pinned: dict[str, dict[str, Shapes]]
    asked: dict[Entry, None] = field(default_factory=dict)

    def install(self) -> None:
        """Let `tile_shapes` read from here."""
        tuning._table = self._table  # type: ignore[assignment]
        tuning.tile_shapes.cache_clear()

    def put(self, entry: Entry, shapes: Shapes) -> None:
        """Pin `shapes`; the next call uses them."""
        self.pinned.setdefault(entry[0], {})[entry[1]] = shapes
        tuning.tile_shapes.cache_clear()

    def get(self, entry: Entry) -> Shapes:
        """What is in force."""
        op, variant = entry
        return dict(self.pinned.get(op, {}).get(variant) or self.generic[op][variant])

    def _table(self, name: str) -> dict[str, dict[str, Shapes]]:
        if name == "generic.json":
            return self.generic
        return {op: _Recorded(self, op) for op in self.generic}


class _Recorded(dict[str, Shapes]):
    def __init__(self, pins: Pins, op: str) -> None:
        super().__init__(pins.pinned.get(op, {}))
        self.pins, self.op = pins, op

    def __contains__(self, variant: object) -> bool:
        self.pins.asked[self.op, str(variant)] = None
        return super().__contains__(variant)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, leaf: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(leaf)


def _with_gradients(forward: Call, leaves: list[Tensor]) -> Call:
    upstream = [torch.randn_like(value) for value in forward()]

    def call() -> Results:
        values = forward()
        gradients = torch.autograd.grad(values, leaves, upstream)
        # Detached: nodes of the leaves that outlive a call belong to its stream, and a capture may not touch them.
        return *(value.detach() for value in values), *gradients

    return call


def _score_topk() -> Iterable[Call]:
    for batch, items, dtype in ((1, 1_000_000, torch.bfloat16), (512, 1_000_000, torch.bfloat16)):
        queries, table = _random(batch, 128, dtype=dtype), _random(items + 1, 128, dtype=dtype)
        yield lambda queries=queries, table=table: score_topk(queries, table, 20, backend="triton")
    for batch, dtype in ((1, torch.bfloat16), (512, torch.bfloat16), (1, torch.float32), (512, torch.float32)):
        queries, table = _random(batch, 128, dtype=dtype), _random(100_001, 128, dtype=dtype)
        yield lambda queries=queries, table=table: score_topk(queries, table, 1000, backend="triton")
    table = _random(10_000_001, 128)
    packed = ByteTable.pack(table)
    queries = _random(1, 128)
    yield lambda queries=queries, table=table, packed=packed: score_topk(
        queries, table, 20, table_bytes=packed, backend="triton"
    )
    for batch in (1, 512):
        queries, table = _random(batch, 128, dtype=torch.float32), _random(100_001, 128, dtype=torch.float32)
        yield lambda queries=queries, table=table: score_topk(queries, table, 20, backend="triton")


def _rank_count() -> Iterable[Call]:
    for batch, n, dtype in (
        (512, 1_000_003, torch.bfloat16), (64, 1_000_003, torch.bfloat16),
        (512, 12_101, torch.float32), (64, 12_101, torch.float32),
    ):  # fmt: skip
        queries, table, targets, exclude = catalogue(batch, n, dtype)
        yield lambda q=queries, t=table, y=targets, e=exclude: (rank_count(q, t, y, e, backend="triton"),)


def _cross_entropy() -> Iterable[Call]:
    for n in (12_101, 1_000_000):
        endpoint, table = _random(512, 128, leaf=True), _random(n + 1, 128, leaf=True)
        targets = torch.randint(1, n + 1, (512,), device="cuda")
        call = lambda e=endpoint, t=table, y=targets: (cross_entropy(e, t, y, backend="triton"),)  # noqa: E731
        yield _with_gradients(call, [endpoint, table])


def _encoder() -> Iterable[Call]:
    bench = EncoderBench()
    for batch in (1, 512):
        offsets = offsets_of(torch.full((batch,), 50, device="cuda"))
        e = _random(batch * 50, 128)
        yield lambda e=e, offsets=offsets: (encode(bench.weights, e, offsets, backend="triton"),)


def _input_modulation() -> Iterable[Call]:
    for count in (512, 4096):
        inputs = modulation_bench.Inputs.make(count)
        for dual in (False, True):
            yield lambda inputs=inputs, dual=dual: inputs.trained(lambda: inputs.ours("drawn", "computed", True, dual))


def _attention() -> Iterable[Call]:
    offsets = torch.arange(513, device="cuda") * 50
    tables = rotary_by_age(50, 32, "cuda")
    x, dx = _random(512 * 50, 384, leaf=True), _random(512 * 50, 384, leaf=True)
    yield _with_gradients(lambda: (attention(x, offsets, 4, tables),), [x])
    yield _with_gradients(lambda: attention_dual(x, dx, offsets, 4, tables), [x, dx])


def _block() -> Iterable[Call]:
    module = block_bench.Block(block_bench.ModelConfig(dropout=0.0)).to("cuda", torch.bfloat16)
    weights, offsets = block_bench.weights_of(module), torch.arange(513, device="cuda") * 50
    tables = rotary_by_age(50, 32, "cuda")
    x, dx = _random(512 * 50, 128, leaf=True), _random(512 * 50, 128, leaf=True)
    leaves = list(module.parameters())
    yield _with_gradients(lambda: (block(x, weights, offsets, 4, tables),), [x, *leaves])
    yield _with_gradients(lambda: block_dual(x, dx, weights, offsets, 4, tables), [x, dx, *leaves])


WORKLOADS: dict[str, Callable[[], Iterable[Call]]] = {
    "score_topk": _score_topk,
    "rank_count": _rank_count,
    "cross_entropy": _cross_entropy,
    "encoder": _encoder,
    "input_modulation": _input_modulation,
    "attention": _attention,
    "block": _block,
}


def alike(results: Results, before: Results) -> bool:
    """Whether results are those of another tile shape: whole numbers equal, the rest within a rounding of the sums."""
    for one, other in zip(results, before, strict=True):
        if one.is_floating_point():
            if not (one.double() - other.double()).norm() <= 4e-3 * other.double().norm():
                return False
        elif (one != other).float().mean() > 1e-3:  # lists may swap two scores that differ by a rounding
            return False
    return True


def neighbours(shapes: Shapes) -> Iterable[Shapes]:
    """The shapes with one size halved or doubled; switches (0 or 1) are turned."""
    for name, value in shapes.items():
        low, high = LIMITS.get(name, (1, 1 << 30))
        candidates = (1 - value,) if value in (0, 1) and name.isupper() else (value // 2, value * 2)
        if name == "num_stages":
            candidates = (value - 1, value + 1)
        for candidate in candidates:
            if (name.isupper() and value in (0, 1)) or low <= candidate <= high:
                yield {**shapes, name: candidate}


def _seconds(call: Call) -> float | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints the assembly that failed
            return time_us(call, repeats=20).median * 1e-6
    except Exception:  # a shape may fail in the compiler, at launch or for want of memory: each with its own error
        torch.cuda.synchronize()
        return None


def tune(pins: Pins, entry: Entry, call: Call, passes: int) -> None:
    """Improve one entry by the time of `call`."""
    before = call()
    best, best_time = pins.get(entry), _seconds(call)
    if best_time is None:
        raise RuntimeError(f"{entry}: the shapes in force, {best}, do not run")
    for _ in range(passes):
        found = False
        for candidate in list(neighbours(best)):
            pins.put(entry, candidate)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    good = alike(call(), before)
            except Exception:  # as above
                continue
            time = _seconds(call) if good else None
            if time is not None and time < best_time * (1 - MARGIN):
                best, best_time, found = candidate, time, True
        pins.put(entry, best)
        if not found:
            break
    print(f"{'/'.join(entry):<40} {1e6 * best_time:9.1f} us  {best}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--passes", type=int, default=1, help="rounds over an entry's sizes (default: 1)")
    parser.add_argument("--out", type=Path, help="file to write (default: the GPU's in kernels/tuning)")
    args = parser.parse_args()
    unknown = [op for op in args.ops if op not in WORKLOADS]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; expected one of {', '.join(WORKLOADS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: tile shapes are measured on the GPU that is to run them")
    file = args.out or FOLDER / tuning.file_name(torch.cuda.get_device_name())
    present = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    pins = Pins(json.loads((FOLDER / "generic.json").read_text(encoding="utf-8")), present)
    pins.install()
    tuned: set[Entry] = set()  # by the first call that asks for it: the scan of bytes asks for the table's, unused
    for op in args.ops or WORKLOADS:
        for call in WORKLOADS[op]():
            pins.asked.clear()
            call()
            for entry in [entry for entry in pins.asked if entry[0] == op and entry not in tuned]:
                tune(pins, entry, call, args.passes)
                tuned.add(entry)
            file.write_text(json.dumps(pins.pinned, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
