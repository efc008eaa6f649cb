"""How time and memory grow with N, B, L, K and threads; `python bench/growth.py [--device cpu|cuda]`.

One size moves at a time, from B = 64 (1 on a CPU), N = 100,000, L = 50, K = 20. `score_topk` is the exact top K of
random queries, `step` the whole of a request's device work, histories to lists. Memory is all that it needs at its
peak: catalogue, weights and what a call takes; on a CPU, beyond the interpreter and its libraries. The run is added to
the day's file of results; a size that does not fit is listed as absent.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from bench import record
from bench.measure import HOST, WARM, Row, host_us, time_us
from bench.soak import return_freed_memory
from bench.verify import lists_are_complete
from fave_fast import cli
from fave_fast.config import Config, ModelConfig
from fave_fast.flow import InferenceNoise
from fave_fast.graphs import Step
from fave_fast.model import DTYPES, FAVE
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.encoder import EncoderWeights, InputPath

D, N, L, K = 128, 100_000, 50, 20
CATALOGUES = (10_000, 31_623, 100_000, 316_228, 1_000_000, 3_162_278, 10_000_000, 31_622_777, 100_000_000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LENGTHS = (1, 5, 10, 20, 30, 40, 50, 64, 100, 128)
LISTS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
SPARE = 1 << 30  # bytes to leave free
CHECK = 24  # bytes an item that the check takes: scores in float64, and copies of them


class Growth:
    """Times on one device in one dtype."""

    def __init__(self, device: torch.device, dtype: str, seconds: float, largest: int, absent: dict[str, str]) -> None:
        self.device, self.dtype, self.seconds, self.largest = device, DTYPES[dtype], seconds, largest
        self.absent = absent
        self.on_gpu = device.type == "cuda"
        self.before = _status("VmRSS")  # the interpreter and its libraries
        self.batch = 64 if self.on_gpu else 1
        self.who = f"fave_fast {dtype}"

    def rows(self, axes: Sequence[str]) -> Iterator[Row]:
        """The axes asked for, one after another."""
        for axis in axes:
            yield from {
                "N": self.catalogues, "B": self.batches, "L": self.lengths, "K": self.lists, "threads": self.threads,
            }[axis]()  # fmt: skip
            _give_back()

    def catalogues(self) -> Iterator[Row]:
        """N, the top K alone: nothing else depends on it."""
        for items in CATALOGUES:
            if items > self.largest:
                continue
            need, free = (items + 1) * D * self.dtype.itemsize, self._free()
            if need + CHECK * items + SPARE > free:
                takes = f"the catalogue takes {need / 2**30:.1f} GiB"
                self.absent[f"N {items}"] = f"{takes}, and {free / 2**30:.1f} are free"
                continue
            table = self._table(items)
            for batch in (1, self.batch) if self.on_gpu else (1,):
                yield self._topk(table, batch, K)
            del table
            _give_back()

    def batches(self) -> Iterator[Row]:
        """B, both the top K and the whole step."""
        batches = BATCHES if self.on_gpu else BATCHES[:10]
        table = self._table(N)
        for batch in batches:
            yield self._topk(table, batch, K)
        del table
        step = self._step(L)
        for batch in batches:
            yield self._whole(step, batch, L)

    def lengths(self) -> Iterator[Row]:
        """L, the whole step of a model that takes histories of that length."""
        for length in LENGTHS:
            yield self._whole(self._step(length), self.batch, length)

    def lists(self) -> Iterator[Row]:
        """K, the top K alone."""
        table = self._table(N)
        for k in LISTS:
            yield self._topk(table, self.batch, k)

    def threads(self) -> Iterator[Row]:
        """Threads of the CPU."""
        if self.on_gpu:
            return
        before = torch.get_num_threads()
        table, step = self._table(N), self._step(L)
        count = 1
        while count <= before:
            torch.set_num_threads(count)
            yield self._topk(table, 64, K, f", {count} threads")
            yield self._whole(step, 64, L, f", {count} threads")
            count *= 2
        torch.set_num_threads(before)

    def _topk(self, table: Tensor, batch: int, k: int, more: str = "") -> Row:
        queries = torch.randn(batch, D, device=self.device).to(self.dtype)
        lists_are_complete(queries[:1], table, None, *score_topk(queries[:1], table, k))
        items = len(table) - 1
        bytes_read, operations = (items + batch) * D * self.dtype.itemsize, 2 * batch * items * D
        case = f"B {batch}, N {items}, K {k}{more}"
        return self._row("score_topk", case, lambda: score_topk(queries, table, k), bytes_read, operations)

    def _whole(self, step: Step, batch: int, length: int, more: str = "") -> Row:
        ids = torch.randint(1, len(step.table), (batch * length,), device=self.device, dtype=torch.int32)
        offsets = torch.arange(batch + 1, device=self.device) * length
        exclude = Exclusions(ids, offsets)
        plan = step.plan(batch)

        def call() -> object:
            with torch.no_grad():
                return step(ids, offsets, exclude, K, plan=plan)

        return self._row("step", f"B {batch}, N {len(step.table) - 1}, L {length}{more}", call)

    def _row(self, op: str, case: str, call: Callable[[], object], read: int = 0, operations: int = 0) -> Row:
        _give_back()
        peak: int | None
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            spent, clock = time_us(call, 30, clock=WARM), WARM
        else:
            known = _reset_peak()
            call()
            peak = max(0, _status("VmHWM") - self.before) if known else None
            spent, clock = host_us(lambda _: call(), self.seconds, least=5), HOST
        print(
            f"{op:<12} {case:<44} {spent.median:12.1f} us {(peak or 0) / 2**20:10.1f} MiB", file=sys.stderr, flush=True
        )
        return Row(op, case, self.who, spent, read, operations, clock, peak_bytes=peak)

    def _table(self, items: int) -> Tensor:
        table = torch.empty(items + 1, D, dtype=self.dtype, device=self.device)
        for part in table.split(1 << 20):
            part.copy_(torch.randn(part.shape, device=self.device))
        return table

    def _step(self, length: int) -> Step:
        model = FAVE(ModelConfig(max_length=length), 1).to(self.device, self.dtype).eval()
        model.item_embedding.weight = nn.Parameter(self._table(N), requires_grad=False)
        model.num_items = N
        flow = Config().flow
        path = InputPath.pack(model, flow, InferenceNoise.draw(model, flow))
        return Step(EncoderWeights.pack(model), path, "auto")

    def _free(self) -> int:
        if self.on_gpu:
            return torch.cuda.mem_get_info()[0]
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        return int(found.group(1)) << 10 if found else 1 << 62


def _reset_peak() -> bool:
    """Let the process's peak of memory start anew; False where Linux does not do so."""
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found.group(1)) << 10 if found else 0


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


AXES = ("N", "B", "L", "K", "threads")


def measure(arguments: argparse.Namespace, command: Sequence[str]) -> record.Run:
    """Let each axis grow.

    Raises:
        AssertionError: a check failed.
        InputError: bad options.
    """
    device = cli.resolve_device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = arguments.dtype or ("bf16" if on_gpu else "fp32")
    absent: dict[str, str] = {}
    recorder = record.Recorder("growth", command, on_gpu, arguments.commit)
    growth = Growth(device, dtype, arguments.seconds, arguments.largest, absent)
    return recorder.finish(list(growth.rows(arguments.axis or AXES)), absent, dtype=dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="bench/growth.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--axis", choices=AXES, action="append", help="what grows; may repeat (default: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--largest", type=cli.whole_number(1), default=CATALOGUES[-1], help="N, at most")
    parser.add_argument("--seconds", type=float, default=0.5, help="of repeats for each row on a CPU")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--commit", metavar="TEXT", help="what is measured, where the checkout has no git to say it")
    arguments = parser.parse_args(argv)
    command = ["python", "bench/growth.py", *(sys.argv[1:] if argv is None else argv)]
    added = record.add("bench/growth.py", lambda: measure(arguments, command), arguments.out)
    if isinstance(added, int):
        return added
    run, path = added
    print(record.card(run))
    print(f"added to {path}", file=sys.stderr)
    print(json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
