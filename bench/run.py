"""Ours beside what you would use instead, in one run: `python bench/run.py --suite latency`, or another suite.

Every suite checks its results first and prints no time where a check fails (exit code 1). It ends with one JSON object,
which is also added to `bench/results/<date>-<GPU or CPU>.json`; with matplotlib the figures are drawn beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: its folder holds modules that are none of the path's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench import record
from bench.measure import Row
from bench.sampling import MEASURED_BEFOREHAND
from bench.steps import steps
from bench.suites import MODES, SUITES, Options
from bench.summary import SUMMARY
from fave_fast import cli
from fave_fast.config import PRESETS
from fave_fast.errors import InputError
from fave_fast.model import DTYPES

BATCHES = {"cuda": {"topk": (1, 8, 16, 128, 512), "": (1, 8, 64, 512)}, "cpu": {"": (1, 64)}}
ITEMS = {
    "cuda": {"topk": (12_101, 1_000_000, 10_000_000), "": (12_101,)},
    "cpu": {"topk": (12_101, 100_000, 1_000_000), "cpu": (12_101, 1_000_000), "": (12_101,)},
}
QUICK = {"batches": (1, 4), "items": (500,), "compiled": (), "seconds": 0.02}  # to see that everything runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    whole = cli.whole_number(1)
    parser.add_argument("--suite", required=True, choices=(*SUITES, "steps", "quality"))
    parser.add_argument("--data", type=Path, action="append", default=[], help="log of real histories; may repeat")
    parser.add_argument("--ckpt", metavar="FILE", help="steps: a checkpoint trained on the one log of --data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (the suite cpu: always cpu)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cpp"), help="of ours")
    parser.add_argument("--batch", type=whole, action="append", help="histories in a request; may repeat")
    parser.add_argument("--items", type=whole, action="append", help="size of the catalogue; may repeat")
    parser.add_argument(
        "--compiled", choices=(*MODES, "none"), action="append", help="modes of torch.compile (GPU: all, CPU: default)"
    )
    parser.add_argument("--seconds", type=float, help="of repeats for each row that the host times; quality: in all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--commit", metavar="TEXT", help="what is measured, where the checkout has no git to say it")
    parser.add_argument("--jobs", type=whole, default=1, help="quality: trainings at a time")
    parser.add_argument(
        "--seed", type=cli.whole_number(0), action="append", help="quality: may repeat (default: 0 to 4)"
    )
    parser.add_argument("--folder", type=Path, help="quality: where trainings are kept (default: OUT/quality)")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    device = torch.device("cpu") if arguments.suite == "cpu" else cli.resolve_device(arguments.device)
    kind, suite = device.type, arguments.suite
    quick = QUICK if arguments.quick else {}
    modes = arguments.compiled or quick.get("compiled", MODES if kind == "cuda" else ("default",))
    if arguments.suite == "steps" and (arguments.ckpt is None or len(arguments.data) != 1):
        raise InputError("--ckpt FILE and one --data FILE are what the suite steps needs")
    for path in arguments.data:
        if not path.is_file():
            raise InputError(f"{path}: is no file; expected a log of interactions")
    return Options(
        device=device,
        dtype=arguments.dtype or ("bf16" if kind == "cuda" else "fp32"),
        batches=tuple(arguments.batch or quick.get("batches") or BATCHES[kind].get(suite) or BATCHES[kind][""]),
        items=tuple(arguments.items or quick.get("items") or ITEMS[kind].get(suite) or ITEMS[kind][""]),
        compiled=() if "none" in modes else tuple(modes),
        logs=tuple(arguments.data),
        seconds=arguments.seconds or quick.get("seconds", 1.0),
        backend=arguments.backend,
    )


def measure(arguments: argparse.Namespace, command: Sequence[str]) -> record.Run:
    """Run one suite.

    Raises:
        AssertionError: a check failed.
        InputError: bad options.
    """
    options = _options(arguments)
    recorder = record.Recorder(arguments.suite, command, options.on_gpu, arguments.commit)
    rows: list[Row] = []
    try:
        for row in steps(arguments.ckpt, options) if arguments.suite == "steps" else SUITES[arguments.suite](options):
            rows.append(row)
            line = f"{row.op:<14} {row.case:<38} {row.who:<32} {row.time.median:10.1f} us ({row.clock})"
            print(line, file=sys.stderr, flush=True)
    except (AssertionError, InputError):
        raise
    except (Exception, KeyboardInterrupt) as error:  # what was measured so far is worth keeping
        if not rows:
            raise
        traceback.print_exc()
        options.absent["everything after the last row"] = f"the run ended early: {type(error).__name__}: {error}"
    more = {"measured_beforehand_ms": MEASURED_BEFOREHAND} if arguments.suite == "latency" and options.on_gpu else {}
    return recorder.finish(rows, options.absent, dtype=options.dtype, quick=arguments.quick, **more)


def preset_of(log: Path) -> str:
    """The preset that a log is trained with: the longest whose name the log's begins with, or the default."""
    return max((name for name in PRESETS if log.stem.startswith(name)), key=len, default="default")


# Of a training that shows that everything runs, within seconds on two cores.
QUICK_TRAINING = (
    "model.d=32", "model.heads=2", "model.blocks=1", "model.source_block=-1", "model.max_length=10",
    "train.epochs=1", "train.epochs_stage2=1",
)  # fmt: skip


def quality(arguments: argparse.Namespace, command: Sequence[str]) -> record.Run:
    """Train and test by `bench.quality`, several seeds, and keep its summary.

    Raises:
        InputError: no log, or bench.quality refuses.
    """
    if not arguments.data:
        raise InputError("--data is missing; expected the logs to train on")
    folder = arguments.folder or arguments.out / "quality"
    recorder = record.Recorder("quality", command, torch.cuda.is_available(), arguments.commit)
    work = ["--jobs", str(arguments.jobs), "--out", str(folder), "--device", arguments.device]
    for log in arguments.data:
        work += ["--data", str(log), preset_of(log)]
    for name, value in (("--seconds", arguments.seconds), ("--dtype", arguments.dtype), ("--commit", arguments.commit)):
        if value is not None:
            work += [name, str(value)]
    seeds = arguments.seed or ([0] if arguments.quick else [])
    if seeds:
        work += ["--seeds", *map(str, seeds)]
    if arguments.quick:
        work += [word for change in QUICK_TRAINING for word in ("--set", change)]
    for options in (work, ["--summarise", str(folder)]):
        line = [sys.executable, "-m", "bench.quality", *options]
        done = subprocess.run(line, cwd=record.ROOT, stdout=sys.stderr, check=False)
        if done.returncode not in (0, 1):  # 1: some trainings did not end, the others count
            raise InputError(f"{' '.join(line[1:])} ended with exit code {done.returncode}")
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if not summary["rows"]:
        raise InputError(f"{folder}: no training ended; expected more --seconds, or fewer logs and seeds")
    return recorder.finish([], {}, quick=arguments.quick, summary=summary)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command = ["python", "bench/run.py", *(sys.argv[1:] if argv is None else argv)]
    suite = quality if arguments.suite == "quality" else measure
    added = record.add("bench/run.py", lambda: suite(arguments, command), arguments.out)
    if isinstance(added, int):
        return added
    run, path = added
    print(record.card(run))
    for who, by_batch in run.get("measured_beforehand_ms", {}).items():
        found = ", ".join(f"B {batch}: {ms:.0f} ms" for batch, ms in by_batch.items())
        print(f"measured beforehand on an H200, not in this run: {who}: {found}")
    print(f"added to {path}", file=sys.stderr)
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: pip install 'fave-fast[bench]', then python bench/plot.py", file=sys.stderr)
    else:
        from bench import plot

        for figure in plot.draw([run], arguments.out):
            print(f"drew {figure}", file=sys.stderr)
    print(json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
