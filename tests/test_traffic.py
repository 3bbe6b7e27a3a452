"""Who answers: the own model, another by its name, a canary for its share of prompts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace

import httpx
import pytest
from served import Served, served
from tiny import tiny_qwen2

from raywards.config import ServeConfig
from raywards.errors import ConfigError, OverloadedError, RequestRefusedError, ServiceError
from raywards.scorer import Scorer
from raywards.serve.dialects import ScoredItem, ScoringRequest, ScoringResult
from raywards.serve.traffic import SETTINGS, Traffic, settings_of, taken_over

TALKS = [
    [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "Yes."}]
    for n in range(60)
]


@dataclass
class Other:
    """Another model: its rewards are a hundred and one."""

    error: ServiceError | None = None
    hangs: bool = False
    asked: list[ScoringRequest] = field(default_factory=list)

    async def score(self, request: ScoringRequest) -> ScoringResult:
        self.asked.append(request)
        if self.hangs:
            await asyncio.sleep(60)
        if self.error is not None:
            raise self.error
        items = [ScoredItem(101.0, 3) for _ in request.items]
        return ScoringResult(items, "other", "sha256:other", 0.0, 0.0, 0.0, 1)

    async def stream(self, request: ScoringRequest) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        for position, item in enumerate((await self.score(request)).items):
            yield position, item


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_qwen2(tmp_path_factory.mktemp("traffic") / "rm")) as running:
        yield running


@pytest.fixture(autouse=True)
def no_traffic_is_left(rm: Served) -> Iterator[None]:
    yield
    rm.service.traffic = Traffic()


def rewards(rm: Served, body: dict[str, object]) -> list[float]:
    return [row["reward"] for row in rm.post("/v1/reward", body)["data"]]


def test_the_canary_has_its_share_of_prompts_and_keeps_each() -> None:
    prompts = [[n, n * 7, 5] for n in range(4000)]
    traffic = Traffic(canary=Other(), canary_share=0.25)
    taken = [traffic.diverts(prompt) for prompt in prompts]
    assert 0.22 < sum(taken) / len(taken) < 0.28
    assert taken == [traffic.diverts(prompt) for prompt in prompts]
    more = replace(traffic, canary_share=0.5)
    # Who was the canary's stays so while its share grows.
    assert all(more.diverts(prompt) for prompt, was in zip(prompts, taken, strict=True) if was)
    assert not any(replace(traffic, canary_share=0.0).diverts(prompt) for prompt in prompts)
    assert all(replace(traffic, canary_share=1.0).diverts(prompt) for prompt in prompts)


def test_all_answers_to_one_prompt_are_scored_by_the_same_model(rm: Served) -> None:
    other = Other()
    rm.service.traffic = Traffic(canary=other, canary_share=0.5)
    models = []
    for talk in TALKS:
        prompt = talk[0]["content"]
        replies = [
            rm.post("/v1/reward", {"prompt": prompt, "responses": [answer]})["model"]
            for answer in ("Yes.", "No, never.")
        ]
        replies.append(rm.post("/v1/reward", {"messages": talk})["model"])
        assert len(set(replies)) == 1, replies
        models.append(replies[0])
    assert 0.25 < models.count("other") / len(models) < 0.75
    assert len(other.asked) == 3 * models.count("other")


@pytest.mark.parametrize("how", ["together", "each on its own", "as lines"])
def test_a_request_about_several_prompts_is_parted(rm: Served, how: str) -> None:
    other = Other()
    rm.service.traffic = Traffic(canary=other, canary_share=0.5)
    alone = [rm.post("/v1/reward", {"messages": talk}) for talk in TALKS[:20]]
    theirs = [reply["model"] == "other" for reply in alone]
    assert 3 < sum(theirs) < 17, "proves nothing"
    body = {"messages": TALKS[:20], "on_error": "request" if how == "together" else "item"}
    accept = "application/x-ndjson" if how == "as lines" else "application/json"
    response = rm.http.post("/v1/reward", json=body, headers={"accept": accept})
    if how == "as lines":
        rows = sorted(map(json.loads, response.text.splitlines()[:-1]), key=lambda r: r["index"])
    else:
        rows = response.json()["data"]
        revisions = [rm.scorer.info["revision"], "sha256:other"]
        assert response.json()["revision"] == ", ".join(revisions)
        assert response.json()["model"] == "rm"
    found = [row["reward"] for row in rows]
    assert found == pytest.approx([reply["data"][0]["reward"] for reply in alone], abs=1e-5)
    assert [reward == 101.0 for reward in found] == theirs


def test_a_canary_that_hangs_costs_half_of_the_time_and_no_answer(rm: Served) -> None:
    rm.service.traffic = Traffic(canary=Other(hangs=True), canary_share=1.0)
    started = time.monotonic()
    found = rewards(rm, {"messages": TALKS[:2], "timeout_s": 4.0})
    assert time.monotonic() - started < 4
    assert found == pytest.approx(rm.scorer.score(TALKS[:2]), abs=1e-5)


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_another_model_that_hangs_is_waited_for_until_the_deadline(rm: Served, accept: str) -> None:
    rm.service.traffic = Traffic(others={"big": Other(hangs=True)})
    asked = {"messages": TALKS[0], "model": "big", "timeout_s": 0.5}
    status, body = rm.refused("/v1/reward", asked, accept=accept)
    assert status == 504
    assert "deadline" in body["error"]["message"]


def test_a_revision_of_another_model_is_for_it_to_know(rm: Served) -> None:
    other = Other()
    rm.service.traffic = Traffic(others={"big": other})
    assert rewards(rm, {"messages": TALKS[0], "model": "big@sha256:other"}) == [101.0]
    assert [request.model for request in other.asked] == ["big@sha256:other"]


def test_without_a_share_the_canary_is_not_asked(rm: Served) -> None:
    other = Other()
    rm.service.traffic = Traffic(canary=other, canary_share=0.0)
    scorer: Scorer = rm.scorer
    assert rewards(rm, {"messages": TALKS}) == pytest.approx(scorer.score(TALKS), abs=1e-5)
    assert not other.asked


def test_what_the_canary_cannot_answer_is_answered_here(rm: Served) -> None:
    other = Other(OverloadedError("full", status=503))
    rm.service.traffic = Traffic(canary=other, canary_share=1.0)
    for body in ({"messages": TALKS[:3]}, {"messages": TALKS[:3], "on_error": "item"}):
        assert rewards(rm, body) == pytest.approx(rm.scorer.score(TALKS[:3]), abs=1e-5)
    assert len(other.asked) == 2


def test_what_the_canary_refuses_is_refused(rm: Served) -> None:
    refusal = RequestRefusedError("too long for me", status=422, field="messages", code="too_long")
    rm.service.traffic = Traffic(canary=Other(refusal), canary_share=1.0)
    status, body = rm.refused("/v1/reward", {"messages": TALKS[0]})
    assert (status, body["error"]["message"]) == (422, "too long for me")


def test_who_names_a_revision_gets_it(rm: Served) -> None:
    other = Other()
    rm.service.traffic = Traffic(canary=other, canary_share=1.0)
    assert rewards(rm, {"messages": TALKS[0], "model": "rm"}) == [101.0]
    pinned = f"rm@{rm.scorer.info['revision']}"
    expected = pytest.approx(rm.scorer.score(TALKS[:1]), abs=1e-5)
    assert rewards(rm, {"messages": TALKS[0], "model": pinned}) == expected
    assert len(other.asked) == 1


def test_another_model_answers_to_its_name_in_every_dialect(rm: Served) -> None:
    rm.service.traffic = Traffic(others={"big": Other()})
    assert rewards(rm, {"messages": TALKS[0], "model": "big"}) == [101.0]
    reply = rm.post("/classify", {"model": "big", "input": "Hi", "use_activation": False})
    assert reply["data"][0]["probs"] == [101.0]
    lines = rm.http.post(
        "/v1/reward",
        json={"messages": TALKS[:2], "model": "big"},
        headers={"accept": "application/x-ndjson"},
    ).text.splitlines()
    assert [('"reward":101.0' in line) for line in lines] == [True, True, False]
    listed = httpx.get(f"{rm.url}/v1/models").json()["data"]
    assert [row["id"] for row in listed] == ["rm", "big"]
    status, body = rm.refused("/v1/reward", {"messages": TALKS[0], "model": "bigger"})
    assert status == 404
    assert "'rm' is" in body["error"]["message"]
    assert "'big'" in body["error"]["message"]


def test_what_a_running_replica_takes_over_is_named() -> None:
    config = ServeConfig(model="m", canary="new", canary_share=0.1, other_models=["big"])
    assert settings_of(config) == {
        "other_models": ["big"], "canary": "new", "canary_share": 0.1,
    }  # fmt: skip
    off = taken_over(config, {"canary_share": 0.0, "canary": None})
    assert (off.canary, off.canary_share, off.other_models) == (None, 0.0, ["big"])
    with pytest.raises(ConfigError, match="user_config has 'canary_shar'; expected other_models"):
        taken_over(config, {"canary_shar": 0.1})
    with pytest.raises(ConfigError, match="canary_share"):
        taken_over(config, {"canary_share": 1.5})
    assert set(SETTINGS) <= set(ServeConfig.model_fields)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"canary_share": 0.1}, "canary_share=0.1 without a canary"),
        ({"canary": "rm"}, "'rm' is this model itself"),
        ({"other_models": ["a", "rm"]}, "'rm' is this model itself"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ServeConfig(model="m", **settings)  # type: ignore[arg-type]
