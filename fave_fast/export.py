"""Artefacts for servers without Python: `OneStep` by `torch.export` or AOTInductor; `python -m fave_fast.export`.

The folder holds one `batch-B.pt2` for each batch size, `items.jsonl` (line n is item n: its original id, and how often
it was trained on, for the fallback of histories without a known item) and `manifest.json`. A program's inputs and
outputs are those of `OneStep.forward`, in that order. For Triton Inference Server all of this lies in `fave/1`, the
program as `model.pt2`, below `fave/config.pbtxt`.

A server reads `manifest.json`, maps ids to the numbers of `items.jsonl`, pads histories on the left and exclusions
anywhere with 0, and calls `torch::inductor::AOTIModelPackageLoader(path).run({history, exclude, deny})` (aoti).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import fave_fast
from fave_fast import checkpoint as checkpoints
from fave_fast import cli, triton_server
from fave_fast.checkpoint import Checkpoint
from fave_fast.errors import InputError
from fave_fast.files import check_new_folder, new_folder
from fave_fast.flow import InferenceNoise
from fave_fast.model import DTYPES
from fave_fast.one_step import OneStep

FORMATS = ("pt2", "aoti", "triton")
MANIFEST_VERSION = 1
ANY = "any"
_TRACED = 2  # an example of any batch: torch.export takes 1 for a constant
_PROBES = 64  # histories that an artefact is compared with plain PyTorch on


def export_one_step(step: OneStep, batch: int | None, excluded: int) -> ExportedProgram:
    """`step` as a program for batches of `batch` histories (None: of any number), E = `excluded`.

    Raises:
        ValueError: batch below 1, or excluded below 0.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if excluded < 0:
        raise ValueError(f"excluded is {excluded}; expected at least 0")
    inputs = _example(step, batch or _TRACED, excluded)
    rows = {0: Dim("B", min=1)}
    shapes = None if batch else {"history": rows, "exclude": rows, "deny": None}
    with torch.no_grad():
        return torch.export.export(step, inputs, dynamic_shapes=shapes)


def save(program: ExportedProgram, path: Path, format: str) -> None:
    """Write `program` to `path`, whose ending is .pt2.

    Args:
        program: of `export_one_step`.
        path: a file of that name is replaced.
        format: pt2 (graph and weights, for `torch.export.load`), or aoti or triton (compiled for the device that the
            program is on and its like, for `torch._inductor.aoti_load_package` and its twin in C++).

    Raises:
        InputError: the compiler failed, for want of a C++ compiler, say, or made what PyTorch cannot load.
    """
    if format == "pt2":
        torch.export.save(program, path)
        return
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[:1]
        raise InputError(f"{path.name}: cannot be compiled: {first[0] if first else type(error).__name__}") from None
    if sys.platform == "linux" and _has_its_own_libstdcxx(path):
        path.unlink()
        compiler = os.environ.get("CXX", "g++")
        raise InputError(
            f"{path.name}: the C++ compiler, {compiler}, linked libstdc++ statically, and PyTorch could not load that; "
            "expected one in the environment variable CXX that does not"
        )


def _has_its_own_libstdcxx(package: Path) -> bool:
    """Whether a program of the package names neither libstdc++ nor libc++ among the libraries that it needs.

    Its loader uses std::regex, whose facets a second libstdc++ in the process looks up in the first one's locale: a
    segmentation fault (PyTorch 2.11, H200), or "API call failed" (2.13, CPU).
    """
    with zipfile.ZipFile(package) as content:
        programs = [content.read(name) for name in content.namelist() if name.endswith(".so")]
    return any(b"libstdc++.so" not in program and b"libc++.so" not in program for program in programs)


def load(path: Path, format: str) -> Any:
    """A file of `save` as a function of history, exclude and deny."""
    if format == "pt2":
        return torch.export.load(path).module()
    return torch._inductor.aoti_load_package(str(path))


def export(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    format: str = "pt2",
    batches: Sequence[int | None] = (1, 64),
    length: int | None = None,
    excluded: int = 256,
    k: int = 20,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> dict[str, Any]:
    """Write the folder that this module's head describes, whole or not at all, and return its manifest.

    Args:
        checkpoint: whose model to export.
        folder: new, or empty.
        format: one of `FORMATS`; triton is a model repository of Triton Inference Server, for one batch size.
        batches: batch sizes, a file each, which holds the whole catalogue; None is one for any number.
        length: L; None is the model's longest.
        excluded: E, how many exclusions a row may have.
        k: K.
        dtype: fp32 or bf16.
        device: where the programs run.
        seed: of what is drawn; None is the checkpoint's.

    Raises:
        InputError: a folder that is not empty or cannot be written, a length that the model does not take, a failure of
            the compiler, or what no model of Triton Inference Server can be made of.
        CheckpointError: weights and configuration do not fit.
    """
    longest, flow = checkpoint.config.model.max_length, checkpoint.config.flow
    if length is not None and not 1 <= length <= longest:
        raise InputError(f"length is {length}; expected 1 to {longest}, the longest history that the model reads")
    if format == "triton":
        triton_server.check_exportable(len(batches), excluded)
    check_new_folder(folder)
    model = checkpoint.build_model().to(device, DTYPES[dtype])
    step = OneStep(model, flow, InferenceNoise.draw(model, flow, seed), k, length)
    manifest: dict[str, Any] = {
        "version": MANIFEST_VERSION,
        "format": format,
        "fave_fast": fave_fast.__version__,
        "torch": torch.__version__,
        "device": _device_facts(step.table.device),
        "dtype": dtype,
        "items": step.num_items,
        "topk": k,
        "length": step.length,
        "exclusions": excluded,
        "seed": flow.seed if seed is None else seed,
        "item_ids": "items.jsonl",
        "programs": [],
        "config": checkpoint.config.to_dict(),
    }
    with new_folder(folder) as part:
        home = triton_server.version_folder(part) if format == "triton" else part
        _write_items(checkpoint, home / manifest["item_ids"])
        for batch in batches:
            name = triton_server.PROGRAM if format == "triton" else f"batch-{batch or ANY}.pt2"
            manifest["programs"].append(_write_program(step, batch, excluded, home / name, format))
        (home / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if format == "triton":
            triton_server.write_config(manifest["programs"][0], step.table.device.type, part)
    return manifest


def _example(step: OneStep, batch: int, excluded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Histories of all lengths, the same each time; half of the exclusions are the history's, one item is denied."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(1, step.num_items + 1, (batch, step.length), generator=generator)
    padding = torch.randint(0, step.length, (batch, 1), generator=generator)
    history.masked_fill_(torch.arange(step.length) < padding, 0)
    exclude = torch.zeros(batch, excluded, dtype=torch.int64)
    width = min(excluded, step.length)
    exclude[:, :width] = history[:, step.length - width :]
    deny = torch.zeros(step.num_items + 1, dtype=torch.bool)
    deny[-1] = True
    return history.to(step.table.device), exclude.to(step.table.device), deny.to(step.table.device)


def _device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type}
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return {"type": "cuda", "name": name, "capability": list(capability), "cuda": torch.version.cuda}


def _write_items(checkpoint: Checkpoint, path: Path) -> None:
    counts = checkpoint.popularity[1:].tolist()
    with path.open("w", encoding="utf-8") as file:
        for item, count in zip(checkpoint.item_ids.ids, counts, strict=True):
            file.write(json.dumps({"id": item, "count": count}, ensure_ascii=False) + "\n")


def _write_program(step: OneStep, batch: int | None, excluded: int, path: Path, format: str) -> dict[str, Any]:
    """Write one program, run it once, and return its part of the manifest."""
    started = time.perf_counter()
    save(export_one_step(step, batch, excluded), path, format)
    seconds = time.perf_counter() - started
    inputs = _example(step, batch or _PROBES, excluded)
    found, expected = load(path, format)(*inputs), step(*inputs)
    # Lists that end early have -inf in both.
    difference = torch.where(found[0] == expected[0], 0.0, (found[0] - expected[0]).abs()).max().item()
    size = path.stat().st_size
    cli.say(
        f"{path.name}: {size / 1e6:.1f} MB in {seconds:.1f} s; scores of {len(inputs[0])} made-up histories differ "
        f"from plain PyTorch's by at most {difference:.2g}"
    )
    return {
        "file": path.name,
        "batch": batch,
        "inputs": _signature(("history", "exclude", "deny"), inputs, batch),
        "outputs": _signature(("scores", "ids"), expected, batch),
        "largest_difference": difference,
    }


def _signature(names: Sequence[str], tensors: Sequence[Tensor], batch: int | None) -> list[dict[str, Any]]:
    """Name, dtype and shape of each tensor; where any batch goes, the first of two sizes is -1."""
    return [
        {
            "name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [-1, *tensor.shape[1:]] if batch is None and tensor.dim() == 2 else list(tensor.shape),
        }
        for name, tensor in zip(names, tensors, strict=True)
    ]


def _batch_size(text: str) -> int | None:
    """An argparse type: a whole number from 1, or `any`."""
    return None if text == ANY else cli.whole_number(1)(text)


def _parser() -> cli.Parser:
    parser = cli.Parser("export", "Export a checkpoint as programs that need no Python.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by fave_fast.train")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--format",
        default="pt2",
        choices=FORMATS,
        help="pt2: a graph of torch.export; aoti: compiled for this device; triton: compiled, as a model repository of "
        "Triton Inference Server",
    )
    parser.add_argument(
        "--batch-size",
        action="append",
        type=_batch_size,
        metavar="B",
        help="histories in one call, a file each (repeat the option); any: one file for all sizes; none: 1 and 64, but "
        "any for triton",
    )
    parser.add_argument("--length", type=cli.whole_number(1), help="items of a history, L; none: the model's longest")
    parser.add_argument("--exclusions", type=cli.whole_number(0), default=256, help="items a row can leave out, E")
    parser.add_argument("--topk", type=cli.whole_number(1), default=20, help="length of a list")
    parser.add_argument("--seed", type=cli.whole_number(0), help="of what is drawn; none: as trained")
    cli.add_device_options(parser, "of weights and products")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments: argparse.Namespace = _parser().parse_args(argv)
    batches = list(dict.fromkeys(arguments.batch_size or ((None,) if arguments.format == "triton" else (1, 64))))
    check_new_folder(arguments.output)
    device = cli.resolve_device(arguments.device)
    checkpoint = checkpoints.load(arguments.ckpt)
    if checkpoint.config.flow.n_samples > 1:
        cli.say(f"note: one endpoint is drawn a history, not {checkpoint.config.flow.n_samples} as the checkpoint says")
    export(
        checkpoint,
        arguments.output,
        format=arguments.format,
        batches=batches,
        length=arguments.length,
        excluded=arguments.exclusions,
        k=arguments.topk,
        dtype=arguments.dtype,
        device=device,
        seed=arguments.seed,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
