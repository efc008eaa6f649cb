"""Uvicorn around the app: logs, signals, a graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import uvicorn

from fave_fast.errors import InputError
from fave_fast.serving.gateway import Gateway
from fave_fast.serving.service import Service
from fave_fast.serving.telemetry import JsonLines

_log = logging.getLogger(__name__)


def run(app: Gateway, service: Service, listener: socket.socket, drain_seconds: float) -> None:
    """Serve until SIGTERM; returns when all that was accepted is answered.

    SIGHUP reads the checkpoint anew. Logs go to stderr, one JSON object a line.

    Args:
        app: what answers.
        service: what is behind it.
        listener: a listening socket.
        drain_seconds: after the signal, to answer on while `/readyz` says no.

    Raises:
        KeyboardInterrupt: SIGINT ended it, as gracefully.
    """
    _log_as_json()
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False)
    with contextlib.suppress(_Terminated), _terminable():
        _Server(config, service, drain_seconds).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal begins the drain; a second one ends it."""
        again, self._service.stopping = self._service.stopping, True
        _log.info("stopping", extra={"fields": {"signal": signal.Signals(sig).name}})
        stop = functools.partial(super().handle_exit, sig, frame)
        if again or self._drain_seconds == 0:
            stop()
        else:
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, self._drain_seconds, stop)

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload_logged())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload_logged(self) -> None:
        with contextlib.suppress(InputError):  # the service logs it
            await self._service.reload()


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Terminated(BaseException):
    """SIGTERM, after a graceful stop."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this block; uvicorn, when it has stopped, raises the signal that stopped it once more."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
