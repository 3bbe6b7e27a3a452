"""SGLang's routes: its own `/classify`, `/v1/embeddings`, `/v1/score`. verl's SGLang path calls the
second.

All give the raw reward. Its `/classify` shares the path with vLLM's, and its `/v1/score` too; the
keys of the body tell them apart. SGLang's `/v1/classify`, whose softmax of one label is always 1,
is answered as vLLM's.

Fields of sgl-project/sglang, python/sglang/srt/managers/io_struct.py, as of mid-2026.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from raywards.schemas import (
    Rendered as RenderedText,
)
from raywards.schemas import (
    ReplyModel,
    Some,
    Strict,
    Text,
    TokenId,
    finding,
)
from raywards.serve.dialects import (
    Call,
    Core,
    Item,
    Reply,
    Response,
    Route,
    ScoringRequest,
    errors,
)
from raywards.serve.dialects.bodies import (
    Input,
    ModelName,
    No,
    Prompt,
    Responses,
    Zero,
    begins_with_prompt,
    has,
    items_of,
    one_or_many,
    read,
    refuse_query,
    vector_of_one,
)

# SGLang does nothing with `user`.
IGNORED = frozenset({"user"})
NOT_BUILT = {
    "lora_path": "an adapter is named as the `model`",
    "dimensions": "a reward has one dimension",
    "label_token_ids": "a reward model has one label",
    "image_data": "text alone is scored",
    "audio_data": "text alone is scored",
    "video_data": "text alone is scored",
    "input_embeds": "text and token ids are scored",
    "sampling_params": "nothing is sampled",
}


def _kind_of_text(value: Any) -> str:
    if not isinstance(value, list):
        return "|text"
    return "|pairs" if value and isinstance(value[0], list) else "|texts"


def _kind_of_ids(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    return "|many" if isinstance(first, list) else "|one"


Pair = Annotated[list[Text], Field(min_length=2, max_length=2), AfterValidator(begins_with_prompt)]
RequestId = Annotated[Text, Field(max_length=128)]
RequestIds = Annotated[
    Annotated[RequestId, Tag("|one")] | Annotated[Some[RequestId], Tag("|many")],
    Discriminator(one_or_many),
]


class EmbeddingReqInput(Strict):
    """Body of SGLang's `POST /classify`: `text`, or `input_ids`."""

    text: (
        Annotated[
            Annotated[RenderedText, Tag("|text")]
            | Annotated[Some[RenderedText], Tag("|texts")]
            | Annotated[Some[Pair], Tag("|pairs")],
            Discriminator(_kind_of_text),
        ]
        | None
    ) = None
    """Rendered text, texts, or pairs of a prompt and a response."""
    input_ids: (
        Annotated[
            Annotated[Some[TokenId], Tag("|one")] | Annotated[Some[Some[TokenId]], Tag("|many")],
            Discriminator(_kind_of_ids),
        ]
        | None
    ) = None
    """Token ids of one sequence, or of several."""
    rid: RequestIds | None = None
    """The caller's name for the sequence, or for each of them."""
    priority: Zero | None = None
    """Requests are served oldest first."""

    @model_validator(mode="after")
    def _fields_agree(self) -> EmbeddingReqInput:
        if (self.text is None) == (self.input_ids is None):
            seen = "neither" if self.text is None else "both"
            raise finding(None, f"expected either `text` or `input_ids`, got {seen}")
        if isinstance(self.rid, list) and len(self.rid) != len(self.items()):
            raise finding("rid", f"has {len(self.rid)} names for {len(self.items())} sequences")
        return self

    def is_single(self) -> bool:
        """Whether the reply is one object, and no list."""
        return isinstance(self.text, str) or bool(self.input_ids and type(self.input_ids[0]) is int)

    def items(self) -> list[Item]:
        """The sequences to score."""
        if self.input_ids is not None:
            return items_of("input_ids", self.input_ids)
        elif _kind_of_text(self.text) == "|pairs":
            pairs: Any = self.text
            return [Response(f"text[{i}]", *pair) for i, pair in enumerate(pairs)]
        return items_of("text", self.text, special_tokens=True)


class EmbeddingRequest(Strict):
    """Body of `POST /v1/embeddings`."""

    input: Input
    """Rendered text or token ids, or a list of either."""
    model: ModelName | None = None
    """Name of the served model. Default: whichever is served."""
    encoding_format: Literal["float", "base64"] = "float"
    """JSON numbers, or base64 of the vector's float32s."""
    rid: RequestId | None = None
    """The caller's name for the request."""
    priority: Zero | None = None
    """Requests are served oldest first."""


class ScoringBody(Strict):
    """Body of SGLang's `POST /v1/score`: one prompt, several responses."""

    query: Prompt
    """The prompt."""
    items: Responses
    """The responses."""
    model: ModelName | None = None
    """Name of the served model. Default: whichever is served."""
    apply_softmax: No = False
    """Of one label it is always 1."""
    item_first: No = False
    """A response comes after its prompt."""


class MetaInfo(ReplyModel):
    """About one sequence."""

    id: str
    """The caller's name for it, or of the request."""
    prompt_tokens: int
    """Tokens scored."""
    e2e_latency: float
    """Seconds in the queue, at the tokenizer and in the model."""


class EmbeddingOutput(ReplyModel):
    """Reply of SGLang's `POST /classify`, or an entry of it."""

    embedding: list[float]
    """The reward."""
    meta_info: MetaInfo
    """About the sequence."""


class Embedding(ReplyModel):
    """One sequence."""

    object: Literal["embedding"] = "embedding"
    """Always `embedding`."""
    index: int
    """Position in the request."""
    embedding: list[float] | str
    """The reward, or base64 of it."""


class EmbeddingUsage(ReplyModel):
    """Tokens of the request."""

    prompt_tokens: int
    """Tokens scored."""
    total_tokens: int
    """The same."""


class EmbeddingResponse(ReplyModel):
    """Reply of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    """Always `list`."""
    model: str
    """Name of the served model."""
    data: list[Embedding]
    """One per sequence."""
    usage: EmbeddingUsage
    """Tokens of the request."""


class ScoringReply(ReplyModel):
    """Reply of SGLang's `POST /v1/score`."""

    object: Literal["scoring"] = "scoring"
    """Always `scoring`."""
    scores: list[list[float]]
    """The reward of each response."""
    model: str
    """Name of the served model."""
    usage: EmbeddingUsage
    """Tokens of the request."""


async def classify(call: Call, core: Core) -> Reply:
    """The raw reward of each sequence."""
    request = _read(EmbeddingReqInput, call)
    result = await core.score(ScoringRequest(items=request.items()))
    latency = round(result.queue_s + result.tokenize_s + result.forward_s, 6)
    entries = [
        {
            "embedding": [item.reward],
            "meta_info": {
                "id": _name(request, i, call),
                "prompt_tokens": item.num_tokens,
                "e2e_latency": latency,
            },
        }
        for i, item in enumerate(result.items)
    ]
    return Reply(entries[0] if request.is_single() else entries)


async def embeddings(call: Call, core: Core) -> Reply:
    """The raw reward of each sequence, as a vector of one."""
    request = _read(EmbeddingRequest, call)
    items = items_of("input", request.input, special_tokens=True)
    result = await core.score(ScoringRequest(items=items, model=request.model))
    form = request.encoding_format
    data = [
        {"object": "embedding", "index": i, "embedding": vector_of_one(reward, form)}
        for i, reward in enumerate(result.rewards)
    ]
    usage = {"prompt_tokens": result.num_tokens, "total_tokens": result.num_tokens}
    return Reply({"object": "list", "model": result.model, "data": data, "usage": usage})


async def score(call: Call, core: Core) -> Reply:
    """The raw reward of each response to the prompt."""
    request = _read(ScoringBody, call)
    if isinstance(request.items, str):
        items = [Response("items", request.query, request.items)]
    else:
        items = [
            Response(f"items[{i}]", request.query, item) for i, item in enumerate(request.items)
        ]
    result = await core.score(ScoringRequest(items=items, model=request.model))
    usage = {"prompt_tokens": result.num_tokens, "total_tokens": result.num_tokens}
    return Reply(
        {
            "object": "scoring",
            "scores": [[reward] for reward in result.rewards],
            "model": result.model,
            "usage": usage,
        }
    )


def _has_text_or_ids(body: object) -> bool:
    return has(body, "text", "input_ids")


def _has_one_query(body: object) -> bool:
    return has(body, "query")


ROUTES = (
    Route(
        "/classify",
        EmbeddingReqInput,
        EmbeddingOutput | list[EmbeddingOutput],
        classify,
        errors.vllm,
        claims=_has_text_or_ids,
    ),
    Route("/v1/embeddings", EmbeddingRequest, EmbeddingResponse, embeddings, errors.vllm),
    Route("/v1/score", ScoringBody, ScoringReply, score, errors.vllm, claims=_has_one_query),
    Route("/score", ScoringBody, ScoringReply, score, errors.vllm, claims=_has_one_query),
)


def _read(cls: Any, call: Call) -> Any:
    refuse_query(call)
    return read(cls, call.body, ignored=IGNORED, not_built=NOT_BUILT)


def _name(request: EmbeddingReqInput, index: int, call: Call) -> str:
    if isinstance(request.rid, list):
        return request.rid[index]
    return request.rid or call.request_id
