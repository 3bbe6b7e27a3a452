"""The scoring core of one replica: checks, tokenising, batching, deadlines, health.

    ScoringRequest ─check─► items ─tokenise (threads)─► ids ─Batcher─► rewards ─► ScoringResult

Every dialect asks this core. It holds a `Scorer` and a `Batcher`, and lives on one event loop; the
tokeniser and the model run in threads beside it. Knows nothing of JSON, HTTP or Ray, so that it
runs under a bare FastAPI app as it does in a Serve replica.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry import trace

from raywards.config import HUGE_PAGES, ServeConfig
from raywards.errors import (
    DeadlineError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
)
from raywards.serve.batcher import Batcher, Forward, Scored, packed_cost, padded_cost
from raywards.serve.dialects import Core, ScoredItem, ScoringRequest, ScoringResult
from raywards.serve.keys import Keys
from raywards.serve.metrics import Metric, Metrics
from raywards.serve.recent import Recent
from raywards.serve.tokenizing import Encoded, Tokenizer, TokenizerLike
from raywards.serve.traffic import Traffic

if TYPE_CHECKING:
    from raywards.scorer import Scorer

logger = logging.getLogger(__name__)
# Spans go nowhere unless Serve's tracing is switched on (docs/operations.md).
_TRACER = trace.get_tracer("raywards")

REQUEST_ID: ContextVar[str | None] = ContextVar("raywards_request_id", default=None)
"""Of the request that this task serves: for the log."""

_PROBE_S = 10.0
_WATCH_S = 1.0
# A forward of one batch takes seconds. One that takes this long will not come back.
_STUCK_S = 600.0
# Beyond a request's deadline, for others to say themselves that it has passed.
_GRACE_S = 1.0


class ScorerLike(TokenizerLike, Protocol):
    """What the core needs of `raywards.scorer.Scorer`."""

    info: dict[str, Any]

    @property
    def packs(self) -> bool: ...

    def free_memory(self) -> None: ...

    def score_encoded(self, sequences: Sequence[Sequence[int]]) -> list[float]: ...


class RewardService:
    """One model, ready to score, and its adapters. `start()` it on the loop that will call it."""

    def __init__(
        self,
        scorer: ScorerLike,
        config: ServeConfig,
        metrics: Metrics | None = None,
        adapters: Mapping[str, RewardService] | None = None,
    ) -> None:
        self.config = config
        self.adapters = dict(adapters or {})
        """Each with a queue of its own; their forwards take turns."""
        self.metrics = metrics or Metrics(config.name)
        self.started_at = int(time.time())
        self.replica = uuid.uuid4().hex[:8]
        key = None if config.api_key is None else config.api_key.get_secret_value()
        self.keys = Keys(key, config.api_key_file)
        self._scorer = scorer
        self._tokenizer = Tokenizer(scorer)
        self._batcher = Batcher(
            self._forward,
            max_batch_tokens=config.max_batch_tokens,
            max_batch_sequences=config.max_batch_sequences,
            max_queued_tokens=config.max_queued_tokens,
            cost=packed_cost if scorer.packs else padded_cost,
            observe=self._measure,
            arriving=lambda: self._tokenizer.waiting_tokens,
        )
        self.traffic = Traffic()
        self._recent = Recent()
        self._closed = False
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the batcher on the running loop."""
        for adapter in self.adapters.values():
            adapter.start()
        self._batcher.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="metrics")

    async def close(self) -> None:
        """Refuse new requests, finish the accepted ones."""
        self._closed = True
        await asyncio.gather(*(adapter.close() for adapter in self.adapters.values()))
        await self._batcher.close()
        self._tokenizer.close()
        if self._watching is not None:
            self._watching.cancel()
        self.metrics.flush()

    @property
    def healthy(self) -> bool:
        """Whether requests are accepted and computed."""
        adapters = all(adapter.healthy for adapter in self.adapters.values())
        return self._batcher.healthy and adapters and not self._closed

    @property
    def load_tokens(self) -> int:
        """Tokens that wait to be tokenised, wait for a forward, or are in one: for autoscaling."""
        own = self._waiting_tokens + self._batcher.computing_tokens
        return own + sum(adapter.load_tokens for adapter in self.adapters.values())

    @property
    def _waiting_tokens(self) -> int:
        return self._tokenizer.waiting_tokens + self._batcher.stats.queued_tokens

    async def check(self) -> None:
        """Send a canary through the batcher; raises where rewards do not come out any more."""
        await asyncio.gather(self._probe(), *(one.check() for one in self.adapters.values()))

    async def _probe(self) -> None:
        if self._batcher.forward_age_s > _STUCK_S:
            raise ServiceError(f"a forward has been running for more than {_STUCK_S:g} s")
        canary = [min(1, int(self._scorer.info["vocab_size"]) - 1)] * 2
        try:
            await self._batcher.probe(canary, deadline=time.monotonic() + _PROBE_S)
        except DeadlineError:
            # It waits behind one long forward: busy, not broken.
            if not self._batcher.healthy:
                raise

    def info(self) -> dict[str, Any]:
        """What is served, its limits, and how much waits."""
        config = self.config
        return {
            "name": config.name,
            **self._scorer.info,
            "adapters": {name: one._scorer.info for name, one in self.adapters.items()},
            "limits": {
                "max_length": self._scorer.max_length,
                "max_items_per_request": config.max_items_per_request,
                "max_body_bytes": config.max_body_bytes,
                "max_batch_tokens": config.max_batch_tokens,
                "max_queued_tokens": config.max_queued_tokens,
                "request_timeout_s": config.request_timeout_s,
            },
            "batcher": asdict(self._batcher.stats),
        }

    def stats(self) -> dict[str, Any]:
        """What this replica has done and has to do, and its last rewards."""
        return {
            "replica": self.replica,
            "uptime_s": int(time.time()) - self.started_at,
            **asdict(self._batcher.stats),
            "rewards": self._recent.describe(),
            "adapters": {name: asdict(one._batcher.stats) for name, one in self.adapters.items()},
        }

    async def score(self, request: ScoringRequest) -> ScoringResult:
        """The core. Raises `ServiceError`: refused, overloaded, too late, or failed."""
        other = self._other(request.model)
        if other is None:
            return await self._score(request, self.traffic)
        deadline = self._deadline(request)
        async with _until(deadline + _GRACE_S):
            return await other.score(_due(request, deadline))

    def _other(self, asked: str | None) -> Core | None:
        """Who answers for another name than this model's own."""
        name = (asked or "").partition("@")[0]
        return self.adapters.get(name) or self.traffic.others.get(name)

    async def score_here(self, request: ScoringRequest) -> ScoringResult:
        """The same, with this replica's own model in any case."""
        return await self._score(request, Traffic())

    async def _score(self, request: ScoringRequest, traffic: Traffic) -> ScoringResult:
        with _span() as span:
            deadline = self._deadline(request)
            encoded, tokenize_s = await self._encode(request, deadline)
            canarys = await self._of_canary(encoded, request, traffic, deadline)
            own = _own(encoded, canarys)
            if request.fails_as_a_whole:
                outcomes = await self._together(encoded, own, deadline)
            else:
                outcomes = [one async for one in self._each(encoded, own, deadline)]
            result = self._result(encoded, outcomes, canarys, tokenize_s)
            self._tell(result, span)
            return result

    async def stream(self, request: ScoringRequest) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        """Each item with its position, as soon as it is scored or has failed.

        Raises `ServiceError` before the first, where the request as a whole is refused.
        """
        deadline = self._deadline(request)
        other = self._other(request.model)
        if other is None:
            scored = self._stream(request, deadline)
        else:
            scored = _in_time(other.stream(_due(request, deadline)), deadline)
        async with aclosing(scored):
            async for item in scored:
                yield item

    async def _stream(
        self, request: ScoringRequest, deadline: float
    ) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        with _span() as span:
            request = replace(request, fails_as_a_whole=False)
            encoded, tokenize_s = await self._encode(request, deadline)
            canarys = await self._of_canary(encoded, request, self.traffic, deadline)
            own = _own(encoded, canarys)
            outcomes: list[tuple[int, Scored | Exception]] = []
            async with aclosing(self._each(encoded, own, deadline)) as each:
                first = await anext(each, None)  # refused here, or not at all
                known = self._result(encoded, [], canarys, tokenize_s)
                for position, item in enumerate(known.items):
                    if position not in own:
                        yield position, item
                while first is not None:
                    outcomes.append(first)
                    position, outcome = first
                    yield position, _scored_item(encoded[position], outcome)
                    first = await anext(each, None)
            self._tell(self._result(encoded, outcomes, canarys, tokenize_s), span)

    async def _encode(
        self, request: ScoringRequest, deadline: float
    ) -> tuple[list[Encoded | RequestRefusedError], float]:
        """Every item as token ids, or why it cannot be scored; and the seconds that it took."""
        started = time.monotonic()
        guess = self._tokenizer.guess(request)
        self._check(request, guess)
        encoded = await self._tokenizer.encode(request, deadline, guess)
        return encoded, time.monotonic() - started

    async def _together(
        self, encoded: Sequence[Encoded | RequestRefusedError], own: Sequence[int], deadline: float
    ) -> list[tuple[int, Scored | Exception]]:
        if not own:
            return []
        submitted = _submitted([encoded[i] for i in own], deadline)
        try:
            scored = await self._batcher.submit_timed(**submitted)
        except ServiceError as error:
            self._count_if_not_finite(error)
            raise
        rewards = zip(own, scored.rewards, strict=True)
        return [(i, replace(scored, rewards=[reward])) for i, reward in rewards]

    async def _each(
        self, encoded: Sequence[Encoded | RequestRefusedError], own: Sequence[int], deadline: float
    ) -> AsyncGenerator[tuple[int, Scored | Exception], None]:
        submitted = _submitted([encoded[i] for i in own], deadline)
        async with aclosing(self._batcher.submit_each(**submitted)) as outcomes:
            async for position, outcome in outcomes:
                yield own[position], outcome

    async def _of_canary(
        self,
        encoded: Sequence[Encoded | RequestRefusedError],
        request: ScoringRequest,
        traffic: Traffic,
        deadline: float,
    ) -> _Canarys | None:
        """The canary's answer to those items whose prompts are its own; who names a revision gets
        that. None where there is no such item, or no answer: the own model is there to give one.
        """
        if traffic.canary is None or (request.model is not None and "@" in request.model):
            return None
        places = [
            i
            for i, one in enumerate(encoded)
            if isinstance(one, Encoded) and traffic.diverts(one.ids[: one.prefix] or one.ids)
        ]
        if not places:
            return None
        # Half of the time, so that the other half is left for the own model.
        until = (time.monotonic() + deadline) / 2
        asked = replace(request, model=None, items=[request.items[i] for i in places])
        try:
            async with _until(until):
                result = await traffic.canary.score(_due(asked, until))
        except RequestRefusedError:
            raise
        except ServiceError as error:
            logger.warning("the canary failed, and its request is scored here: %s", error)
            self.metrics.put(Metric.canary_total, outcome="fallback")
            return None
        self.metrics.put(Metric.canary_total, outcome="answered")
        return _Canarys(result, dict(zip(places, result.items, strict=True)))

    def _result(
        self,
        encoded: Sequence[Encoded | RequestRefusedError],
        outcomes: Sequence[tuple[int, Scored | Exception]],
        canarys: _Canarys | None,
        tokenize_s: float,
    ) -> ScoringResult:
        """Of what is known so far."""
        items = [ScoredItem(None, None, error=_error_of(one)) for one in encoded]
        for position, outcome in outcomes:
            items[position] = _scored_item(encoded[position], outcome)
        for position, item in (canarys.items if canarys else {}).items():
            items[position] = item
        if canarys and not outcomes:
            return replace(canarys.result, items=items, tokenize_s=tokenize_s)
        about = self._scorer.info
        timed = [outcome for _, outcome in outcomes if isinstance(outcome, Scored)]
        revision = about.get("revision")
        return ScoringResult(
            items=items,
            model=self.config.name,
            revision=f"{revision}, {canarys.result.revision}" if canarys else revision,
            queue_s=max((outcome.queue_s for outcome in timed), default=0.0),
            tokenize_s=tokenize_s,
            forward_s=max((outcome.forward_s for outcome in timed), default=0.0),
            batch_size=max((outcome.batch_size for outcome in timed), default=0),
            label=about["label"],
            is_regression=about["problem_type"] == "regression",
            device=about["device"],
        )

    def _deadline(self, request: ScoringRequest) -> float:
        limit = self.config.request_timeout_s
        return time.monotonic() + min(request.timeout_s or limit, limit)

    def _forward(self, sequences: list[list[int]]) -> list[float]:
        """Called in the batcher's thread."""
        try:
            return self._scorer.score_encoded(sequences)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # of torch, which this module lacks
                raise
        # Outside of the handler: the error's frames hold the tensors of the failed forward.
        self._scorer.free_memory()
        raise MemoryError

    # ---- metrics

    def _measure(self, forward: Forward) -> None:
        """Its time, and the tokens that it took and was spared."""
        padded = cached = 0
        if self._scorer.packs:
            cached = forward.shared_tokens
        else:
            padded = forward.sequences * forward.longest - forward.tokens
        put = self.metrics.put
        put(Metric.forward_seconds, forward.seconds)
        put(Metric.batch_items, forward.sequences)
        put(Metric.batch_tokens, forward.tokens)
        put(Metric.padding_ratio, 1 + padded / forward.tokens)
        for kind, tokens in (("real", forward.tokens), ("cached", cached), ("padded", padded)):
            put(Metric.tokens_total, tokens, kind=kind)

    def _tell(self, result: ScoringResult, span: trace.Span) -> None:
        """Of one request: what its answer says."""
        # Serve has a line for each request. One more takes an eighth of what small ones cost.
        if logger.isEnabledFor(logging.DEBUG) or span.is_recording():
            about = _in_numbers(result)
            log_event(logging.DEBUG, "scored", **about)
            span.set_attributes({f"raywards.{k}": v for k, v in about.items()})
        self.metrics.put(Metric.tokenize_seconds, result.tokenize_s)
        if result.batch_size:
            self.metrics.put(Metric.queue_seconds, result.queue_s)
        for item in result.items:
            self._count(item)

    def _count(self, item: ScoredItem) -> None:
        failed = item.error is not None
        self.metrics.put(Metric.items_total, outcome="failed" if failed else "scored")
        self.metrics.put(Metric.truncated_total, item.truncated)
        if item.error is not None:
            self._count_if_not_finite(item.error)
        if item.reward is not None:
            self._recent.add(item.reward)
            self.metrics.put_reward(item.reward)

    def _count_if_not_finite(self, error: ServiceError) -> None:
        if error.__dict__.get("code") == "non_finite_reward":
            self.metrics.put(Metric.nonfinite_total)

    async def _watch(self) -> None:
        """Write what is a state, not an event, every second."""
        about = self._scorer.info
        labels = {"revision": str(about["revision"]), "dtype": str(about["dtype"])}
        while True:
            stats = self._batcher.stats
            rewards = self._recent.describe()
            if rewards["count"]:
                self.metrics.put(Metric.reward_mean, rewards["mean"])
                self.metrics.put(Metric.reward_std, rewards["std"])
            self.metrics.put(Metric.queue_items, stats.queued_sequences)
            self.metrics.put(Metric.queue_tokens, stats.queued_tokens)
            self.metrics.put(Metric.model_info, 1, **labels)
            self.metrics.flush()
            await asyncio.sleep(_WATCH_S)

    def _check(self, request: ScoringRequest, guess: int) -> None:
        """What can be refused without looking at a token."""
        if self._closed:
            raise OverloadedError(
                "this replica is stopping; try again", status=503, retry_after_s=1.0
            )
        self._check_model(request.model)
        if len(request.items) > self.config.max_items_per_request:
            raise RequestRefusedError(
                f"the request has {len(request.items)} sequences, and at most "
                f"{self.config.max_items_per_request} are accepted; send fewer per request",
                status=413,
                code="too_many_items",
            )
        limit = self._scorer.max_length
        if request.max_length is not None and request.max_length > limit:
            raise RequestRefusedError(
                f"{request.max_length_field}: {request.max_length} is more than this model's "
                f"{limit}",
                status=422,
                field=request.max_length_field,
                code="invalid_value",
            )
        self._admit(guess)

    def _admit(self, guess: int) -> None:
        """By a guess of its tokens; the batcher decides by their count."""
        load, most = self._waiting_tokens, self.config.max_queued_tokens
        if 0 < load > most - guess:
            raise OverloadedError(
                f"the queue is full: about {load} tokens wait and {most} may; try again after the "
                "time in Retry-After",
                status=503,
                retry_after_s=self._batcher.retry_after_s(),
            )

    def _check_model(self, asked: str | None) -> None:
        name, revision = self.config.name, self._scorer.info.get("revision")
        if asked is not None and asked not in (name, f"{name}@{revision}"):
            names = (*self.adapters, *self.traffic.others)
            others = "".join(f", and {other!r}" for other in names)
            raise RequestRefusedError(
                f"model: {asked[:80]!r} is not served here; {name!r} is, at revision {revision}"
                f"{others}",
                status=404,
                field="model",
                code="model_not_found",
            )


def load(config: ServeConfig, metrics: Metrics | None = None) -> RewardService:
    """Load and verify the model that `config` names. Raises `ModelError`, `CheckpointError`."""
    # Not in the deployment's runtime_env: one of its own would displace what the job's says.
    os.environ.setdefault(HUGE_PAGES, "1")
    import torch

    from raywards.scorer import Scorer

    # Of all replicas on a machine, each would else start a thread for every core of it.
    torch.set_num_threads(max(1, int(config.num_cpus)))
    scorer = Scorer.from_pretrained(
        config.model,
        dtype=config.dtype,
        # Not by what is visible: Ray hides no GPU from a replica that has none.
        device=config.device or ("cuda" if config.num_gpus else "cpu"),
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        deterministic=config.deterministic,
        trust_remote_code=config.trust_remote_code,
    )
    config = config.model_copy(update={"max_batch_tokens": scorer.fit_memory()})
    service = service_of(scorer, config, metrics)
    # What is here now stays. To look through it for garbage takes up to 0.2 s, in which the loop
    # stands still: a large body makes Python do that.
    gc.collect()
    gc.freeze()
    return service


def service_of(
    scorer: Scorer, config: ServeConfig, metrics: Metrics | None = None
) -> RewardService:
    """The service of a loaded model, with its adapters; each is verified. Raises as `load`."""
    metrics = metrics or Metrics(config.name)
    adapters = {}
    for name, folder in config.adapters.items():
        adapted = scorer.with_adapter(folder)
        alone = {"name": name, "model": folder, "adapters": {}, "other_models": []}
        own = config.model_copy(update={**alone, "canary": None, "canary_share": 0.0})
        adapters[name] = RewardService(adapted, own, metrics.of(name))
        if config.verify:
            adapted.verify()
    if config.verify:
        scorer.verify()
    return RewardService(scorer, config, metrics, adapters)


def log_event(level: int, event: str, **fields: Any) -> None:
    """One line of JSON. Never a prompt, a response, or a field's value: counts and codes only."""
    if logger.isEnabledFor(level):
        line: Mapping[str, Any] = {"event": event, "request_id": REQUEST_ID.get(), **fields}
        logger.log(level, "%s", json.dumps(line))


def _in_numbers(result: ScoringResult) -> dict[str, float]:
    """Of one answer, for the log and the trace."""
    return {
        "items": len(result.items),
        "failed": sum(item.error is not None for item in result.items),
        "truncated": sum(item.truncated for item in result.items),
        "tokens": result.num_tokens,
        "queue_ms": round(result.queue_s * 1e3, 1),
        "tokenize_ms": round(result.tokenize_s * 1e3, 1),
        "forward_ms": round(result.forward_s * 1e3, 1),
        "batch_size": result.batch_size,
    }


@dataclass(frozen=True)
class _Canarys:
    """What the canary answered, and its items by their places in the request."""

    result: ScoringResult
    items: Mapping[int, ScoredItem]


@contextmanager
def _span() -> Iterator[trace.Span]:
    """Of one answer, below the current one; nothing is below it, so it does not become that."""
    span = _TRACER.start_span("raywards.score")
    try:
        yield span
    except ServiceError:
        span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        span.end()


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """For those who keep no deadline: another application may have no replica to take it."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        message = "the deadline passed before the reward was there; allow more time"
        raise DeadlineError(message, status=504) from None


async def _in_time(
    items: AsyncGenerator[tuple[int, ScoredItem], None], deadline: float
) -> AsyncGenerator[tuple[int, ScoredItem], None]:
    async with aclosing(items):
        while True:
            async with _until(deadline + _GRACE_S):
                item = await anext(items, None)
            if item is None:
                return
            yield item


def _due(request: ScoringRequest, deadline: float) -> ScoringRequest:
    return replace(request, timeout_s=max(deadline - time.monotonic(), 1e-3))


def _own(encoded: Sequence[Encoded | RequestRefusedError], canarys: _Canarys | None) -> list[int]:
    """Places of the items that this model scores."""
    others = canarys.items if canarys else {}
    return [i for i, one in enumerate(encoded) if isinstance(one, Encoded) and i not in others]


def _submitted(encoded: Sequence[Encoded | RequestRefusedError], deadline: float) -> dict[str, Any]:
    good = [one for one in encoded if isinstance(one, Encoded)]
    return {
        "sequences": [one.ids for one in good],
        "prefixes": [one.prefix for one in good],
        "deadline": deadline,
    }


def _scored_item(one: Encoded | RequestRefusedError, outcome: Scored | Exception) -> ScoredItem:
    assert isinstance(one, Encoded)
    if isinstance(outcome, Scored):
        return ScoredItem(outcome.rewards[0], len(one.ids), one.truncated)
    elif isinstance(outcome, ServiceError):
        return ScoredItem(None, len(one.ids), one.truncated, outcome)
    raise outcome


def _error_of(one: Encoded | RequestRefusedError) -> ServiceError | None:
    return None if isinstance(one, Encoded) else one
