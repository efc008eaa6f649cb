"""Exported programs: what the folder holds, and that they answer as the model does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fave_fast import checkpoint as checkpoints
from fave_fast import export
from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config
from fave_fast.engine import ItemId, Recommender
from fave_fast.errors import InputError
from fave_fast.flow import InferenceNoise
from fave_fast.model import DTYPES
from fave_fast.one_step import OneStep

HISTORIES: list[list[ItemId]] = [[101], [103, 102, 101], [124, 101, 124, 110, 105, 101], list(range(105, 120))]
DENIED: list[ItemId] = [102, 110]


@pytest.fixture(scope="module")
def kept(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


def numbered(kept: Checkpoint, length: int, excluded: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a server makes of `HISTORIES` and `DENIED`."""
    history = torch.zeros(len(HISTORIES), length, dtype=torch.int64)
    exclude = torch.zeros(len(HISTORIES), excluded, dtype=torch.int64)
    for row, items in enumerate(HISTORIES):
        numbers = torch.from_numpy(kept.item_ids.index(items) + 1)
        exclude[row, : len(numbers)] = numbers
        history[row, -len(numbers[-length:]) :] = numbers[-length:]
    deny = torch.zeros(len(kept.item_ids) + 1, dtype=torch.bool)
    deny[torch.from_numpy(kept.item_ids.index(DENIED) + 1)] = True
    return history, exclude, deny


def frozen(kept: Checkpoint, dtype: torch.dtype, k: int, device: str = "cpu") -> OneStep:
    model = kept.build_model().to(device, dtype)
    return OneStep(model, kept.config.flow, InferenceNoise.draw(model, kept.config.flow), k)


def assert_answers_as_the_recommender(
    kept: Checkpoint, found: tuple[Tensor, Tensor], dtype: torch.dtype, histories: list[list[ItemId]] = HISTORIES
) -> None:
    """Equal lists; scores are those of float64, rounded to float32 once: a step of 2^-23 apart at most."""
    answers = Recommender(kept, dtype=dtype).recommend(histories, found[0].shape[1], deny=DENIED)
    for scores, ids, answer in zip(*found, answers, strict=True):
        count = len(answer.items)
        assert kept.item_ids.take(ids[:count].numpy() - 1) == answer.items
        assert ids[count:].eq(0).all()
        assert scores[count:].eq(-torch.inf).all()
        np.testing.assert_allclose(scores[:count], answer.scores, rtol=2**-23, atol=0)


@pytest.mark.parametrize("batch", [len(HISTORIES), None], ids=["bucket", "any"])
def test_a_program_answers_as_the_recommender(kept: Checkpoint, tmp_path: Path, batch: int | None) -> None:
    step = frozen(kept, torch.float64, 20)
    path = tmp_path / "p.pt2"
    export.save(export.export_one_step(step, batch, 16), path, "pt2")
    run = export.load(path, "pt2")
    history, exclude, deny = numbered(kept, step.length, 16)
    found = run(history, exclude, deny)
    assert_answers_as_the_recommender(kept, found, torch.float64)
    for rows in (1, 3) if batch is None else ():
        scores, ids = run(history[:rows], exclude[:rows], deny)
        assert torch.equal(ids, found[1][:rows])
        torch.testing.assert_close(scores, found[0][:rows], rtol=2**-23, atol=0)


def test_the_folder(
    tiny_checkpoint: Path, kept: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that a server needs: programs that run on what the manifest says they take, and the items' ids."""
    folder = tmp_path / "out"
    options = ["--ckpt", str(tiny_checkpoint), "--output", str(folder), "--device", "cpu", "--topk", "5"]
    options += ["--length", "6", "--exclusions", "16", "--batch-size", "4", "--batch-size", "any", "--batch-size", "4"]
    assert export.main(options) == 0
    names = ["batch-4.pt2", "batch-any.pt2", "items.jsonl", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("differ from plain PyTorch's by at most 0\n") == 2

    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == kept.item_ids.ids
    assert [line["count"] for line in lines] == kept.popularity[1:].tolist()

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert Config.from_dict(manifest["config"], "manifest") == kept.config
    facts = {"items": 24, "topk": 5, "length": 6, "exclusions": 16, "seed": 0, "dtype": "fp32", "format": "pt2"}
    assert {name: manifest[name] for name in facts} == facts
    assert manifest["torch"] == torch.__version__
    assert [program["file"] for program in manifest["programs"]] == names[:2]
    model = kept.build_model()
    step = OneStep(model, kept.config.flow, InferenceNoise.draw(model, kept.config.flow), 5, 6)
    inputs = numbered(kept, 6, 16)
    expected = step(*inputs)
    for program in manifest["programs"]:
        check_signature(program["inputs"], inputs, program["batch"])
        check_signature(program["outputs"], expected, program["batch"])
        found = export.load(folder / program["file"], "pt2")(*inputs)
        assert torch.equal(found[0], expected[0])  # the same operations in the same order
        assert torch.equal(found[1], expected[1])


def check_signature(signature: list[dict[str, Any]], tensors: tuple[Tensor, ...], batch: int | None) -> None:
    for told, tensor in zip(signature, tensors, strict=True):
        assert told["dtype"] == str(tensor.dtype).removeprefix("torch.")
        sizes = [len(HISTORIES) if size == -1 else size for size in told["shape"]]
        assert sizes == list(tensor.shape)
        assert (told["shape"][0] == -1) == (batch is None and tensor.dim() == 2)


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler"
)
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # spares g++ some seconds


@needs_compiler
def test_a_compiled_package_answers_as_the_recommender(kept: Checkpoint, tmp_path: Path) -> None:
    step = frozen(kept, torch.float64, 20)
    path = tmp_path / "p.pt2"
    with torch._inductor.config.patch(QUICK):
        export.save(export.export_one_step(step, len(HISTORIES), 16), path, "aoti")
    found = export.load(path, "aoti")(*numbered(kept, step.length, 16))
    assert_answers_as_the_recommender(kept, tuple(found), torch.float64)


@needs_compiler
def test_a_model_repository_of_triton_inference_server(
    tiny_checkpoint: Path, kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration is one by the server's schema and fits the program; the ids beside it are all one needs."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    monkeypatch.setitem(DTYPES, "fp32", torch.float64)  # whose lists are the recommender's, however they are summed
    options = ["--ckpt", str(tiny_checkpoint), "--output", str(tmp_path / "models"), "--format", "triton"]
    with torch._inductor.config.patch(QUICK):
        assert export.main([*options, "--device", "cpu", "--exclusions", "16"]) == 0
    model = tmp_path / "models" / "fave"
    files = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    assert files == ["1/items.jsonl", "1/manifest.json", "1/model.pt2", "config.pbtxt"]

    config = text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())
    assert (config.backend, config.platform, config.max_batch_size) == ("pytorch", "torch_aoti", 0)
    assert [group.kind for group in config.instance_group] == [schema.ModelInstanceGroup.KIND_CPU]
    assert (config.name, config.default_model_filename) == ("", "")  # the folder's, and the backend's own

    ids = [json.loads(line)["id"] for line in (model / "1" / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    number = {item: at for at, item in enumerate(ids, start=1)}
    run = export.load(model / "1" / "model.pt2", "triton")
    for histories in (HISTORIES, HISTORIES[:1]):
        shapes = [(len(histories), 8), (len(histories), 16), (len(ids) + 1,)]
        inputs = [
            torch.zeros(shape, dtype=TRITON_TYPES[schema.DataType.Name(tensor.data_type)])
            for shape, tensor in zip(shapes, config.input, strict=True)
        ]
        assert_fits(config.input, inputs, "INPUT", schema)
        for row, history in enumerate(histories):
            numbers = torch.tensor([number[item] for item in history])
            inputs[0][row, -len(numbers[-8:]) :] = numbers[-8:]
            inputs[1][row, : len(numbers)] = numbers
        inputs[2][[number[item] for item in DENIED]] = True
        outputs = tuple(run(*inputs))
        assert_fits(config.output, outputs, "OUTPUT", schema)
        assert_answers_as_the_recommender(kept, outputs, torch.float64, histories)


TRITON_TYPES = {"TYPE_INT64": torch.int64, "TYPE_BOOL": torch.bool, "TYPE_FP32": torch.float32}


def assert_fits(told: Sequence[Any], tensors: Sequence[Tensor], kind: str, schema: ModuleType) -> None:
    assert [one.name for one in told] == [f"{kind}__{place}" for place in range(len(tensors))]
    for one, tensor in zip(told, tensors, strict=True):
        assert TRITON_TYPES[schema.DataType.Name(one.data_type)] == tensor.dtype
        assert [have if size == -1 else size for size, have in zip(one.dims, tensor.shape, strict=True)] == [
            *tensor.shape
        ]


def test_what_is_no_model_of_triton_inference_server(kept: Checkpoint, tmp_path: Path) -> None:
    for options, message in (
        ({"batches": (1, 64)}, "2 batch sizes given; expected one"),
        ({"batches": (None,), "excluded": 0}, "exclusions is 0; expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            export.export(kept, tmp_path / "models", format="triton", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_compiler(kept: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(InputError, match=r"batch-1\.pt2: cannot be compiled: No working C\+\+ compiler found$"):
        export.export(kept, tmp_path / "out", format="aoti")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere libraries have other names")
def test_a_program_that_pytorch_could_not_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [b"libm.so.6 libstdc++.so.6"]

    def compiled(program: object, package_path: str) -> None:
        with zipfile.ZipFile(package_path, "w") as package:
            package.writestr("model/data/aotinductor/model/a.wrapper.so", needed[0])
            package.writestr("model/data/aotinductor/model/a.wrapper.cpp", "#include <regex>")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setenv("CXX", "/opt/other/bin/g++")
    program: Any = None
    export.save(program, tmp_path / "good.pt2", "aoti")
    needed[0] = b"libm.so.6"
    with pytest.raises(
        InputError, match=r"bad\.pt2: the C\+\+ compiler, /opt/other/bin/g\+\+, linked libstdc\+\+ statically"
    ):
        export.save(program, tmp_path / "bad.pt2", "aoti")
    assert [path.name for path in tmp_path.iterdir()] == ["good.pt2"]


def test_an_empty_folder_is_taken_and_another_is_left(kept: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    export.export(kept, folder, batches=(1,))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "manifest.json" in before
    with pytest.raises(InputError, match="out: is not empty; expected a new folder"):
        export.export(kept, folder, batches=(2,))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_one_draw_is_said(tmp_path: Path, kept: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    flow = replace(kept.config.flow, n_samples=3)
    checkpoints.save(replace(kept, config=replace(kept.config, flow=flow)), tmp_path / "model.pt")
    options = ["--ckpt", str(tmp_path / "model.pt"), "--output", str(tmp_path / "out"), "--batch-size", "1"]
    assert export.main([*options, "--seed", "5"]) == 0
    assert "note: one endpoint is drawn a history, not 3 as the checkpoint says" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 5


@pytest.mark.parametrize(("batch", "excluded", "message"), [(0, 1, "batch is 0"), (1, -1, "excluded is -1")])
def test_what_does_not_fit_is_refused(kept: Checkpoint, batch: int, excluded: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.export_one_step(frozen(kept, torch.float32, 5), batch, excluded)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_bf16_on_a_gpu(kept: Checkpoint, tmp_path: Path, format: str) -> None:
    """The list's scores have at most twice the error of plain PyTorch in bf16, against float64."""
    try:
        manifest = export.export(
            kept, tmp_path / "out", format=format, batches=(len(HISTORIES),), dtype="bf16", device="cuda", excluded=16
        )
    except InputError as error:
        if "linked libstdc++ statically" not in str(error):
            raise
        pytest.skip(str(error))
    assert manifest["device"]["type"] == "cuda"
    rounded = kept.build_model().to(DTYPES["bf16"]).double().state_dict()
    exact = frozen(replace(kept, weights=rounded), torch.float64, 24)
    history, exclude, deny = numbered(kept, exact.length, 16)
    scores = exact.encode(history) @ exact.table.T
    plain = frozen(kept, DTYPES["bf16"], 20, "cuda")
    inputs = [part.cuda() for part in (history, exclude, deny)]
    run = export.load(tmp_path / "out" / f"batch-{len(HISTORIES)}.pt2", format)
    errors = []
    for found, ids in (run(*inputs), plain(*inputs)):
        listed = found.cpu().isfinite()
        errors.append((found.cpu() - scores.gather(1, ids.cpu()))[listed].norm())
        assert not deny[ids.cpu()].any()
        assert not (ids.cpu()[:, :, None] == exclude[:, None]).logical_and(exclude[:, None] > 0).any()
    assert errors[0] <= 2 * errors[1]
