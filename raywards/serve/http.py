"""HTTP around the scoring core: the FastAPI app. Runs in a Serve replica, and without Ray.

It reads bodies, asks for keys, finds the dialect that a path and a body belong to, and writes what
that says; what it means is the dialects' and the core's.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, StreamingResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from raywards.errors import DeadlineError, OverloadedError, RequestRefusedError, ServiceError
from raywards.serve.batcher import raised_at
from raywards.serve.dialects import (
    Call,
    Route,
    native,
    nim,
    openrlhf,
    rerank,
    sglang,
    slime,
    tei,
    vllm,
)
from raywards.serve.incoming import Bodies
from raywards.serve.metrics import Metric
from raywards.serve.openapi import described, document, keyless, refusals
from raywards.serve.page import page, page_headers
from raywards.serve.replica import REQUEST_ID, RewardService, log_event

logger = logging.getLogger(__name__)

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

# Where dialects share a path, those that know their bodies by a key come first.
ROUTES: tuple[Route, ...] = (
    *native.ROUTES,
    *openrlhf.ROUTES,
    *sglang.ROUTES,
    *vllm.ROUTES,
    *tei.ROUTES,
    *rerank.ROUTES,
    *slime.ROUTES,
    *nim.ROUTES,
)

_LONGEST_REQUEST_ID = 128
_NDJSON = "application/x-ndjson"
_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def create_app(current: Callable[[], RewardService], *, echo_request_id: bool = True) -> FastAPI:
    """The HTTP face of the service that `current()` gives, once there is one.

    `echo_request_id=False` where something in front already repeats `x-request-id`: Serve does.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await current().close()

    app = FastAPI(
        title="raywards",
        version="1",  # of the wire formats
        description="Rewards of conversations from a served reward model.",
        lifespan=lifespan,
        separate_input_output_schemas=False,
        # FastAPI's own pages ask for no key: `_add_guarded` has ours.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    bodies, endpoints = Bodies(), {}
    for path in dict.fromkeys(route.path for route in ROUTES):
        sharing = [route for route in ROUTES if route.path == path]
        endpoints[path] = _add_path(app, path, sharing, current, bodies, echo_request_id)
    app.add_middleware(_Direct, endpoints=endpoints)
    _add_probes(app, current)
    _add_guarded(app, current)
    _add_page(app)
    app.add_exception_handler(HTTPException, _not_a_route)
    app.openapi = lambda: document(app, ROUTES, with_key=current().keys.any)  # type: ignore[method-assign]
    return app


def _add_path(
    app: FastAPI,
    path: str,
    sharing: Sequence[Route],
    current: Callable[[], RewardService],
    bodies: Bodies,
    echo_request_id: bool,
) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        request_id, started = _request_id(request.headers), time.monotonic()
        REQUEST_ID.set(request_id)
        route = sharing[-1]  # describes what is wrong before the body is known
        try:
            service = current()
            service.keys.client(request.headers)
            body = await bodies.read_json(request, service.config)
            route = next((one for one in sharing if one.claims(body)), route)
            call = Call(
                body=body,
                request_id=request_id,
                given_id=request_id if request.headers.get("x-request-id") == request_id else None,
                query=dict(request.query_params),
            )
            if route.lines is not None and _NDJSON in request.headers.get("accept", ""):
                lines = route.lines(call, service)
                gone = functools.partial(service.metrics.put, Metric.cancelled_total)
                response = await _unless_gone(request, _stream(lines, gone))
            else:
                reply = await _unless_gone(request, route.answer(call, service))
                response = _json(200, reply.body, reply.headers)
        except ClientDisconnect:
            response = Response(status_code=499)
            current().metrics.put(Metric.cancelled_total)
        except Exception as error:
            told = _as_service_error(error, request_id)
            response = _error_response(told, route)
            current().metrics.put(Metric.rejected_total, reason=_reason(told))
        code, seconds = str(response.status_code), time.monotonic() - started
        current().metrics.put(Metric.requests_total, route=path, code=code)
        current().metrics.put(Metric.request_seconds, seconds, route=path)
        if echo_request_id:
            response.headers["x-request-id"] = request_id
        return response

    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_model=None,
        name=sharing[-1].answer.__name__,
        **described(sharing),
    )
    return endpoint


class _Direct:
    """Takes scoring requests to their endpoints. FastAPI has nothing to look into, and its way
    there takes longer than all that is done with the body."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app, self._endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)


def _add_probes(app: FastAPI, current: Callable[[], RewardService]) -> None:
    """What a load balancer asks, without a key."""

    def probe(word: str) -> Response:
        if current().healthy:
            return _json(200, {"status": word})
        stopping = OverloadedError(
            "this replica does not accept requests", status=503, retry_after_s=1.0
        )
        return _error_response(stopping, native.ROUTES[0])

    @app.get("/health", response_model=None, responses=refusals(503), openapi_extra=keyless())
    async def health() -> Response:
        """Whether this replica is alive."""
        return probe("healthy")

    @app.get("/ping", response_model=None, responses=refusals(503), openapi_extra=keyless())
    async def ping() -> Response:
        """The same, as SageMaker and vLLM call it."""
        return probe("healthy")

    @app.get("/ready", response_model=None, responses=refusals(503), openapi_extra=keyless())
    async def ready() -> Response:
        """Whether this replica has verified its model and accepts requests."""
        return probe("ready")


def _add_page(app: FastAPI) -> None:
    """For people. It tells nothing without a key: what it shows, it asks for."""

    @app.get("/", response_model=None, response_class=HTMLResponse, openapi_extra=keyless())
    async def playground() -> Response:
        """A page to try the model, and to see what it does."""
        return HTMLResponse(page(), headers=page_headers())


def _add_guarded(app: FastAPI, current: Callable[[], RewardService]) -> None:
    """What tells about the model or the server: with a key set, only to who has it."""

    def guard(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                current().keys.client(request.headers)
            except ServiceError as error:
                return _error_response(error, native.ROUTES[0])
            return answer(request)

        return endpoint

    def models(request: Request) -> Response:
        service = current()
        about = {"object": "model", "created": service.started_at, "owned_by": "raywards"}
        own = {
            "root": service.config.model,
            "max_model_len": service.info()["limits"]["max_length"],
        }
        rows = [{"id": service.config.name, **about, **own}]
        rows += [
            {
                "id": name,
                **about,
                **own,
                "root": one.config.model,
                "parent": service.config.name,
            }
            for name, one in service.adapters.items()
        ]
        rows += [{"id": name, **about} for name in service.traffic.others]
        return _json(200, {"object": "list", "data": rows})

    def docs(request: Request) -> Response:
        prefix = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(openapi_url=f"{prefix}/openapi.json", title=app.title)

    for path, answer, text in (
        ("/info", lambda _: _json(200, current().info()), "What is served, and its limits."),
        ("/stats", lambda _: _json(200, current().stats()), "What a replica does now."),
        ("/v1/models", models, "The name of the served model."),
        ("/version", lambda _: _json(200, {"version": version("raywards")}), "Of raywards."),
    ):
        app.add_api_route(
            path,
            guard(answer),
            response_model=None,
            name=path[1:],
            description=text,
            responses=refusals(401),
        )
    schema = guard(lambda _: _json(200, app.openapi()))
    app.add_api_route("/openapi.json", schema, response_model=None, include_in_schema=False)
    app.add_api_route("/docs", guard(docs), response_model=None, include_in_schema=False)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    usable = given.isascii() and given.isprintable() and 0 < len(given) <= _LONGEST_REQUEST_ID
    return given if usable else uuid.uuid4().hex


# ---- replies


def _json(status: int, body: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        _ENCODE(body),
        status_code=status,
        media_type="application/json",
        headers=dict(headers or {}),
    )


async def _stream(
    lines: AsyncGenerator[dict[str, Any], None], gone: Callable[[], None]
) -> Response:
    """A line as soon as it is known. What goes wrong before the first one is raised here.

    `gone` is called if the caller leaves after it.
    """
    first = await anext(lines)

    async def written() -> AsyncIterator[str]:
        try:
            yield _line(first)
            async for line in lines:
                yield _line(line)
        except (asyncio.CancelledError, GeneratorExit):
            gone()
            raise
        finally:
            await lines.aclose()

    return StreamingResponse(written(), media_type=_NDJSON)


def _line(value: object) -> str:
    return _ENCODE(value) + "\n"


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """What `answer` gives; if the caller leaves first, it is cancelled: nobody would read it."""
    answering = asyncio.current_task()
    assert answering is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        # The body has been read, so the next message is that of the disconnect.
        await request.receive()
        has_left = True
        answering.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await answer
    except asyncio.CancelledError:
        if has_left and answering.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


def _as_service_error(error: Exception, request_id: str) -> ServiceError:
    """`error`, if it is for the caller; else only its request id; the log has its place."""
    if not isinstance(error, ServiceError):
        logger.error("request %s failed: %s", request_id, raised_at(error))
        error = ServiceError(
            f"internal error; the server's log has it under request id {request_id}",
            status=500,
            code="internal_error",
        )
    error.request_id = request_id
    return error


def _reason(error: ServiceError) -> str:
    """One of few words: what a metric is labelled with."""
    if isinstance(error, OverloadedError):
        return "overloaded"
    elif isinstance(error, DeadlineError):
        return "deadline"
    return str(error.__dict__.get("code", "refused"))


def _error_response(error: ServiceError, route: Route) -> Response:
    status, body = route.describe(error)
    response = _json(status, body)
    if isinstance(error, OverloadedError):
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    elif status == 401:
        response.headers["www-authenticate"] = "Bearer"
    failed = (error.status or 500) in (500, 504)
    level = logging.WARNING if failed else logging.INFO
    log_event(level, "refused", status=status, code=error.__dict__.get("code"))
    return response


async def _not_a_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = ", ".join([*dict.fromkeys(route.path for route in ROUTES), "/info", "/ready", "/docs"])
    refused = RequestRefusedError(
        f"{request.method} {request.url.path[:200]}: {error.detail}. Here are {paths}",
        status=error.status_code,
        code="no_such_route",
        request_id=_request_id(request.headers),
    )
    response = _error_response(refused, native.ROUTES[0])
    response.headers.update(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of one route, and `/` has two
        response.headers["allow"] = ", ".join(sorted(_methods(request)))
    return response


def _methods(request: Request) -> set[str]:
    """Those that the path has."""
    return {
        method
        for route in request.app.routes
        if isinstance(route, APIRoute) and route.matches(request.scope)[0] != Match.NONE
        for method in route.methods or ()
    }
