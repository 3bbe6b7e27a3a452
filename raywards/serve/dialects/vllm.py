"""vLLM's pooling routes: `/classify`, `/pooling`, `/score`. verl's vLLM path calls the first.

As there, a score is the sigmoid of the reward unless the model's config says regression (as our
exports do), or the request `use_activation: false`. Unlike there, a text that opens with BOS does
not get a second one, `/score` renders its two texts as a prompt and a response of the conversation
that the model was trained on, and what is not honoured is refused.

Fields of vllm-project/vllm, vllm/entrypoints/pooling, as of mid-2026.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from raywards.schemas import (
    Message,
    ReplyModel,
    Some,
    Strict,
    TemplateVariables,
    Text,
    finding,
    refused,
)
from raywards.serve.dialects import (
    Call,
    Core,
    Item,
    Reply,
    Response,
    Route,
    ScoringRequest,
    ScoringResult,
    errors,
    sigmoid,
)
from raywards.serve.dialects.bodies import (
    Input,
    ModelName,
    No,
    Prompts,
    Responses,
    Zero,
    conversation_of,
    items_of,
    read,
    refuse_query,
    vector_of_one,
)

# vLLM does nothing with `user`; we keep no cache between requests that a salt could part, and pad
# no row that a request could ask to.
IGNORED = frozenset({"user", "cache_salt", "padding"})
NOT_BUILT = {
    "chat_template": "conversations are rendered with the model's own template",
    "media_io_kwargs": "text alone is scored",
    "mm_processor_kwargs": "text alone is scored",
    "normalize": "it is called `use_activation`",
    "rid": "it is called `request_id`",
    "max_tokens_per_query": "texts are not cut one by one",
    "max_tokens_per_doc": "texts are not cut one by one",
    "instruction": "put it into the prompt",
    "dimensions": "a reward has one dimension",
    "embed_dtype": "rewards are JSON numbers",
    "endianness": "rewards are JSON numbers",
}
# What `use_activation` was called before vLLM 0.11.2: ignored there today, honoured here.
_OLD_NAMES = ("activation", "softmax")


class PoolingOptions(Strict):
    """What all of vLLM's pooling routes take."""

    model: ModelName | None = None
    """Name of the served model. Default: whichever is served."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Longest sequence in tokens, beyond which it is cut; -1: the model's own. Default: refused."""
    truncation_side: Literal["left", "right"] = "right"
    """Where it is cut: `left` keeps the last tokens, `right` the first."""
    request_id: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    """Stands in the reply's `id`, unless the header `X-Request-Id` does."""
    priority: Zero = 0
    """Requests are served oldest first."""
    use_activation: bool = True
    """False: the raw reward. True: the sigmoid of it, unless the model's config says regression."""

    @model_validator(mode="after")
    def _cuts_to_something(self) -> PoolingOptions:
        if self.truncate_prompt_tokens == 0:
            raise finding("truncate_prompt_tokens", "0 tokens have no reward; -1 or at least 1")
        return self


Asked = TypeVar("Asked", bound=PoolingOptions)


class ClassifyRequest(PoolingOptions):
    """Body of `POST /classify`: `input`, or one conversation as `messages`."""

    input: Input | None = None
    """Rendered text or token ids, or a list of either."""
    messages: Some[Message] | None = None
    """One conversation, rendered with the model's chat template."""
    add_special_tokens: bool | None = None
    """Open and close texts as the tokenizer does. Default: for `input`, and never a second BOS."""
    add_generation_prompt: No = False
    """A conversation to score has been answered."""
    continue_final_message: No = False
    """A conversation to score is closed."""
    chat_template_kwargs: TemplateVariables | None = None
    """Variables for the model's chat template. Only with `messages`."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            seen = "neither" if self.input is None else "both"
            raise finding(None, f"expected either `input` or `messages`, got {seen}")
        if self.messages is not None and self.add_special_tokens:
            raise finding(
                "add_special_tokens", "the chat template has its own; leave it out with `messages`"
            )
        if self.input is not None and self.chat_template_kwargs is not None:
            raise finding("chat_template_kwargs", "has no effect on `input`; leave it out")
        return self


class PoolingRequest(ClassifyRequest):
    """Body of `POST /pooling`: as `/classify`."""

    task: Literal["classify"] = "classify"
    """A reward model classifies."""
    encoding_format: Literal["float", "base64"] = "float"
    """JSON numbers, or base64 of the vector's float32s."""


class ScoreRequest(PoolingOptions):
    """Body of `POST /score`: prompts and responses, 1 to N or N to N, in one of four spellings."""

    text_1: Prompts | None = None
    """Prompts."""
    text_2: Responses | None = None
    """Responses."""
    queries: Prompts | None = None
    """Prompts."""
    documents: Responses | None = None
    """Responses."""
    items: Responses | None = None
    """Responses."""
    data_1: Prompts | None = None
    """Prompts."""
    data_2: Responses | None = None
    """Responses."""

    @model_validator(mode="after")
    def _one_spelling(self) -> ScoreRequest:
        self.sides()
        return self

    def sides(self) -> tuple[str, Prompts, str, Responses]:
        """Name and value of the prompts and of the responses."""
        given = [name for name in _SIDES if getattr(self, name) is not None]
        for left, right in _SPELLINGS:
            if sorted(given) == sorted((left, right)):
                return left, getattr(self, left), right, getattr(self, right)
        told = ", ".join(f"`{left}` with `{right}`" for left, right in _SPELLINGS)
        raise finding(None, f"expected one of {told}; got {' and '.join(given) or 'none'}")


_SPELLINGS = (
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
    ("text_1", "text_2"),
)
_SIDES = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")


class PoolingUsage(ReplyModel):
    """Tokens of the request."""

    prompt_tokens: int
    """Tokens scored."""
    total_tokens: int
    """The same."""
    completion_tokens: int = 0
    """Nothing is generated."""
    prompt_tokens_details: None = None
    """Always null."""
    completion_tokens_details: None = None
    """Always null."""


class Classified(ReplyModel):
    """One sequence."""

    index: int
    """Position in the request."""
    label: str
    """What the model's config calls its one label."""
    probs: list[float]
    """The score."""
    num_classes: int = 1
    """One."""


class Pooled(ReplyModel):
    """One sequence."""

    index: int
    """Position in the request."""
    object: Literal["pooling"] = "pooling"
    """Always `pooling`."""
    data: list[float] | str
    """The score, or base64 of it."""


class PairScore(ReplyModel):
    """One pair of texts."""

    index: int
    """Position in the request."""
    object: Literal["score"] = "score"
    """Always `score`."""
    score: float
    """The score."""


class _Envelope(ReplyModel):
    id: str
    """Name of this reply."""
    object: Literal["list"] = "list"
    """Always `list`."""
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the served model."""
    usage: PoolingUsage
    """Tokens of the request."""


class ClassifyResponse(_Envelope):
    """Reply of `POST /classify`."""

    data: list[Classified]
    """One per sequence."""


class PoolingResponse(_Envelope):
    """Reply of `POST /pooling`."""

    data: list[Pooled]
    """One per sequence."""


class ScoreResponse(_Envelope):
    """Reply of `POST /score`."""

    data: list[PairScore]
    """One per pair."""


async def classify(call: Call, core: Core) -> Reply:
    """The label of each sequence with its score."""
    request = _read(ClassifyRequest, call)
    result = await core.score(scoring(request, _items(request)))
    scores = activated(result, on=request.use_activation)
    data = [
        {"index": i, "label": result.label, "probs": [score], "num_classes": 1}
        for i, score in enumerate(scores)
    ]
    return Reply(_envelope("classify", call, request, result, data))


async def pooling(call: Call, core: Core) -> Reply:
    """The score of each sequence as a vector of one."""
    request = _read(PoolingRequest, call)
    result = await core.score(scoring(request, _items(request)))
    scores = activated(result, on=request.use_activation)
    data = [
        {"index": i, "object": "pooling", "data": vector_of_one(score, request.encoding_format)}
        for i, score in enumerate(scores)
    ]
    return Reply(_envelope("pooling", call, request, result, data))


async def score(call: Call, core: Core) -> Reply:
    """The score of each response to its prompt."""
    request = _read(ScoreRequest, call)
    left, prompts, right, responses = request.sides()
    result = await core.score(scoring(request, _pairs(left, prompts, right, responses)))
    scores = activated(result, on=request.use_activation)
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    return Reply(_envelope("score", call, request, result, data))


def activated(result: ScoringResult, *, on: bool) -> list[float]:
    """Rewards as vLLM's pooler gives them: a model of regression has no activation."""
    if not on or result.is_regression:
        return result.rewards
    return [sigmoid(reward) for reward in result.rewards]


def modern(body: object) -> object:
    """The old names of `use_activation` under the new one."""
    if not isinstance(body, dict):
        return body
    names = [name for name in ("use_activation", *_OLD_NAMES) if body.get(name) is not None]
    if len(names) > 1:
        raise refused(f"{names[0]} and {names[1]} are the same setting; send one", field=names[1])
    rest = {name: value for name, value in body.items() if name not in _OLD_NAMES}
    return rest | ({"use_activation": body[names[0]]} if names else {})


def scoring(request: PoolingOptions, items: Sequence[Item]) -> ScoringRequest:
    cut = request.truncate_prompt_tokens
    return ScoringRequest(
        items=items,
        model=request.model,
        truncation="error" if cut is None else request.truncation_side,
        max_length=None if cut in (None, -1) else cut,
        max_length_field="truncate_prompt_tokens",
    )


ROUTES = (
    Route("/classify", ClassifyRequest, ClassifyResponse, classify, errors.vllm),
    Route("/v1/classify", ClassifyRequest, ClassifyResponse, classify, errors.vllm),
    Route("/pooling", PoolingRequest, PoolingResponse, pooling, errors.vllm),
    Route("/score", ScoreRequest, ScoreResponse, score, errors.vllm),
    Route("/v1/score", ScoreRequest, ScoreResponse, score, errors.vllm),
)


def _read(cls: type[Asked], call: Call) -> Asked:
    refuse_query(call)
    return read(cls, modern(call.body), ignored=IGNORED, not_built=NOT_BUILT)


def _items(request: ClassifyRequest) -> list[Item]:
    if request.messages is not None:
        return [conversation_of(request.messages, request.chat_template_kwargs)]
    special_tokens = request.add_special_tokens is not False
    return items_of("input", request.input, special_tokens=special_tokens)


def _pairs(left: str, prompts: Prompts, right: str, responses: Responses) -> list[Item]:
    one_response = isinstance(responses, str)
    answers = [responses] if isinstance(responses, str) else responses
    questions = [prompts] if isinstance(prompts, str) else prompts
    if len(questions) == 1:
        questions = questions * len(answers)
    if len(questions) != len(answers):
        raise refused(
            f"{right}: expected as many as `{left}` ({len(questions)}), or one of `{left}`; got "
            f"{len(answers)}",
            field=right,
        )
    return [
        Response(right if one_response else f"{right}[{i}]", question, answer)
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def _envelope(
    kind: str,
    call: Call,
    request: PoolingOptions,
    result: ScoringResult,
    data: list[dict[str, Any]],
) -> dict[str, Any]:
    tokens = result.num_tokens
    return {
        "id": f"{kind}-{call.given_id or request.request_id or call.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": result.model,
        "data": data,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }
