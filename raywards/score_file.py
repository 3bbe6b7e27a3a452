"""A JSONL file in, the same rows with rewards out, in one process: `raywards score`.

The output appears whole or not at all: it is written beside its name and renamed at the end.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raywards.config import ScoreConfig
from raywards.errors import ConfigError, ConversationError, RowError
from raywards.scorer import Scorer

_ROWS_AT_ONCE = 512


def score_file(config: ScoreConfig) -> dict[str, int]:
    """Score `config.input` into `config.output`; returns how many rows were `scored` and `bad`.

    Raises `RowError` for the first row that cannot be scored, unless `on_bad_row` is "null".
    """
    source, target = Path(config.input).expanduser(), Path(config.output).expanduser()
    if not source.is_file():
        raise ConfigError(f"input={config.input!r}: there is no such file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scorer = Scorer.from_pretrained(
        config.model,
        dtype=config.dtype,
        device=config.device,
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        trust_remote_code=config.trust_remote_code,
    )
    partial = target.with_name(f".{target.name}.partial")
    counts = {"scored": 0, "bad": 0}
    try:
        with source.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as out:
            rows = _rows(lines, str(source))
            while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
                for row in _score_chunk(scorer, chunk, config, str(source)):
                    counts["bad" if row["reward"] is None else "scored"] += 1
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    if not sum(counts.values()):
        raise ConfigError(f"input={config.input!r}: has no rows.")
    return counts


def _rows(lines: Any, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(
                f"{source} line {number + 1}: is not JSON: {error}.",
                source=source, row=number, field="", reason="not_json",
            ) from None  # fmt: skip
        if not isinstance(row, dict):
            raise RowError(
                f"{source} line {number + 1}: expected an object, got {type(row).__name__}.",
                source=source, row=number, field="", reason="not_an_object",
            )  # fmt: skip
        yield number, row


def _score_chunk(
    scorer: Scorer, chunk: list[tuple[int, dict[str, Any]]], config: ScoreConfig, source: str
) -> Iterator[dict[str, Any]]:
    """The rows of a chunk with `reward` added, in order."""
    sequences: list[list[int]] = []
    errors: dict[int, str] = {}
    for number, row in chunk:
        try:
            sequences.append(_encode(scorer, row))
        except ConversationError as error:
            if config.on_bad_row == "error":
                raise RowError(
                    f"{source} line {number + 1}: {error} Mend it, or set on_bad_row='null'.",
                    source=source, row=number, field="", reason="not_a_conversation",
                ) from error  # fmt: skip
            errors[number] = str(error)
    rewards = iter(scorer.score_ids(sequences))
    for number, row in chunk:
        if number in errors:
            yield {**row, "reward": None, "error": errors[number]}
        else:
            yield {**row, "reward": next(rewards)}


def _encode(scorer: Scorer, row: dict[str, Any]) -> list[int]:
    if "messages" in row:
        return scorer.encode(row["messages"])
    if "prompt" in row and "response" in row:
        return scorer.encode_response(row["prompt"], row["response"])
    if isinstance(row.get("text"), str):
        return scorer.encode(row["text"])
    raise ConversationError(
        f"it has {', '.join(sorted(row)) or 'nothing'}; expected `messages`, or `prompt` and "
        "`response`, or `text`.",
        reason="missing_field",
    )
