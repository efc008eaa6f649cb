"""The ASGI app: routes, their documentation, and errors as answers."""

# No `from __future__ import annotations`: FastAPI reads the annotations of routes made inside a function.

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.routing import Route

import fave_fast
from fave_fast.errors import Closed, InputError, Overloaded
from fave_fast.serving.api import (
    ID_DEPTHS,
    ID_MEANING,
    FieldProblem,
    FieldProblems,
    Limits,
    Problem,
    RecommendRequest,
    RecommendResponse,
    Reloaded,
    Status,
    request_model,
)
from fave_fast.serving.direct import DirectRecommend
from fave_fast.serving.gateway import Gateway
from fave_fast.serving.service import Service
from fave_fast.serving.telemetry import Labelled

RECOMMEND = "/v1/recommend"
RETRY_AFTER_SECONDS = 1
BODY_SECONDS = 30.0
OPEN_ROUTES = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})

_PROBLEMS: dict[int, tuple[type[Problem] | type[FieldProblems], str]] = {
    400: (Problem, "The body cannot be read as JSON."),
    401: (Problem, "The bearer token is missing or wrong."),
    408: (Problem, "The body took too long to arrive."),
    409: (Problem, "The checkpoint cannot be served; the old one still is."),
    413: (Problem, "The body is too large."),
    422: (FieldProblems, "A field is missing, unknown or out of bounds; each is named."),
    500: (Problem, "The server failed; its log has the cause under the request's id."),
    503: (Problem, "Too many histories wait, or the server is stopping; try again after Retry-After seconds."),
}


def create_app(
    service: Service,
    *,
    limits: Limits,
    k: int = 20,
    token: str | None = None,
    reloadable: bool = True,
    log_requests: bool = True,
    labels: Mapping[str, str] | None = None,
) -> Gateway:
    """The ASGI app; the end of its lifespan closes the service.

    Args:
        service: answers.
        limits: of one request.
        k: length of the lists where a request names none.
        token: what every request but those to `OPEN_ROUTES` must bring.
        reloadable: with a token, `POST /v1/reload` is there.
        log_requests: write a line for each request.
        labels: of every metric, beside its own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="fave_fast",
        version=fave_fast.__version__,
        description="The next items of a user, by one step of a flow model and an exact top-K over the catalogue.",
        lifespan=lifespan,
        redoc_url=None,
    )
    _add_errors(app)
    _add_recommend(app, service, request_model(limits, k), token is not None)
    if token is not None and reloadable:
        _add_reload(app, service)
    _add_probes(app, service)
    _add_metrics(app, service, labels or {}, token is not None)
    _add_page(app)
    return Gateway(
        app,
        service.telemetry,
        routes={path for route in app.routes if (path := getattr(route, "path", None))},
        open_routes=OPEN_ROUTES,
        token=None if token is None else token.encode(),
        body_bytes=limits.body_bytes,
        body_seconds=BODY_SECONDS,
        log_requests=log_requests,
    )


def _documented(*statuses: int, token: bool) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for status in (*statuses, *([401] if token else [])):
        model, text = _PROBLEMS[status]
        found[status] = {"model": model, "description": text}
    return found


def _secured(token: bool) -> list[Any]:
    """For the documentation: the gateway is who checks."""
    return [Depends(HTTPBearer(auto_error=False))] if token else []


def _add_recommend(app: FastAPI, service: Service, asked: type[RecommendRequest], token: bool) -> None:
    @app.post(
        RECOMMEND,
        response_model=RecommendResponse,
        responses=_documented(400, 408, 413, 422, 500, 503, token=token),
        dependencies=_secured(token),
        summary="The K best next items of each history",
    )
    async def recommend(body: asked) -> Response:  # type: ignore[valid-type]
        answer = await service.recommend(body)
        return Response(answer.model_dump_json(), media_type="application/json")

    (documented,) = (route for route in app.routes if getattr(route, "path", None) == RECOMMEND)
    direct = DirectRecommend(service, asked, documented)
    app.router.routes.insert(0, Route(RECOMMEND, direct, methods=["POST"], include_in_schema=False))


def _add_reload(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/reload",
        responses=_documented(408, 409, 413, 500, token=True),
        dependencies=_secured(True),
        summary="Read the checkpoint anew and serve it",
    )
    async def reload() -> Reloaded:
        return await service.reload()


def _add_probes(app: FastAPI, service: Service) -> None:
    no: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "No."}}

    @app.get("/healthz", responses=no, summary="Whether the server works")
    async def healthz(response: Response) -> Status:
        return _status(response, service.healthy, "ok", "the worker ended by an error")

    @app.get("/readyz", responses=no, summary="Whether the server takes requests")
    async def readyz(response: Response) -> Status:
        return _status(response, service.ready, "ready", "not ready")


def _status(response: Response, good: bool, yes: str, no: str) -> Status:
    response.status_code = 200 if good else 503
    return Status(status=yes if good else no)


def _add_metrics(app: FastAPI, service: Service, labels: Mapping[str, str], token: bool) -> None:
    registry = Labelled(service.telemetry.registry, labels)
    documented = _documented(token=token)
    documented[200] = {"content": {"text/plain": {}}, "description": "Metrics as Prometheus reads them."}

    @app.get(
        "/metrics",
        response_class=Response,
        responses=documented,
        dependencies=_secured(token),
        summary="Metrics for Prometheus",
    )
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI) -> None:
    html = resources.files("fave_fast.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = _content_policy(html)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"content-security-policy": policy})


def _content_policy(html: str) -> str:
    """Nothing runs or styles the page but what it holds itself."""
    sources = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        sources[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; connect-src 'self'; script-src 'sha256-{sources['script']}'; "
        f"style-src 'sha256-{sources['style']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _add_errors(app: FastAPI) -> None:
    def handler(
        status: int, detail: Callable[[Exception], object], **headers: str
    ) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(request: Request, error: Exception) -> Response:
            return JSONResponse({"detail": detail(error)}, status, headers)

        return handle

    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    app.add_exception_handler(Overloaded, handler(503, str, **retry))
    app.add_exception_handler(Closed, handler(503, str, **retry))
    app.add_exception_handler(InputError, handler(409, str))
    app.add_exception_handler(RequestValidationError, handler(422, _field_problems))
    app.add_exception_handler(Exception, handler(500, lambda error: "the server failed; its log has the cause"))


def _field_problems(error: Exception) -> list[dict[str, Any]]:
    """Place and expectation of each problem; not the value given, which may be long, or no text that UTF-8 can hold."""
    assert isinstance(error, RequestValidationError)
    problems: dict[tuple[int | str, ...], FieldProblem] = {}
    for one in error.errors():
        place, message, kind = tuple(one["loc"]), one["msg"], one["type"]
        depth = ID_DEPTHS.get(str(place[1]), len(place)) if len(place) > 1 else 1
        if len(place) > depth:  # Pydantic says what is wrong with each of the things that an id may be
            place, message, kind = place[:depth], f"Input should be {ID_MEANING}", "item_id"
        if kind == "model_attributes_type":
            message = "Input should be a JSON object, sent with Content-Type: application/json"
        problems[place] = FieldProblem(loc=list(place), msg=message, type=kind)
    return [problem.model_dump() for problem in problems.values()]
