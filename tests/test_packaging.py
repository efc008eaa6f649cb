"""What a wheel holds, with the C++ extension and without it."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fave_fast

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pybind11")),
    reason="needs scikit-build-core and pybind11, which are part of the test extras",
)


def build(folder: Path, **environment: str) -> Path:
    """Build a wheel as `pip install .` does, of a copy, so that nothing is left in the checkout."""
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "bench")
    shutil.copytree(ROOT, source, ignore=unwanted)
    (source / "kernels" / "probe.py").write_text("VALUE = 7\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    for option in ("AVX512", "CUDA"):  # most of the time to build, and no file of the wheel
        command += ["-C", f"cmake.define.FAVE_FAST_{option}=OFF"]
    command.append(source)
    clean = {name: value for name, value in os.environ.items() if name != "FAVE_FAST_PURE"}
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(folder: Path, code: str) -> str:
    """Run `code` with `folder` first on the path; -S keeps the import hook of an editable install out."""
    path = os.pathsep.join([str(folder), *(entry for entry in sys.path if entry and Path(entry) != ROOT)])
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pure"), FAVE_FAST_PURE="1")


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"fave_fast/{file.relative_to(ROOT / 'fave_fast')}" for file in (ROOT / "fave_fast").rglob("*.py")}
    files = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "tuning").glob("*.json")]
    kernels = {f"fave_fast/{file.relative_to(ROOT)}" for file in files}
    assert "fave_fast/kernels/tuning/generic.json" in kernels
    assert "fave_fast/serving/page.html" in names
    assert sources | kernels | {"fave_fast/py.typed", "fave_fast/_C.pyi", "fave_fast/kernels/probe.py"} <= set(names)
    assert [name for name in names if re.fullmatch(r"fave_fast/_C\.[^/]*\.(so|pyd)", name)]
    # A top-level `kernels` would shadow the package of that name.
    assert {name.split("/")[0] for name in names} == {"fave_fast", f"fave_fast-{fave_fast.__version__}.dist-info"}
    assert "fave_fast/kernels/README.md" not in names


def test_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"fave_fast-{fave_fast.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert b"Apache License" in archive.read(f"{folder}/licenses/LICENSE")
    assert (metadata["Name"], metadata["Version"]) == ("fave-fast", fave_fast.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"test", "gpu", "safetensors", "tensorboard"} <= set(metadata.get_all("Provides-Extra", []))


COUNT = """
import torch, fave_fast, importlib
from fave_fast.ops import OPS, rank_count
from fave_fast.ops.registry import why_no_extension
print(fave_fast.__file__)
print(importlib.import_module("fave_fast.kernels.probe").VALUE)
print(why_no_extension())
print(rank_count(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([3])).tolist())
try:
    print(rank_count(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([3]), backend="cpp").tolist())
except fave_fast.errors.BackendError as error:
    print(error)
"""


def test_the_wheel_runs_with_its_extension(wheel: Path) -> None:
    folder = unpacked(wheel)
    where, probe, reason, auto, cpp = run(folder, COUNT).splitlines()
    assert Path(where).is_relative_to(folder)
    assert (probe, reason, auto, cpp) == ("7", "None", "[3]", "[3]")


def test_the_pure_wheel_falls_back_and_says_why(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith((".so", ".pyd"))]
    folder = unpacked(pure_wheel)
    where, probe, reason, auto, cpp = run(folder, COUNT).splitlines()
    assert Path(where).is_relative_to(folder)
    assert (probe, auto) == ("7", "[3]")
    assert reason == "the C++ extension is not there: fave-fast was built with FAVE_FAST_PURE=1"
    assert cpp == f"rank_count: backend 'cpp' cannot run: {reason}"


def test_without_a_compiler_the_build_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    with pytest.raises(AssertionError, match="FAVE_FAST_PURE=1"):
        build(tmp_path / "wheel", CXX=str(tmp_path / "no-such-compiler"))
