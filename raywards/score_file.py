"""A JSONL file in, the same rows with rewards out, in one process: `raywards score`.

The output appears whole or not at all: it is written beside its name and renamed at the end.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from raywards.config import ScoreConfig
from raywards.conversation import kind_of
from raywards.errors import ConfigError, ConversationError, NonFiniteError, RowError
from raywards.scorer import Scorer

_ROWS_AT_ONCE = 512


class _Row(NamedTuple):
    """A line of the input, and its ids or why it has none."""

    line: int  # from 1
    content: dict[str, Any]
    ids: list[int]
    problem: str | None = None
    reason: str = ""


def score_file(config: ScoreConfig) -> dict[str, int]:
    """Score `config.input` into `config.output`; returns how many rows were `scored` and `bad`.

    A line that is no JSON object is kept as its number, under `line`. Blank lines are no rows.

    Raises `RowError` for the first row that cannot be scored, unless `on_bad_row` is "keep", and
    `ConfigError` where there is no input or no row in it. What was at `output` then stays.
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
        deterministic=config.deterministic,
        trust_remote_code=config.trust_remote_code,
    )
    partial = target.with_name(f".{target.name}.partial")
    counts = {"scored": 0, "bad": 0}
    try:
        with source.open("rb") as lines, partial.open("w", encoding="ascii") as out:
            rows = (_read(scorer, number, line) for number, line in _numbered(lines))
            while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
                if config.on_bad_row == "error":
                    _refuse_bad(chunk, source)
                for row, reward, problem in _score(scorer, chunk):
                    if problem is None:
                        counts["scored"] += 1
                        told = {**row.content, "reward": reward}
                    else:
                        if config.on_bad_row == "error":
                            _refuse(row, problem, "non_finite", source)
                        counts["bad"] += 1
                        told = {**row.content, "reward": None, "error": problem}
                    # Escaped, for half a surrogate pair cannot be written as UTF-8.
                    out.write(json.dumps(told, ensure_ascii=True) + "\n")
        if not sum(counts.values()):
            raise ConfigError(f"input={config.input!r}: has no rows.")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _read(scorer: Scorer, number: int, line: bytes) -> _Row:
    nothing: dict[str, Any] = {"line": number}
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return _Row(number, nothing, [], f"is not JSON: {error}.", "not_json")
    if not isinstance(content, dict):
        problem = f"expected an object, got {kind_of(content)}."
        return _Row(number, nothing, [], problem, "not_an_object")
    try:
        return _Row(number, content, _encode(scorer, content))
    except ConversationError as error:
        return _Row(number, content, [], str(error), "not_a_conversation")


def _encode(scorer: Scorer, row: dict[str, Any]) -> list[int]:
    if row.get("messages") is not None:
        if isinstance(row["messages"], str):
            raise ConversationError(
                "messages is str; expected a list of messages. Plain text belongs into `text`.",
                reason="malformed",
            )
        return scorer.encode(row["messages"])
    if "prompt" in row and "response" in row:
        return scorer.encode_response(row["prompt"], row["response"])
    if isinstance(row.get("text"), str):
        return scorer.encode(row["text"])
    seen = ", ".join(f"{name} ({kind_of(value)})" for name, value in sorted(row.items())[:8])
    raise ConversationError(
        f"it has {seen or 'nothing'}; expected `messages`, or `prompt` and `response`, or `text`.",
        reason="missing_field",
    )


def _score(
    scorer: Scorer, rows: list[_Row]
) -> Iterator[tuple[_Row, float, None] | tuple[_Row, None, str]]:
    """Each row with its reward, or with what is wrong with it, in order."""
    good = [row for row in rows if row.problem is None]
    try:
        rewards: Iterator[float | str] = iter(scorer.score_ids([row.ids for row in good]))
    except NonFiniteError:
        rewards = (_alone(scorer, row) for row in good)
    for row in rows:
        outcome = next(rewards) if row.problem is None else row.problem
        yield (row, None, outcome) if isinstance(outcome, str) else (row, outcome, None)


def _alone(scorer: Scorer, row: _Row) -> float | str:
    try:
        [reward] = scorer.score_ids([row.ids])
    except NonFiniteError as error:
        return str(error).replace("sequence 0", "the row")
    return reward


def _refuse_bad(rows: Iterable[_Row], source: Path) -> None:
    for row in rows:
        if row.problem is not None:
            _refuse(row, row.problem, row.reason, source)


def _refuse(row: _Row, problem: str, reason: str, source: Path) -> NoReturn:
    raise RowError(
        f"{source} line {row.line}: {problem} Mend it, or set on_bad_row='keep'.",
        source=str(source), row=row.line - 1, field="", reason=reason,
    )  # fmt: skip
