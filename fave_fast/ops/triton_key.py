"""What Triton tells its versions apart by, remembered between processes.

Triton names the file of a compiled kernel by, among others, a hash of its own files, of which libtriton.so alone has
416 MB (3.6): every process reads all of it before its first kernel is launched, compiled or not. That took 0.33 s on a
Zen 4 with nothing else to do, 0.95 beside others. Here the hash is kept beside the kernels, under the files' names,
sizes and times of change, which takes 9 ms to look up.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HASHED = ("_C", "backends", "compiler", "language", "runtime")  # of Triton's folders; its hash reads no others


def remember() -> None:
    """Have Triton take its hash from where it is kept; where it has none of that name, nothing changes."""
    cache: Any = importlib.import_module("triton.runtime.cache")
    if hasattr(cache, "triton_key"):
        knobs: Any = importlib.import_module("triton.knobs")
        root = Path(cache.__file__).parents[1]
        cache.triton_key = functools.cache(functools.partial(key, cache.triton_key, root, Path(knobs.cache.dir)))


def key(compute: Callable[[], str], root: Path, folder: Path) -> str:
    """The hash of the Triton in `root`: as `folder` keeps it, else what `compute` returns, and kept there."""
    kept = folder / f"fave-fast-triton-key-{_state(root)}"
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="utf-8")
    computed = compute()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(computed)
        Path(name).replace(kept)  # another process reads all of it or nothing
    return computed


def _state(root: Path) -> str:
    paths = sorted(path for name in HASHED for kind in ("py", "so", "pyd") for path in (root / name).rglob(f"*.{kind}"))
    stats = [(path, path.stat()) for path in paths]
    facts = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(facts.encode()).hexdigest()
