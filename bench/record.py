"""Files of results: what was measured, where, on which commit, with which versions and clocks.

A file belongs to one day and one kind of machine and holds runs, the oldest first; a run is one suite's rows, ours and
the peers', with what was absent and why.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fave_fast
from bench.cpu import processor
from bench.measure import CEILINGS, COLD, DIRTY, HOST, Row, ceilings
from bench.peers import version
from fave_fast.errors import InputError
from fave_fast.files import replacing
from fave_fast.ops.registry import why_no_extension
from fave_fast.ops.tuning import file_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch", "triton", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "faiss-cpu", "flashinfer-python",
    "pytest-benchmark",
)  # fmt: skip
LARGEST_CACHES = {"bf16": 64 << 20, "fp32": 256 << 20}  # of a GPU, of a CPU: by the product that its ceilings name
_SMI = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "temperature.gpu")

Run = dict[str, Any]


class ResultsError(Exception):
    """A file that is no file of results."""


def machine(on_gpu: bool) -> dict[str, Any]:
    """The machine that a run is about; `kind` names the file and says which runs may be compared."""
    name = torch.cuda.get_device_name() if on_gpu else processor()
    facts: dict[str, Any] = {
        "kind": file_name(name).removesuffix(".json"),
        "gpu": name if on_gpu else None,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if on_gpu:
        facts |= {"driver": _smi("driver_version"), "cuda": torch.version.cuda}
        facts["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    if why_no_extension() is None:
        from fave_fast import _C

        facts |= {"compiler": _C.compiler, "instruction_sets": _C.instruction_sets()}
    return facts


def _smi(query: str) -> str | None:
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else None


def clocks(on_gpu: bool) -> dict[str, str] | None:
    """The GPU's clocks (MHz), power (W) and temperature (C) at this moment, or None."""
    found = _smi(",".join(_SMI)) if on_gpu else None
    return None if found is None else dict(zip(_SMI, found.split(", "), strict=True))


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether its tree is as committed; None where there is no git to say so."""
    try:
        short, changed = (
            subprocess.run(["git", *rest], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
            for rest in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return short.strip(), not changed.strip()


@dataclass
class Recorder:
    """One suite's run, from before its first row to the file."""

    suite: str
    command: Sequence[str]
    on_gpu: bool
    named_commit: str | None = None

    def __post_init__(self) -> None:
        self._began = datetime.datetime.now(datetime.UTC)
        self._clocks = clocks(self.on_gpu)
        found, clean = commit()
        self._commit, self._clean = (found, clean) if self.named_commit is None else (self.named_commit, None)

    def finish(self, rows: Sequence[Row], absent: dict[str, str], **more: Any) -> Run:
        """The run as plain values."""
        name = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        # A quick run measures nothing, so it has no floors either.
        limits = {} if more.get("quick") else CEILINGS.get(name) or ceilings("cuda" if self.on_gpu else "cpu")
        return {
            "suite": self.suite,
            "date": self._began.date().isoformat(),
            "seconds": round((datetime.datetime.now(datetime.UTC) - self._began).total_seconds(), 1),
            "commit": self._commit,
            "clean": self._clean,
            "command": " ".join(self.command),
            "machine": machine(self.on_gpu),
            "versions": {"fave_fast": fave_fast.__version__, **{one: version(one) for one in PACKAGES}},
            "clocks": {"before": self._clocks, "after": clocks(self.on_gpu)},
            "ceilings": limits,
            "absent": absent,
            **more,
            "rows": [plain(row, limits) for row in rows],
        }


def plain(row: Row, limits: dict[str, float]) -> dict[str, Any]:
    """A row as plain values, with its floor by the ceilings `limits`; without any where they are empty."""
    floor = None
    if limits:
        # What a cache may hold from the call before has no floor in the memory's speed.
        kind = "bf16" if "bf16" in limits else "fp32"
        read = row.floor_bytes if row.clock in (COLD, DIRTY) or row.floor_bytes > LARGEST_CACHES[kind] else 0
        floor = 1e6 * max(read / limits["bytes"], row.floor_operations / limits[kind])
    values: dict[str, Any] = {"op": row.op, "case": row.case, "clock": row.clock, "who": row.who, "ours": row.ours}
    values["us"] = {name: round(value, 2) for name, value in vars(row.time).items()}
    more = {
        "floor_us": floor or None,
        "prepared_s": row.prepared_s,
        "peak_bytes": row.peak_bytes,
        "ndcg@20": row.ndcg,
        "recall@20": row.recall,
    }
    values |= {name: round(value, 3) for name, value in more.items() if value is not None}
    return values


def file_for(run: Run, folder: Path) -> Path:
    """Where a run is kept."""
    return folder / f"{run['date']}-{run['machine']['kind']}.json"


def append(run: Run, folder: Path) -> Path:
    """Add a run to its file.

    Raises:
        ResultsError: there is a file of that name with something else in it.
        OSError: it cannot be written.
    """
    path = file_for(run, folder)
    runs = read(path) if path.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        lines = ",\n".join(_readable(one) for one in [*runs, run])
        part.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")
    return path


def _readable(run: Run) -> str:
    """JSON with a line for each fact and each row."""
    facts = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in run.items() if name != "rows"]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in run["rows"])
    return " {\n" + ",\n".join([*facts, f'  "rows": [\n{rows}\n  ]' if rows else '  "rows": []']) + "\n }"


def add(program: str, measure: Callable[[], Run], folder: Path) -> tuple[Run, Path] | int:
    """Measure a run and append it; the run and its file, or the exit code once stderr has the reason.

    1: a check failed, so nothing was timed; 2: bad input or output.
    """
    try:
        run = measure()
        return run, append(run, folder)
    except AssertionError as error:
        print(f"{program}: the check failed, so nothing was timed: {error}", file=sys.stderr)
        return 1
    except (InputError, ResultsError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        ResultsError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON: {error}") from None


def read(path: Path) -> list[Run]:
    """The runs of a file.

    Raises:
        ResultsError: it cannot be read or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("runs"), list):
        raise ResultsError(f'{path}: expected an object with "runs", as bench/run.py writes it')
    if not all(isinstance(run, dict) and {"suite", "machine", "rows"} <= run.keys() for run in value["runs"]):
        raise ResultsError(f'{path}: a run lacks "suite", "machine" or "rows"')
    return list(value["runs"])


def stored(folder: Path) -> Iterator[Run]:
    """All runs of the files of `folder` that hold runs, the oldest day first."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield from read(path)
        except ResultsError:  # results in an older form, whose figures the README explains
            continue


def _quality(row: dict[str, Any]) -> str:
    return "".join(f", {name} {row[name.lower()]:.3g}" for name in ("NDCG@20", "recall@20") if name.lower() in row)


def card(run: Run) -> str:
    """A run's rows as text, each with its share of the floor."""
    lines = [
        f"{run['suite']} on {run['machine']['kind']}, commit {run['commit'] or 'unknown'}"
        + {True: "", False: " with changes", None: ""}[run["clean"]],
        f"{'op':<14} {'case':<38} {'who':<32} {'p50 us':>10} {'p20':>10} {'p80':>10} {'p99':>10} {'floor':>9} clock",
    ]
    for row in run["rows"]:
        us = row["us"]
        floor = f"{row['floor_us']:9.1f}" if "floor_us" in row else " " * 9
        before = f", prepared in {row['prepared_s']:.1f} s" if "prepared_s" in row else ""
        clock = row["clock"].replace(HOST, "host") + _quality(row)
        lines.append(
            f"{row['op']:<14} {row['case']:<38} {row['who']:<32} {us['median']:10.1f} {us['p20']:10.1f} "
            f"{us['p80']:10.1f} {us['p99']:10.1f} {floor} {clock}{before}"
        )
    lines += [f"absent: {who}: {reason}" for who, reason in run["absent"].items()]
    return "\n".join(lines)
