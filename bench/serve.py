"""What the HTTP server adds to the engine, and what it does at twice the load that it can take.

    python -m bench.serve [--dtype bf16] [--items 12101] [--rounds 30]

Needs the load generator `hey` (Debian has it under that name). A random checkpoint of the default configuration, one
history of 50 items a request, on this machine alone.

- app: CPU time of a request in the app alone, from its scope to its answer: no socket, and an engine that does nothing.
- added: rounds of one second each, the engine called directly and the server asked by `hey`, 100 requests a second
  each, in turn. Of each the median latency of every round, and of these the least, the median and the difference:
  other work on the machine can only add to a round.
- saturation: 64 callers without a pause; answers a second.
- overload: twice that rate, from 512 callers, a queue of 64 histories: statuses, latencies of the answers, and whether
  the server's own count of answers is that of the callers.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.batching import Nothing
from bench.latency import random_checkpoint
from fave_fast import checkpoint as checkpoints
from fave_fast import cli
from fave_fast.batching import MicroBatcher
from fave_fast.data import IdMap
from fave_fast.engine import ItemId, Recommender
from fave_fast.errors import InputError
from fave_fast.model import DTYPES
from fave_fast.serving.api import Limits
from fave_fast.serving.app import create_app
from fave_fast.serving.service import Model, Service

RATE = 100
CALLERS, MANY_CALLERS = 64, 512
QUEUE = 64
SECONDS = 5


@dataclass(frozen=True)
class Load:
    """What `hey` saw: seconds and status of each request."""

    seconds: np.ndarray[tuple[int], np.dtype[np.float64]]
    statuses: np.ndarray[tuple[int], np.dtype[np.int64]]
    wall: float

    def milliseconds(self, percent: float) -> float:
        """A percentile of the answers' latencies."""
        return round(1e3 * float(np.percentile(self.seconds[self.statuses == 200], percent)), 3)


@contextmanager
def server(path: Path, dtype: str, *options: str) -> Iterator[str]:
    """The address of a server process."""
    command = [sys.executable, "-m", "fave_fast.serve", "--ckpt", str(path), "--dtype", dtype, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield "http://" + process.stderr.readline().split("http://")[1].split()[0]
    finally:
        process.terminate()
        if process.wait() != 0:
            raise RuntimeError(f"the server ended with {process.returncode}: {process.stderr.read()}")


def load(address: str, body: Path, *options: str) -> Load:
    """Load from `hey` on /v1/recommend."""
    command = ["hey", "-m", "POST", "-T", "application/json", "-D", str(body), "-o", "csv", *options]
    started = time.perf_counter()
    done = subprocess.run([*command, f"{address}/v1/recommend"], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - started
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    seconds = np.array([float(row["response-time"]) for row in rows])
    return Load(seconds, np.array([int(row["status-code"]) for row in rows]), wall)


def directly(recommender: Recommender, history: list[ItemId]) -> float:
    """Median milliseconds of the engine, a second long."""
    found, due = [], time.perf_counter()
    for _ in range(RATE):
        due += 1 / RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        started = time.perf_counter()
        recommender.recommend([history])
        found.append(time.perf_counter() - started)
    return 1e3 * float(np.median(found))


def answered(address: str) -> int:
    """How many requests the server says it answered with a list."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    name = 'fave_fast_http_requests_total{route="/v1/recommend",status="200"} '
    return int(sum(float(line.removeprefix(name)) for line in lines if line.startswith(name)))


def added(address: str, body: Path, recommender: Recommender, history: list[ItemId], rounds: int) -> dict[str, float]:
    """Milliseconds of both, by rounds."""
    pairs = []
    for _ in range(rounds):
        engine = directly(recommender, history)
        pairs.append((engine, load(address, body, "-z", "1s", "-c", "1", "-q", str(RATE)).milliseconds(50)))
    engine_ms, server_ms = np.array(pairs).T
    return {
        "rounds": rounds,
        "engine_p50_ms_least": round(float(engine_ms.min()), 3),
        "engine_p50_ms_median": round(float(np.median(engine_ms)), 3),
        "server_p50_ms_least": round(float(server_ms.min()), 3),
        "server_p50_ms_median": round(float(np.median(server_ms)), 3),
        "added_p50_ms_least": round(float(server_ms.min() - engine_ms.min()), 3),
        "added_p50_ms_median": round(float(np.median(server_ms - engine_ms)), 3),
    }


def overload(path: Path, dtype: str, body: Path, rate: float) -> dict[str, object]:
    """Twice the rate that saturates."""
    with server(path, dtype, "--no-request-log", "--max-queue", str(QUEUE), "--max-histories", str(QUEUE)) as address:
        each = max(1.0, 2 * rate / MANY_CALLERS)
        count = MANY_CALLERS * max(1, round(each * SECONDS))  # hey gives each caller the same number
        found = load(address, body, "-n", str(count), "-c", str(MANY_CALLERS), "-q", f"{each:.2f}")
        counted = answered(address)
    statuses = {str(status): count for status, count in sorted(Counter(found.statuses.tolist()).items())}
    return {
        "offered_per_second": round(each * MANY_CALLERS),
        "sent_per_second": round(len(found.seconds) / found.wall),
        "queue": QUEUE,
        "requests": count,
        "without_an_answer": count - len(found.seconds),
        "statuses": statuses,
        "answers_p50_ms": found.milliseconds(50),
        "answers_p99_ms": found.milliseconds(99),
        "answers_longest_ms": found.milliseconds(100),
        "all_that_the_server_answered_arrived": counted == statuses.get("200", 0),
    }


class Idle(Recommender):
    """Answers at once."""

    recommend = Nothing.recommend  # type: ignore[assignment]
    answer = Nothing.answer._replace(items=list(range(1, 21)), scores=[0.5] * 20)


def app_alone(path: Path, body: bytes, rounds: int) -> dict[str, float]:
    """Microseconds of CPU time a request, by rounds of 100."""
    engine = Idle.from_pretrained(path)
    service = Service(lambda: Model("0" * 64, str(path), engine), MicroBatcher)
    app = create_app(service, limits=Limits(), log_requests=False)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    about = {"type": "http", "method": "POST", "path": "/v1/recommend", "query_string": b"", "client": ("127.0.0.1", 1)}

    async def ask() -> None:
        statuses: list[int] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": body}

        async def send(message: MutableMapping[str, Any]) -> None:
            statuses.append(message.get("status", 0))

        await app({**about, "headers": headers, "state": {}}, receive, send)
        assert statuses[0] == 200

    async def work() -> list[float]:
        found = []
        for _ in range(rounds + 3):
            started = time.process_time()
            for _ in range(100):
                await ask()
            found.append(1e4 * (time.process_time() - started))
        await service.close()
        return found[3:]

    found = asyncio.run(work())
    return {"cpu_us_least": round(min(found)), "cpu_us_median": round(float(np.median(found)))}


def measure(dtype: str, items: int, rounds: int) -> dict[str, object]:
    """All four."""
    history: list[ItemId] = [37 * at % items + 1 for at in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        path, body = Path(folder) / "model.pt", Path(folder) / "body.json"
        checkpoints.save(replace(random_checkpoint(items), user_ids=IdMap.from_ids([1])), path)
        body.write_text(json.dumps({"histories": [history]}))
        found: dict[str, object] = {"dtype": dtype, "items": items, "device": "cpu"}
        found["app"] = app_alone(path, body.read_bytes(), rounds)
        with server(path, dtype, "--no-request-log") as address:
            recommender = Recommender.from_pretrained(path, dtype=DTYPES[dtype])
            found["at_100_a_second"] = added(address, body, recommender, history, rounds)
            print(json.dumps(found), flush=True)
            full = load(address, body, "-z", f"{SECONDS}s", "-c", str(CALLERS))
        rate = float(np.count_nonzero(full.statuses == 200)) / SECONDS
        found["saturation"] = {
            "callers": CALLERS,
            "answers_per_second": round(rate),
            "p50_ms": full.milliseconds(50),
            "p99_ms": full.milliseconds(99),
        }
        found["at_twice_saturation"] = overload(path, dtype, body, rate)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = cli.Parser("serve", __doc__.splitlines()[0] if __doc__ else "")
    parser.prog = "python -m bench.serve"
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES), help="of weights and scores")
    parser.add_argument("--items", type=cli.whole_number(64), default=12_101, help="items of the catalogue")
    parser.add_argument("--rounds", type=cli.whole_number(1), default=30, help="seconds for each of engine and server")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if shutil.which("hey") is None:
        raise InputError("the load generator hey is not there; expected it on the PATH (apt-get install hey)")
    print(json.dumps(measure(arguments.dtype, arguments.items, arguments.rounds)))
    return 0


if __name__ == "__main__":
    cli.run(main)
