"""Recommendations from a checkpoint: file to file, stdin to stdout, or a table; `python -m fave_fast.infer`."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from fave_fast import cli
from fave_fast.data import load_interactions
from fave_fast.demo import run_demo
from fave_fast.engine import ItemId, Recommendation, Recommender
from fave_fast.errors import DataError, InputError
from fave_fast.files import check_writable, replacing
from fave_fast.model import DTYPES
from fave_fast.profiling import Trace

_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
_LATENCY_REQUESTS = 200


@dataclass(frozen=True)
class Request:
    """One line of input: a user and what they met, oldest first."""

    user: ItemId
    history: list[ItemId]


@dataclass
class Counts:
    """What happened to the input, for the closing line."""

    users: int = 0
    unknown: int = 0
    popular: int = 0
    bad: int = 0

    def line(self, seconds: float) -> str:
        """All counts in words."""
        return (
            f"{self.users:,} users in {seconds:.2f} s; {self.unknown:,} unknown items skipped; "
            f"{self.popular:,} histories without a known item got the most popular; {self.bad:,} bad lines skipped"
        )


def _is_id(value: object) -> bool:
    if isinstance(value, str):
        return value != "" and value == value.encode("utf-8", "ignore").decode()  # JSON can spell lone surrogates
    return isinstance(value, int) and not isinstance(value, bool)


def parse_request(text: str, where: str) -> Request:
    """One jsonl line `{"user": ..., "history": [ids]}`; `where` (file and line) begins every error.

    Raises:
        DataError: not JSON, not an object, no user or history, or ids that are neither whole numbers nor text.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f'{where}: not JSON; expected {{"user": ..., "history": [ids]}}') from None
    if not isinstance(value, dict) or "user" not in value or "history" not in value:
        raise DataError(f'{where}: expected an object with "user" and "history"')
    user, history = value["user"], value["history"]
    if not _is_id(user):
        raise DataError(f"{where}: user is {user!r}; expected a whole number or text")
    if not isinstance(history, list):
        raise DataError(f"{where}: history is {history!r}; expected a list of item ids")
    for item in history:
        if not _is_id(item):
            raise DataError(f"{where}: the history holds {item!r}; expected whole numbers or text")
    return Request(user, history)


def read_requests(lines: Iterable[bytes], name: str, skip: Callable[[DataError], None] | None) -> Iterator[Request]:
    """Requests of a jsonl stream; blank lines are passed over, a bad one raises or goes to `skip`.

    Raises:
        DataError: a bad line, with its number, where `skip` is None; or no line at all.
    """
    found = False
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8").strip()
            if not text:
                continue
            found = True
            request = parse_request(text, where)
        except UnicodeDecodeError:
            error = DataError(f"{where}: not UTF-8; expected UTF-8 text")
        except DataError as bad:
            error = bad
        else:
            yield request
            continue
        found = True
        if skip is None:
            raise error from None
        skip(error)
    if not found:
        raise DataError(f'{name}: is empty; expected lines {{"user": ..., "history": [ids]}}')


def _holds_histories(path: Path) -> bool:
    """Whether a jsonl file holds histories, and not one interaction a line; its first line tells."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return True  # whose reader names the broken line and the form expected
    return not isinstance(value, dict) or "history" in value or "item" not in " ".join(map(str, value)).lower()


def _log_requests(arguments: argparse.Namespace) -> Iterator[Request]:
    """Every user of an interaction log with the whole of their history."""
    data = load_interactions(arguments.input, format=arguments.format, columns=cli.log_columns(arguments))
    cli.say_decisions(data.decisions)
    for user in range(data.num_users):
        yield Request(data.user_ids.id_at(user), data.item_ids.take(data.history(user) - 1))


@contextlib.contextmanager
def _requests(arguments: argparse.Namespace, counts: Counts) -> Iterator[Iterator[Request]]:
    def skip(error: DataError) -> None:
        counts.bad += 1
        cli.say(f"skipped: {error}")

    chosen = skip if arguments.skip_bad else None
    if arguments.input == "-":
        yield read_requests(sys.stdin.buffer, "stdin", chosen)
        return
    path = Path(arguments.input)
    is_log = arguments.format != "auto" or path.suffix not in _JSON_ENDINGS or not path.is_file()
    if is_log or not _holds_histories(path):
        yield _log_requests(arguments)
    else:
        with path.open("rb") as file:
            yield read_requests(file, str(path), chosen)


def read_deny(path: str) -> list[str]:
    """Item ids that nobody gets, one a line.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read the denied items: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; expected one item id a line") from None
    return [line.strip() for line in lines if line.strip()]


def _as_line(request: Request, answer: Recommendation) -> str:
    line: dict[str, object] = {"user": request.user, "items": answer.items, "scores": answer.scores}
    if answer.popular:
        line["fallback"] = "popular"
    return json.dumps(line, ensure_ascii=False)


def _batched(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        batch.append(request)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass
class _Sink:
    """Where answers go: lines at once, or a table at the end for parquet."""

    lines: io.TextIOBase | None
    rows: list[tuple[Request, Recommendation]] = field(default_factory=list)

    def put(self, request: Request, answer: Recommendation) -> None:
        if self.lines is None:
            self.rows.append((request, answer))
        else:
            self.lines.write(_as_line(request, answer) + "\n")

    def frame(self) -> pl.DataFrame:
        """The rows as a table: ids are whole numbers where all are, else text."""
        users = _ids([request.user for request, _ in self.rows])
        answers = [answer for _, answer in self.rows]
        items = _ids([item for answer in answers for item in answer.items])
        return lists_frame(users, answers, items.dtype)


def lists_frame(users: pl.Series, answers: Sequence[Recommendation], item_dtype: pl.DataType) -> pl.DataFrame:
    """A table of lists, one row a user: user (as given), items, scores (float32) and popular."""
    return pl.DataFrame(
        {
            "user": users,
            "items": pl.Series([_typed(answer.items, item_dtype) for answer in answers], dtype=pl.List(item_dtype)),
            "scores": pl.Series([answer.scores for answer in answers], dtype=pl.List(pl.Float32)),
            "popular": pl.Series([answer.popular for answer in answers], dtype=pl.Boolean),
        }
    )


def _typed(items: list[ItemId], dtype: pl.DataType) -> list[ItemId]:
    return [str(item) for item in items] if dtype == pl.String else items


def _ids(values: Sequence[ItemId]) -> pl.Series:
    if all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in values):
        return pl.Series(values, dtype=pl.Int64)
    return pl.Series([str(value) for value in values], dtype=pl.String)


@contextlib.contextmanager
def _sink(output: str | None) -> Iterator[_Sink]:
    """Answers to stdout, or to a file that appears only when everything is in it."""
    if output is None:
        yield _Sink(sys.stdout)  # type: ignore[arg-type]
        return
    with replacing(output) as part:
        if output.endswith(".parquet"):
            sink = _Sink(None)
            yield sink
            sink.frame().write_parquet(part)
        else:
            with part.open("w", encoding="utf-8") as file:
                yield _Sink(file)


def _answer_all(
    recommender: Recommender, arguments: argparse.Namespace, after_batch: Callable[[], None] = lambda: None
) -> None:
    counts, started = Counts(), time.perf_counter()
    deny = read_deny(arguments.deny) if arguments.deny else None
    if deny is not None:
        missing = int((recommender.checkpoint.item_ids.index(deny) < 0).sum())
        cli.say(f"note: {len(deny) - missing} items denied" + (f", {missing} unknown ones ignored" if missing else ""))
    with _sink(arguments.output) as sink, _requests(arguments, counts) as requests:
        for batch in _batched(requests, arguments.batch_size):
            answers = recommender.recommend(
                [request.history for request in batch],
                arguments.topk,
                exclude_history=not arguments.include_seen,
                deny=deny,
                batch_size=arguments.batch_size,
                n_samples=arguments.samples,
                seed=arguments.seed,
            )
            for request, answer in zip(batch, answers, strict=True):
                sink.put(request, answer)
                counts.users += 1
                counts.unknown += answer.unknown
                counts.popular += answer.popular
            after_batch()
    cli.say(counts.line(time.perf_counter() - started))


def _telling_of_the_first(step: Callable[[], None]) -> Callable[[], None]:
    """`step`, to be called after each answer; the first time it says how long the process took to get there."""
    told = False

    def after_answer() -> None:
        nonlocal told
        seconds = None if told else cli.process_seconds()
        if seconds is not None:
            cli.say(f"note: the first answer was there {seconds:.2f} s after the process began")
        told = True
        step()

    return after_answer


def sample_requests(recommender: Recommender) -> list[Request]:
    """The few users that the checkpoint keeps, with their histories up to the test target."""
    kept = recommender.checkpoint
    items, offsets = kept.sample_items.numpy(), kept.sample_offsets.tolist()
    users = kept.user_ids.take(kept.sample_users.numpy())
    spans = itertools.pairwise(offsets)
    return [
        Request(user, kept.item_ids.take(items[start:end] - 1)) for user, (start, end) in zip(users, spans, strict=True)
    ]


def sample_table(recommender: Recommender, k: int, after_request: Callable[[], None] = lambda: None) -> str:
    """Lists for the sample users, and the latency of single requests on this machine."""
    requests = sample_requests(recommender)
    facts = recommender.checkpoint.facts
    lines = [f"{facts['dataset']}: {facts['items']:,} items; trained on {facts['interactions']:,} interactions", ""]
    shown = min(k, 8)
    for request in requests:
        (answer,) = recommender.recommend([request.history], k)
        after_request()
        recent = ", ".join(map(str, request.history[-5:]))
        lines.append(f"user {request.user}: {len(request.history)} items, the last {recent}")
        pairs = zip(answer.items[:shown], answer.scores[:shown], strict=True)
        lines.append("  next: " + "  ".join(f"{item} ({score:.2f})" for item, score in pairs))
    timings = latencies(recommender, [request.history for request in requests], k, after_request)
    p50, p95, p99 = (_duration(value) for value in np.percentile(timings, (50, 95, 99)))
    lines += ["", f"one request, history to top-{k}: p50 {p50}, p95 {p95}, p99 {p99}"]
    return "\n".join([*lines, f"({len(timings)} requests one after the other, on {recommender.device})"])


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def latencies(
    recommender: Recommender,
    histories: Sequence[Sequence[ItemId]],
    k: int,
    after_request: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds of single requests, one after the other, after a tenth of them to warm up."""
    timings = []
    for number in range(_LATENCY_REQUESTS + _LATENCY_REQUESTS // 10):
        started = time.perf_counter()
        recommender.recommend([histories[number % len(histories)]], k)
        timings.append(time.perf_counter() - started)
        after_request()
    return timings[_LATENCY_REQUESTS // 10 :]


def _parser() -> cli.Parser:
    parser = cli.Parser("infer", "Recommend the next items from a checkpoint.")
    parser.add_argument("--ckpt", metavar="FILE", help="checkpoint written by fave_fast.train")
    parser.add_argument("--demo", action="store_true", help="make data, train, evaluate and recommend; about a minute")
    parser.add_argument(
        "--input", metavar="FILE", help='jsonl of {"user", "history"}, or an interaction log; - is stdin; none: a table'
    )
    parser.add_argument("--output", metavar="FILE", help="jsonl, or parquet by its ending; none: stdout")
    parser.add_argument("--topk", type=cli.whole_number(1), default=20, help="length of a list")
    parser.add_argument("--include-seen", action="store_true", help="also recommend items of the user's own history")
    parser.add_argument("--deny", metavar="FILE", help="item ids that nobody gets, one a line")
    parser.add_argument("--batch-size", type=cli.whole_number(1), default=512, help="histories in one forward pass")
    parser.add_argument("--skip-bad", action="store_true", help="count bad input lines and go on")
    parser.add_argument("--samples", type=cli.whole_number(1), help="endpoints drawn a history; none: as trained")
    parser.add_argument("--seed", type=cli.whole_number(0), help="of what is drawn; none: as trained")
    cli.add_log_options(parser)
    cli.add_run_options(parser, "of weights and scores")
    cli.add_table_bytes_option(parser)
    cli.add_profile_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.demo:
        print(run_demo(sample_table))
        return 0
    if arguments.ckpt is None:
        parser.error("--ckpt FILE is missing; expected a checkpoint, or --demo")
    if arguments.input is None and arguments.output is not None:
        parser.error("--output without --input; expected both, or neither")
    if arguments.output is not None:
        check_writable(arguments.output)
        for name in ("input", "ckpt", "deny"):
            read = getattr(arguments, name)
            if read is not None and Path(arguments.output).resolve() == Path(read).resolve():
                raise InputError(f"{arguments.output}: is the file of --{name}; expected another file to write to")
    recommender = Recommender.from_pretrained(
        arguments.ckpt,
        device=cli.resolve_device(arguments.device),
        dtype=DTYPES[arguments.dtype],
        backend=arguments.backend,
        table_bytes=arguments.table_bytes,
    )
    at_a_time = 1 if arguments.input is None else arguments.batch_size
    seconds = recommender.warmup(arguments.topk, [at_a_time])
    if seconds > 0:
        cli.say(f"note: one step captured for up to {at_a_time} histories at a time, in {seconds:.2f} s")
    with Trace(arguments.profile, "infer") as trace:
        after_answer = _telling_of_the_first(trace.step)
        if arguments.input is None:
            print(sample_table(recommender, arguments.topk, after_answer))
        else:
            _answer_all(recommender, arguments, after_answer)
    cli.say_decisions(trace.notes())
    missed = {reason: count for reason, count in recommender.batches.items() if reason != "captured"}
    if missed:
        cli.say("note: batches that were not captured: " + ", ".join(f"{missed[why]} for {why}" for why in missed))
    return 0


if __name__ == "__main__":
    cli.run(main)
