"""One safe file: weights, configuration, id maps, popularity, facts about the data and the protocol.

The file is a zip of tensors and plain values, read with `weights_only=True`, so that nothing in it can run. A SHA-256
of all its content travels inside: a file that was damaged or edited is refused. (It is no signature: whoever can
rewrite the file can rewrite the digest too.)
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fave_fast.config import Config
from fave_fast.data import IdMap
from fave_fast.errors import CheckpointError, ConfigError, InputError
from fave_fast.files import replacing
from fave_fast.model import FAVE

FORMAT_VERSION = 1
_KIND = "fave_fast model"
# What the unpickler was seen to raise on damaged bytes, besides its own error.
_UNPICKLING_FAILURES = (
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    OSError,
    AttributeError,
    AssertionError,
    struct.error,
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with all that is needed to evaluate and to serve it."""

    config: Config
    weights: Mapping[str, Tensor]  # the state of `FAVE`, fp32, on the CPU
    item_ids: IdMap  # position i is item i + 1
    user_ids: IdMap
    popularity: Tensor  # int64 [N + 1], how often each item occurs in the training parts
    facts: Mapping[str, Any]  # plain values: data set, counts, protocol, decisions, seed, validation result
    sample_users: Tensor  # int64 [S], a few users kept to show lists for
    sample_items: Tensor  # int64, their histories end to end
    sample_offsets: Tensor  # int64 [S + 1]

    def build_model(self) -> FAVE:
        """The network with these weights, on the CPU, in evaluation mode.

        Raises:
            CheckpointError: weights and configuration do not fit.
        """
        model = FAVE(self.config.model, len(self.item_ids))
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise CheckpointError(f"weights and configuration do not fit: {' '.join(str(error).split())}") from None
        return model.eval()


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write `checkpoint` to `path`, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    write_envelope(path, _KIND, *_pack(checkpoint))


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint written by `save`.

    Raises:
        CheckpointError: no such file, not a checkpoint, truncated, damaged, edited, or written by a newer version.
    """
    plain, tensors = read_envelope(path, _KIND)
    return _unpack(plain, tensors, str(path))


def content_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 of all the content, in hexadecimal: the one that `save` writes into the file."""
    plain, tensors = _pack(checkpoint)
    return _digest({"kind": _KIND, "version": FORMAT_VERSION, "plain": plain}, tensors)


def export_safetensors(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write `checkpoint` as a safetensors file: the tensors, and the rest as JSON in its metadata.

    Raises:
        InputError: the file cannot be written.
        ImportError: the package safetensors is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain, tensors = _pack(checkpoint)
    envelope = {"kind": _KIND, "version": FORMAT_VERSION, "plain": plain}
    metadata = {"fave_fast": json.dumps(envelope), "digest": _digest(envelope, tensors)}
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:
            raise InputError(f"{path}: cannot write: {error}") from None


def import_safetensors(path: str | Path) -> Checkpoint:
    """Read a file written by `export_safetensors`.

    Raises:
        CheckpointError: as `load`.
        ImportError: the package safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
    try:
        envelope = json.loads(metadata["fave_fast"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{path}: not written by fave_fast; expected an exported checkpoint") from None
    _check_envelope(envelope, metadata.get("digest"), tensors, _KIND, str(path))
    return _unpack(envelope["plain"], tensors, str(path))


def write_envelope(path: str | Path, kind: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write plain values and named tensors to one file with format, version and digest; whole or not at all."""
    envelope = {"kind": kind, "version": FORMAT_VERSION, "plain": dict(plain)}
    stored = {name: _alone(tensor) for name, tensor in tensors.items()}
    with replacing(path) as part:
        try:
            torch.save({**envelope, "tensors": stored, "digest": _digest(envelope, stored)}, part)
        except RuntimeError as error:
            raise InputError(f"{path}: cannot write: {str(error).splitlines()[0]}") from None


def read_envelope(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of `write_envelope`, running nothing of it.

    Raises:
        CheckpointError: no such file, another kind, truncated, damaged, edited, or newer.
    """
    path = _check_file(path)
    try:
        whole = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        whole = False
    if not whole:
        with path.open("rb") as file:
            started = file.read(4) == b"PK\x03\x04"
        what = "truncated: the end of the file is missing" if started else "not a checkpoint"
        raise CheckpointError(f"{path}: {what}; expected a {kind} file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values, none of which was run; expected a {kind} file"
        ) from None
    except _UNPICKLING_FAILURES as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a {kind} file: {reason}") from None
    tensors = content.get("tensors") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: not written by fave_fast; expected a {kind} file")
    envelope = {key: content.get(key) for key in ("kind", "version", "plain")}
    _check_envelope(envelope, content.get("digest"), tensors, kind, str(path))
    return envelope["plain"], tensors


def _check_file(path: str | Path) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; expected a checkpoint file")
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror}") from None
    return path


def _check_envelope(envelope: Any, digest: object, tensors: Mapping[str, Tensor], kind: str, path: str) -> None:
    if not isinstance(envelope, dict) or not isinstance(envelope.get("plain"), dict):
        raise CheckpointError(f"{path}: not written by fave_fast; expected a {kind} file")
    if envelope.get("kind") != kind:
        raise CheckpointError(f"{path}: is a {envelope.get('kind') or 'foreign'} file; expected a {kind} file")
    version = envelope.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: format version {version!r}; expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format version {version}; this fave_fast reads up to {FORMAT_VERSION}: upgrade it"
        )
    try:
        computed = _digest(envelope, tensors)
    except (TypeError, RuntimeError):
        computed = ""
    if digest != computed:
        raise CheckpointError(f"{path}: its content does not match its SHA-256: damaged or edited after it was written")


def _digest(envelope: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(json.dumps(envelope, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel() > 0:  # an empty one may have strides that no view of bytes takes
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _pack(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    plain = {"config": checkpoint.config.to_dict(), "facts": dict(checkpoint.facts)}
    tensors = {f"weights/{name}": tensor for name, tensor in checkpoint.weights.items()}
    for prefix, ids in (("item_ids", checkpoint.item_ids), ("user_ids", checkpoint.user_ids)):
        tensors |= {f"{prefix}/{name}": tensor for name, tensor in ids.to_tensors().items()}
    for name in ("popularity", "sample_users", "sample_items", "sample_offsets"):
        tensors[name] = getattr(checkpoint, name)
    return json.loads(json.dumps(plain)), {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unpack(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> Checkpoint:
    def group(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    try:
        checkpoint = Checkpoint(
            config=Config.from_dict(plain["config"], path),
            weights=group("weights/"),
            item_ids=IdMap.from_tensors(group("item_ids/")),
            user_ids=IdMap.from_tensors(group("user_ids/")),
            popularity=tensors["popularity"],
            facts=plain["facts"],
            sample_users=tensors["sample_users"],
            sample_items=tensors["sample_items"],
            sample_offsets=tensors["sample_offsets"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks {error}; expected a complete {_KIND} file") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return checkpoint
