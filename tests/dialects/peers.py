"""How OpenRLHF, verl and slime ask for a reward, rebuilt from what their documents and sources do.

OpenRLHF: `SingleTurnAgentExecutor` of openrlhf/utils/agent.py. verl: `RewardLoopWorker` of
verl/experimental/reward_loop/reward_loop.py. slime: `remote_rm` of slime/rollout/rm_hub. All as of
2026. A new connection a request, one sample in it, and what each of them takes for an answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import torch

OPENRLHF_TRIES = 5
OPENRLHF_TIMEOUT_S = 180
VERL_TRIES = 16


class OpenRLHF:
    """`--remote_rm_url`: an address, several of them, or a file with `reward_func`."""

    def __init__(self, *remote_rm_url: str, pause_s: float = 1.0) -> None:
        self.addresses = remote_rm_url
        self.pause_s = pause_s
        self.tries = 0
        self.reward_func: Callable[..., Any] | None = None
        if remote_rm_url[0].endswith(".py"):
            self.reward_func = load_python(Path(remote_rm_url[0])).reward_func

    async def execute(self, tokenizer: Any, ids: list[int], prompt: str, label: Any) -> Any:
        """What an experience has of its sample: `reward` stays None where there is none."""
        found = {"reward": None, "scores": None, "extra_logs": {}}
        try:
            query = tokenizer.decode(ids, skip_special_tokens=False)
            if self.reward_func is not None:
                info = await asyncio.to_thread(self.reward_func, [query], [prompt], [label])
            else:
                body = {"query": [query], "prompts": [prompt], "labels": [label]}
                info = await self._post(self.addresses[0], body)
            found["reward"] = info.get("rewards")
            found["scores"] = info.get("scores") or info.get("rewards")
            found["extra_logs"] = info.get("extra_logs") or {}
        except Exception:  # logged there, and the training goes on
            return found
        return found

    async def _post(self, url: str, body: Mapping[str, Any]) -> Any:
        timeout = aiohttp.ClientTimeout(total=OPENRLHF_TIMEOUT_S)
        for _ in range(OPENRLHF_TRIES):
            self.tries += 1
            try:
                async with (
                    aiohttp.ClientSession(timeout=timeout) as session,
                    session.post(url, json=body) as response,
                ):
                    response.raise_for_status()
                    return await response.json()
            except Exception:
                await asyncio.sleep(self.pause_s)
        raise RuntimeError("no reward after five tries")


def as_openrlhf_reads(info: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Rewards and scores as its trainer makes tensors of them, and what it would log."""
    rewards = torch.tensor(info["reward"], dtype=torch.float32)
    scores = torch.tensor(info["scores"], dtype=torch.float32)
    logs = [float(torch.as_tensor(values).float().mean()) for values in info["extra_logs"].values()]
    return rewards, scores, logs


class Verl:
    """The discriminative reward model behind a router: `engine` is `vllm` or `sglang`."""

    def __init__(self, router: str, model: str, engine: str, *, first_pause_s: float = 1.0) -> None:
        self.router, self.model, self.engine = router, model, engine
        self.first_pause_s = first_pause_s
        self.tries = 0

    async def compute_score(
        self,
        policy_tokenizer: Any,
        reward_tokenizer: Any,
        raw_prompt: list[dict[str, Any]],
        response_ids: list[int],
        *,
        old_name: bool = False,
    ) -> float:
        """Of one sample. `old_name`: as verl before it followed vLLM 0.11.2."""
        text = self.prompt(policy_tokenizer, reward_tokenizer, raw_prompt, response_ids)
        if self.engine == "vllm":
            switch = "activation" if old_name else "use_activation"
            body = {"model": self.model, "input": text, switch: False}
            reply = await self._post("classify", body)
            return float(reply["data"][-1]["probs"][-1])
        reply = await self._post("v1/embeddings", {"model": self.model, "input": text})
        return float(reply["data"][-1]["embedding"][-1])

    @staticmethod
    def prompt(
        policy_tokenizer: Any,
        reward_tokenizer: Any,
        raw_prompt: list[dict[str, Any]],
        response_ids: list[int],
    ) -> str:
        """The response without any EOS, in the reward model's template without its BOS."""
        response = policy_tokenizer.decode(response_ids).replace(policy_tokenizer.eos_token, "")
        talk = [*raw_prompt, {"role": "assistant", "content": response}]
        text: str = reward_tokenizer.apply_chat_template(
            talk, add_generation_prompt=False, tokenize=False
        )
        bos = reward_tokenizer.bos_token
        return text.removeprefix(bos) if bos is not None else text

    async def _post(self, endpoint: str, body: Mapping[str, Any]) -> Any:
        failed: Exception | None = None
        for attempt in range(VERL_TRIES):
            self.tries += 1
            try:
                timeout = aiohttp.ClientTimeout(total=None)
                async with (
                    aiohttp.ClientSession(timeout=timeout) as session,
                    session.post(f"{self.router}/{endpoint}", json=body) as response,
                ):
                    response.raise_for_status()
                    return await response.json()
            except aiohttp.ClientResponseError as error:
                if 400 <= error.status < 500:
                    raise
                failed = error
            except (TimeoutError, aiohttp.ClientError) as error:
                failed = error
            await asyncio.sleep(min(self.first_pause_s * 2**attempt, 30))
        assert failed is not None
        raise failed


class Slime:
    """`--rm-type remote_rm --rm-url URL`: connections are kept, at most 64 of them."""

    def __init__(self, rm_url: str) -> None:
        self.rm_url = rm_url

    async def rewards(self, samples: list[Mapping[str, Any]]) -> list[Any]:
        connector = aiohttp.TCPConnector(limit=64)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def one(sample: Mapping[str, Any]) -> Any:
                async with session.post(self.rm_url, json=dict(sample)) as response:
                    response.raise_for_status()
                    return await response.json()

            return await asyncio.gather(*(one(sample) for sample in samples))


def load_python(file: Path) -> Any:
    """A file as both trainers load the user's."""
    spec = importlib.util.spec_from_file_location("user_reward", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
