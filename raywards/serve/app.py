"""Ray around the scoring core: the Serve application.

build        `serve run raywards.serve:build model=FOLDER`
deploy, run  the same from Python, and as a job that stays until it is stopped
"""

from __future__ import annotations

import hashlib
import logging
import re
import signal
import threading
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from raywards import errors
from raywards.client import RewardClient
from raywards.config import ServeConfig
from raywards.errors import ConfigError, RaywardsError, ServiceError, UnreachableError
from raywards.ray_cluster import check_recorded_address
from raywards.serve.autoscaling import TOKENS, ReplicasForTokens
from raywards.serve.batcher import raised_at
from raywards.serve.dialects import ScoringRequest, ScoringResult, native
from raywards.serve.http import create_app
from raywards.serve.metrics import Metrics, make_for_ray
from raywards.serve.replica import RewardService, load
from raywards.serve.traffic import SETTINGS, settings_of, taken_over, traffic_of

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

DEPLOYMENT = "RewardModel"

_POLL_S = 2.0
_DEPLOYED_BY = "raywards:deployed_by:"
# What Serve does itself: it changes without a restart of the replicas.
_OF_SERVE = {
    *("min_replicas", "max_replicas", "target_replica_tokens", "max_ongoing_requests"),
    *("upscale_delay_s", "downscale_delay_s", "metrics_interval_s", "look_back_period_s"),
    *("route_prefix", "host", "port", *SETTINGS),
}


def build(args: ServeConfig | Mapping[str, Any]) -> Application:
    """The Serve application of one reward model. Raises `ConfigError`."""
    from ray import serve
    from ray.serve.config import AutoscalingPolicy

    config = args if isinstance(args, ServeConfig) else ServeConfig(**args)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=config.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "policy": AutoscalingPolicy(
                policy_function=ReplicasForTokens,
                policy_kwargs={"target_tokens": config.target_replica_tokens},
            ),
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "metrics_interval_s": config.metrics_interval_s,
            "look_back_period_s": config.look_back_period_s,
        },
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        user_config=settings_of(config),
        # An update starts its replicas beside the old ones, which go on until it is verified.
        max_surge_percent=100,
        # A dead replica is noticed, and replaced, at the next check. The default is 10.
        health_check_period_s=3.0,
        graceful_shutdown_timeout_s=config.request_timeout_s + 5,
        # The default of 20 keeps a bad model folder restarting for minutes.
        max_constructor_retry_count=2,
    )
    replica = deployment(serve.ingress(_app_of_this_replica)(RewardReplica))
    # Serve restarts the replicas of a deployment whose version is another; without one it draws
    # one at random.
    return replica.options(version=_version(config), _internal=True).bind(config)


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

    stop = threading.Event()
    _start(config)  # first: where it starts a local Ray, that takes SIGTERM for itself
    others = _deployment_of(config.name)
    own = None
    try:
        # A deployment may wait for ever, for a GPU that the cluster does not have.
        _on_signals(_interrupt)
        _deploy(config)
        own = _deployment_of(config.name)
        _check_endpoint(config)
        _on_signals(lambda *_: stop.set())
        logger.info("serving %s as %r at %s", config.model, config.name, endpoint(config))
        while not stop.wait(_POLL_S):
            application = serve.status().applications.get(config.name)
            if application is None:
                return
            if _deployment_of(config.name) != own:
                logger.info("another deployment has taken over %r", config.name)
                return
            if application.status == "DEPLOY_FAILED" and not _runs(application):
                raise _start_failure(config)
    finally:
        # An update that failed leaves what it was to replace, and what has been replaced meanwhile
        # is not this one's any more. Requests that are under way finish; where no replica came,
        # there is none to wait for.
        is_own = others is None if own is None else _deployment_of(config.name) == own
        if is_own:
            serve.delete(config.name, _blocking=own is not None)


def endpoint(config: ServeConfig) -> str:
    """Base URL of the served model for clients on this machine."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    host = f"[{host}]" if ":" in host else host  # IPv6
    return f"http://{host}:{config.port}{config.route_prefix.rstrip('/')}"


class RewardReplica:
    """The deployment: loads the model, holds the core, answers HTTP and handles."""

    def __init__(self, config: ServeConfig) -> None:
        _log_to_serve()
        self.service = load(config, Metrics(config.name, make_for_ray))
        self.service.start()  # Serve calls constructors on the loop that serves requests
        self._is_configured = False
        _log_no_messages()

    async def reward(self, request: dict[str, Any]) -> dict[str, Any]:
        """`POST /v1/reward` without HTTP, for callers inside the cluster. Raises `ServiceError`;
        Ray keeps the original, with its `status` and `field`, as the `cause` of what arrives."""
        return await native.reward(request, self.service)

    async def score(self, request: ScoringRequest) -> ScoringResult:
        """For other applications whose traffic this model answers. Raises `ServiceError`."""
        return await self.service.score_here(request)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve after the constructor, and where `user_config` has changed."""
        try:
            self.service.traffic = traffic_of(taken_over(self.service.config, user_config))
        except ConfigError as error:
            if not self._is_configured:
                raise
            # Serve would replace a running replica by one that cannot start.
            logger.error("the traffic stays as it was: %s", error)
        self._is_configured = True

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return {TOKENS: float(self.service.load_tokens)}

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


# ---- Ray


def _version(config: ServeConfig) -> str:
    """Of all that a replica is started with: settings, model files, the job's code."""
    import ray

    folders = [Path(name) for name in (config.model, *config.adapters.values())]
    files = [file for one in folders if one.is_dir() for file in sorted(one.iterdir())]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    code = ray.get_runtime_context().get_runtime_env_string() if ray.is_initialized() else ""
    key = config.api_key.get_secret_value() if config.api_key is not None else ""
    settings = config.model_dump_json(exclude=_OF_SERVE)
    started_with = (settings, key, stats, code, version("raywards"))
    return hashlib.sha256(repr(started_with).encode()).hexdigest()[:16]


def _log_to_serve() -> None:
    """Let the package's log lines into the replica's log, beside Serve's own, from its level on."""
    package, own = logging.getLogger("raywards"), logging.getLogger("ray.serve")
    package.handlers = list(own.handlers)
    package.setLevel(own.level)


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
    from ray.experimental.internal_kv import _internal_kv_put

    try:
        handle = serve.run(build(config), name=config.name, route_prefix=config.route_prefix)
    except RuntimeError:
        raise _start_failure(config) from None
    _internal_kv_put(_DEPLOYED_BY + config.name, uuid.uuid4().bytes)
    return handle


def _deployment_of(name: str) -> tuple[float, bytes | None] | None:
    """What tells this deployment of an application from the next one; None where there is none.

    Serve's own time changes with config files alone; ours is written by `_deploy`.
    """
    from ray import serve
    from ray.experimental.internal_kv import _internal_kv_get

    application = serve.status().applications.get(name)
    if application is None:
        return None
    return application.last_deployed_time_s, _internal_kv_get(_DEPLOYED_BY + name)


def _runs(application: Any) -> bool:
    """Whether it answers: after an update that failed, with the replicas from before."""
    return any(one.replica_states.get("RUNNING") for one in application.deployments.values())


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
    # No proxy of the environment's: it would not reach this machine's own address.
    with RewardClient(endpoint(config), trust_env=False) as client:
        try:
            client.wait_until_ready(30)
        except (ServiceError, UnreachableError) as error:
            raise ServiceError(
                f"nothing answers at {endpoint(config)} ({error}). If Serve was already running "
                "on this cluster, it keeps its own host and port: use those"
            ) from None
