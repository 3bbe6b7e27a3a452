"""TRL's GRPO calls our reward functions itself, and logs the rewards that the Scorer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from served import Served
from tiny import tiny_qwen2

from raywards import AsyncRewardClient, RewardClient

pytestmark = pytest.mark.trains

QUESTIONS = ["What is the capital of France?", "Tell me a joke.", "Is it cold?", "Sort a list."]
STEPS = 2


def trained(
    folder: Path, out: Path, reward_func: Any, prompts: list[Any]
) -> tuple[list[dict[str, Any]], list[tuple[Any, Any]]]:
    """The log of two steps of GRPO on a tiny policy, and what each step asked rewards for."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    asked: list[tuple[Any, Any]] = []

    def seen(prompts: Any, completions: Any, **_: Any) -> list[float]:
        asked.append((list(prompts), list(completions)))
        return [0.0] * len(prompts)

    trainer = trl.GRPOTrainer(
        model=str(tiny_qwen2(folder, num_labels=None)),
        reward_funcs=[reward_func, seen],
        args=trl.GRPOConfig(
            output_dir=str(out),
            reward_weights=[1.0, 0.0],
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            max_steps=STEPS,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            report_to="none",
            save_strategy="no",
            seed=7,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    trainer.train()
    return trainer.state.log_history, asked


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
def test_grpo_logs_the_rewards_of_the_scorer(kind: Any, rm: Served, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    reward_func = kind(rm.url).as_trl_reward_func(name="served")
    log, asked = trained(tmp_path / "policy", tmp_path / "out", reward_func, prompts)
    assert len(asked) == STEPS
    means = [entry["rewards/served/mean"] for entry in log if "rewards/served/mean" in entry]
    spreads = [entry["rewards/served/std"] for entry in log if "rewards/served/std" in entry]
    assert len(means) == STEPS
    assert all(spread > 1e-4 for spread in spreads), "all the same: proves nothing"
    for mean, (prompts_of_step, completions) in zip(means, asked, strict=True):
        talks = [
            prompt + answer for prompt, answer in zip(prompts_of_step, completions, strict=True)
        ]
        assert len(talks) == 4
        rewards = rm.scorer.score(talks)
        assert mean == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
