"""Something for a profiler to look at: the parts of a step, one after another; `python -m bench.workload PART`.

    step       a serving step, histories to lists, its kernels launched one by one
    graph      the same, replayed from its CUDA graph
    topk       the exact top K of a catalogue
    train      a training step of each stage, its kernels launched one by one

Everything is compiled and warm before cudaProfilerStart, so that profilers told to wait for it see nothing else.
`bench/profile.sh` runs this with FAVE_FAST_NVTX=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from bench.latency import full_length, model_of, step_of
from fave_fast import cli
from fave_fast.graphs import StepGraphs
from fave_fast.ops import Exclusions, score_topk

K = 20
Call = Callable[[], object]


def step(arguments: argparse.Namespace) -> Call:
    """A serving step."""
    serving = step_of(model_of(arguments.items), arguments.backend)
    [request] = full_length(arguments.batch, arguments.items)[:1]
    ids, offsets = (torch.from_numpy(part).cuda() for part in request)
    exclude, plan = Exclusions(ids, offsets), serving.plan(arguments.batch)
    return lambda: serving(ids, offsets, exclude, K, plan=plan)


def graph(arguments: argparse.Namespace) -> Call:
    """A serving step from its graph."""
    graphs = StepGraphs(step_of(model_of(arguments.items), arguments.backend), K, (arguments.batch,))
    [request] = full_length(arguments.batch, arguments.items)[:1]
    captured = graphs.fitting(request)
    if captured is None:
        raise SystemExit(f"no graph holds {arguments.batch} histories")
    return lambda: captured.run(request, True)


def topk(arguments: argparse.Namespace) -> Call:
    """The exact top K alone."""
    from bench.score_topk import catalogue

    table = catalogue(arguments.items)
    queries = torch.randn(arguments.batch, table.shape[1], device="cuda").to(table.dtype)
    return lambda: score_topk(queries, table, K)


def train(arguments: argparse.Namespace) -> Call:
    """A step of stage 1, then one of stage 2."""
    from bench.training import full_length as log
    from bench.training import make

    data, config, batches = log()
    both = [make("fused, no graph", stage, data, config, torch.device("cuda")) for stage in (1, 2)]
    return lambda: [one.take(*batches[0], 0) for one in both]


PARTS = {"step": step, "graph": graph, "topk": topk, "train": train}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.workload", description=__doc__.splitlines()[0])
    whole = cli.whole_number(1)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--batch", type=whole, default=512, help="histories or queries")
    parser.add_argument("--items", type=whole, default=12_101, help="size of the catalogue")
    parser.add_argument("--times", type=whole, default=3, help="how often, after the warm-up")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton"))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device; expected one to profile")
    call = PARTS[arguments.part](arguments)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(arguments.times):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
