"""OpenRLHF's `--remote_rm_url`: `POST /get_reward`, a text or a list of them in `query`.

The texts are what the trainer decoded, special tokens included: none is added. A text that is too
long is refused, since a reward of half a response is none; `?truncation=right` in the URL cuts it
as OpenRLHF's `serve_rm` does. `?scores=sigmoid` maps `scores`, which its dynamic filtering expects
between 0 and 1.

Fields of OpenRLHF/OpenRLHF, openrlhf/trainer/ray and openrlhf/cli/serve_rm.py, as of August 2026.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Tag

from raywards.schemas import Rendered as RenderedText
from raywards.schemas import ReplyModel, Some, Strict
from raywards.serve.dialects import Call, Core, Reply, Route, ScoringRequest, errors, sigmoid
from raywards.serve.dialects.bodies import items_of, read, read_query


def _kind(value: Any) -> str:
    return "|many" if isinstance(value, list) else "|one"


class GetRewardRequest(Strict):
    """Body of `POST /get_reward`. Other keys (`prompts`, `labels`, ...) are for rewards by rule:
    `serve_rm` reads none of them, and neither do we."""

    model_config = ConfigDict(extra="ignore")

    query: Annotated[
        Annotated[RenderedText, Tag("|one")] | Annotated[Some[RenderedText], Tag("|many")],
        Discriminator(_kind),
    ]
    """Prompts with their responses, as the trainer decoded them."""


class GetRewardQuery(Strict):
    """What may stand behind `?` in `--remote_rm_url`."""

    truncation: Literal["error", "left", "right"] = "error"
    """What happens to a text that is too long."""
    scores: Literal["raw", "sigmoid"] = "raw"
    """What `scores` is."""


class GetRewardResponse(ReplyModel):
    """Reply of `POST /get_reward`: lists as long as `query`."""

    rewards: list[float]
    """Raw rewards."""
    scores: list[float]
    """The same, or their sigmoids."""
    extra_logs: dict[str, list[float]]
    """Lengths in tokens: OpenRLHF logs their mean."""


async def get_reward(call: Call, core: Core) -> Reply:
    """The reward of each text."""
    request = read(GetRewardRequest, call.body)
    options = read_query(GetRewardQuery, call.query)
    items = items_of("query", request.query)
    result = await core.score(ScoringRequest(items=items, truncation=options.truncation))
    rewards = result.rewards
    return Reply(
        {
            "rewards": rewards,
            "scores": [sigmoid(r) for r in rewards] if options.scores == "sigmoid" else rewards,
            "extra_logs": {"reward_num_tokens": [float(i.num_tokens or 0) for i in result.items]},
        }
    )


ROUTES = (
    Route(
        "/get_reward",
        GetRewardRequest,
        GetRewardResponse,
        get_reward,
        errors.native,
        query=GetRewardQuery,
    ),
)
