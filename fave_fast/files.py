"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fave_fast.errors import InputError


def check_writable(path: str | Path) -> Path:
    """`path`, if a file can be written there; to be asked before the work whose result goes there.

    Raises:
        InputError: it is a folder, or its folder is missing or read-only.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; expected a file name to write to")
        _check_parent(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None
    return path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes when it raises.

    A kill at any moment leaves the old file or the new one at `path`, never a part of one.

    Raises:
        InputError: the file cannot be written (no folder, no permission, no space).
    """
    path = check_writable(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends, and vanishes when it raises.

    Raises:
        InputError: `path` is there already and no empty folder, or cannot be written.
    """
    path = check_new_folder(path)
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None
    try:
        yield part
        part.chmod(0o777 & ~_umask())
        part.replace(path)  # takes the place of nothing, or of an empty folder
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new_folder(path: str | Path) -> Path:
    """`path`, if `new_folder` can make it; to be asked before the work whose result goes there.

    Raises:
        InputError: it is there already and no empty folder, or its parent is missing or read-only.
    """
    path = Path(path).absolute()
    try:
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path}: is not empty; expected a new folder")
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; expected a new folder")
        _check_parent(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None
    return path


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot write into the folder {path.parent}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
