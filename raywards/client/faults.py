"""Why an attempt gave no answer, whether another one may, and when. Pure."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import ValidationError

from raywards.errors import (
    DeadlineError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
    UnreachableError,
)
from raywards.schemas import ErrorBody, ErrorInfo

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 8.0
_LEAST_SPREAD_S = 0.25


@dataclass(frozen=True)
class Reply:
    """What came back: status, headers in lower case, the whole body."""

    status: int
    headers: dict[str, str]
    content: bytes


Outcome = Reply | httpx.RequestError | None


@dataclass(frozen=True)
class Fault:
    """An attempt without an answer, as the error to raise if it was the last."""

    error: ServiceError
    passing: bool
    retry_after_s: float | None = None

    def pause(self, attempt: int) -> float:
        """Seconds before the next attempt: what the server asked for, else doubling.

        With jitter, so that clients that failed together do not come back together: a server that
        names a time names the same to all of them.
        """
        longest = min(_FIRST_PAUSE_S * 2.0 ** min(attempt, 30), _LONGEST_PAUSE_S)
        if self.retry_after_s is None:
            return random.uniform(0.5, 1.0) * longest
        spread = max(_LEAST_SPREAD_S, self.retry_after_s / 4, longest / 4)
        return self.retry_after_s + random.uniform(0.0, 1.0) * spread


def fault_of(where: str, outcome: Outcome, request_id: str) -> Fault:
    """`where`: method and address. `outcome`: anything but a reply with status 200."""
    if not isinstance(outcome, Reply):
        return _transport_fault(where, outcome, request_id)
    own = _own_error(outcome)
    if own is not None:
        return _served_fault(own, outcome, request_id)
    return _foreign_fault(where, outcome, request_id)


def _transport_fault(where: str, outcome: httpx.RequestError | None, request_id: str) -> Fault:
    what = f"{type(outcome).__name__}: {outcome}" if outcome is not None else "no reply"
    if isinstance(outcome, httpx.TimeoutException) and not isinstance(
        outcome, httpx.ConnectTimeout
    ):
        late = DeadlineError(
            f"{where}: no answer within the time limit; raise timeout_s, or send less at once",
            request_id=request_id,
        )
        return Fault(late, passing=True)
    if isinstance(outcome, httpx.DecodingError):
        damaged = ServiceError(
            f"{where}: the body of the reply is damaged ({what}). Look at what stands between "
            "here and the server",
            request_id=request_id,
        )
        return Fault(damaged, passing=True)
    gone = UnreachableError(f"{where}: {what}. Is the server running there?", request_id=request_id)
    return Fault(gone, passing=True)


def _served_fault(own: ErrorInfo, reply: Reply, request_id: str) -> Fault:
    """The server itself said what is wrong: it knows whether trying again helps."""
    status = reply.status
    details: dict[str, Any] = {
        "status": status,
        "request_id": own.request_id or request_id,
        "code": own.code,
    }
    if status in (429, 503):
        wait = _retry_after_s(reply)
        error = OverloadedError(own.message, retry_after_s=wait, **details)
        return Fault(error, passing=True, retry_after_s=wait)
    elif status in (408, 504):
        return Fault(DeadlineError(own.message, **details), passing=False)
    elif status < 500:
        return Fault(RequestRefusedError(own.message, field=own.param, **details), passing=False)
    return Fault(ServiceError(own.message, **details), passing=False)


def _foreign_fault(where: str, reply: Reply, request_id: str) -> Fault:
    """Something in front of the server spoke: a proxy whose replica was just killed, mostly."""
    status = reply.status
    details: dict[str, Any] = {"status": status, "request_id": request_id}
    if status in (429, 503):
        wait = _retry_after_s(reply)
        full = OverloadedError(f"{where}: HTTP {status}", retry_after_s=wait, **details)
        return Fault(full, passing=True, retry_after_s=wait)
    elif status in (408, 504):
        return Fault(DeadlineError(f"{where}: HTTP {status}", **details), passing=True)
    elif status >= 500:
        return Fault(ServiceError(f"{where}: HTTP {status}", **details), passing=True)
    message = (
        f"{where}: HTTP {status} that is not from a raywards server. Check base_url and the "
        "route prefix"
    )
    return Fault(RequestRefusedError(message, **details), passing=False)


def _own_error(reply: Reply) -> ErrorInfo | None:
    try:
        info = ErrorBody.model_validate_json(reply.content).error
    except ValidationError:
        return None
    return info if info.code is not None else None


def _retry_after_s(reply: Reply) -> float | None:
    """The header `Retry-After`: seconds, or the date of RFC 9110, which proxies write."""
    value = reply.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value)
    return seconds if 0 <= seconds < math.inf else None


def _seconds_until(date: str) -> float:
    """0 for one that has passed, NaN for what is no date."""
    try:
        when = parsedate_to_datetime(date)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    if when.tzinfo is None:  # the zone "-0000"
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
