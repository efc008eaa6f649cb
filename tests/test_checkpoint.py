from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import resource
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fave_fast import checkpoint, files
from fave_fast.checkpoint import Checkpoint, export_safetensors, import_safetensors, load, save
from fave_fast.config import Config, ModelConfig
from fave_fast.data import IdMap
from fave_fast.errors import CheckpointError, InputError
from fave_fast.model import FAVE

ITEMS = 5
MODEL = ModelConfig(d=8, blocks=2, heads=2, ffn_mult=1, max_length=4)
SAVERS = pytest.mark.parametrize(
    ("write", "read"), [(save, load), (export_safetensors, import_safetensors)], ids=["own", "safetensors"]
)


def build(texts: bool = False) -> Checkpoint:
    torch.manual_seed(0)
    items: list[object] = ["a", "ü", "\U0001f600", "007", "z" * 300] if texts else [-5, 0, 7, 2**62, -(2**63)]
    return Checkpoint(
        config=Config(model=MODEL).override({"loss": {"alpha": 0.1 + 0.2}}, "test"),
        weights=FAVE(MODEL, ITEMS).state_dict(),
        item_ids=IdMap.from_ids(items),
        user_ids=IdMap.from_ids(["u1", "u2"] if texts else [3, 4]),
        popularity=torch.tensor([0, 5, 4, 3, 2, 1]),
        facts={"data": "tëst", "validation": {"NDCG@20": 1 / 3}, "decisions": ["a", None, True], "seed": 3},
        sample_users=torch.tensor([1]),
        sample_items=torch.tensor([1, 2, 3]),
        sample_offsets=torch.tensor([0, 3]),
    )


def assert_equal(got: Checkpoint, want: Checkpoint) -> None:
    for field in dataclasses.fields(Checkpoint):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "weights":
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
        elif isinstance(b, torch.Tensor):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        else:
            assert a == b, field.name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.fave"
    save(build(), path)
    return path


@SAVERS
@pytest.mark.parametrize("texts", [False, True])
def test_round_trip(tmp_path: Path, write: Callable[..., None], read: Callable[..., Checkpoint], texts: bool) -> None:
    path, want = tmp_path / "model", build(texts)
    write(want, path)
    got = read(path)
    assert_equal(got, want)
    assert list(tmp_path.iterdir()) == [path]
    model = got.build_model()
    assert not model.training
    assert all(torch.equal(value, want.weights[name]) for name, value in model.state_dict().items())


@SAVERS
def test_facts_with_whole_number_keys(
    tmp_path: Path, write: Callable[..., None], read: Callable[..., Checkpoint]
) -> None:
    """What was written can be read, whichever plain keys the facts have."""
    write(dataclasses.replace(build(), facts={"users_by_length": {9: 1, 10: 2}}), tmp_path / "model")
    assert list(read(tmp_path / "model").facts["users_by_length"].values()) == [1, 2]


def test_views_are_stored_alone(tmp_path: Path) -> None:
    want = build()
    big = torch.zeros(1_000_000, dtype=torch.int64)
    big[:6] = want.popularity
    save(dataclasses.replace(want, popularity=big[:6]), tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").popularity, want.popularity)
    assert (tmp_path / "model").stat().st_size < 8_000_000


def test_weights_that_do_not_fit(file: Path) -> None:
    wrong = dataclasses.replace(load(file), config=Config(model=dataclasses.replace(MODEL, ffn_mult=2)))
    with pytest.raises(CheckpointError, match=r"weights and configuration do not fit: .*ffn_in") as error:
        wrong.build_model()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [1, 3, 4, 100, 0.5, 0.9, -30, -1])
def test_truncated(file: Path, keep: float) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    expected = "truncated: the end of the file is missing" if keep not in (1, 3) else "not a checkpoint"
    with pytest.raises(CheckpointError, match=expected) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(build(), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        import_safetensors(path)


def test_flipped_byte_in_a_weight(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    at = bytes(raw).index(build().weights["item_embedding.weight"].numpy().tobytes())
    raw[at + 40] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged|SHA-256"):
        load(file)


def test_flipped_byte_in_a_safetensors_weight(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(build(), path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        import_safetensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_is_either_harmless_or_told(tmp_path: Path) -> None:
    """One flipped bit, anywhere in the file or in its pickle: the same content or a CheckpointError."""
    path, plain, tensors = tmp_path / "x", {"text": "abc", "list": [1]}, {"a": torch.ones(3)}
    checkpoint.write_envelope(path, "thing", plain, tensors)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    draws = random.Random(0)

    def flip(content: bytes, at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 1 << draws.randrange(8)]) + content[at + 1 :]

    def check() -> None:
        try:
            got = checkpoint.read_envelope(path, "thing")
        except CheckpointError:
            return
        assert got[0] == plain
        assert got[1].keys() == {"a"}
        assert torch.equal(got[1]["a"], tensors["a"])

    for at in range(len(raw)):
        path.write_bytes(flip(raw, at))
        check()
    (name,) = (name for name in members if name.endswith("data.pkl"))
    for at in list(range(len(members[name]))) * 2:
        # Rewritten with a right checksum, so that the unpickler meets the damage.
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, flip(content, at) if member == name else content)
        check()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["plain"]["config"]["loss"].update(alpha=0.5), "does not match its SHA-256"),
        (lambda c: c["plain"]["facts"].update(seed=4), "does not match its SHA-256"),
        (lambda c: c["tensors"]["popularity"].add_(1), "does not match its SHA-256"),
        (lambda c: c["tensors"].pop("popularity"), "does not match its SHA-256"),
        (lambda c: c["tensors"].update(extra=torch.ones(2)), "does not match its SHA-256"),
        (lambda c: c["tensors"].update(popularity=c["tensors"]["popularity"].int()), "does not match its SHA-256"),
        (lambda c: c["tensors"].update(popularity=torch.eye(2).to_sparse()), "SHA-256|damaged|sparse"),
        (lambda c: c["tensors"].update(popularity=torch.ones(2, device="meta")), "SHA-256|damaged|meta"),
        (lambda c: c.pop("digest"), "does not match its SHA-256"),
        (lambda c: c["plain"].update(facts={1, 2}), "does not match its SHA-256"),
        (lambda c: c.update(version=checkpoint.FORMAT_VERSION + 1), r"format version 2; this fave_fast reads up to 1"),
        (lambda c: c.update(version="1"), "format version '1'; expected a whole number"),
        (lambda c: c.update(version=0), "format version 0; expected a whole number"),
        (
            lambda c: c.update(kind="fave_fast training state"),
            "is a fave_fast training state file; expected a fave_fast",
        ),
        (lambda c: c.update(kind=None), "is a foreign file"),
        (lambda c: c.update(tensors=[1]), "not written by fave_fast"),
        (lambda c: c["tensors"].update(popularity=3), "not written by fave_fast"),
    ],
)
def test_edited(file: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(file, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda plain, _: plain.pop("facts"),
        lambda plain, _: plain["config"].update(other={}),
        lambda plain, _: plain["config"]["model"].update(d=-8),
        lambda plain, _: plain.update(config=3),
        lambda _, tensors: tensors.pop("popularity"),
        lambda _, tensors: tensors.pop("item_ids/ints"),
        lambda _, tensors: tensors.update({"item_ids/ints": torch.tensor([3, 2])}),
    ],
)
def test_well_formed_file_with_the_wrong_content(file: Path, change: Callable[[Any, Any], object]) -> None:
    """A right digest, as an older or another writer might make: each part is still checked."""
    plain, tensors = checkpoint.read_envelope(file, "fave_fast model")
    change(plain, tensors)
    checkpoint.write_envelope(file, "fave_fast model", plain, tensors)
    with pytest.raises(CheckpointError):
        load(file)


@pytest.mark.parametrize("plain", [None, [1], "text", 1])
def test_well_formed_file_without_a_mapping(file: Path, plain: object) -> None:
    def change(content: dict[str, Any]) -> None:
        content["plain"] = plain
        envelope = {key: content[key] for key in ("kind", "version", "plain")}
        content["digest"] = checkpoint._digest(envelope, content["tensors"])

    edit(file, change)
    with pytest.raises(CheckpointError):
        load(file)


class Malicious:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "numpy"])
def test_nothing_in_a_file_is_run(tmp_path: Path, form: str) -> None:
    path, trap = tmp_path / "model", tmp_path / "trap"
    content = {"kind": "fave_fast model", "version": 1, "plain": Malicious(trap), "tensors": {}, "digest": ""}
    with path.open("wb") as file:
        match form:
            case "pickle":
                pickle.dump(content, file)
            case "numpy":
                np.save(file, np.array([content], dtype=object), allow_pickle=True)
            case _:
                torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    for read in (load, import_safetensors):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")
    if form == "zip":
        with pytest.raises(CheckpointError, match="none of which was run"):
            load(path)
    assert not trap.exists()
    if form in ("zip", "legacy"):
        torch.load(path, weights_only=False)
        assert trap.exists(), "the trap itself must work for this test to mean anything"


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save({"weight": torch.ones(3)}, path), "not written by fave_fast"),
        (lambda path: torch.save([1, 2], path), "not written by fave_fast"),
        (lambda path: torch.save(torch.ones(3), path), "not written by fave_fast"),
        (foreign_zip, "damaged, or not a fave_fast model file"),
        (lambda path: path.write_bytes(b""), "not a checkpoint; expected a fave_fast model file"),
        (lambda path: path.write_text("user,item\n1,2\n"), "not a checkpoint; expected a fave_fast model file"),
        (lambda path: path.mkdir(), "is a folder; expected a checkpoint file"),
        (lambda path: None, "cannot read the checkpoint: No such file"),
        (lambda path: export_safetensors(build(), path), "not a checkpoint"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "model"
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    for metadata in (None, {"fave_fast": "no json"}, {"fave_fast": "[1]"}, {"fave_fast": "{}"}, {"fave_fast": "3"}):
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(CheckpointError) as error:
            import_safetensors(path)
        assert str(error.value).startswith(f"{path}: ")


def test_newer_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 9)
        export_safetensors(build(), path)
    with pytest.raises(CheckpointError, match="written in format version 9; this fave_fast reads up to 1"):
        import_safetensors(path)


def test_path_too_long_for_the_system(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(CheckpointError, match="File name too long"):
        load(path)
    with pytest.raises(InputError, match="File name too long"):
        save(build(), path)


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_replacing_keeps_the_old_file_if_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "result"
    path.write_text("old")

    def fail() -> None:
        with files.replacing(path) as part:
            part.write_text("new, but only half")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_turns_a_failed_write_into_one_line(tmp_path: Path) -> None:
    path = tmp_path / "result"

    def fail() -> None:
        with files.replacing(path):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="result: cannot write: No space left on device"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_replacing_puts_the_new_file_there_with_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    (tmp_path / "plain").write_text("")
    with files.replacing(path) as part:
        assert part.parent == tmp_path
        part.write_text("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {entry.name for entry in tmp_path.iterdir()} == {"result", "plain"}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files of this process end at 1 kB: a write beyond it fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [save, export_safetensors])
def test_full_disk(tmp_path: Path, write: Callable[..., None]) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    with pytest.raises(InputError, match="model: cannot write"), full_disk():
        write(build(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is a folder; expected a file name"):
        save(build(), tmp_path)
    with pytest.raises(InputError, match=r"the folder .*missing does not exist"):
        save(build(), tmp_path / "missing" / "model")
    tmp_path.chmod(0o500)
    # The administrator may write anywhere: there the answer of the system is put in its mouth.
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda *_: False)
    try:
        with pytest.raises(InputError, match=r"model: cannot write into the folder"):
            save(build(), tmp_path / "model")
    finally:
        tmp_path.chmod(0o700)


def test_envelope_holds_plain_json_and_tensors_only(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"kind", "version", "plain", "tensors", "digest"}
    assert json.loads(json.dumps(content["plain"])) == content["plain"]
