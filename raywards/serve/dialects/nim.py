"""NVIDIA NIM's reward models: `POST /v1/chat/completions`, asked as one asks a chat model.

The last message is the assistant's answer, and the completion is its reward: as text in
`message.content`, and as a number in `logprobs`, where NeMo-Curator and CAMEL read it.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raywards.schemas import Message, ReplyModel, Some, Strict, finding
from raywards.serve.dialects import Call, Core, Reply, Route, ScoringRequest, errors
from raywards.serve.dialects.bodies import ModelName, No, One, conversation_of, read, refuse_query

# Settings of a generation, which a reward model does not do.
IGNORED = frozenset(
    {
        "frequency_penalty",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "presence_penalty",
        "seed",
        "stop",
        "temperature",
        "top_logprobs",
        "top_p",
        "user",
    }
)
NOT_BUILT = {
    "tools": "send them to /v1/reward",
    "tool_choice": "nothing is generated",
    "response_format": "nothing is generated",
    "functions": "nothing is generated",
}


# For the schema, which cannot say who has to speak last.
_ANSWERED = [
    {"role": "user", "content": "Is 91 prime?"},
    {"role": "assistant", "content": "No: 7 x 13."},
]


class ChatCompletionRequest(Strict):
    """Body of `POST /v1/chat/completions`: one conversation that ends with the answer to score."""

    messages: Annotated[Some[Message], Field(examples=[_ANSWERED])]
    """The conversation; its last message is the assistant's."""
    model: ModelName | None = None
    """Name of the served model. Default: whichever is served."""
    n: One = 1
    """A conversation has one reward."""
    stream: No = False
    """The reply comes in one piece."""

    @model_validator(mode="after")
    def _is_answered(self) -> ChatCompletionRequest:
        last = self.messages[-1].role
        if last != "assistant":
            raise finding(
                f"messages[{len(self.messages) - 1}].role",
                f"expected 'assistant', got '{last}': the last message is the answer to score",
            )
        return self


class RewardToken(ReplyModel):
    """The reward, where a generated token would stand."""

    token: str
    """`reward`."""
    logprob: float
    """The raw reward."""
    bytes: list[int] | None = None
    """Always null."""
    top_logprobs: list[Any] = Field(default_factory=list)
    """Always empty."""


class RewardTokens(ReplyModel):
    """One of them."""

    content: list[RewardToken]
    """The reward."""


class CompletionMessage(ReplyModel):
    """The reward as text."""

    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: str
    """`reward:1.25`."""


class Choice(ReplyModel):
    """The only one."""

    index: int
    """0."""
    message: CompletionMessage
    """The reward as text."""
    logprobs: RewardTokens
    """The reward as a number."""
    finish_reason: Literal["stop"] = "stop"
    """Always `stop`."""


class CompletionUsage(ReplyModel):
    """Tokens of the request."""

    prompt_tokens: int
    """Tokens scored."""
    completion_tokens: int
    """None is generated."""
    total_tokens: int
    """The tokens scored."""


class ChatCompletionResponse(ReplyModel):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    """Name of this reply."""
    object: Literal["chat.completion"] = "chat.completion"
    """Always `chat.completion`."""
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the served model."""
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    """One."""
    usage: CompletionUsage
    """Tokens of the request."""


async def chat_completions(call: Call, core: Core) -> Reply:
    """The reward of the conversation, in the shape of a completion."""
    refuse_query(call)
    request = read(ChatCompletionRequest, call.body, ignored=IGNORED, not_built=NOT_BUILT)
    item = conversation_of(request.messages, None)
    result = await core.score(ScoringRequest(items=[item], model=request.model))
    [reward] = result.rewards
    token = {"token": "reward", "logprob": reward, "bytes": None, "top_logprobs": []}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": f"reward:{reward!r}"},
        "logprobs": {"content": [token]},
        "finish_reason": "stop",
    }
    tokens = result.num_tokens
    return Reply(
        {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": result.model,
            "choices": [choice],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }
    )


ROUTES = (
    Route(
        "/v1/chat/completions",
        ChatCompletionRequest,
        ChatCompletionResponse,
        chat_completions,
        errors.busy_is_429(errors.native),
    ),
)
