"""How everything here is timed, and the floor that a time is compared with.

`time_us`: device events around one CUDA-graph replay (launch gaps of Python excluded), the L2 cache as its clock says.
`host_us`: the wall clock around one call, answer on the host included. Both: a median with the 20th, 80th and 99th
percentile over many repeats, after calls that warm up and are not counted.

A cold cache is full of other data that was read. `DIRTY` is full of data that was written, each line of which goes to
memory before another takes its place: what a call finds behind one that writes as much. Before a call that only reads
that is none of its work, and no small part: 1 M items are read in 83 us behind it and in 74 from a cold one (H200,
de49f1c).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

# Clocks.
COLD, DIRTY, WARM = "device, cold L2", "device, L2 full of writes", "device, warm L2"
HOST = "host to host, warm"

# Measured ceilings: bytes read a second, bf16 product. For what is not listed, `ceilings` measures them.
CEILINGS: dict[str, dict[str, float]] = {
    "NVIDIA H200": {"bytes": 4.35e12, "bf16": 740e12},
    "NVIDIA H100 80GB HBM3": {"bytes": 3.0e12, "bf16": 740e12},
}

_SLEEP = 100_000  # cycles, some 50 us


@dataclass(frozen=True)
class Time:
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float
    p99: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Time:
        """Of single calls, in microseconds."""
        return cls(*(float(value) for value in np.percentile(times, (50, 20, 80, 99))))


@dataclass(frozen=True)
class Row:
    """One measurement: who, on what, how long, and the least that its bytes and operations can take."""

    op: str
    case: str
    who: str
    time: Time
    floor_bytes: int = 0
    floor_operations: int = 0
    clock: str = COLD
    prepared_s: float | None = None  # compiling, capturing, building an index: before anything was timed
    peak_bytes: int | None = None  # memory at its peak, catalogue and weights included
    recall: float | None = None  # the share of the exact top 20 that these lists hold, where they are approximate
    ndcg: float | None = None  # NDCG@20 of these lists on test targets, filtered, per cent

    @property
    def ours(self) -> bool:
        """Whether this package did it: `who` begins with one of its backends, or with its name."""
        return self.who.replace(",", " ").split()[0] in ("triton", "cpp", "fused", "fave_fast")

    def floor_us(self, gpu: str) -> float | None:
        """The larger of the two floors in microseconds, or None on a GPU without known ceilings."""
        ceiling = CEILINGS.get(gpu)
        if ceiling is None:
            return None
        return 1e6 * max(self.floor_bytes / ceiling["bytes"], self.floor_operations / ceiling["bf16"])

    def as_dict(self, gpu: str) -> dict[str, object]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "floor_us": self.floor_us(gpu)}


def _lead(clock: str) -> Callable[[], object]:
    """What leaves the L2 cache as the clock says, and takes longer than the host needs to launch what follows."""
    if clock == WARM:
        return lambda: torch.cuda._sleep(_SLEEP)  # type: ignore[attr-defined]
    other = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")
    total = torch.empty((), device="cuda")
    return {COLD: lambda: torch.sum(other, dim=0, out=total), DIRTY: other.zero_}[clock]


def time_us(call: Callable[[], object], repeats: int = 60, graph: bool = True, clock: str = COLD) -> Time:
    """Time `call`, which must not allocate differently from one run to the next where `graph` is True.

    By the clock COLD or DIRTY; or WARM: the L2 cache is as the last run left it, a served model's weights stay there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    run = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        run = captured.replay
    lead = _lead(clock)
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in spans:
        lead()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return Time.of([1e3 * start.elapsed_time(stop) for start, stop in spans])


def host_us(call: Callable[[int], object], seconds: float = 1.0, least: int = 20, most: int = 5000) -> Time:
    """Time `call`, which gets the number of the call and waits for its answer, by the wall clock."""
    for at in range(3):
        call(at)
    begun, times = time.perf_counter(), []
    while len(times) < least or (time.perf_counter() - begun < seconds and len(times) < most):
        started = time.perf_counter()
        call(len(times))
        times.append(1e6 * (time.perf_counter() - started))
    return Time.of(times)


@cache
def ceilings(device: str) -> dict[str, float]:
    """Bytes that can be read a second, and operations of a product (bf16 on a GPU, fp32 on a CPU), here and now.

    By the fastest of a few sums over more memory than any cache holds, and of a few square products.
    """
    on_gpu = device == "cuda"
    words = torch.ones((1 << 30) if on_gpu else (1 << 27), dtype=torch.float32, device=device)
    side = 8192 if on_gpu else 1536
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)

    def fastest(call: Callable[[], object]) -> float:
        if on_gpu:
            return time_us(call, 10, graph=False, clock=WARM).p20
        return host_us(lambda _: call(), 0.3, least=5).p20

    read, product = fastest(words.sum), fastest(lambda: torch.mm(square, square))
    return {"bytes": 1e6 * words.nbytes / read, "bf16" if on_gpu else "fp32": 1e6 * 2 * side**3 / product}


def shown(rows: Iterable[Row], device: str) -> list[Row]:
    """All rows, each printed as it comes, the floor's share last: a run that ends early has said what it knows."""
    print(f"{'op':<18} {'case':<34} {'who':<28} {'us':>9} {'p20':>9} {'p80':>9} {'floor':>8} {'of floor':>8}")
    result = []
    for row in rows:
        floor, time = row.floor_us(device), row.time
        share = "" if not floor else f"{floor:8.1f} {time.median / floor:7.2f}x"
        times = f"{time.median:9.1f} {time.p20:9.1f} {time.p80:9.1f}"
        print(f"{row.op:<18} {row.case:<34} {row.who:<28} {times} {share}", flush=True)
        result.append(row)
    return result
