"""One step from histories on the host to lists on the host; `python -m bench.latency [--data FILE]`.

Wall-clock time of single requests, one after the other, each of B histories of item numbers: what
`Recommender.best_items` does, and through original ids what `Recommender.recommend` does. No time is printed unless the
captured lists equal the uncaptured ones bit for bit and the reference's scores within rounding.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bench.measure import WARM, time_us
from fave_fast.checkpoint import Checkpoint
from fave_fast.compiled import CompiledOneStep, Mode
from fave_fast.config import Config
from fave_fast.data import IdMap, gather_histories, load_interactions
from fave_fast.engine import Recommender
from fave_fast.flow import InferenceNoise
from fave_fast.graphs import CapturedParts, CapturedStep, Floats, Histories, Ints, Step, StepGraphs
from fave_fast.model import FAVE
from fave_fast.one_step import OneStep
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.encoder import EncoderWeights, InputPath, Plan, encode_ids, planned_rows

K, LENGTH = 20, 50
BATCHES = (1, 8, 64, 512)
SIZES = (12_101, 1_000_000, 10_000_000)
CALLERS = (1, 4, 16)
SATURATED = (1, 64, 512)  # batch sizes whose users a second are measured
SECONDS = 2.0  # of saturation

Row = dict[str, object]


def model_of(items: int) -> FAVE:
    """A random model on the GPU with a catalogue of `items`."""
    torch.manual_seed(0)
    model = FAVE(Config().model, 1).to("cuda", torch.bfloat16).eval()
    table = torch.empty(items + 1, model.config.d, dtype=torch.bfloat16, device="cuda")
    for part in table.split(1 << 20):
        part.normal_()
    model.item_embedding.weight = nn.Parameter(table, requires_grad=False)
    model.num_items = items
    return model


def step_of(model: FAVE, backend: str) -> Step:
    flow = Config().flow
    path = InputPath.pack(model, flow, InferenceNoise.draw(model, flow))
    return Step(EncoderWeights.pack(model), path, backend)


def full_length(count: int, items: int) -> list[Histories]:
    """Requests of `count` random histories of the longest length."""
    source = np.random.default_rng(0)
    offsets = np.arange(count + 1, dtype=np.int64) * LENGTH
    return [Histories(source.integers(1, items + 1, count * LENGTH, dtype=np.int32), offsets) for _ in range(32)]


def real(count: int, flat: npt.NDArray[np.int32], begins: npt.NDArray[np.int64]) -> list[Histories]:
    """Requests of `count` users of a data set, with all that they met."""
    source = np.random.default_rng(0)
    requests = []
    for _ in range(32):
        users = source.integers(0, len(begins) - 1, count)
        parts = [flat[begins[user] : begins[user + 1]] for user in users]
        offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts])))
        requests.append(Histories(np.concatenate(parts), offsets))
    return requests


def holding(graphs: StepGraphs, request: Histories) -> CapturedStep | CapturedParts | None:
    """What the engine answers a request by: one graph, or several."""
    return graphs.fitting(request) or graphs.split(request)


def run(graphs: StepGraphs, request: Histories) -> tuple[Floats, Ints]:
    captured = holding(graphs, request)
    assert captured is not None
    return captured.run(request, True)


def check(step: Step, graphs: StepGraphs, requests: list[Histories]) -> None:
    for request in requests[:4]:
        scores, best = run(graphs, request)
        ids, offsets = (torch.from_numpy(part).cuda() for part in request)
        exclude = Exclusions(ids, offsets)
        want = step(ids, offsets, exclude, graphs.k)
        # The graph may be of a larger batch, whose encoder's kernel may be the other one; parts keep the whole's.
        backend = step.encoder_backend(graphs.batch_of(request) or len(offsets) - 1)
        same = np.array_equal(want[0].cpu(), scores) and np.array_equal(want[1].cpu(), best)
        if backend == step.encoder_backend(len(offsets) - 1) and not same:
            raise AssertionError("the captured list is not the uncaptured one")
        endpoint = encode_ids(step.weights, step.path, ids, offsets, backend=backend)
        plain, _ = score_topk(endpoint[-8:], step.table, graphs.k, exclude.rows(len(exclude) - 8, len(exclude))
                              if len(exclude) > 8 else exclude, backend="reference")  # fmt: skip
        if not np.allclose(plain.cpu(), scores[-8:], rtol=1e-4, atol=1e-3):
            raise AssertionError("the list is not the reference's")


def percentiles(call: Callable[[int], object], requests: int) -> dict[str, float]:
    """Microseconds of `requests` calls, one after the other, after a tenth of them to warm up."""
    times = np.empty(requests)
    for at in range(-requests // 10, requests):
        started = time.perf_counter()
        call(at)
        if at >= 0:
            times[at] = time.perf_counter() - started
    named = zip(("p50", "p95", "p99", "p99.9"), np.percentile(1e6 * times, (50, 95, 99, 99.9)), strict=True)
    return {name: round(float(value), 1) for name, value in named}


def users_per_second(graphs: StepGraphs, requests: list[Histories], callers: int) -> float:
    """All callers ask for one batch after the other."""
    counts = [0] * callers
    until = time.perf_counter() + SECONDS

    def ask(caller: int) -> None:
        at = caller
        while time.perf_counter() < until:
            run(graphs, requests[at % len(requests)])
            counts[caller] += len(requests[at % len(requests)].offsets) - 1
            at += 1

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def breakdown(step: Step, request: Histories) -> dict[str, float]:
    """Device microseconds: the encoder, the top K, both in one graph as a request has them, and an empty kernel."""
    ids, offsets = (torch.from_numpy(part).cuda() for part in request)
    exclude = Exclusions(ids, offsets)
    backend = step.encoder_backend(len(offsets) - 1)
    planned = step.plan(len(offsets) - 1) is not None
    plan = Plan.of(offsets.diff().clamp_max(LENGTH), planned_rows(LENGTH)) if planned else None
    endpoint = encode_ids(step.weights, step.path, ids, offsets, plan=plan, backend=backend)

    def encode() -> None:
        encode_ids(step.weights, step.path, ids, offsets, plan=plan, out=endpoint, backend=backend)

    def top_k() -> None:
        score_topk(endpoint, step.table, K, exclude, backend=step.backend)

    def both() -> None:
        encode()
        top_k()

    parts = {"encoder": encode, "top-K": top_k, "both": both, "empty": lambda: endpoint[:1].zero_()}
    return {name: round(time_us(call, 200, clock=WARM).median, 1) for name, call in parts.items()}


def padded(request: Histories, length: int) -> torch.Tensor:
    """The last `length` items of each history, padded on the left with 0: what a compiled program takes."""
    starts, ends = request.offsets[:-1], request.offsets[1:]
    return torch.from_numpy(gather_histories(request.ids, starts, ends, length)).long()


def compiled_row(model: FAVE, mode: Mode, items: int, batch: int, requests: int) -> Row:
    """The same step by `torch.compile`, its own CUDA graphs included; compile time is not counted."""
    flow = Config().flow
    peer = CompiledOneStep(OneStep(model, flow, InferenceNoise.draw(model, flow), K), LENGTH, mode)
    started = time.perf_counter()
    peer.warmup([batch])
    seconds = time.perf_counter() - started
    asked = [padded(request, LENGTH) for request in full_length(batch, items)]
    found = percentiles(lambda at: peer(asked[at % len(asked)], asked[at % len(asked)]), requests)
    who = f"torch.compile {mode}, compiled in {seconds:.0f} s"
    return {"N": items, "B": batch, "histories": "50 items", "who": who, "requests": requests, **found}


def measure(
    items: int,
    batches: Sequence[int],
    data: dict[str, Histories],
    requests: int,
    backend: str,
    compiled: Sequence[Mode],
) -> list[Row]:
    rows: list[Row] = []
    model = model_of(items)
    step = step_of(model, backend)
    started = time.perf_counter()
    graphs = StepGraphs(step, K)
    print(f"N {items:,}: {len(graphs.batches)} graphs captured in {time.perf_counter() - started:.2f} s", flush=True)
    for batch in batches:
        cases = {"50 items": full_length(batch, items)}
        cases |= {name: real(batch, *log) for name, log in data.items() if log.ids.max() <= items}
        for name, asked in cases.items():
            parted = [holding(graphs, request) for request in asked]
            if None in parted:
                most = max(len(request.ids) for request in asked)
                print(f"N {items:,}, B {batch}, {name}: no graphs hold requests of {most:,} items", flush=True)
                continue
            check(step, graphs, asked)
            count = requests if batch * items < 10**9 else max(100, requests // 10)
            found = percentiles(lambda at, asked=asked: run(graphs, asked[at % len(asked)]), count)
            parts = breakdown(step, asked[0])
            row: Row = {"N": items, "B": batch, "histories": name, "requests": count, **found, "device": parts}
            row["graphs"] = max(one.runs for one in parted if one is not None)
            print(json.dumps(row), flush=True)
            rows.append(row)
        for mode in compiled:
            rows.append(compiled_row(model, mode, items, batch, min(requests, 2000)))
            print(json.dumps(rows[-1]), flush=True)
    if items == SIZES[0]:
        for batch in [batch for batch in batches if batch in SATURATED]:
            for callers in CALLERS:
                speed = users_per_second(graphs, full_length(batch, items), callers)
                row = {"N": items, "B": batch, "callers": callers, "users_per_second": round(speed)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def random_checkpoint(items: int) -> Checkpoint:
    """An untrained model of the default sizes; item ids are 1 to `items`."""
    torch.manual_seed(0)
    none = torch.zeros(0, dtype=torch.int64)
    ids, weights = IdMap.from_ids(range(1, items + 1)), FAVE(Config().model, items).state_dict()
    popularity = torch.ones(items + 1, dtype=torch.int64)
    return Checkpoint(Config(), weights, ids, IdMap.from_ids([]), popularity, {}, none, none, none.new_zeros(1))


def through_recommender(requests: int) -> list[Row]:
    """`Recommender.best_items` on item numbers, and `recommend` on lists of original ids."""
    items = SIZES[0]
    recommender = Recommender(random_checkpoint(items), device="cuda", dtype="bf16")
    recommender.warmup(K)
    source = np.random.default_rng(0)
    rows: list[Row] = []

    def add(batch: int, histories: str, call: Callable[[int], object]) -> None:
        found = percentiles(call, max(200, requests // batch))
        rows.append({"N": items, "B": batch, "histories": histories, **found})
        print(json.dumps(rows[-1]), flush=True)

    def best_items(numbered: list[Histories]) -> Callable[[int], object]:
        return lambda at: recommender.best_items(*numbered[at % len(numbered)], K)

    def recommend(asked: list[list[list[int]]]) -> Callable[[int], object]:
        return lambda at: recommender.recommend(asked[at % len(asked)], K)

    for batch in (1, 64, 512):
        add(batch, "50 item numbers each, best_items()", best_items(full_length(batch, items)))
        asked = [source.integers(1, items + 1, (batch, LENGTH)).tolist() for _ in range(32)]
        add(batch, "50 original ids each, recommend()", recommend(asked))
    print(f"batches: {dict(recommender.batches)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, action="append", default=[], help="log of real histories; may repeat")
    parser.add_argument("--requests", type=int, default=10_000, help="timed requests of a case")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton"))
    parser.add_argument("--compiled", choices=("reduce-overhead", "max-autotune"), action="append", default=[])
    parser.add_argument("--batch", type=int, action="append", help=f"histories of a request (default: {BATCHES})")
    parser.add_argument("--items", type=int, action="append", help=f"sizes of the catalogue (default: {SIZES})")
    args = parser.parse_args()
    logs = {path.stem: load_interactions(path) for path in args.data}
    data = {name: Histories(log.items, log.offsets) for name, log in logs.items()}
    rows: list[Row] = []
    for items in args.items or SIZES:
        rows += measure(items, args.batch or BATCHES, data, args.requests, args.backend, args.compiled)
    rows += through_recommender(args.requests)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "backend": args.backend, "rows": rows}))


if __name__ == "__main__":
    main()
