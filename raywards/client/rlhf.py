"""What RLHF trainers hand to a reward function, as conversations and pairs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from raywards.errors import ConfigError, ConversationError

OnError = Literal["raise", "none"]
Conversation = list[Mapping[str, Any]]
Pair = tuple[Any, str]


def of_trl(prompts: Sequence[Any], completions: Sequence[Any]) -> list[Conversation] | list[Pair]:
    """What TRL's trainers call a reward function with, one entry a completion.

    Conversations where completions are messages, else pairs of prompt and answer. Raises
    `ConversationError`.
    """
    if len(prompts) != len(completions):
        raise ConversationError(
            f"{len(prompts)} prompts and {len(completions)} completions; expected as many",
            reason="malformed",
        )
    if all(isinstance(completion, str) for completion in completions):
        return list(zip(prompts, completions, strict=True))
    found: list[Conversation] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(completion, str) or not isinstance(completion, Sequence):
            raise ConversationError(
                f"completions[{index}]: expected a list of messages, as the first of them is",
                reason="not_messages",
            )
        if not isinstance(prompt, str | Sequence):
            raise ConversationError(
                f"prompts[{index}]: expected text or a list of messages", reason="not_messages"
            )
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        found.append([*turns, *completion])
    return found


def of_verl(
    prompt: str | Callable[[Mapping[str, Any]], Any],
    solution: str,
    extra_info: Mapping[str, Any] | None,
) -> Pair:
    """A solution with its prompt, which verl passes in `extra_info` alone.

    `prompt` is the key it stands under, or a function that finds it. Raises `ConfigError`.
    """
    given = extra_info or {}
    if callable(prompt):
        return prompt(given), solution
    if prompt not in given:
        raise ConfigError(
            f"extra_info has no {prompt!r} (it has {', '.join(map(str, given)) or 'nothing'}), so "
            "there is no prompt to score the solution with. Keep the prompt in the rows' "
            "extra_info, or say where it is: as_verl_compute_score(prompt=...)."
        )
    return given[prompt], solution


def of_on_error(on_error: str) -> dict[str, str]:
    """The fields of a request for it. Raises `ConfigError`."""
    fields = {"raise": {}, "none": {"on_error": "item"}}
    if on_error not in fields:
        raise ConfigError(f"on_error={on_error!r}: expected 'raise' or 'none'")
    return fields[on_error]
