"""HTTP and Ray around the scoring core: the FastAPI app, and the Serve application.

    create_app   routes of every dialect, /health, /ready, /info, docs; needs no Ray
    build        the Serve application: `serve run raywards.serve:build model=FOLDER`
    deploy, run  the same from Python, and as a job that stays until it is stopped

The app reads bodies and writes status codes; what they mean is the dialects' and the core's.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from raywards import errors
from raywards.client import RewardClient
from raywards.config import ServeConfig
from raywards.errors import (
    ConfigError,
    DeadlineError,
    OverloadedError,
    RaywardsError,
    RequestRefusedError,
    ServiceError,
    UnreachableError,
)
from raywards.ray_cluster import check_recorded_address
from raywards.schemas import ErrorBody, parse_body
from raywards.serve.batcher import raised_at
from raywards.serve.dialects import Route, native
from raywards.serve.replica import REQUEST_ID, RewardService, load, log_event

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

ROUTES: tuple[Route, ...] = native.ROUTES
DEPLOYMENT = "RewardModel"

# Parsing more than this at once would hold up everyone else on the loop.
_PARSE_IN_THREAD_BYTES = 262_144
_LONGEST_REQUEST_ID = 128
_POLL_S = 2.0
_ERROR_STATUSES = (400, 401, 404, 413, 415, 422, 500, 503, 504)


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
    for route in ROUTES:
        _add_route(app, route, current, echo_request_id)
    _add_probes(app, current)
    _add_guarded(app, current)
    app.add_exception_handler(HTTPException, _not_a_route)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def build(args: ServeConfig | Mapping[str, Any]) -> Application:
    """The Serve application of one reward model. Raises `ConfigError`."""
    from ray import serve

    config = args if isinstance(args, ServeConfig) else ServeConfig(**args)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=config.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "metrics_interval_s": config.metrics_interval_s,
            "look_back_period_s": config.look_back_period_s,
        },
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        # A dead replica is noticed, and replaced, at the next check. The default is 10.
        health_check_period_s=3.0,
        graceful_shutdown_timeout_s=config.request_timeout_s + 5,
        # The default of 20 keeps a bad model folder restarting for minutes.
        max_constructor_retry_count=2,
    )
    return deployment(serve.ingress(_app_of_this_replica)(RewardReplica)).bind(config)


def deploy(config: ServeConfig) -> DeploymentHandle[Any]:
    """Start the model on the running Ray cluster, or a new local one, and wait until it is ready.

    `await handle.reward.remote({"messages": [...]})` then scores without HTTP. Raises what the
    replica raised if the model cannot be served: `ModelError`, `CheckpointError`, ...; and
    `ConfigError` where the port is taken.
    """
    _start(config)
    return _deploy(config)


def run(config: ServeConfig) -> None:
    """Serve until SIGINT, SIGTERM, or until somebody deletes the application: what a job does.

    Raises `KeyboardInterrupt` where one of the signals comes before the model is ready.
    """
    from ray import serve

    stop, ready = threading.Event(), False
    _start(config)  # first: where it starts a local Ray, that takes SIGTERM for itself
    try:
        # A deployment may wait for ever, for a GPU that the cluster does not have.
        _on_signals(_interrupt)
        _deploy(config)
        _check_endpoint(config)
        ready = True
        _on_signals(lambda *_: stop.set())
        logger.info("serving %s as %r at %s", config.model, config.name, endpoint(config))
        while not stop.wait(_POLL_S):
            application = serve.status().applications.get(config.name)
            if application is None:
                return
            if application.status == "DEPLOY_FAILED":
                raise _start_failure(config)
    finally:
        # Requests that are under way finish; where no replica came, there is none to wait for.
        serve.delete(config.name, _blocking=ready)


def endpoint(config: ServeConfig) -> str:
    """Base URL of the served model for clients on this machine."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return f"http://{host}:{config.port}{config.route_prefix.rstrip('/')}"


class RewardReplica:
    """The deployment: loads the model, holds the core, answers HTTP and handles."""

    def __init__(self, config: ServeConfig) -> None:
        _log_to_serve()
        self.service = load(config)
        self.service.start()  # Serve calls constructors on the loop that serves requests
        _log_no_messages()

    async def reward(self, request: dict[str, Any]) -> dict[str, Any]:
        """`POST /v1/reward` without HTTP, for callers inside the cluster. Raises `ServiceError`;
        Ray keeps the original, with its `status` and `field`, as the `cause` of what arrives."""
        return await native.answer(request, self.service.score)

    async def info(self) -> dict[str, Any]:
        """`GET /info` without HTTP."""
        return self.service.info()

    async def check_health(self) -> None:
        """Called by Serve; a replica whose rewards do not come out any more is replaced."""
        await self.service.check()


def _app_of_this_replica() -> FastAPI:
    """Called by Serve in the replica, before the replica's own object is known."""
    from ray import serve

    def service_of_this_replica() -> RewardService:
        replica: Any = serve.get_replica_context().servable_object
        service: RewardService = replica.service
        return service

    return create_app(service_of_this_replica, echo_request_id=False)


# ---- routes


def _add_route(
    app: FastAPI, route: Route, current: Callable[[], RewardService], echo_request_id: bool
) -> None:
    async def endpoint(request: Request) -> Response:
        request_id = _request_id(request.headers)
        REQUEST_ID.set(request_id)
        try:
            service = current()
            _authorize(request.headers, service.config.api_key)
            body = await _read_json(request, service.config)
            response = _json(200, await route.answer(body, service.score))
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            response = _error_response(_as_service_error(error, request_id), route)
        if echo_request_id:
            response.headers["x-request-id"] = request_id
        return response

    reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
    app.add_api_route(
        route.path,
        endpoint,
        methods=["POST"],
        response_model=None,
        responses={
            200: {"model": route.reply},
            **{status: {"model": ErrorBody} for status in _ERROR_STATUSES},
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            }
        },
    )


def _add_probes(app: FastAPI, current: Callable[[], RewardService]) -> None:
    def probe(word: str) -> Response:
        if current().healthy:
            return _json(200, {"status": word})
        stopping = OverloadedError(
            "this replica does not accept requests", status=503, retry_after_s=1.0
        )
        return _error_response(stopping, ROUTES[0])

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether this replica is alive."""
        return probe("healthy")

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether this replica has verified its model and accepts requests."""
        return probe("ready")


def _add_guarded(app: FastAPI, current: Callable[[], RewardService]) -> None:
    """What tells about the model or the server: with a key set, only to who has it."""

    def guard(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                _authorize(request.headers, current().config.api_key)
            except ServiceError as error:
                return _error_response(error, ROUTES[0])
            return answer(request)

        return endpoint

    def docs(request: Request) -> Response:
        prefix = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(openapi_url=f"{prefix}/openapi.json", title=app.title)

    app.add_api_route(
        "/info",
        guard(lambda _: _json(200, current().info())),
        response_model=None,
        name="info",
        description="What is served: model, revision, limits, rendering.",
    )
    schema = guard(lambda _: _json(200, app.openapi()))
    app.add_api_route("/openapi.json", schema, response_model=None, include_in_schema=False)
    app.add_api_route("/docs", guard(docs), response_model=None, include_in_schema=False)


def _authorize(headers: Headers, key: SecretStr | None) -> None:
    if key is None:
        return
    given = headers.getlist("authorization")
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    expected = key.get_secret_value().encode()
    # Compared in any case, and in constant time: the answer takes as long for every wrong key.
    same = hmac.compare_digest(token.strip().encode(), expected)
    if not (same and scheme.lower() == "bearer"):
        raise RequestRefusedError(
            "send the server's key as one header `Authorization: Bearer KEY`",
            status=401,
            code="invalid_api_key",
        )


async def _read_json(request: Request, config: ServeConfig) -> object:
    """The body, refused by its headers or its size before it is parsed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestRefusedError(
            f"Content-Type is {kind[:80] or 'missing'}; expected application/json",
            status=415,
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestRefusedError(
            "compressed bodies are not accepted; send it without Content-Encoding",
            status=415,
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > config.max_body_bytes:
        raise _too_large(config)
    body = bytearray()
    try:
        async with asyncio.timeout(config.request_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise _too_large(config)
    except TimeoutError:
        raise DeadlineError("the body did not arrive in time", status=408, code="timeout") from None
    if len(body) > _PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(parse_body, bytes(body))
    return parse_body(bytes(body))


def _too_large(config: ServeConfig) -> RequestRefusedError:
    return RequestRefusedError(
        f"the body is larger than {config.max_body_bytes} bytes; send fewer sequences per request",
        status=413,
        code="body_too_large",
    )


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    usable = given.isascii() and given.isprintable() and 0 < len(given) <= _LONGEST_REQUEST_ID
    return given if usable else uuid.uuid4().hex


# ---- replies


def _json(status: int, body: object) -> Response:
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    return Response(text, status_code=status, media_type="application/json")


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


def _error_response(error: ServiceError, route: Route) -> Response:
    status = error.status or 500
    response = _json(status, route.describe(error))
    if isinstance(error, OverloadedError):
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    elif status == 401:
        response.headers["www-authenticate"] = "Bearer"
    level = logging.WARNING if status >= 500 and status != 503 else logging.INFO
    log_event(level, "refused", status=status, code=error.__dict__.get("code"))
    return response


async def _not_a_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = ", ".join([*(route.path for route in ROUTES), "/info", "/ready", "/health", "/docs"])
    refused = RequestRefusedError(
        f"{request.method} {request.url.path[:200]}: {error.detail}. Here are {paths}",
        status=error.status_code,
        code="no_such_route",
        request_id=_request_id(request.headers),
    )
    response = _error_response(refused, ROUTES[0])
    response.headers.update(error.headers or {})
    return response


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, with the schemas of the bodies that are parsed by hand."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=app.servers,
        )
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for route in ROUTES:
            body = route.body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(body.pop("$defs", {}))
            schemas[route.body.__name__] = body
        app.openapi_schema = schema
    return app.openapi_schema


# ---- Ray


def _log_to_serve() -> None:
    """Let the package's log lines into the replica's log, beside Serve's own."""
    package = logging.getLogger("raywards")
    package.handlers = list(logging.getLogger("ray.serve").handlers)
    package.setLevel(logging.INFO)


def _log_no_messages() -> None:
    """From here on, exceptions in the replica's log lose their text: it could repeat a request's.

    Serve logs what a call through the handle raises, message and all.
    """

    def place_only(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            record.msg = f"{record.getMessage()} {raised_at(record.exc_info[1])}"
            record.args = record.exc_info = record.exc_text = None
        return True

    for handler in logging.getLogger("ray.serve").handlers:
        handler.addFilter(place_only)


def _start(config: ServeConfig) -> None:
    """Have Serve and its HTTP server running.

    Raises `ConfigError` where the port is taken, or this machine's cluster is gone.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        check_recorded_address()
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
    except RuntimeError as error:
        if "Failed to bind" not in str(error):
            raise
        serve.shutdown()  # else it stays, without an HTTP server
        raise ConfigError(
            f"host={config.host!r}, port={config.port}: the address cannot be bound: something "
            "else listens there, or the host is not this machine's. Choose another port."
        ) from None


def _deploy(config: ServeConfig) -> DeploymentHandle[Any]:
    from ray import serve

    try:
        return serve.run(build(config), name=config.name, route_prefix=config.route_prefix)
    except RuntimeError:
        raise _start_failure(config) from None


def _on_signals(handle: Callable[..., object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _start_failure(config: ServeConfig) -> RaywardsError:
    """What the replica raised, out of the traceback that Serve keeps of it."""
    from ray import serve

    application = serve.status().applications.get(config.name)
    deployments = application.deployments.values() if application else []
    told = max((deployment.message for deployment in deployments), key=len, default="").strip()
    ours = re.findall(r"^raywards\.errors\.(\w+): (.*?)\Z", told, re.MULTILINE | re.DOTALL)
    if ours:
        name, message = ours[-1]
        kind: type[RaywardsError] = vars(errors).get(name, ServiceError)
        return kind(message)
    last = told.splitlines()[-1] if told else "Serve gives no reason; see its logs"
    return ServiceError(f"{config.model}: could not be served: {last}")


def _check_endpoint(config: ServeConfig) -> None:
    """Serve keeps the port that it was first started with, whatever is asked for later."""
    with RewardClient(endpoint(config)) as client:
        try:
            client.wait_until_ready(30)
        except (ServiceError, UnreachableError) as error:
            raise ServiceError(
                f"nothing answers at {endpoint(config)} ({error}). If Serve was already running "
                "on this cluster, it keeps its own host and port: use those"
            ) from None
