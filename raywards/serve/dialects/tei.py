"""text-embeddings-inference: `POST /predict`, also as `/` and `/invocations`, and its `/rerank`.

Scores are the sigmoid of the reward unless `raw_scores`. A pair of texts is a prompt and a
response; `["a", "b"]` is one such pair, `[["a"], ["b"]]` are two single texts. As there, a text
that is too long is cut at its end unless `truncate` is false.

A body with `parameters` is that of the Hugging Face inference API, which `InferenceClient` of
huggingface_hub sends: its reply to one text is a list in a list. There, `["a", "b"]` would be two
texts, so it is refused.

Fields of huggingface/text-embeddings-inference 1.9, router/src/http/types.rs, and of
huggingface_hub 2.4, inference/_generated/types/text_classification.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from raywards.schemas import Rendered as RenderedText
from raywards.schemas import ReplyModel, Some, Strict, Text, refused
from raywards.serve.dialects import (
    Call,
    Core,
    Item,
    Rendered,
    Reply,
    Response,
    Route,
    ScoringRequest,
    ScoringResult,
    Truncation,
    errors,
    sigmoid,
)
from raywards.serve.dialects.bodies import begins_with_prompt, has, read, refuse_query

Direction = Literal["Left", "Right", "left", "right"]
OneOrTwo = Annotated[
    list[Text], Field(min_length=1, max_length=2), AfterValidator(begins_with_prompt)
]


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return "|text"
    return "|batch" if value and isinstance(value[0], list) else "|pair"


class Parameters(Strict):
    """Of the Hugging Face inference API."""

    function_to_apply: Literal["none", "sigmoid"] | None = None
    """What a score is: the reward, or its sigmoid."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Labels that are wanted; there is one."""


class PredictRequest(Strict):
    """Body of `POST /predict`."""

    inputs: Annotated[
        Annotated[RenderedText, Tag("|text")]
        | Annotated[OneOrTwo, Tag("|pair")]
        | Annotated[Some[OneOrTwo], Tag("|batch")],
        Discriminator(_kind),
    ]
    """A text; a pair of prompt and response; or a list of lists of one or two texts."""
    truncate: bool = True
    """Cut what is too long, rather than refuse it."""
    truncation_direction: Direction = "Right"
    """Where it is cut."""
    raw_scores: bool = False
    """The reward itself, and no sigmoid."""
    parameters: Parameters | None = None
    """Of the Hugging Face inference API: the reply is a list of lists."""


class RerankRequest(Strict):
    """Body of TEI's `POST /rerank`: known by its `texts`."""

    query: RenderedText
    """The prompt."""
    texts: Some[Text]
    """The responses."""
    truncate: bool = True
    """Cut what is too long, rather than refuse it."""
    truncation_direction: Direction = "Right"
    """Where it is cut."""
    raw_scores: bool = False
    """The reward itself, and no sigmoid."""
    return_text: bool = False
    """Repeat the responses."""


class Prediction(ReplyModel):
    """A label with its score."""

    score: float
    """The sigmoid of the reward, or the reward."""
    label: str
    """What the model's config calls its one label."""


class Rank(ReplyModel):
    """One response."""

    index: int
    """Position in the request."""
    score: float
    """The sigmoid of the reward, or the reward."""
    text: str | None = None
    """The response, with `return_text`."""


async def predict(call: Call, core: Core) -> Reply:
    """The one label with its score: of a text or a pair, or of each entry of a batch."""
    refuse_query(call)
    _check_any(call.body, "inputs", "text")
    request = read(PredictRequest, call.body)
    kind = _kind(request.inputs)
    of_the_hub = request.parameters is not None
    if of_the_hub and kind == "|pair":
        raise refused(
            'inputs: ["a", "b"] is a pair for text-embeddings-inference, and two texts for the '
            'inference API that has `parameters`; write [["a", "b"]] or [["a"], ["b"]]',
            field="inputs",
        )
    given: Any = [request.inputs] if kind == "|pair" else request.inputs
    items: list[Item]
    if kind == "|text":
        items = [Rendered("inputs", given, special_tokens=True)]
    else:
        names = [f"inputs[{i}]" if kind == "|batch" else "inputs" for i in range(len(given))]
        items = [_item(name, texts) for name, texts in zip(names, given, strict=True)]
    result = await core.score(ScoringRequest(items=items, truncation=_truncation(request)))
    scores = _scores(result, raw=_wants_raw(request))
    predictions = [[{"score": score, "label": result.label}] for score in scores]
    many = kind == "|batch" or of_the_hub
    return Reply(predictions if many else predictions[0], timings(result, items))


async def rerank(call: Call, core: Core) -> Reply:
    """The responses, best first."""
    refuse_query(call)
    _check_any(call.body, "texts", "the responses")
    request = read(RerankRequest, call.body)
    items = [Response(f"texts[{i}]", request.query, text) for i, text in enumerate(request.texts)]
    result = await core.score(ScoringRequest(items=items, truncation=_truncation(request)))
    scores = _scores(result, raw=request.raw_scores)
    ranks = []
    for index in best_first(result.rewards):
        text = {"text": request.texts[index]} if request.return_text else {}
        ranks.append({"index": index, **text, "score": scores[index]})
    return Reply(ranks, timings(result, items))


def best_first(rewards: list[float]) -> list[int]:
    """Positions by falling reward, equal ones in their order.

    Of the rewards and not of their sigmoids: those of high rewards are all 1.
    """
    return sorted(range(len(rewards)), key=lambda index: -rewards[index])


def timings(result: ScoringResult, items: list[Item] | list[Response]) -> dict[str, str]:
    """TEI's headers: where the time went, in milliseconds."""
    total = result.queue_s + result.tokenize_s + result.forward_s
    return {
        "x-compute-type": "cpu" if result.device == "cpu" else "gpu+optimized",
        "x-compute-time": _ms(total),
        "x-compute-characters": str(sum(item.characters() for item in items)),
        "x-compute-tokens": str(result.num_tokens),
        "x-total-time": _ms(total),
        "x-tokenization-time": _ms(result.tokenize_s),
        "x-queue-time": _ms(result.queue_s),
        "x-inference-time": _ms(result.forward_s),
    }


def claims_rerank(body: object) -> bool:
    """Whether a body at `/rerank` is TEI's."""
    return has(body, "texts")


_PREDICTIONS = list[Prediction] | list[list[Prediction]]

ROUTES = (
    *(
        Route(path, PredictRequest, _PREDICTIONS, predict, errors.tei)
        for path in ("/predict", "/", "/invocations")
    ),
    Route("/rerank", RerankRequest, list[Rank], rerank, errors.tei, claims=claims_rerank),
)


def _check_any(body: object, name: str, what: str) -> None:
    """There is something to score, or TEI has an error of its own for it."""
    if isinstance(body, dict) and body.get(name) in ("", []):
        raise refused(f"{name}: is empty; expected {what}", field=name, code="empty")


def _item(field: str, texts: list[str]) -> Item:
    if len(texts) == 1:
        if not texts[0].strip():
            raise refused(f"{field}: is empty; expected text", field=field)
        return Rendered(field, texts[0], special_tokens=True)
    return Response(field, texts[0], texts[1])


def _truncation(request: PredictRequest | RerankRequest) -> Truncation:
    if not request.truncate:
        return "error"
    return "left" if request.truncation_direction in ("Left", "left") else "right"


def _wants_raw(request: PredictRequest) -> bool:
    asked = request.parameters.function_to_apply if request.parameters else None
    return request.raw_scores if asked is None else asked == "none"


def _scores(result: ScoringResult, *, raw: bool) -> list[float]:
    return result.rewards if raw else [sigmoid(reward) for reward in result.rewards]


def _ms(seconds: float) -> str:
    return str(round(seconds * 1e3))
