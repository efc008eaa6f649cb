"""What `ncu --csv --page raw` counted, a line for each kernel, with what it means; `python -m bench.counters FILE`.

Read: bytes a second from or to the device's memory, and the share of what it can do; the share of cycles in which the
tensor cores worked; the share of warps that the multiprocessors held; and what a warp mostly waited for between two of
its instructions. Counters differ between GPUs and versions of ncu: each figure takes the first of its names that the
file has, and is left out where it has none.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TIME = ("gpu__time_duration.sum", "gpu__time_duration.max", "gpu__time_duration.avg")
BYTES = ("dram__bytes.sum.per_second",)
READ, WRITTEN = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MEMORY = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
L2 = ("lts__throughput.avg.pct_of_peak_sustained_elapsed",)
TENSOR = re.compile(r"sm__(inst_executed_)?pipe_tensor.*\.pct_of_peak_sustained_(active|elapsed)$")
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio$|"
                   r"smsp__average_warp_latency_issue_stalled_(\w+?)\.ratio$")  # fmt: skip

MEANING = {
    "long_scoreboard": "waits for data from L2 or memory",
    "short_scoreboard": "waits for shared memory or special functions",
    "wait": "fixed latency of the instruction before: too few independent instructions",
    "barrier": "waits for the other warps of its block",
    "gmma": "waits for a matrix product to end",
    "math_pipe_throttle": "its arithmetic unit is busy: near what that unit can do",
    "mio_throttle": "the queue of shared-memory and special instructions is full",
    "lg_throttle": "the queue of loads and stores is full: too many, too narrow",
    "tex_throttle": "the queue of texture loads is full",
    "drain": "waits for its last stores",
    "membar": "waits at a memory fence",
    "no_instruction": "waits for instructions: the code does not fit its cache, or jumps",
    "no_inst": "waits for instructions: the code does not fit its cache, or jumps",
    "branch_resolving": "waits for a branch",
    "imc_miss": "waits for constants",
    "sleeping": "sleeps, as told",
    "dispatch_stall": "the dispatcher holds it back",
    "not_selected": "another warp was chosen: enough warps are ready",
    "misc": "something else",
}


class CountersError(Exception):
    """A file that does not hold what ncu writes."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's counters; None for what was not counted."""

    name: str
    us: float | None
    gigabytes_per_second: float | None
    memory_percent: float | None
    l2_percent: float | None
    tensor_percent: float | None
    warps_percent: float | None
    stall: str | None
    stall_cycles: float | None  # of all that a warp spends between two instructions, on average

    @property
    def meaning(self) -> str:
        """The stall in words, and what limits the kernel."""
        words = MEANING.get(self.stall or "", self.stall or "")
        for share, what in ((self.memory_percent, "the memory"), (self.tensor_percent, "the tensor cores")):
            if share is not None and share >= 80:
                return f"limited by {what}; {words}"
        return words


def read(path: Path) -> list[Kernel]:
    """The kernels of a file, in the order in which they ran.

    Raises:
        CountersError: it cannot be read, or holds no table of ncu's.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CountersError(f"{path}: cannot be read: {error.strerror}") from None
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        said = next((line for line in lines if line.startswith("==ERROR==")), 'expected a line that begins with "ID"')
        raise CountersError(f"{path}: no table of ncu --csv --page raw: {said}")
    rows = list(csv.DictReader(line for line in lines[first:] if line.startswith('"')))
    kernels = [_kernel(row, rows[0]) for row in rows if row["ID"]]  # the line of units has no number
    if not kernels:
        raise CountersError(f"{path}: no kernel was profiled; expected at least one inside the ranges")
    return kernels


def _kernel(row: dict[str, str], units: dict[str, str]) -> Kernel:
    values = {name: value for name, text in row.items() if (value := _number(text)) is not None}

    def first(names: Sequence[str]) -> float | None:
        return next((values[name] for name in names if name in values), None)

    seconds = first(TIME)
    if seconds is not None:
        unit = next(units[name] for name in TIME if name in values)
        seconds *= {"s": 1.0, "second": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6}.get(unit, 1e-9)
    per_second = first(BYTES)
    if per_second is None and seconds and READ in values and WRITTEN in values:
        per_second = (values[READ] + values[WRITTEN]) / seconds
    tensor = [value for name, value in values.items() if TENSOR.match(name)]
    stalls = {found.group(1) or found.group(2): value for name, value in values.items() if (found := STALL.match(name))}
    stalls.pop("selected", None)  # no wait: the issue itself
    stall = max(stalls, key=lambda name: stalls[name]) if stalls else None
    return Kernel(
        name=re.sub(r"\(.*|<.*", "", row["Kernel Name"]),
        us=None if seconds is None else 1e6 * seconds,
        gigabytes_per_second=None if per_second is None else per_second / 1e9,
        memory_percent=first(MEMORY),
        l2_percent=first(L2),
        tensor_percent=max(tensor) if tensor else None,
        warps_percent=first(OCCUPANCY),
        stall=stall,
        stall_cycles=None if stall is None else stalls[stall],
    )


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def table(kernels: Sequence[Kernel]) -> str:
    """A line for each kernel; of several runs of one name, the one with the median time."""
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    titles = f"{'us':>8} {'GB/s':>7} {'memory':>7} {'L2':>6} {'tensor':>7} {'warps':>6}  waits most"
    lines = [f"{'kernel':<44} {'runs':>4} {titles}"]
    for name, runs in by_name.items():
        kernel = sorted(runs, key=lambda one: one.us or 0)[len(runs) // 2]
        shares = (kernel.memory_percent, kernel.l2_percent, kernel.tensor_percent, kernel.warps_percent)
        memory, l2, tensor, warps = ("-" if share is None else f"{share:.0f} %" for share in shares)
        us = "-" if kernel.us is None else f"{kernel.us:.1f}"
        speed = "-" if kernel.gigabytes_per_second is None else f"{kernel.gigabytes_per_second:.0f}"
        cycles = "" if kernel.stall_cycles is None else f"{kernel.stall} ({kernel.stall_cycles:.1f} cycles): "
        lines.append(
            f"{name[:44]:<44} {len(runs):>4} {us:>8} {speed:>7} {memory:>7} {l2:>6} {tensor:>7} {warps:>6}  "
            f"{cycles}{kernel.meaning}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="written by bench/profile.sh ncu, or by ncu --csv --page raw")
    parser.add_argument("--json", action="store_true", help="also print every kernel as one JSON object, last")
    arguments = parser.parse_args(argv)
    try:
        kernels = read(arguments.file)
    except CountersError as error:
        print(f"bench.counters: error: {error}", file=sys.stderr)
        return 2
    print(table(kernels))
    if arguments.json:
        print(json.dumps([asdict(kernel) for kernel in kernels]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
