"""RLHF trainers that ask over HTTP: OpenRLHF, verl and slime, sixty-four samples at once.

Their request code is that of peers.py. The rewards are those of the Scorer for the conversation
that the policy had, special tokens and all.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gates import KEY, Gate, filled
from peers import OpenRLHF, Slime, Verl, as_openrlhf_reads, load_python
from served import Served
from talks import ANSWERS, QUESTION, TALKS

from raywards import RewardClient
from raywards.errors import ConfigError, RequestRefusedError

JOBS = Path(__file__).parents[2] / "jobs"
AT_ONCE = 64

Talk = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer(rm: Served) -> Any:
    return rm.scorer._rendering.tokenizer


@pytest.fixture(scope="module")
def rollouts() -> list[Talk]:
    """Sixty-four: sixteen answers to each of four prompts."""
    prompts = [QUESTION, "Tell me a joke.", "How do I sort a list?", "Is the weather good?"]
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"{answer} {n}"}]
        for prompt in prompts
        for n in range(AT_ONCE // len(prompts))
        for answer in [ANSWERS[n % 3]]
    ]


@pytest.fixture(scope="module")
def expected(rm: Served, rollouts: list[Talk]) -> list[float]:
    found = rm.scorer.score(rollouts)
    assert len(found) == AT_ONCE
    assert len({round(reward, 5) for reward in found}) > AT_ONCE / 2
    return found


def answer_ids(tokenizer: Any, talk: Talk) -> list[int]:
    """What the policy generated: the answer, and the EOS that ended it."""
    ids = tokenizer(talk[-1]["content"], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def rollout_ids(tokenizer: Any, talk: Talk) -> list[int]:
    """Prompt and answer; templates put a newline behind the last EOS, and policies do not."""
    ids: list[int] = tokenizer.apply_chat_template(talk, return_dict=False)
    return ids


async def ask_openrlhf(trainer: OpenRLHF, tokenizer: Any, talks: list[Talk]) -> list[Any]:
    return await asyncio.gather(
        *(
            trainer.execute(tokenizer, rollout_ids(tokenizer, talk), talk[0]["content"], None)
            for talk in talks
        )
    )


def test_openrlhf_gets_its_rewards(
    rm: Served, tokenizer: Any, rollouts: list[Talk], expected: list[float]
) -> None:
    trainer = OpenRLHF(f"{rm.url}/get_reward")
    found = asyncio.run(ask_openrlhf(trainer, tokenizer, rollouts))
    assert trainer.tries == AT_ONCE
    for info, reward in zip(found, expected, strict=True):
        rewards, scores, logs = as_openrlhf_reads(info)
        assert rewards.tolist() == scores.tolist() == pytest.approx([reward], abs=1e-5)
        assert len(logs) == 1
        assert logs[0] > 10


def test_openrlhf_of_2025_sends_many_at_once_and_reads_them_in_order(
    rm: Served, rendered: list[str], rewards: list[float]
) -> None:
    reply = rm.post("/get_reward", {"query": rendered})
    assert reply["rewards"] == pytest.approx(rewards, abs=1e-5)
    many = rm.post("/get_reward", {"query": [rendered[1]] * 3, "prompts": ["a"] * 3})
    assert len(set(many["rewards"])) == 1
    one = rm.post("/get_reward", {"query": rendered[0]})
    assert {name: len(one[name]) for name in ("rewards", "scores")} == {"rewards": 1, "scores": 1}


def test_openrlhfs_scores_are_between_0_and_1_where_the_address_says_so(
    rm: Served, tokenizer: Any, expected: list[float], rollouts: list[Talk]
) -> None:
    trainer = OpenRLHF(f"{rm.url}/get_reward?scores=sigmoid")
    [info] = asyncio.run(ask_openrlhf(trainer, tokenizer, rollouts[:1]))
    rewards, scores, _ = as_openrlhf_reads(info)
    assert rewards.item() == pytest.approx(expected[0], abs=1e-5)
    assert scores.item() == pytest.approx(rewards.sigmoid().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("query", "code"),
    [("", "invalid_value"), ([], "invalid_value"), ([3], "invalid_value"), (None, "missing_field")],
)
def test_openrlhfs_queries_are_texts(query: Any, code: str, rm: Served) -> None:
    status, reply = rm.refused("/get_reward", {"query": query, "prompts": [], "labels": []})
    assert (status, reply["error"]["code"]) == (422, code)
    assert reply["error"]["param"].startswith("query")


def test_openrlhfs_long_text_is_refused_unless_it_may_be_cut(rm: Served) -> None:
    long = {"query": ["Good. " * 600]}
    assert rm.refused("/get_reward", long)[1]["error"]["code"] == "too_long"
    [tokens] = rm.post("/get_reward?truncation=right", long)["extra_logs"]["reward_num_tokens"]
    assert tokens == 512
    assert rm.refused("/get_reward?truncate=right", long)[0] == 422


def test_openrlhf_waits_for_a_server_that_is_full(
    small: Gate, tokenizer: Any, rollouts: list[Talk], expected: list[float]
) -> None:
    trainer = OpenRLHF(f"{small.server.url}/get_reward", pause_s=0.1)
    with filled(small):
        threading.Timer(0.25, small.open).start()
        [info] = asyncio.run(ask_openrlhf(trainer, tokenizer, rollouts[:1]))
    assert 1 < trainer.tries < 5
    assert info["reward"] == pytest.approx(expected[:1], abs=1e-5)


def test_openrlhf_calls_our_file(
    guarded: Served,
    tokenizer: Any,
    rollouts: list[Talk],
    expected: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYWARDS_URL", guarded.url)
    monkeypatch.setenv("RAYWARDS_API_KEY", KEY)
    trainer = OpenRLHF(str(JOBS / "openrlhf_reward.py"))
    found = asyncio.run(ask_openrlhf(trainer, tokenizer, rollouts[:8]))
    assert trainer.reward_func is not None
    for info, reward in zip(found, expected[:8], strict=True):
        assert info["reward"].tolist() == pytest.approx([reward], abs=1e-5)
        assert info["scores"].tolist() == pytest.approx(info["reward"].sigmoid().tolist())
        assert info["extra_logs"]["reward"].tolist() == info["reward"].tolist()


def test_our_file_cuts_a_long_rollout_where_that_is_asked_for(
    rm: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYWARDS_URL", rm.url)
    queries = ["Fine. ", "Good. " * 600]
    reward_func = load_python(JOBS / "openrlhf_reward.py").reward_func
    with pytest.raises(RequestRefusedError, match=r"input\[1\]"):
        reward_func(queries, queries, [None, None])
    monkeypatch.setenv("RAYWARDS_TRUNCATION", "right")
    found = reward_func(queries, queries, [None, None])
    cut = rm.scorer.score_ids([rm.scorer.encode_rendered(queries[1], truncation="right")])
    assert found["rewards"][1].item() == pytest.approx(cut[0], abs=1e-5)
    monkeypatch.setenv("RAYWARDS_TRUNCATION", "middle")
    with pytest.raises(ConfigError, match="truncation"):
        reward_func(queries, queries, [None, None])


@pytest.mark.parametrize(
    ("engine", "old_name"), [("vllm", False), ("vllm", True), ("sglang", False)]
)
def test_verl_gets_its_rewards(
    engine: str,
    old_name: bool,
    classifier: Served,
    tokenizer: Any,
    rollouts: list[Talk],
    expected: list[float],
) -> None:
    """From a model without a word of regression, too: it asks for no activation, by either name."""
    trainer = Verl(classifier.url, "rm", engine)

    async def all_of_them() -> list[float]:
        return await asyncio.gather(
            *(
                trainer.compute_score(
                    tokenizer, tokenizer, talk[:-1], answer_ids(tokenizer, talk), old_name=old_name
                )
                for talk in rollouts
            )
        )

    assert asyncio.run(all_of_them()) == pytest.approx(expected, abs=1e-5)
    assert trainer.tries == AT_ONCE


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verl_waits_for_a_server_that_is_full(
    engine: str, small: Gate, tokenizer: Any, rollouts: list[Talk], expected: list[float]
) -> None:
    """On 429 it would give up at once: it must be told 503."""
    trainer = Verl(small.server.url, "rm", engine, first_pause_s=0.05)
    talk = rollouts[0]
    with filled(small):
        threading.Timer(0.25, small.open).start()
        found = asyncio.run(
            trainer.compute_score(tokenizer, tokenizer, talk[:-1], answer_ids(tokenizer, talk))
        )
    assert trainer.tries > 1
    assert found == pytest.approx(expected[0], abs=1e-5)


def test_verl_gives_up_at_once_on_what_is_wrong(
    rm: Served, tokenizer: Any, rollouts: list[Talk]
) -> None:
    trainer = Verl(rm.url, "/models/another", "vllm")
    talk = rollouts[0]
    with pytest.raises(aiohttp.ClientResponseError) as refused:
        asyncio.run(
            trainer.compute_score(tokenizer, tokenizer, talk[:-1], answer_ids(tokenizer, talk))
        )
    assert refused.value.status == 404
    assert trainer.tries == 1


def test_verl_loads_our_function_from_a_file(
    rm: Served, tmp_path: Path, rewards: list[float]
) -> None:
    """`custom_reward_function.path` and `.name`; called with keywords, as its managers do."""
    file = tmp_path / "reward.py"
    file.write_text(
        "from raywards import RewardClient\n\n"
        f'compute_score = RewardClient("{rm.url}").as_verl_compute_score(prompt="prompt")\n'
    )
    compute_score = load_python(file).compute_score
    for talk, answer, expected in zip(TALKS, ANSWERS, rewards, strict=True):
        found = compute_score(
            data_source="any",
            solution_str=answer,
            ground_truth=None,
            extra_info={"prompt": talk[:1], "index": 3},
            reward_router_address=None,
            reward_model_tokenizer=None,
        )
        assert type(found) is float
        assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="as_verl_compute_score"):
        compute_score("any", "answer", None, {"index": 3})
    with RewardClient(rm.url) as client:
        by_text = client.as_verl_compute_score(prompt=lambda info: info["q"])
        assert by_text("any", ANSWERS[0], None, {"q": QUESTION}) == pytest.approx(
            rewards[0], abs=1e-5
        )


def test_slime_gets_its_rewards(rm: Served, rollouts: list[Talk], expected: list[float]) -> None:
    samples = [
        {"prompt": talk[:-1], "response": talk[-1]["content"], "label": None} for talk in rollouts
    ]
    found = asyncio.run(Slime(f"{rm.url}/remote_rm").rewards(list(samples)))
    assert found == pytest.approx(expected, abs=1e-5)
    keyed = asyncio.run(Slime(f"{rm.url}/remote_rm?dict=1").rewards(list(samples[:2])))
    assert [entry["reward"] for entry in keyed] == pytest.approx(expected[:2], abs=1e-5)
