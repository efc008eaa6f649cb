"""Good requests for lists, answered without what FastAPI does for a route in general."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from fave_fast.serving.api import RecommendRequest
from fave_fast.serving.service import Service

_JSON = b"application/json"


@dataclass(frozen=True)
class DirectRecommend:
    """An ASGI app for a route that FastAPI documents and has, too, which was most of what a request costs.

    A body is read and checked in one go; one that is no good request goes to FastAPI's route, which says what is wrong
    with it. What both take, `bench/results/README.md` says.

    Attributes:
        service: answers.
        asked: the model of a good request.
        documented: the route that FastAPI has.
    """

    service: Service
    asked: type[RecommendRequest]
    documented: BaseRoute

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body the gateway gives as one message."""
        message = await receive()
        request = self._read(scope, message["body"])
        if request is None:
            await self._explain(scope, message, receive, send)
            return
        body = (await self.service.recommend(request)).model_dump_json().encode()
        headers = [(b"content-length", str(len(body)).encode()), (b"content-type", _JSON)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _read(self, scope: Scope, body: bytes) -> RecommendRequest | None:
        kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        if kind != _JSON and not kind.startswith(_JSON + b";"):
            return None
        try:
            return self.asked.model_validate_json(body)
        except ValidationError:
            return None

    async def _explain(self, scope: Scope, message: Message, receive: Receive, send: Send) -> None:
        read = [message]

        async def again() -> Message:
            return read.pop() if read else await receive()

        scope.update(self.documented.matches(scope)[1])
        await self.documented.handle(scope, again, send)
