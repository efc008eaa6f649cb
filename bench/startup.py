"""From the start of a process to its first answer; `python -m bench.startup --ckpt model.pt`.

Runs `fave_fast.infer` on one history again and again, and beside it a process that only imports PyTorch and, on a GPU,
makes a CUDA context: what is more than that is ours. Seconds by the clock; the first run of each kind fills caches and
is left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fave_fast import checkpoint as checkpoints
from fave_fast import cli

FIRST_ANSWER = "the first answer was there"
TORCH = f"import sys, torch; torch.zeros(1, device=sys.argv[1]); print({FIRST_ANSWER!r}, flush=True)"


def seconds_to_first_answer(command: Sequence[str]) -> float:
    """Seconds until `command` has said, on stdout or stderr, that its first answer is there.

    Raises:
        RuntimeError: it ended without.
    """
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if FIRST_ANSWER in line:
                seconds = time.perf_counter() - started
                process.communicate()
                return seconds
    raise RuntimeError(f"{' '.join(command)} ended without an answer:\n{''.join(said)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", metavar="FILE", required=True, help="checkpoint of the model that answers")
    parser.add_argument("--repeats", type=cli.whole_number(1), default=5, help="timed runs of each kind")
    cli.add_device_options(parser, "of weights and scores")
    arguments = parser.parse_args(argv)
    device = cli.resolve_device(arguments.device)
    item = checkpoints.load(arguments.ckpt).item_ids.take([0])[0]
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / "history.jsonl"
        history.write_text(json.dumps({"user": 1, "history": [item]}) + "\n", encoding="utf-8")
        infer = [sys.executable, "-m", "fave_fast.infer", "--ckpt", arguments.ckpt, "--input", str(history)]
        infer += ["--batch-size", "1", "--device", str(device), "--dtype", arguments.dtype]
        torch_alone = [sys.executable, "-c", TORCH, str(device)]
        rounds = [[seconds_to_first_answer(one) for one in (torch_alone, infer)] for _ in range(1 + arguments.repeats)]
    alone, whole = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    what = "importing PyTorch" if device.type == "cpu" else "importing PyTorch and making a CUDA context"
    print(f"first answer after {whole:.2f} s, {what} {alone:.2f} s: {whole - alone:.2f} s more")
    result = {
        "device": str(device),
        "dtype": arguments.dtype,
        "first_run_s": rounds[0],
        "rounds_s": rounds[1:],
        "first_answer_s": round(whole, 3),
        "torch_s": round(alone, 3),
        "more_s": round(whole - alone, 3),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
