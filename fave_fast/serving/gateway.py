"""What every HTTP request passes before the app: its id, the token, the limit on its body, its time, its log line."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fave_fast.serving.telemetry import Telemetry

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_log = logging.getLogger(__name__)


class _Refused(Exception):
    def __init__(self, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


@dataclass(frozen=True)
class Gateway:
    """An ASGI app around an app.

    Attributes:
        app: answers what passes.
        telemetry: counts every request.
        routes: the paths that metrics tell apart.
        open_routes: paths that need no token.
        token: what `Authorization: Bearer` must hold; None: nothing is asked for.
        body_bytes: of a request's body, at most.
        body_seconds: that a body may take to arrive.
        log_requests: write a line for each request; for failures of the server in any case.
    """

    app: ASGIApp
    telemetry: Telemetry
    routes: Collection[str]
    open_routes: Collection[str]
    token: bytes | None
    body_bytes: int
    body_seconds: float
    log_requests: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or a lifespan."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, answered = time.perf_counter(), 0
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()

        async def stamped(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
                spent = f"app;dur={1e3 * (time.perf_counter() - started):.3f}".encode()
                stamps = [(b"x-request-id", request_id), (b"server-timing", spent)]
                message = {**message, "headers": [*message["headers"], *stamps]}
            await send(message)

        with self.telemetry.in_flight.track_inprogress():
            try:
                self._authorize(scope["path"], headers)
                body = await self._body(headers, receive)
                await self.app(scope, _replay(body, receive), stamped)
            except _Refused as refusal:
                await _answer(refusal, stamped)
            finally:
                self._note(scope, request_id, answered or 500, time.perf_counter() - started)

    def _authorize(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.token is None or path in self.open_routes:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
            challenge = (b"www-authenticate", b"Bearer")
            raise _Refused(401, "no valid token; expected the header Authorization: Bearer TOKEN", challenge)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, which the limit allows to hold in memory."""
        announced = headers.get(b"content-length", b"0")
        body = bytearray()
        size = int(announced) if announced.isdigit() else 0
        try:
            async with asyncio.timeout(self.body_seconds):
                more = True
                while more and size <= self.body_bytes:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    size = max(size, len(body))
        except TimeoutError:
            detail = f"the body took over {self.body_seconds:g} s; expected all of it by then"
            raise _Refused(408, detail, (b"connection", b"close")) from None
        if size > self.body_bytes:
            detail = f"the body has {size:,} bytes or more; expected at most {self.body_bytes:,}"
            raise _Refused(413, detail, (b"connection", b"close"))
        return bytes(body)

    def _note(self, scope: Scope, request_id: bytes, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self.routes else "other"
        self.telemetry.requests.labels(route, str(status)).inc()
        self.telemetry.request_seconds.labels(route).observe(seconds)
        level = logging.ERROR if status == 500 else logging.INFO
        if self.log_requests or level == logging.ERROR:
            fields = {
                "request_id": request_id.decode(),
                "method": scope["method"],
                "path": path,
                "status": status,
                "ms": round(1e3 * seconds, 3),
                "client": scope["client"][0] if scope.get("client") else None,
            }
            _log.log(level, "request", extra={"fields": fields})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the server says (a disconnect)."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed


async def _answer(refusal: _Refused, send: Send) -> None:
    body = json.dumps({"detail": refusal.detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
