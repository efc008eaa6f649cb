"""What the death of a replica costs those who ask: two replicas of the Ray Serve deployment under load, one killed.

    python -m bench.replicas [--dtype bf16] [--items 12101] [--callers 8]

Needs `pip install 'fave-fast[ray]'`; starts a Ray cluster of its own on this machine, and a random checkpoint of the
default configuration. Callers ask without a pause, each for a history of its own, and every answer is compared with the
engine's. After some seconds one replica gets SIGKILL; the load goes on until Ray has two replicas again, and as long
after that. The last line is one JSON object; times are in seconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.latency import random_checkpoint
from fave_fast import checkpoint as checkpoints
from fave_fast import cli
from fave_fast.data import IdMap
from fave_fast.engine import Recommender
from fave_fast.model import DTYPES
from fave_fast.serve_ray import NAME, RayOptions, deployment

APP = "bench"
REPLICAS = 2
SECONDS = 5.0  # of load before the kill, and after the recovery
PATIENCE = 120.0


@dataclass(frozen=True)
class Asked:
    """One request: when it was sent and answered, how, and whether a list in the answer was right."""

    began: float
    ended: float
    status: int
    right: bool


@dataclass(frozen=True)
class Outcome:
    """All requests, and moments on their clock."""

    asked: list[Asked]
    killed: float  # just before the signal
    dead: float  # the process is no more
    noticed: float  # Ray counts one replica less
    recovered: float  # Ray counts as many replicas as before

    @property
    def failed(self) -> list[Asked]:
        """Requests without a list."""
        return [one for one in self.asked if one.status != 200]

    def rate(self, begin: float, end: float) -> float:
        """Lists a second between two moments."""
        return sum(one.status == 200 and begin <= one.ended < end for one in self.asked) / (end - begin)


@contextmanager
def deployed(options: RayOptions) -> Iterator[int]:
    """A Ray cluster on this machine that serves `options` by two replicas; the port it listens on."""
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Replicas take CPUs by number alone: a machine with fewer has them share.
    ray.init(num_cpus=REPLICAS + 1, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(options)
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(options: RayOptions) -> None:
    """Serve `options` by two replicas, or replace those that are there; returns when they answer."""
    from ray import serve

    serve.run(deployment(replace(options, replicas=REPLICAS)), name=APP)


def replicas() -> list[int]:
    """Process ids of the replicas."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes()
        except OSError:
            continue  # it has just ended
        if title.startswith(f"ray::ServeReplica:{APP}:{NAME}".encode()):
            found.append(int(path.parent.name))
    return sorted(found)


def running() -> int:
    """How many replicas Ray counts as running."""
    from ray import serve

    return serve.status().applications[APP].deployments[NAME].replica_states.get("RUNNING", 0)


def _wait(reached: Callable[[], bool], what: str) -> float:
    """The moment when it is so."""
    given_up = time.perf_counter() + PATIENCE
    while not reached():
        if time.perf_counter() > given_up:
            raise RuntimeError(f"after {PATIENCE:g} s still not: {what}")
        time.sleep(0.02)
    return time.perf_counter()


def _is_dead(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Callers:
    """Threads that ask without a pause, each for its own history, until they are stopped."""

    def __init__(
        self, port: int, recommenders: Sequence[Recommender], histories: Sequence[list[int]], k: int = 20
    ) -> None:
        """Start them.

        Args:
            port: where they ask.
            recommenders: a list is right if one of them gives it.
            histories: one for each caller.
            k: the length of a list where a request names none.
        """
        self._port, self._stop = port, threading.Event()
        self._asked: list[list[Asked]] = [[] for _ in histories]
        expected = zip(*(recommender.recommend(histories, k) for recommender in recommenders), strict=True)
        self._threads = [
            threading.Thread(target=self._ask, args=(history, [(one.items, one.scores) for one in answers], asked))
            for history, answers, asked in zip(histories, expected, self._asked, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, history: list[int], expected: list[tuple[list[object], list[float]]], asked: list[Asked]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        body = json.dumps({"histories": [history]})
        while not self._stop.is_set():
            began, right = time.perf_counter(), False
            try:
                connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                status, content = answer.status, answer.read()
                if status == 200:
                    (found,) = json.loads(content)["lists"]
                    right = (found["items"], found["scores"]) in expected
            except (OSError, http.client.HTTPException):
                status = 0
                connection.close()
            asked.append(Asked(began, time.perf_counter(), status, right))

    def each_has(self, more: int) -> None:
        """Wait until each caller has `more` answers than now."""
        before = [len(asked) for asked in self._asked]
        _wait(
            lambda: all(len(asked) >= count + more for asked, count in zip(self._asked, before, strict=True)),
            "an answer for each caller",
        )

    def stop(self) -> list[Asked]:
        """All that was asked."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        return [one for asked in self._asked for one in asked]


def kill_one(callers: Callers, load: Callable[[Callers], None]) -> Outcome:
    """Kill one of two replicas under load.

    Args:
        callers: who ask; stopped in the end.
        load: waits, before the kill and after the recovery, for as much load as is wanted.
    """
    try:
        load(callers)
        victim = replicas()[0]
        killed = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        dead = _wait(lambda: _is_dead(victim), "the killed replica is dead")
        noticed = _wait(lambda: running() < REPLICAS, "Ray has noticed")
        recovered = _wait(lambda: running() == REPLICAS, "Ray has started another replica")
        load(callers)
    finally:
        asked = callers.stop()
    return Outcome(asked, killed, dead, noticed, recovered)


def report(outcome: Outcome) -> dict[str, object]:
    """What happened, in numbers."""
    failed, killed = outcome.failed, outcome.killed
    first, last = min(one.began for one in outcome.asked), max(one.ended for one in outcome.asked)
    return {
        "requests": len(outcome.asked),
        "wrong_lists": sum(one.status == 200 and not one.right for one in outcome.asked),
        "failed": {str(status): count for status, count in sorted(Counter(one.status for one in failed).items())},
        "failed_but_sent_after_the_death": sum(one.began > outcome.dead for one in failed),
        "longest_answer": round(max(one.ended - one.began for one in outcome.asked), 3),
        "kill_to_last_failure": round(max((one.ended - killed for one in failed), default=0.0), 3),
        "kill_to_noticed": round(outcome.noticed - killed, 3),
        "kill_to_all_replicas_running": round(outcome.recovered - killed, 3),
        "lists_a_second": {
            "before": round(outcome.rate(first, killed)),
            "one_replica": round(outcome.rate(killed, outcome.recovered)),
            "after": round(outcome.rate(outcome.recovered, last)),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser("replicas", __doc__.splitlines()[0] if __doc__ else "")
    parser.prog = "python -m bench.replicas"
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES), help="of weights and scores")
    parser.add_argument("--items", type=cli.whole_number(64), default=12_101, help="items of the catalogue")
    parser.add_argument("--callers", type=cli.whole_number(1), default=8, help="who ask at a time")
    arguments: argparse.Namespace = parser.parse_args(argv)
    histories = [
        [(37 * at + 101 * caller) % arguments.items + 1 for at in range(50)] for caller in range(arguments.callers)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        checkpoints.save(replace(random_checkpoint(arguments.items), user_ids=IdMap.from_ids([1])), path)
        options = RayOptions(str(path), dtype=arguments.dtype, device="cpu")
        recommender = Recommender.from_pretrained(path, dtype=DTYPES[arguments.dtype])
        with deployed(options) as port:
            outcome = kill_one(Callers(port, [recommender], histories), lambda callers: time.sleep(SECONDS))
    print(json.dumps({**vars(arguments), **report(outcome)}))
    return 0


if __name__ == "__main__":
    cli.run(main)
