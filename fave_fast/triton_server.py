"""An exported program as a model of Triton Inference Server (the server, not the language of our kernels).

From release 26.03 on its PyTorch backend runs what AOTInductor compiled, under the platform torch_aoti. It knows inputs
and outputs by their places and gives such a program one request at a time (github.com/triton-inference-server,
pytorch_backend, README at 266fd38). Ours could not take several joined into one, for the deny list has no row for each
history. So `max_batch_size` is 0, and a request is a batch: the first dimension of histories and exclusions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fave_fast.errors import InputError

MODEL = "fave"
VERSION = "1"
PROGRAM = "model.pt2"  # the name that the backend looks for
CONFIG = "config.pbtxt"
_TYPES = {"int64": "TYPE_INT64", "bool": "TYPE_BOOL", "float32": "TYPE_FP32"}


def version_folder(repository: Path) -> Path:
    """Where the first version of the model goes, made."""
    folder = repository / MODEL / VERSION
    folder.mkdir(parents=True)
    return folder


def write_config(program: Mapping[str, Any], device: str, repository: Path) -> None:
    """Write the model's `config.pbtxt`, a text of the protobuf message `inference.ModelConfig`.

    The model gets its folder's name, so that the folder can be renamed.

    Args:
        program: its entry in the manifest.
        device: cpu or cuda.
        repository: the folder of models.
    """
    kind = "KIND_GPU" if device == "cuda" else "KIND_CPU"
    text = (
        'backend: "pytorch"\n'
        'platform: "torch_aoti"\n'
        "max_batch_size: 0\n"
        f"{_tensors('input', program['inputs'])}"
        f"{_tensors('output', program['outputs'])}"
        f"instance_group [\n  {{ kind: {kind} }}\n]\n"
    )
    (repository / MODEL / CONFIG).write_text(text, encoding="utf-8")


def check_exportable(batches: int, excluded: int) -> None:
    """Whether a model can be made of so many programs with so many exclusions.

    Raises:
        InputError: more or fewer programs than one, or a tensor without elements, which the server does not take.
    """
    if batches != 1:
        raise InputError(
            f"{batches} batch sizes given; expected one, for a model of Triton Inference Server is one program"
        )
    if excluded < 1:
        raise InputError(
            f"exclusions is {excluded}; expected at least 1, for Triton Inference Server takes no empty input"
        )


def _tensors(kind: str, tensors: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        f"  # {tensor['name']}\n"
        f'  {{ name: "{kind.upper()}__{place}" data_type: {_TYPES[tensor["dtype"]]} dims: {tensor["shape"]} }}'
        for place, tensor in enumerate(tensors)
    ]
    return f"{kind} [\n" + ",\n".join(lines) + "\n]\n"
