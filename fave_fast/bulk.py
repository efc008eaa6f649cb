"""Lists for all users of a folder of parquet files; `python -m fave_fast.bulk --ckpt FILE --input DIR --output DIR`.

Each file below the input folder is a partition with the columns `user` (kept as it is) and `history` (a list of item
ids, oldest first). Its lists go to a file of the same name below the output folder, and then a marker below `_done`
says so. Both appear whole or not at all, so a job that was killed at any moment is started again by the same command:
partitions with a marker are passed over, all others are computed anew, to the same bytes. `_job.json` holds what the
lists depend on; a job with other settings does not mix with them. `_SUCCESS` appears last.

With `--ray` partitions are spread over the workers of a Ray cluster (`pip install 'fave-fast[ray]'`); all of them must
see the folders and the checkpoint under the same names.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from fave_fast import checkpoint as checkpoints
from fave_fast import cli
from fave_fast.engine import Recommendation, Recommender
from fave_fast.errors import DataError, InputError
from fave_fast.files import replacing
from fave_fast.infer import lists_frame, read_deny
from fave_fast.model import DTYPES

JOB, DONE, SUCCESS = "_job.json", "_done", "_SUCCESS"


@dataclass(frozen=True)
class Options:
    """What a worker needs to know; plain values."""

    ckpt: str
    input: str
    output: str
    k: int = 20
    exclude_history: bool = True
    deny: tuple[str, ...] = ()
    batch_size: int = 512
    device: str = "cpu"
    dtype: str = "fp32"
    backend: str = "auto"


@dataclass(frozen=True)
class Partition:
    """One file of the input as it was when the job began."""

    name: str
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, folder: Path, path: Path) -> Partition:
        """The file at `path` below `folder`."""
        status = path.stat()
        return cls(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Count:
    """What happened in a partition."""

    users: int = 0
    unknown: int = 0
    popular: int = 0

    def __add__(self, other: Count) -> Count:
        """Both together."""
        return Count(self.users + other.users, self.unknown + other.unknown, self.popular + other.popular)


class Worker:
    """A recommender that answers whole partitions; one for each process."""

    def __init__(self, options: Options) -> None:
        """Load the checkpoint.

        Raises:
            InputError: it cannot be served here.
        """
        self.options = options
        self.recommender = Recommender.from_pretrained(
            options.ckpt,
            device=cli.resolve_device(options.device),
            dtype=DTYPES[options.dtype],
            backend=options.backend,
        )
        self.recommender.warmup(options.k, [options.batch_size])

    def answer(self, partition: Partition) -> Count:
        """Write the partition's lists, then its marker.

        Raises:
            DataError: the file is not what it should be.
            InputError: the output cannot be written.
        """
        options = self.options
        source = Path(options.input) / partition.name
        frame = _read(source)
        answers: list[Recommendation] = []
        for rows in frame.select("history").iter_slices(options.batch_size):
            histories = [[] if one is None else one for one in rows["history"].to_list()]
            try:
                answers += self.recommender.recommend(
                    histories, options.k, options.exclude_history, options.deny or None, batch_size=options.batch_size
                )
            except InputError as error:
                first = len(answers) + 1
                raise DataError(f"{source}: rows {first:,} to {first + len(histories) - 1:,}: {error}") from None
        whole = self.recommender.checkpoint.item_ids.numbers is not None
        target = Path(options.output) / partition.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            lists_frame(frame["user"], answers, pl.Int64() if whole else pl.String()).write_parquet(part)
        count = Count(len(answers), sum(one.unknown for one in answers), sum(one.popular for one in answers))
        _write_json(_marker(Path(options.output), partition), asdict(partition) | asdict(count))
        return count


def _read(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path, hive_partitioning=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    for column in ("user", "history"):
        if column not in frame.columns:
            raise DataError(f"{path}: has the columns {', '.join(frame.columns)}; expected user and history")
    history = frame.schema["history"]
    inner = history.inner if isinstance(history, pl.List) else None
    if inner is None or not (inner.is_integer() or inner in (pl.String, pl.Null)):
        raise DataError(f"{path}: history is {history}; expected lists of whole numbers or of text")
    return frame


def partitions(folder: Path) -> list[Partition]:
    """All parquet files below `folder`, by name; hidden ones, and what job tools mark with `_`, are none.

    Raises:
        InputError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with parquet files")
    found = [
        path
        for path in sorted(folder.rglob("*.parquet"))
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"{folder}: holds no parquet file; expected files that end in .parquet")
    return [Partition.of(folder, path) for path in found]


def _marker(output: Path, partition: Partition) -> Path:
    return output / DONE / f"{partition.name}.json"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def done(output: Path, partition: Partition) -> Count | None:
    """What the marker says, or None where there is none for the partition as it is now, or no lists."""
    try:
        marker = json.loads(_marker(output, partition).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not (output / partition.name).is_file() or any(marker[key] != value for key, value in asdict(partition).items()):
        return None
    return Count(marker["users"], marker["unknown"], marker["popular"])


def claim(options: Options) -> None:
    """Make the output folder that of this job, or find that it is.

    Raises:
        InputError: it is that of another one, or holds something else, or lies in the input.
    """
    output, source = Path(options.output), Path(options.input)
    if output.resolve() == source.resolve() or output.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{output}: is the input folder, or lies in it; expected a folder elsewhere")
    job = {
        "model": checkpoints.content_digest(checkpoints.load(options.ckpt)),
        "k": options.k,
        "exclude_history": options.exclude_history,
        "deny": sorted(options.deny),
        "dtype": options.dtype,
        "backend": options.backend,
        "device": options.device.split(":")[0],
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        there = json.loads((output / JOB).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise InputError(f"{output}: is not empty and holds no {JOB}; expected a new folder") from None
        _write_json(output / JOB, job)
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: cannot be the output: {error}") from None
    other = [name for name, value in job.items() if there.get(name) != value]
    if other:
        raise InputError(f"{output}: holds lists made with another {', '.join(other)}; expected a new folder")


def run(options: Options, spread: Callable[[Options, Sequence[Partition]], Iterable[Count]]) -> Count:
    """Do what is not done yet, by `spread`, which yields the count of each partition that it is given.

    Raises:
        InputError: as `claim` and `Worker.answer`.
    """
    output = Path(options.output)
    found = partitions(Path(options.input))
    claim(options)
    counts = [done(output, partition) for partition in found]
    left = [partition for partition, count in zip(found, counts, strict=True) if count is None]
    _forget(output, found, left)
    if len(left) < len(found):
        cli.say(f"note: {len(found) - len(left)} of {len(found)} partitions are done already")
    total = sum((count for count in counts if count is not None), Count())
    for at, count in enumerate(spread(options, left) if left else (), start=1):
        total += count
        cli.say(f"{at + len(found) - len(left)} of {len(found)} partitions, {total.users:,} users")
    _write_json(output / SUCCESS, asdict(total) | {"partitions": len(found)})
    return total


def _forget(output: Path, found: Sequence[Partition], left: Sequence[Partition]) -> None:
    """Take away what no longer holds: the end mark of a job that has work left, and lists whose partition is gone."""
    if left:
        (output / SUCCESS).unlink(missing_ok=True)
    known = {partition.name for partition in found}
    for marker in sorted((output / DONE).rglob("*.json")):
        name = marker.relative_to(output / DONE).as_posix().removesuffix(".json")
        if name not in known:
            (output / SUCCESS).unlink(missing_ok=True)
            marker.unlink()
            (output / name).unlink(missing_ok=True)
            cli.say(f"note: {name} is no longer in the input: its lists are taken away")
    for part in output.rglob(".*.part"):  # of a run that was killed
        part.unlink(missing_ok=True)


def here(options: Options, left: Sequence[Partition]) -> Iterator[Count]:
    """One partition after the other, in this process."""
    worker = Worker(options)
    yield from map(worker.answer, left)


def _parser() -> cli.Parser:
    parser = cli.Parser("bulk", "Recommend for all users of a folder of parquet files; started again, it goes on.")
    parser.add_argument("--ckpt", metavar="FILE", required=True, help="checkpoint written by fave_fast.train")
    parser.add_argument("--input", metavar="DIR", required=True, help="parquet files with the columns user and history")
    parser.add_argument("--output", metavar="DIR", required=True, help="where lists go, under the same names")
    parser.add_argument("--topk", type=cli.whole_number(1), default=20, help="length of a list")
    parser.add_argument("--include-seen", action="store_true", help="also recommend items of the user's own history")
    parser.add_argument("--deny", metavar="FILE", help="item ids that nobody gets, one a line")
    parser.add_argument("--batch-size", type=cli.whole_number(1), default=512, help="histories in one forward pass")
    parser.add_argument("--ray", metavar="ADDRESS", help="spread over a Ray cluster: its address, or local")
    parser.add_argument("--workers", type=cli.whole_number(1), default=1, help="with --ray, recommenders at a time")
    cli.add_run_options(parser, "of weights and scores")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments: argparse.Namespace = _parser().parse_args(argv)
    if arguments.ray is None and arguments.workers > 1:
        raise InputError(f"--workers is {arguments.workers} without --ray; expected both, or neither")
    options = Options(
        ckpt=str(Path(arguments.ckpt).absolute()),
        input=str(Path(arguments.input).absolute()),
        output=str(Path(arguments.output).absolute()),
        k=arguments.topk,
        exclude_history=not arguments.include_seen,
        deny=tuple(read_deny(arguments.deny)) if arguments.deny else (),
        batch_size=arguments.batch_size,
        device=str(cli.resolve_device(arguments.device)),
        dtype=arguments.dtype,
        backend=arguments.backend,
    )
    started = time.perf_counter()
    if arguments.ray is None:
        total = run(options, here)
    else:
        from fave_fast.bulk_ray import over_ray

        total = run(options, over_ray(arguments.ray, arguments.workers))
    cli.say(
        f"{total.users:,} users in {time.perf_counter() - started:.2f} s; {total.unknown:,} unknown items skipped; "
        f"{total.popular:,} histories without a known item got the most popular"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
