from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fave_fast
from fave_fast.env import ENVIRONMENT, main
from fave_fast.ops import OPS
from fave_fast.ops.registry import why_no_extension

ROOT = Path(__file__).resolve().parent.parent


def test_json_is_one_object(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAVE_FAST_DATA", "somewhere")
    assert main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fave_fast"] == fave_fast.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["extension"]["available"] is (facts["extension"]["reason"] is None)
    assert set(facts["backends"]["cpu"]) == {op.name for op in OPS}
    assert all(refusals["reference"] is None for refusals in facts["backends"]["cpu"].values())
    assert facts["backends"]["cpu"]["rank_count"]["cpp"] == why_no_extension()
    assert facts["environment"]["FAVE_FAST_DATA"]["value"] == "somewhere"


def test_the_table_names_every_backend_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for op in OPS:
        for one in op.implementations:
            assert re.search(rf"^  {op.name} +{one.backend} ", text, re.MULTILINE)
    assert all(f"  {name} is " in text for name in ENVIRONMENT)


def test_every_variable_in_use_is_listed() -> None:
    files = [ROOT / "pyproject.toml", *(ROOT / "fave_fast").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    used = {name for file in files for name in re.findall(r"FAVE_FAST_[A-Z]+", file.read_text(encoding="utf-8"))}
    assert used == set(ENVIRONMENT)


def test_importing_asks_nothing_of_a_gpu_and_configures_no_logging() -> None:
    code = (
        "import logging, torch, fave_fast.env, fave_fast.ops\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('fave_fast').handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
