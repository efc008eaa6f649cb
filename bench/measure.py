"""How everything here is timed, and the floor that a time is compared with.

Times are those of device events around one CUDA-graph replay (launch gaps of Python excluded), the L2 cache flushed
before each, as a median with the 20th and 80th percentile over many replays.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Measured ceilings: copy (read plus write), read only, bf16 matrix product. A GPU that is not listed gets no floor.
CEILINGS: dict[str, dict[str, float]] = {
    "NVIDIA H200": {"bytes": 4.35e12, "bf16": 740e12},
    "NVIDIA H100 80GB HBM3": {"bytes": 3.0e12, "bf16": 740e12},
}


@dataclass(frozen=True)
class Time:
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Row:
    """One measurement: who, on what, how long, and the least that its bytes and operations can take."""

    op: str
    case: str
    who: str
    time: Time
    floor_bytes: int = 0
    floor_operations: int = 0

    def floor_us(self, gpu: str) -> float | None:
        """The larger of the two floors in microseconds, or None on a GPU without known ceilings."""
        ceiling = CEILINGS.get(gpu)
        if ceiling is None:
            return None
        return 1e6 * max(self.floor_bytes / ceiling["bytes"], self.floor_operations / ceiling["bf16"])

    def as_dict(self, gpu: str) -> dict[str, object]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "floor_us": self.floor_us(gpu)}


def time_us(call: Callable[[], object], repeats: int = 60, graph: bool = True, cold: bool = True) -> Time:
    """Time `call`, which must not allocate differently from one run to the next where `graph` is True.

    Unless `cold`, the L2 cache is left as the last run left it: a served model's weights stay there.
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
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in spans:
        if cold:
            flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(1e3 * start.elapsed_time(stop) for start, stop in spans)
    tenths = statistics.quantiles(times, n=10)
    return Time(statistics.median(times), tenths[1], tenths[7])


def table(rows: list[Row], gpu: str) -> str:
    """The rows as text, one line each, the floor's share last."""
    lines = [f"{'op':<18} {'case':<34} {'who':<28} {'us':>9} {'p20':>9} {'p80':>9} {'floor':>8} {'of floor':>8}"]
    for row in rows:
        floor = row.floor_us(gpu)
        share = "" if not floor else f"{floor:8.1f} {row.time.median / floor:7.2f}x"
        lines.append(
            f"{row.op:<18} {row.case:<34} {row.who:<28} {row.time.median:9.1f} {row.time.p20:9.1f} "
            f"{row.time.p80:9.1f} {share}"
        )
    return "\n".join(lines)
