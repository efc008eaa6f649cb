from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

from fave_fast.config import Config
from fave_fast.data import load_interactions
from fave_fast.synthetic import PlantedConfig, generate
from fave_fast.train import Trainer

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a GPU test took goes back to the device, for tests in other processes."""
    yield
    if "gpu" in request.keywords:
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What `torch.empty` returns is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Makes processes that have the package imported already and nothing of this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fave_fast.bulk", "fave_fast.sharded"])
    return context


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Compiles a source of `emulation`: a kernel of csrc whose instructions for Hopper GPUs are done on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulation")
    for source in [*(ROOT / "csrc").glob("*.cuh"), *(ROOT / "csrc").glob("gpu_*.hpp")]:
        shutil.copy(source, folder)
    shutil.copytree(
        ROOT / "tests" / "emulation", folder, dirs_exist_ok=True
    )  # its hopper.cuh takes the place of csrc's

    def compiled(source: str, *options: str) -> ctypes.CDLL:
        library = f"{tempfile.mkdtemp(dir=folder)}/kernel.so"
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", *options, "-o", library, folder / source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(library)

    return compiled


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the benchmark data sets; the test is skipped where it is absent."""
    folder = Path(os.environ.get("FAVE_FAST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no benchmark data in {folder}; FAVE_FAST_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """Both stages in a second; dropout stays on, so that a lost random state shows."""
    values = {
        "model": {"d": 16, "blocks": 2, "heads": 2, "ffn_mult": 2, "max_length": 8},
        "train": {"batch_size": 48, "lr": 0.01, "lr_stage2": 0.01, "epochs": 2, "epochs_stage2": 2},
    }
    return Config.from_dict(values, "tests")


@pytest.fixture(scope="session")
def tiny_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv log of 41 users and 24 items (101 to 124); a list of 20 ends early, and user 999 has no targets."""
    planted = PlantedConfig(users=40, items=24, interests=3, min_length=3, max_length=10, neighbours=2, successors=3)
    _, data = generate(planted, seed=1)
    rows = [(user + 1, item + 100) for user in range(data.num_users) for item in data.history(user)]
    rows += [(999, 101), (999, 102)]
    path = tmp_path_factory.mktemp("tiny") / "log.csv"
    path.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{user},{item},{at}\n" for at, (user, item) in enumerate(rows))
    )
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_log: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on `tiny_log`."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    Trainer(load_interactions(tiny_log), tiny_config, path).run()
    return path
