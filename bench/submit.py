"""Launch a captured request and wait for it, three ways, host to host; `python -m bench.submit`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch

from fave_fast.submit import Completion, Submission

REQUESTS = 10_000
ITEMS = 50  # ids in, as int32
ANSWERS = 20  # (score, id) out


def measure(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of one call, of REQUESTS calls one after another."""
    for _ in range(500):
        call()
    spans = np.empty(REQUESTS)
    for request in range(REQUESTS):
        start = time.perf_counter_ns()
        call()
        spans[request] = time.perf_counter_ns() - start
    return {name: float(np.percentile(spans, at)) / 1e3 for name, at in (("p50", 50), ("p99", 99), ("p99.9", 99.9))}


def empty() -> Callable[[], None]:
    """A request of one kernel that touches 4 bytes."""
    word = torch.zeros(1, device="cuda")
    return lambda: word.zero_()  # type: ignore[return-value]


def copies() -> Callable[[], None]:
    """A request of a copy in, a kernel and a copy out."""
    ids = torch.arange(ITEMS, dtype=torch.int32).pin_memory()
    out = torch.empty(2 * ANSWERS, dtype=torch.float32).pin_memory()
    device_ids = torch.empty(ITEMS, dtype=torch.int32, device="cuda")
    result = torch.empty(2 * ANSWERS, device="cuda")

    def work() -> None:
        device_ids.copy_(ids, non_blocking=True)
        torch.mul(device_ids[: 2 * ANSWERS], 0.5, out=result)
        out.copy_(result, non_blocking=True)

    return work


def capture(work: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def ways(work: Callable[[], None], stream: torch.cuda.Stream) -> dict[str, Callable[[], object]]:
    event, completion = torch.cuda.Event(), Completion(stream)
    if completion.why_not is not None:
        raise SystemExit(f"no completion flag: {completion.why_not}")

    def and_signal() -> None:
        work()
        completion.signal()

    plain, flagged = capture(work, stream), torch.cuda.CUDAGraph()
    with torch.cuda.graph(flagged, stream=stream):
        and_signal()
    submission = Submission(flagged, completion)

    def stream_wait() -> None:
        plain.replay()
        stream.synchronize()

    def event_wait() -> None:
        plain.replay()
        event.record(stream)
        event.synchronize()

    return {"replay, stream.synchronize": stream_wait, "replay, event.synchronize": event_wait, "run": submission.run}


def main() -> None:
    rows: list[dict[str, object]] = []
    stream = torch.cuda.Stream()
    for case, make in (("one kernel", empty), ("copy, kernel, copy", copies)):
        for who, call in ways(make(), stream).items():
            with torch.cuda.stream(stream):
                times = measure(call)
            rows.append({"case": case, "who": who, **times})
            print(f"{case:<20} {who:<28}", *(f"{name} {value:7.1f}" for name, value in times.items()))
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "requests": REQUESTS, "rows": rows}))


if __name__ == "__main__":
    main()
