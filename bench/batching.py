"""What `MicroBatcher` adds to a request; `python -m bench.batching`. No model and no GPU: an engine that does nothing.

Microseconds, median and 99th percentile of a request; the last line is one JSON object. Two threads that pass a lock to
and fro show what the worker's two thread switches cost at least.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from fave_fast.batching import MicroBatcher
from fave_fast.engine import History, ItemId, Recommendation

HISTORY: list[ItemId] = list(range(50))
REQUESTS = 10_000
CALLERS = 16


class Nothing:
    """Answers at once."""

    answer = Recommendation([1], [1.0], 0, False)

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
    ) -> list[Recommendation]:
        return [self.answer] * len(histories)


def times(call: Callable[[], object]) -> list[float]:
    """Median and 99th percentile in microseconds."""
    for _ in range(REQUESTS // 10):
        call()
    found = []
    for _ in range(REQUESTS):
        start = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - start)
    found.sort()
    return [found[REQUESTS // 2] / 1e3, found[REQUESTS * 99 // 100] / 1e3]


def pass_a_lock() -> list[float]:
    there, back = threading.Lock(), threading.Lock()
    there.acquire()
    back.acquire()

    def serve() -> None:
        while True:
            there.acquire()
            back.release()

    def call() -> None:
        there.release()
        back.acquire()

    threading.Thread(target=serve, daemon=True).start()
    return times(call)


def from_many_threads(batcher: MicroBatcher) -> float:
    """Microseconds a request, `CALLERS` threads."""

    def work() -> None:
        for _ in range(REQUESTS // CALLERS):
            batcher.recommend(HISTORY, timeout=60.0)

    threads = [threading.Thread(target=work) for _ in range(CALLERS)]
    start = time.perf_counter_ns()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter_ns() - start) / 1e3 / (REQUESTS // CALLERS * CALLERS)


def main() -> None:
    engine = Nothing()
    rows: dict[str, object] = {"direct": times(lambda: engine.recommend([HISTORY]))}
    with MicroBatcher(engine) as batcher:
        rows["caller alone, in its own thread"] = times(lambda: batcher.recommend(HISTORY))
        rows["caller alone, with a timeout: by the worker"] = times(lambda: batcher.recommend(HISTORY, timeout=60.0))
        rows["two threads pass a lock to and fro"] = pass_a_lock()
        rows[f"{CALLERS} callers by the worker, us a request"] = from_many_threads(batcher)
        rows["batches"] = dict(batcher.statistics.batch_sizes)
    for name, value in rows.items():
        print(f"{name:<46} {value}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
