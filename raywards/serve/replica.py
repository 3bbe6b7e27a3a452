"""The scoring core of one replica: checks, tokenising, batching, deadlines, health.

    ScoringRequest ─check─► items ─tokenise (threads)─► ids ─Batcher─► rewards ─► ScoringResult

Every dialect asks this core. It holds a `Scorer` and a `Batcher`, and lives on one event loop; the
tokeniser and the model run in threads beside it. Knows nothing of JSON, HTTP or Ray, so that it
runs under a bare FastAPI app as it does in a Serve replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry import trace

from raywards.config import HUGE_PAGES, ServeConfig
from raywards.errors import (
    DeadlineError,
    NonFiniteError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
)
from raywards.serve.batcher import Batcher, Scored, packed_cost, padded_cost
from raywards.serve.dialects import Core, ScoredItem, ScoringRequest, ScoringResult
from raywards.serve.keys import Keys
from raywards.serve.metrics import Metric, Metrics
from raywards.serve.recent import Recent
from raywards.serve.tokenizing import Encoded, Tokenizer, TokenizerLike, guessed_tokens
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


class ScorerLike(TokenizerLike, Protocol):
    """What the core needs of `raywards.scorer.Scorer`."""

    info: dict[str, Any]

    @property
    def packs(self) -> bool: ...

    def free_memory(self) -> None: ...

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]: ...


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
        self.keys = Keys(
            config.api_key.get_secret_value() if config.api_key else None, config.api_key_file
        )
        self._scorer = scorer
        self._batcher = Batcher(
            self._forward,
            max_batch_tokens=config.max_batch_tokens,
            max_batch_sequences=config.max_batch_sequences,
            max_queued_tokens=config.max_queued_tokens,
            cost=packed_cost if scorer.packs else padded_cost,
        )
        self._tokenizer = Tokenizer(scorer)
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
        }

    async def score(self, request: ScoringRequest) -> ScoringResult:
        """The core. Raises `ServiceError`: refused, overloaded, too late, or failed."""
        other = self._other(request.model)
        if other is not None:
            return await other.score(request)
        return await self._score(request, self.traffic)

    def _other(self, asked: str | None) -> Core | None:
        """Who answers for another name than this model's own."""
        adapter = self.adapters.get((asked or "").partition("@")[0])
        return adapter or self.traffic.others.get(asked or "")

    async def score_here(self, request: ScoringRequest) -> ScoringResult:
        """The same, with this replica's own model in any case."""
        return await self._score(request, Traffic())

    async def _score(self, request: ScoringRequest, traffic: Traffic) -> ScoringResult:
        with _TRACER.start_as_current_span("raywards.score"):
            return await self._score_traced(request, traffic)

    async def _score_traced(self, request: ScoringRequest, traffic: Traffic) -> ScoringResult:
        started = time.monotonic()
        deadline = self._deadline(request)
        self._check(request)
        encoded = await self._tokenizer.encode(request, deadline)
        tokenize_s = time.monotonic() - started
        good = [one for one in encoded if isinstance(one, Encoded)]
        if good and self._is_canarys(good[0], request, traffic):
            answer = await self._of_canary(request, traffic)
            if answer is not None:
                return answer
        rewards: list[float] | list[float | ServiceError]
        if request.fails_as_a_whole:
            scored = await self._batcher.submit_timed(**_submitted(good, deadline))
            rewards, timed = scored.rewards, [scored]
        else:
            each = self._batcher.submit_each(**_submitted(good, deadline))
            found = {position: outcome async for position, outcome in each}
            outcomes = [found[position] for position in range(len(good))]
            rewards = [_reward_of(outcome) for outcome in outcomes]
            timed = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
        about = self._scorer.info
        result = ScoringResult(
            items=_scored_items(encoded, rewards),
            model=self.config.name,
            revision=about.get("revision"),
            queue_s=max((outcome.queue_s for outcome in timed), default=0.0),
            tokenize_s=tokenize_s,
            forward_s=max((outcome.forward_s for outcome in timed), default=0.0),
            batch_size=max((outcome.batch_size for outcome in timed), default=0),
            label=about["label"],
            is_regression=about["problem_type"] == "regression",
            device=about["device"],
        )
        self._tell(result)
        return result

    async def stream(self, request: ScoringRequest) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        """Each item with its position, as soon as it is scored or has failed.

        Raises `ServiceError` before the first, where the request as a whole is refused.
        """
        other = self._other(request.model)
        if other is not None:
            async for scored in other.stream(request):
                yield scored
            return
        deadline = self._deadline(request)
        self._check(request)
        request = replace(request, fails_as_a_whole=False)
        encoded = await self._tokenizer.encode(request, deadline)
        good = [(i, one) for i, one in enumerate(encoded) if isinstance(one, Encoded)]
        if good and self._is_canarys(good[0][1], request, self.traffic):
            answer = await self._of_canary(request, self.traffic)
            if answer is not None:
                for position, item in enumerate(answer.items):
                    yield position, item
                return
        outcomes = self._batcher.submit_each(**_submitted([one for _, one in good], deadline))
        async with aclosing(outcomes):
            first = await anext(outcomes, None)  # refused here, or not at all
            for index, one in enumerate(encoded):
                if not isinstance(one, Encoded):
                    yield index, ScoredItem(None, None, error=one)
            while first is not None:
                position, outcome = first
                index, one = good[position]
                item = _scored_item(one, _reward_of(outcome))
                self._count(item)
                yield index, item
                first = await anext(outcomes, None)

    def _is_canarys(self, first: Encoded, request: ScoringRequest, traffic: Traffic) -> bool:
        """Who names a revision gets it. Else the prompt decides, that of the first sequence."""
        pinned = request.model is not None and "@" in request.model
        return not pinned and traffic.diverts(first.ids[: first.prefix] or first.ids)

    async def _of_canary(self, request: ScoringRequest, traffic: Traffic) -> ScoringResult | None:
        """The canary's answer; None where it has none, since the own model is there to answer."""
        assert traffic.canary is not None
        try:
            result = await traffic.canary.score(replace(request, model=None))
        except RequestRefusedError:
            raise
        except ServiceError as error:
            logger.warning("the canary failed, and its request is scored here: %s", error)
            self.metrics.put(Metric.canary_total, outcome="fallback")
            return None
        self.metrics.put(Metric.canary_total, outcome="answered")
        return result

    def _deadline(self, request: ScoringRequest) -> float:
        limit = self.config.request_timeout_s
        return time.monotonic() + min(request.timeout_s or limit, limit)

    def _forward(self, sequences: list[list[int]]) -> list[float]:
        """Called in the batcher's thread."""
        started = time.monotonic()
        try:
            rewards = self._scorer.score_ids(sequences)
            self._measure(sequences, time.monotonic() - started)
            return rewards
        except NonFiniteError:
            self.metrics.put(Metric.nonfinite_total)
            raise
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # of torch, which this module lacks
                raise
        # Outside of the handler: the error's frames hold the tensors of the failed forward.
        self._scorer.free_memory()
        raise MemoryError

    # ---- metrics

    def _measure(self, sequences: Sequence[Sequence[int]], seconds: float) -> None:
        """Of one forward: its time, and the tokens that it took and was spared."""
        real = sum(map(len, sequences))
        padded = cached = 0
        if self._scorer.packs:
            prefixes = [tuple(ids[: self._scorer.split(ids)]) for ids in sequences]
            cached = sum(map(len, prefixes)) - sum(map(len, set(prefixes)))
        else:
            padded = len(sequences) * max(map(len, sequences)) - real
        put = self.metrics.put
        put(Metric.forward_seconds, seconds)
        put(Metric.batch_items, len(sequences))
        put(Metric.batch_tokens, real)
        put(Metric.padding_ratio, 1 + padded / real)
        for kind, tokens in (("real", real), ("cached", cached), ("padded", padded)):
            put(Metric.tokens_total, tokens, kind=kind)

    def _tell(self, result: ScoringResult) -> None:
        """Of one request: what its answer says."""
        about = _in_numbers(result)
        log_event(logging.INFO, "scored", **about)
        trace.get_current_span().set_attributes({f"raywards.{k}": v for k, v in about.items()})
        self.metrics.put(Metric.tokenize_seconds, result.tokenize_s)
        if result.batch_size:
            self.metrics.put(Metric.queue_seconds, result.queue_s)
        for item in result.items:
            self._count(item)

    def _count(self, item: ScoredItem) -> None:
        failed = item.error is not None
        self.metrics.put(Metric.items_total, outcome="failed" if failed else "scored")
        self.metrics.put(Metric.truncated_total, item.truncated)
        if item.reward is not None:
            self._recent.add(item.reward)
            self.metrics.put_reward(item.reward)

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
            await asyncio.sleep(_WATCH_S)

    def _check(self, request: ScoringRequest) -> None:
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
        self._admit(request)

    def _admit(self, request: ScoringRequest) -> None:
        """By a guess of its tokens; the batcher decides by their count."""
        load, most = self._waiting_tokens, self.config.max_queued_tokens
        if 0 < load > most - guessed_tokens(request):
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
    return service_of(scorer, config, metrics)


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


def _submitted(encoded: Sequence[Encoded], deadline: float) -> dict[str, Any]:
    return {
        "sequences": [one.ids for one in encoded],
        "prefixes": [one.prefix for one in encoded],
        "deadline": deadline,
    }


def _scored_items(
    encoded: Sequence[Encoded | RequestRefusedError], rewards: Sequence[float | ServiceError]
) -> list[ScoredItem]:
    """Rewards belong to the items that could be encoded, in order."""
    remaining = iter(rewards)
    items = []
    for one in encoded:
        if not isinstance(one, Encoded):
            items.append(ScoredItem(None, None, error=one))
            continue
        items.append(_scored_item(one, next(remaining)))
    return items


def _scored_item(one: Encoded, reward: float | ServiceError) -> ScoredItem:
    if isinstance(reward, ServiceError):
        return ScoredItem(None, len(one.ids), one.truncated, reward)
    return ScoredItem(reward, len(one.ids), one.truncated)


def _reward_of(outcome: Scored | Exception) -> float | ServiceError:
    if isinstance(outcome, Scored):
        return outcome.rewards[0]
    elif isinstance(outcome, ServiceError):
        return outcome
    raise outcome
