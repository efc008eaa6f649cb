"""Which implementation of an op runs: by name, or the first that can.

An op lists its implementations in order of preference. Whether one can run is asked when the op is called, so importing
this asks nothing of a GPU. A backend asked for by name, in the call or in FAVE_FAST_BACKEND, runs or fails loudly; only
`auto` passes over one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from fave_fast.errors import BackendError
from fave_fast.ops import triton_key

BACKENDS = ("auto", "reference", "triton", "cpp")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Run = TypeVar("Run", bound=Callable[..., Any])
WhyNot = Callable[[torch.device, torch.dtype], str | None]

_HOME = {"triton": "cuda", "cpp": "cpu", "pair": "cuda", "tile": "cuda"}  # the type of device that a backend is for

_logger = logging.getLogger(__name__)


def uncompiled(function: Run) -> Run:
    """A function that `torch.compile` calls as it is, instead of tracing into it: `torch.compiler.disable`.

    That one is asked when something is compiled, as it takes 0.9 s to import.
    """
    disabled: Any = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if disabled is None:  # 8 us
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return call  # type: ignore[return-value]


def always(device: torch.device, dtype: torch.dtype) -> str | None:
    """The check of an implementation that runs everywhere."""
    return None


@functools.cache
def why_no_extension() -> str | None:
    """Why `fave_fast._C` cannot be imported, or None where it can."""
    try:
        importlib.import_module("fave_fast._C")
    except ModuleNotFoundError:
        return f"the C++ extension is not there: {_how_installed()}"
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


def _how_installed() -> str:
    try:
        wheel = importlib.metadata.distribution("fave-fast").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return "fave_fast was imported without being installed"
    if "Root-Is-Purelib: true" in wheel:
        return "fave-fast was built with FAVE_FAST_PURE=1"
    return "the package that was imported is not the one that is installed"


def cpu_extension(device: torch.device, dtype: torch.dtype) -> str | None:
    """The check of an implementation in `fave_fast._C`."""
    return why_no_extension() if device.type == "cpu" else f"it runs on the CPU, and the tensors are on {device.type}"


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton cannot be imported, or None where it can: then it is, and takes its key from where it is kept."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install 'fave-fast[gpu]'"
    triton_key.remember()
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run through its interpreter, on CPU tensors: slow, and meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """The check of an implementation in `fave_fast.kernels`."""
    if device.type == "cpu" and not interpreting():
        return "its kernels run on CUDA devices, and the tensors are on cpu"
    reason = why_no_triton()
    if reason is not None or device.type == "cpu":
        return reason
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs, and the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "its kernels run on CUDA devices, and there is none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None if dtype in KERNEL_DTYPES else f"its kernels take float32, bfloat16 and float16, not {dtype}"


def not_interpreted(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `auto` does not choose a Triton kernel although it could run."""
    return "Triton's interpreter runs only when asked for by name" if interpreting() else None


@dataclass(frozen=True)
class Implementation(Generic[Run]):
    """One way of computing an op, under its backend's name.

    `why_not` gets the tensors' device and dtype and returns the reason why `run` cannot take them, or None;
    `why_not_auto` likewise, for a backend that can run and that `auto` should not choose.
    """

    backend: str
    run: Run
    why_not: WhyNot = always
    why_not_auto: WhyNot = always


@dataclass(frozen=True)
class Op(Generic[Run]):
    """An op's implementations, the preferred first; the last is the reference, which runs everywhere."""

    name: str
    implementations: tuple[Implementation[Run], ...]

    def refusals(self, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
        """For each backend of this op the reason why it cannot run, or None."""
        return {one.backend: one.why_not(device, dtype) for one in self.implementations}

    def offers(self, backend: str) -> bool:
        """Whether one of this op's implementations has that name, `auto` included; it may still refuse to run."""
        return backend == "auto" or any(one.backend == backend for one in self.implementations)

    def resolve(
        self, backend: str, device: torch.device, dtype: torch.dtype, beyond: Mapping[str, str] | None = None
    ) -> Run:
        """The function of the implementation that `choose` gives for the same arguments."""
        return self.choose(backend, device, dtype, beyond).run

    def choose(
        self, backend: str, device: torch.device, dtype: torch.dtype, beyond: Mapping[str, str] | None = None
    ) -> Implementation[Run]:
        """The implementation that `backend` stands for; `auto` stands for FAVE_FAST_BACKEND where that is set.

        `beyond` has the reasons, by backend, why a call of these sizes is not for it.

        Raises:
            BackendError: the name is unknown, this op has no such backend, or it cannot run here.
        """
        origin = ""
        if backend == "auto" and os.environ.get("FAVE_FAST_BACKEND"):
            backend, origin = os.environ["FAVE_FAST_BACKEND"], " (from FAVE_FAST_BACKEND)"
        for one in self.implementations:
            if backend not in ("auto", one.backend):
                continue
            reason = one.why_not(device, dtype) or (beyond or {}).get(one.backend)
            if reason is None and backend == "auto":
                reason = one.why_not_auto(device, dtype)
            if reason is None:
                return one
            if backend != "auto":
                raise BackendError(f"{self.name}: backend {backend!r}{origin} cannot run: {reason}")
            # That a GPU's backend does not run on CPU tensors is no news.
            at_home = _HOME.get(one.backend, device.type) == device.type
            _log_once(self.name, one.backend, reason, logging.INFO if at_home else logging.DEBUG)
        offered = ", ".join(["auto", *(one.backend for one in self.implementations)])
        problem = "no such backend for this op" if backend in BACKENDS else "unknown backend"
        raise BackendError(f"{self.name}: {problem}: {backend!r}{origin}; expected one of {offered}")


@functools.cache
def _log_once(op: str, backend: str, reason: str, level: int) -> None:
    _logger.log(level, "%s: backend %s passed over: %s", op, backend, reason)
