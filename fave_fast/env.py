"""The environment report: versions, devices, which backends run here and why the others do not.

`python -m fave_fast.env [--json]`
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import fave_fast
from fave_fast.ops import OPS
from fave_fast.ops.registry import why_no_extension

# Every environment variable that the project reads, and what it does.
ENVIRONMENT: dict[str, str] = {
    "FAVE_FAST_BACKEND": "the backend of every op that is called with backend='auto': reference, triton or cpp",
    "FAVE_FAST_ISA": "the instruction set of the C++ encoder and top K, one that is listed (default: the fastest)",
    "FAVE_FAST_NVTX": "1 when the package is imported: the parts of a step are named ranges for profilers",
    "FAVE_FAST_TOKEN": "serve: the bearer token that requests must bring, where no --token-file is given",
    "FAVE_FAST_PURE": "1 while installing: build no C++ extension",
    "FAVE_FAST_DATA": "the tests: folder of the benchmark data sets (default: shared/data beside the checkout)",
}
_PACKAGES = ("torch", "numpy", "polars", "triton", "safetensors", "tensorboard", "nvtx", "fastapi", "uvicorn")


def report() -> dict[str, Any]:
    """What is here, as plain values ready for JSON.

    Keys: `versions` (name to version, or None), `devices`, `threads`, `extension` (`available`, `reason`, `compiler`,
    and `instruction_sets`, which run here, the fastest first), `backends` (device type, then op, then backend to the
    reason why it is refused, or None), and `environment` (variable to `value` and `meaning`).
    """
    return {
        "versions": versions(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "extension": _extension(),
        "backends": _backends(),
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in ENVIRONMENT.items()
        },
    }


def versions() -> dict[str, str | None]:
    """Of Python, the project, what it uses (None where it is not there) and CUDA as PyTorch was built for it."""
    found: dict[str, str | None] = {"fave_fast": fave_fast.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}


def _extension() -> dict[str, Any]:
    reason = why_no_extension()
    facts: dict[str, Any] = {"available": reason is None, "reason": reason, "compiler": None, "instruction_sets": []}
    if reason is None:
        module = importlib.import_module("fave_fast._C")
        facts |= {"compiler": module.compiler, "instruction_sets": module.instruction_sets()}
    return facts


def _backends() -> dict[str, dict[str, dict[str, str | None]]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: {op.name: op.refusals(torch.device(device)) for op in OPS} for device in devices}


def _lines(facts: dict[str, Any]) -> list[str]:
    extension = facts["extension"]
    lines = ["versions"]
    lines += [f"  {name:<12} {version or 'not there'}" for name, version in facts["versions"].items()]
    lines += ["devices", f"  cpu          {facts['threads']} threads"]
    lines += [f"  cuda:{i}       {name}" for i, name in enumerate(facts["devices"])]
    lines += ["C++ extension", f"  {extension['reason'] or 'built by ' + extension['compiler']}"]
    if extension["available"]:
        lines.append(f"  instruction sets: {', '.join(extension['instruction_sets'])}")
    for device, ops in facts["backends"].items():
        lines.append(f"backends on {device}, the preferred first")
        for op, refusals in ops.items():
            lines += [f"  {op:<16} {name:<10} {reason or 'runs'}" for name, reason in refusals.items()]
    lines.append("environment variables")
    for name, entry in facts["environment"].items():
        value = "not set" if entry["value"] is None else repr(entry["value"])
        lines.append(f"  {name} is {value}: {entry['meaning']}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fave_fast.env", description="Report what is here and what runs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    facts = report()
    sys.stdout.write(json.dumps(facts) + "\n" if args.json else "\n".join(_lines(facts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
