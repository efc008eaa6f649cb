"""Ranges for profilers, and `--profile` of the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fave_fast import evaluate, infer, profiling, train
from fave_fast.errors import InputError
from fave_fast.profiling import TRACED_STEPS, Trace, ranged


def names(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"]]


def test_a_function_without_the_switch_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_on", False)

    def function() -> None:
        pass

    assert ranged("fave/step")(function) is function


def run_with_ranges(path: str) -> subprocess.CompletedProcess[str]:
    """A top-K under FAVE_FAST_NVTX=1 in a process of its own, which looks for nvtx in `path` first."""
    code = (
        "import torch, fave_fast.profiling as profiling\n"
        "from fave_fast.ops import score_topk\n"
        "score_topk(torch.eye(2), torch.eye(2).repeat(2, 1), 1)\n"
    )
    env = {"PATH": "", "FAVE_FAST_NVTX": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def test_ranges_are_those_of_nvtx(tmp_path: Path) -> None:
    (tmp_path / "nvtx.py").write_text(
        "def push_range(name):\n    print('in', name)\n\n\ndef pop_range():\n    print('out')\n", encoding="utf-8"
    )
    assert run_with_ranges(str(tmp_path)).stdout.splitlines() == ["in fave/topk", "out"]


def test_without_nvtx_a_line_says_who_sees_the_ranges(tmp_path: Path) -> None:
    (tmp_path / "nvtx.py").write_text("raise ImportError\n", encoding="utf-8")
    done = run_with_ranges(str(tmp_path))
    assert "FAVE_FAST_NVTX is set and the package nvtx is not installed" in done.stderr


def test_ranges_are_in_the_trace_and_change_nothing(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from fave_fast import profiling\n"
        "from fave_fast.ops import score_topk\n"
        "queries, table = torch.eye(2), torch.eye(2).repeat(2, 1)\n"
        f"with profiling.Trace({str(tmp_path)!r}, 'ops') as trace:\n"
        "    scores, items = score_topk(queries, table, 1)\n"
        "    trace.step()\n"
        "assert items.flatten().tolist() == [2, 1], items\n"
        "assert score_topk.__name__ == 'score_topk' and 'K best' in score_topk.__doc__\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "FAVE_FAST_NVTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fave/topk" in names(tmp_path / "ops.trace.json")


def test_a_trace_holds_the_first_steps_after_those_skipped(tmp_path: Path) -> None:
    with Trace(str(tmp_path / "new" / "folder"), "train", skip=3) as trace:
        for _ in range(3 + TRACED_STEPS + 5):
            trace.step()
    assert trace.path is not None
    steps = {name for name in names(trace.path) if name.startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{at}" for at in range(3, 3 + TRACED_STEPS)}
    assert str(trace.path) in trace.notes()[0]


def test_a_command_that_ends_before_it_is_traced_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.trace.json").write_text("of an earlier run")
    with Trace(str(tmp_path), "train", skip=3) as trace:
        trace.step()
    assert not (tmp_path / "train.trace.json").exists()
    assert "no trace" in trace.notes()[0]


def test_without_a_folder_nothing_is_traced() -> None:
    with Trace(None, "train") as trace:
        trace.step()
    assert trace.path is None
    assert trace.notes() == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--profile .*file: cannot be a folder"):
        Trace(str(tmp_path / "file"), "train")


def test_each_command_writes_its_trace(
    tiny_log: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--profile", str(tmp_path)]
    assert evaluate.main(["--ckpt", str(tiny_checkpoint), "--data", str(tiny_log), "--device", "cpu", *where]) == 0
    assert infer.main(["--ckpt", str(tiny_checkpoint), "--device", "cpu", *where]) == 0
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {d: 16, blocks: 2, heads: 2, ffn_mult: 1, max_length: 4}\n"
        "train: {batch_size: 8, epochs: 1, epochs_stage2: 1}\n"
    )
    command = ["--data", str(tiny_log), "--out", str(tmp_path / "model.pt"), "--config", str(config), "--device", "cpu"]
    assert train.main([*command, *where]) == 0
    said = capsys.readouterr().err
    for name in ("evaluate", "infer", "train"):
        assert str(tmp_path / f"{name}.trace.json") in said
        assert any(found.startswith("ProfilerStep") for found in names(tmp_path / f"{name}.trace.json"))
