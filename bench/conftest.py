"""`pytest bench --benchmark-only`: each op, the engine and the commands beside a peer, on the device at hand.

Small sizes on a CPU. After the run, ratios to the peers are compared with the stored run of the same machine kind, if
there is one; `bench/check.py` does the same with an exit code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Not to interpret kernels: `auto` passes over them on a CPU.
    os.environ.pop("TRITON_INTERPRET", None)

from bench import check, record
from bench.measure import Row, Time

ROWS = pytest.StashKey[list[Row]]()
CLOCK = "wall clock, device waited for"


@dataclass(frozen=True)
class Sizes:
    """What is measured on this device."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    length: int
    items: int


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    """Those of use on a GPU, in bf16; on a CPU some that end soon, in fp32."""
    if torch.cuda.is_available():
        return Sizes(torch.device("cuda"), torch.bfloat16, 512, 50, 12_101)
    return Sizes(torch.device("cpu"), torch.float32, 16, 12, 1_000)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """timed(op, case, who, call): one contender of a group."""

    def measure(op: str, case: str, who: str, call: Callable[[], object]) -> Any:
        benchmark.group = f"{op}: {case}"
        benchmark.name = who
        on_gpu = torch.cuda.is_available()

        def finished() -> object:
            found = call()
            if on_gpu:
                torch.cuda.synchronize()
            return found

        result = benchmark(finished)
        if benchmark.stats is not None:  # not with --benchmark-disable
            spent = Time.of([1e6 * seconds for seconds in benchmark.stats.stats.data])
            row = Row(op, case, who, spent, clock=CLOCK)
            benchmark.extra_info |= {"op": op, "case": case, "who": who, "ours": row.ours}
            request.config.stash.setdefault(ROWS, []).append(row)
        return result

    return measure


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The facts by which `bench/check.py` finds runs of the same machine kind."""
    found, clean = record.commit()
    machine_info["fave_fast"] = {"machine": record.machine(torch.cuda.is_available()), "commit": found, "clean": clean}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Ours against the peers, and against what is stored."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    recorder = record.Recorder(check.PYTEST, ["pytest bench --benchmark-only"], torch.cuda.is_available())
    run = recorder.finish(rows, {})
    terminalreporter.section("ours / peer")
    for line in check.report(run, check.latest(record.stored(record.RESULTS), run)):
        terminalreporter.write_line(line)
