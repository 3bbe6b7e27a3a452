"""OpenRLHF's `--remote_rm_url jobs/openrlhf_reward.py`: rewards of a served model.

RAYWARDS_URL says where it is served, RAYWARDS_API_KEY has its key. RAYWARDS_TRUNCATION says what
becomes of a text that is too long: `error` stops the run, which is the default, `left` and `right`
cut it there. The server answers OpenRLHF itself, too: `--remote_rm_url
http://HOST:8000/get_reward`; here is where to mix a reward with others.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from raywards import RewardClient


@cache
def client() -> RewardClient:
    """One for all calls: it keeps its connections open."""
    url = os.environ.get("RAYWARDS_URL", "http://127.0.0.1:8000")
    return RewardClient(url, api_key=os.environ.get("RAYWARDS_API_KEY"))


def reward_func(
    queries: list[str], prompts: list[str], labels: list[Any], **_: Any
) -> dict[str, Any]:
    """Rewards [queries], and their sigmoids for dynamic filtering. A query is the whole text."""
    truncation: Any = os.environ.get("RAYWARDS_TRUNCATION", "error")
    rewards = torch.tensor(client().score_texts(queries, truncation=truncation))
    return {"rewards": rewards, "scores": rewards.sigmoid(), "extra_logs": {"reward": rewards}}
