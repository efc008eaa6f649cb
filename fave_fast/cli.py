"""What the commands share: options, exit codes, logging, progress bars.

Exit codes: 0 done, 2 bad usage or bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NoReturn

import torch

from fave_fast import ranks
from fave_fast.config import DataConfig
from fave_fast.data import Interactions, load_interactions
from fave_fast.errors import FailedElsewhere, InputError
from fave_fast.model import DTYPES
from fave_fast.ops import BACKENDS
from fave_fast.profiling import TRACED_STEPS

FORMATS = ("auto", "inter", "csv", "parquet", "jsonl", "npz", "movielens", "amazon", "steam")


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and no abbreviations of options."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"python -m fave_fast.{command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr and exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if ranks.is_first():
            super()._print_message(message, file)


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that reads an interaction log."""
    parser.add_argument("--format", default="auto", choices=FORMATS, help="format of the log")
    for name in ("user", "item", "time"):
        parser.add_argument(
            f"--{name}-column", metavar="NAME", help=f"column that holds the {name}, if not a usual name"
        )


def log_columns(arguments: argparse.Namespace) -> dict[str, str]:
    """The columns named on the command line."""
    names = {name: getattr(arguments, f"{name}_column") for name in ("user", "item", "time")}
    return {name: column for name, column in names.items() if column is not None}


def load_log(arguments: argparse.Namespace, config: DataConfig) -> Interactions:
    """The log at `--data`, read and filtered as `config` says, its decisions printed.

    Raises:
        DataError: it cannot be read.
    """
    data = load_interactions(
        arguments.data,
        format=arguments.format,
        columns=log_columns(arguments),
        min_count=config.min_count,
        drop_repeats=config.drop_repeats,
        keep_times=config.split == "global-time",
    )
    say_decisions(data.decisions)
    return data


def add_device_options(parser: argparse.ArgumentParser, dtype_help: str) -> None:
    """Where the network is, and in what numbers."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES), help=dtype_help)


def add_run_options(parser: argparse.ArgumentParser, dtype_help: str) -> None:
    """Options of every command that runs the network."""
    add_device_options(parser, dtype_help)
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="who computes the catalogue operations")


def add_table_bytes_option(parser: argparse.ArgumentParser) -> None:
    """Whether the catalogue is scanned in bytes."""
    parser.add_argument(
        "--table-bytes",
        action="store_true",
        help="keep the table in one byte an element too: large catalogues answer sooner, with the same lists",
    )


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """Where a trace goes."""
    what = f"folder for a torch.profiler trace of the first steps or batches, up to {TRACED_STEPS}"
    parser.add_argument("--profile", metavar="DIR", help=what)


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:  # what PyTorch takes as a seed or a size
            raise argparse.ArgumentTypeError(
                f"{text!r} given; expected a whole number of at least {least}, below 2**63"
            )
        return value

    return parse


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one. Of several ranks each has the GPU of its number.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = ranks.local_number()
    if local is None:
        if (device.index or 0) >= count:
            raise InputError(f"--device is {name!r}; this machine has {count} CUDA devices that PyTorch can use")
        return device
    if ":" in name:
        raise InputError(f"--device is {name!r} for several ranks; expected cuda: each takes the GPU of its number")
    if local >= count:
        raise InputError(
            f"rank {local} of this machine has no GPU of its own: there are {count}; expected --nproc-per-node of at "
            "most as many, or --device cpu"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)  # NCCL and Triton launch on the current one
    return device


def say(line: str) -> None:
    """A line for the person at the terminal, on stderr, so that results on stdout stay clean; by rank 0 alone."""
    if ranks.is_first():
        print(line, file=sys.stderr, flush=True)


def process_seconds() -> float | None:
    """Seconds since this process began, to a hundredth; None where the system does not tell (it is no Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since the boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def say_decisions(decisions: Iterable[str]) -> None:
    """Print every counted decision about the data."""
    for decision in decisions:
        say(f"note: {decision}")


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command's `main` and leave with its exit code."""
    level = logging.INFO if ranks.is_first() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        code = main(None)
        sys.stdout.flush()
    except FailedElsewhere:
        code = 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except BrokenPipeError:
        # The reader of stdout went away (| head, say): no error, but Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception:
        if not ranks.unfinished():
            raise
        traceback.print_exc()
        code = 1
    if ranks.unfinished():  # threads and GPUs that wait for the others would never end
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
