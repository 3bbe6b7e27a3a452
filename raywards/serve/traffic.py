"""Which model answers: this replica's own, another one of the cluster, or a canary's share.

A model is a Serve application, with replicas, resources and updates of its own. An endpoint may
answer for others by their names, and may let a canary answer a share of what it is asked itself.
Both are lightweight settings: they change in running replicas, within seconds, and load nothing.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from raywards.config import ServeConfig
from raywards.errors import ConfigError, OverloadedError, ServiceError
from raywards.serve.dialects import Core, ScoredItem, ScoringRequest, ScoringResult

logger = logging.getLogger(__name__)

SETTINGS = ("other_models", "canary", "canary_share")
"""Of `ServeConfig`: what a running replica takes over."""


@dataclass(frozen=True)
class Traffic:
    """Who else answers."""

    others: Mapping[str, Core] = field(default_factory=lambda: MappingProxyType({}))
    """Other models, by the name that a request may give."""
    canary: Core | None = None
    """A model that answers a share of the requests for the own one."""
    canary_share: float = 0.0
    """Between 0 and 1."""

    def diverts(self, prompt: Sequence[int]) -> bool:
        """Whether requests about this prompt (token ids) are the canary's.

        All responses to one prompt are scored by the same model: rewards of two models do not
        compare, and trainers compare within a prompt.
        """
        if self.canary is None:
            return False
        digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.canary_share * 2**64


class Application:
    """Another model of this Serve instance, as a core. It scores with its own model alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, request: ScoringRequest) -> ScoringResult:
        """As `RewardService.score`. Raises `ServiceError`."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve import get_app_handle
        from ray.serve.exceptions import RayServeException

        # It is asked as itself, whatever the caller called it, unless for a revision.
        pinned = request.model is not None and "@" in request.model
        asked = request if pinned else replace(request, model=None)
        try:
            result: ScoringResult = await get_app_handle(self.name).score.remote(asked)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ServiceError):
                raise cause from None
            raise _unreachable(self.name, error) from None
        except (RayError, RayServeException) as error:
            raise _unreachable(self.name, error) from None
        return result

    async def stream(self, request: ScoringRequest) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        """As `RewardService.stream`; the items come together."""
        result = await self.score(replace(request, fails_as_a_whole=False))
        for position, item in enumerate(result.items):
            yield position, item


def traffic_of(config: ServeConfig) -> Traffic:
    """The traffic that `config` asks for."""
    return Traffic(
        others={name: Application(name) for name in config.other_models},
        canary=Application(config.canary) if config.canary else None,
        canary_share=config.canary_share,
    )


def settings_of(config: ServeConfig) -> dict[str, Any]:
    """What Serve hands to running replicas (`user_config`)."""
    return config.model_dump(include=set(SETTINGS))


def taken_over(config: ServeConfig, user_config: Mapping[str, Any]) -> ServeConfig:
    """`config` with the traffic that `user_config` names. Raises `ConfigError`."""
    unknown = [name for name in user_config if name not in SETTINGS]
    if unknown:
        raise ConfigError(
            f"user_config has {', '.join(map(repr, unknown))}; expected {', '.join(SETTINGS)}: "
            "everything else is an argument of the application."
        )
    return ServeConfig(**{**config.model_dump(), "api_key": config.api_key, **user_config})


def _unreachable(name: str, error: Exception) -> ServiceError:
    return OverloadedError(
        f"the model {name!r} does not answer ({type(error).__name__}); try again",
        status=503,
        retry_after_s=1.0,
    )
