"""The pinned tile shapes: what ships, and which entry a GPU gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import tune
from fave_fast.ops import tuning

FOLDER = Path(__file__).resolve().parent.parent / "kernels" / "tuning"
FILES = sorted(FOLDER.glob("*.json"))
GENERIC = json.loads((FOLDER / "generic.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _nothing_cached() -> Iterator[None]:
    tuning.tile_shapes.cache_clear()
    yield
    tuning.tile_shapes.cache_clear()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_holds_shapes_of_known_ops(file: Path) -> None:
    for op, variants in json.loads(file.read_text(encoding="utf-8")).items():
        assert variants.keys() <= GENERIC[op].keys()
        for variant, shapes in variants.items():
            # The same names as the generic entry: a kernel reads every one of them.
            assert shapes.keys() == GENERIC[op][variant].keys()
            assert all(type(value) is int and value >= 0 for value in shapes.values())
            assert shapes.get("num_warps", 4) in (1, 2, 4, 8, 16)


def test_a_gpu_gets_its_own_entry_and_else_the_generic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "generic.json": {"op": {"small": {"M": 16}, "large": {"M": 64}}},
        "nvidia-h200.json": {"op": {"large": {"M": 128}}},
    }
    monkeypatch.setattr(tuning, "_table", lambda name: tables.get(name, {}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H{device.index}00")
    asked = [("large", "cuda:2"), ("small", "cuda:2"), ("large", "cuda:1"), ("large", "cpu")]
    got = [tuning.tile_shapes("op", variant, torch.device(device))["M"] for variant, device in asked]
    assert got == [128, 16, 64, 64]


def test_file_names() -> None:
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert tuning.file_name("Tesla T4 ") == "tesla-t4.json"


def test_an_op_that_was_never_tuned_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        tuning.tile_shapes("no such op", "default", torch.device("cpu"))


class FakeKernel:
    """Takes 100 / M + num_warps seconds, does not run above M = 64, and is wrong with one warp."""

    def __init__(self, pins: tune.Pins) -> None:
        self.pins = pins
        self.device = torch.device("cuda:0")

    def shapes(self) -> tuning.Shapes:
        return tuning.tile_shapes("op", "large", self.device)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        shapes = self.shapes()
        if shapes["M"] > 64:
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor([1, 2]), torch.tensor([float(shapes["num_warps"] == 1)])

    def seconds(self, call: object) -> float:
        shapes = self.shapes()
        return 100 / shapes["M"] + shapes["num_warps"]


def test_tuning_takes_the_fastest_shape_that_runs_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tune.Pins({"op": {"large": {"M": 16, "num_warps": 4}}, "other": {"x": {"M": 1}}}, {"other": {"x": {"M": 2}}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(tuning, "_table", tuning._table)  # restores what install() replaces
    pins.install()
    kernel = FakeKernel(pins)
    monkeypatch.setattr(tune, "_seconds", kernel.seconds)
    kernel()
    assert list(pins.asked) == [("op", "large")]
    tune.tune(pins, ("op", "large"), kernel, passes=5)
    assert pins.pinned == {"other": {"x": {"M": 2}}, "op": {"large": {"M": 64, "num_warps": 2}}}
    assert kernel.shapes() == {"M": 64, "num_warps": 2}


def test_a_tuned_result_must_be_the_result() -> None:
    scores, ids = torch.randn(1000), torch.arange(1000)
    assert tune.alike((scores, ids), (scores * (1 + 1e-3), ids))
    assert not tune.alike((scores, ids), (scores * 1.01, ids))
    assert not tune.alike((scores, ids), (scores, ids.flip(0)))
    assert not tune.alike((scores, ids), (scores * torch.nan, ids))
