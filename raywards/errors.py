"""Every error that raywards raises on purpose.

    RaywardsError
    ├── InputError (ValueError)          what a caller handed over cannot be used
    │   ├── ConfigError                  a setting, a flag, a key of a YAML file
    │   ├── RowError                     a preference row
    │   ├── ConversationError            a conversation to score
    │   ├── ModelError                   a model folder or hub id
    │   └── CheckpointError              a checkpoint or an export
    ├── TrainingError (RuntimeError)     a run that had to stop
    │   └── NonFiniteError               a loss, gradient or reward that is not finite
    ├── HubError (RuntimeError)          an export could not be uploaded; it is whole where it is
    └── ServiceError (RuntimeError)      a scoring endpoint did not give a reward
        ├── RequestRefusedError          it refused the request (4xx)
        ├── OverloadedError              it is full, starting or draining (503)
        ├── DeadlineError (TimeoutError) the deadline passed first
        └── UnreachableError (ConnectionError)

A message says what was seen, what is expected, and the next move. Details that a program may want
(`row`, `field`, `status`) are attributes. All of them can be pickled: Ray carries them between
processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class RaywardsError(Exception):
    """Root of the tree. Keyword arguments become attributes and survive pickling."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.__dict__.update(details)


class InputError(RaywardsError, ValueError):
    """What a caller handed over cannot be used."""


class ConfigError(InputError):
    """A setting is unknown, out of range, or in conflict with another."""


class RowError(InputError):
    """A preference row cannot become a pair. Attributes: `source`, `row`, `field`, `reason`."""

    source: str
    row: int
    field: str
    reason: str


class ConversationError(InputError):
    """A conversation cannot be rendered or scored. Attribute: `reason`."""

    reason: str


class ModelError(InputError):
    """A model folder or hub id cannot serve as the reward model that was asked for."""


class CheckpointError(InputError):
    """A checkpoint or export is incomplete, damaged, or belongs to something else.

    Attribute: `newer`, True where a newer raywards wrote it.
    """

    newer: bool

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **{"newer": False, **details})


class TrainingError(RaywardsError, RuntimeError):
    """A training run had to stop."""


class NonFiniteError(TrainingError):
    """A loss, a gradient or a reward is NaN or infinite. No optimizer step was applied."""


class HubError(RaywardsError, RuntimeError):
    """An export could not be uploaded to the hub. The run and its export are not touched."""


class ServiceError(RaywardsError, RuntimeError):
    """A scoring endpoint did not answer with rewards.

    Attributes, each None where it is not known: `status` (HTTP), `request_id`, `field` (of the
    request), `retry_after_s`. They are set on the instance: Ray wraps an error that crosses
    processes in a class of its own, where a default of the class would hide them.
    """

    status: int | None
    request_id: str | None
    field: str | None
    retry_after_s: float | None

    def __init__(self, message: str, **details: Any) -> None:
        unknown = dict.fromkeys(("status", "request_id", "field", "retry_after_s"))
        super().__init__(message, **{**unknown, **details})


class RequestRefusedError(ServiceError):
    """The endpoint refused the request: sending it again will not help."""


class OverloadedError(ServiceError):
    """The endpoint is full, starting or draining; `retry_after_s` says when to come back."""


class DeadlineError(ServiceError, TimeoutError):
    """The deadline of the request passed before a reward was there."""


class UnreachableError(ServiceError, ConnectionError):
    """No connection to the endpoint could be made or kept."""


# Nothing that we know has a longer name, and the comparison takes the product of the lengths.
_LONGEST_NAME = 64


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'learning_rate'?"`, or `""` where nothing known is near `name`."""
    if len(name) > _LONGEST_NAME:
        return ""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
