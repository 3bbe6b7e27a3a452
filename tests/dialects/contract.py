"""What the contract tests of all dialects ask: shapes, fields, and bodies to ask with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from served import Served
from talks import ANSWERS, QUESTION, TALKS

# What differs from one reply to the next, whatever was asked.
_PASSING = {"id", "created", "timing", "e2e_latency"}
RENDERED = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>\n"
)


class Example(NamedTuple):
    """A body that a route answers, the style of its errors, and where it says which model."""

    path: str
    body: dict[str, Any]
    errors: str
    names_model: bool = True


EXAMPLES = [
    Example("/v1/reward", {"messages": TALKS[0]}, "native"),
    Example("/get_reward", {"query": [RENDERED]}, "native", names_model=False),
    Example("/classify", {"input": RENDERED}, "vllm"),
    Example("/classify", {"text": RENDERED}, "vllm", names_model=False),
    Example("/v1/classify", {"input": RENDERED}, "vllm"),
    Example("/pooling", {"input": RENDERED}, "vllm"),
    Example("/score", {"text_1": QUESTION, "text_2": ANSWERS[0]}, "vllm"),
    Example("/score", {"query": QUESTION, "items": ANSWERS}, "vllm"),
    Example("/v1/score", {"data_1": QUESTION, "data_2": ANSWERS}, "vllm"),
    Example("/v1/score", {"query": QUESTION, "items": ANSWERS}, "vllm"),
    Example("/v1/embeddings", {"input": RENDERED}, "vllm"),
    Example("/predict", {"inputs": RENDERED}, "tei", names_model=False),
    Example("/", {"inputs": [[RENDERED]]}, "tei", names_model=False),
    Example("/invocations", {"inputs": RENDERED}, "tei", names_model=False),
    Example("/rerank", {"query": QUESTION, "texts": ANSWERS}, "tei", names_model=False),
    Example("/rerank", {"query": QUESTION, "documents": ANSWERS}, "jina"),
    Example("/v1/rerank", {"query": QUESTION, "documents": ANSWERS}, "jina"),
    Example("/v2/rerank", {"query": QUESTION, "documents": ANSWERS}, "cohere"),
    Example("/remote_rm", {"prompt": QUESTION, "response": "It is."}, "native", names_model=False),
    Example("/v1/chat/completions", {"messages": TALKS[0]}, "nim"),
]


def shape(value: Any) -> Any:
    """Names and types of a reply: `{"id": "str", "data": [{"index": "int"}]}`.

    The entries of a list must all have the same.
    """
    if isinstance(value, Mapping):
        return {name: shape(entry) for name, entry in value.items()}
    elif isinstance(value, list):
        found = [shape(entry) for entry in value]
        assert all(one == found[0] for one in found), found
        return found[:1]
    return type(value).__name__


def lasting(value: Any) -> Any:
    """A reply without what differs each time."""
    if isinstance(value, Mapping):
        return {name: lasting(entry) for name, entry in value.items() if name not in _PASSING}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


def is_ignored(server: Served, path: str, body: Mapping[str, Any], name: str, value: Any) -> None:
    """Assert that a field changes nothing in the reply."""
    assert name not in body
    without = lasting(server.post(path, body))
    assert lasting(server.post(path, {**body, name: value})) == without


def is_refused(server: Served, path: str, body: Mapping[str, Any], name: str, value: Any) -> str:
    """Assert that a field is refused by its name; gives the message."""
    status, reply = server.refused(path, {**body, name: value})
    error = reply.get("error", reply)
    message = error if isinstance(error, str) else error["message"]
    assert status in (400, 422), (status, reply)
    assert name in message, message
    if isinstance(error, dict) and "param" in error:
        assert (error["param"] or name).startswith(name), error
    return str(message)
