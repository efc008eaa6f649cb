"""Triton's hash of itself is computed once for each state of its files."""

import os
from pathlib import Path

import pytest

from fave_fast.ops import triton_key
from fave_fast.ops.registry import why_no_triton


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files as Triton has them."""
    for file in ("_C/libtriton.so", "compiler/compiler.py", "language/extra/core.py", "runtime/cache.py"):
        path = tmp_path / "triton" / file
        path.parent.mkdir(parents=True)
        path.write_text(file)
    return tmp_path / "triton"


def never() -> str:
    raise AssertionError("the hash is computed again")


def test_it_is_computed_once(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "cache"
    assert triton_key.key(lambda: "3.6.0-abc", root, folder) == "3.6.0-abc"
    assert triton_key.key(never, root, folder) == "3.6.0-abc"
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("file", ["_C/libtriton.so", "compiler/compiler.py", "language/extra/core.py"])
def test_a_file_that_changed_has_it_computed_again(file: str, root: Path, tmp_path: Path) -> None:
    triton_key.key(lambda: "before", root, tmp_path)
    stat = (root / file).stat()
    os.utime(root / file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert triton_key.key(lambda: "touched", root, tmp_path) == "touched"
    (root / file).write_text("longer than before")
    os.utime(root / file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert triton_key.key(lambda: "longer", root, tmp_path) == "longer"


def test_where_nothing_can_be_kept_it_is_computed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        assert triton_key.key(lambda: "computed", root, tmp_path / "file") == "computed"


@pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
def test_it_is_tritons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs
    from triton.runtime import cache

    before = cache.triton_key
    monkeypatch.setattr(cache, "triton_key", before)  # and it is again afterwards
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    for _ in range(2):
        triton_key.remember()
        assert cache.triton_key is not before
        assert cache.triton_key() == before()
