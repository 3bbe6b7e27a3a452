"""slime's `--rm-url`: `POST /remote_rm`, one sample a request; the body of the reply is the reward.

A `prompt` of messages is rendered with the model's chat template, the response as the assistant's
answer. A `prompt` of text has been rendered by the trainer: the response is put behind it as it is.
`?dict=1` in the URL gives `{"reward": ...}` for `--reward-key reward`.

Fields of THUDM/slime, slime/rollout/rm_hub, as of August 2026.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from raywards.schemas import Message, Some, Strict, Text
from raywards.schemas import Rendered as RenderedText
from raywards.serve.dialects import (
    Call,
    Core,
    Item,
    Rendered,
    Reply,
    Response,
    Route,
    ScoringRequest,
    errors,
)
from raywards.serve.dialects.bodies import plain, read, read_query


def _kind(value: Any) -> str:
    return "|messages" if isinstance(value, list) else "|text"


class RemoteRmRequest(Strict):
    """Body of `POST /remote_rm`."""

    prompt: Annotated[
        Annotated[RenderedText, Tag("|text")] | Annotated[Some[Message], Tag("|messages")],
        Discriminator(_kind),
    ]
    """Rendered text, or messages."""
    response: Text
    """What the policy answered; it may have ended at once."""
    label: Any = None
    """For rule-based rewards; a reward model has no use for it."""


class RemoteRmQuery(Strict):
    """What may stand behind `?` in `--rm-url`."""

    truncation: Literal["error", "left", "right"] = "error"
    """What happens to a sequence that is too long."""
    as_dict: Annotated[Literal["0", "1"], Field(alias="dict")] = "0"
    """`1`: an object with `reward` instead of the bare number."""


async def remote_rm(call: Call, core: Core) -> Reply:
    """The reward, as a bare number."""
    request = read(RemoteRmRequest, call.body)
    options = read_query(RemoteRmQuery, call.query)
    item: Item
    if isinstance(request.prompt, str):
        item = Rendered("response", request.prompt + request.response)
    else:
        item = Response("response", plain(request.prompt), request.response)
    result = await core.score(ScoringRequest(items=[item], truncation=options.truncation))
    [reward] = result.rewards
    return Reply({"reward": reward} if options.as_dict == "1" else reward)


ROUTES = (
    Route(
        "/remote_rm",
        RemoteRmRequest,
        float | dict[str, float],
        remote_rm,
        errors.native,
        query=RemoteRmQuery,
    ),
)
