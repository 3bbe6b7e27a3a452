"""Rows to groups of sequences, whatever the objective: pairs, rankings, rated texts.

    row ─encode_group─► Pair | Ranking | Rating

| objective | a row has | it is |
|---|---|---|
| `bradley_terry` | what `preferences` reads | a pair |
| `plackett_luce`, `all_pairs` | `responses` (n >= 2) and `ranks`, perhaps `prompt` | a ranking |
| | what `preferences` reads | a pair among rankings |
| `regression` | `text`, or `response` and perhaps `prompt`; and `score` | a rated text |
| with `attributes` | the same, and a column for each attribute instead of `score` | the same |

Texts are texts or lists of messages, and are rendered as those of pairs are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from raywards.config import Objective
from raywards.preferences import (
    NUMBERS,
    Pair,
    PairTruncation,
    encode_row,
    read_number,
    render_answers,
)
from raywards.rendering import Rendering, truncate
from raywards.rowset import Row, RowRef, refuse_row, show

RANKINGS = ("plackett_luce", "all_pairs")

# Columns that make a row one of a kind, and which objectives take it.
_KINDS = {
    "a pair": (("chosen", "rejected", "chosen_ids", "rejected_ids"), ("bradley_terry", *RANKINGS)),
    "a ranking": (("responses", "ranks"), RANKINGS),
    "a rated text": (("text", "response", "score"), ("regression",)),
}


@dataclass(frozen=True, slots=True)
class Ranking:
    """Responses to one prompt, and their places from 1, the best; equal ones are ties."""

    sequences: list[list[int]]
    ranks: list[float]


@dataclass(frozen=True, slots=True)
class Rating:
    """A sequence and its scores, one for each attribute; None where nobody gave one."""

    ids: list[int]
    scores: list[float | None]

    @property
    def sequences(self) -> list[list[int]]:
        return [self.ids]


def encode_group(
    row: Row,
    where: RowRef,
    rendering: Rendering,
    *,
    objective: Objective = "bradley_terry",
    attributes: Sequence[str] = (),
    max_length: int | None,
    truncation: PairTruncation,
    required: Collection[str] = (),
) -> Pair | Ranking | Rating:
    """Validate one row for `objective` and tokenise it.

    `attributes` are the columns of scores; without any it is `score`. The other arguments are those
    of `preferences.encode_row`. Raises `RowError`.
    """
    if isinstance(row, Mapping):
        _refuse_other_kinds(row, where, objective)
        if objective == "regression":
            return _encode_rating(row, where, rendering, attributes, max_length, truncation)
        if objective in RANKINGS and _has(row, "responses", "ranks"):
            return _encode_ranking(row, where, rendering, objective, max_length, truncation)
    return encode_row(
        row, where, rendering, max_length=max_length, truncation=truncation, required=required
    )


def columns_of(group: Pair | Ranking | Rating) -> dict[str, Any]:
    """What is stored of a group: its sequences, and what the objective asks of them."""
    return {
        "sequences": group.sequences,
        "margin": group.margin if isinstance(group, Pair) else None,
        "probability": group.probability if isinstance(group, Pair) else None,
        "ranks": group.ranks if isinstance(group, Ranking) else None,
        "scores": group.scores if isinstance(group, Rating) else None,
    }


def is_conversational(row: Row) -> bool:
    """Whether what a row has us render are lists of messages."""
    texts = [row.get(name) for name in ("chosen", "text", "response")]
    responses = row.get("responses")
    first = responses[0] if isinstance(responses, (list, tuple)) and responses else None
    return any(isinstance(text, (list, tuple)) for text in (*texts, first))


def _has(row: Row, *names: str) -> bool:
    return any(row.get(name) is not None for name in names)


def _refuse_other_kinds(row: Row, where: RowRef, objective: str) -> None:
    """Refuse a row that is plainly of another objective: its own columns are not there."""
    if any(_has(row, *names) for names, takers in _KINDS.values() if objective in takers):
        return
    for kind, (names, takers) in _KINDS.items():
        field = next((name for name in names if _has(row, name)), None)
        if field is not None:
            refuse_row(
                where,
                field,
                "other_objective",
                f"makes the row {kind}, which objective={objective!r} does not take",
                " or ".join(kind for kind, (_, takers) in _KINDS.items() if objective in takers),
                f"set objective to {' or '.join(takers)}, or take such rows out",
            )


# ---------------------------------------------------------------- rankings


def _encode_ranking(
    row: Row,
    where: RowRef,
    rendering: Rendering,
    objective: str,
    max_length: int | None,
    truncation: PairTruncation,
) -> Ranking:
    responses = _responses(row, where)
    ranks = _ranks(row, where, len(responses), objective)
    for name in NUMBERS:
        if row.get(name) is not None:
            todo = f"remove {name} from rows with ranks, or write them as pairs"
            seen = "stands beside ranks, and is of pairs"
            refuse_row(where, name, f"bad_{name}", seen, "ranks alone", todo)
    answers = {f"responses[{i}]": response for i, response in enumerate(responses)}
    sequences = render_answers(row, where, rendering, answers)
    _refuse_equal(sequences, where, "remove one of the two, or the row")
    if max_length is not None and max(map(len, sequences)) > max_length:
        if truncation == "drop":
            _refuse_long(where, "responses", sequences, max_length)
        sequences = [truncate(ids, max_length, truncation) for ids in sequences]
        todo = "raise max_length, or truncate at the other side"
        _refuse_equal(sequences, where, todo, f" once truncated at the {truncation}")
    return Ranking(sequences, ranks)


def _responses(row: Row, where: RowRef) -> Sequence[Any]:
    responses = row.get("responses")
    expected = "a list of at least two texts, or of at least two lists of messages"
    if responses is None:
        refuse_row(where, "responses", "missing_field", "is missing beside ranks", expected)
    if not isinstance(responses, (list, tuple)):
        refuse_row(where, "responses", "bad_responses", f"is {show(responses)}", expected)
    if len(responses) < 2:
        seen = f"has {len(responses)} of them"
        todo = "remove the row: one response alone has no rank"
        refuse_row(where, "responses", "bad_responses", seen, expected, todo)
    return responses


def _ranks(row: Row, where: RowRef, count: int, objective: str) -> list[float]:
    """Places 1, 2, ... in the order of the given ranks."""
    given = row.get("ranks")
    expected = f"a list of {count} finite numbers, one for each response, of which 1 is the best"
    if given is None:
        seen = "is missing" if "ranks" not in row else "is None"
        refuse_row(where, "ranks", "missing_field", f"{seen} beside responses", expected)
    if not isinstance(given, (list, tuple)):
        refuse_row(where, "ranks", "bad_ranks", f"is {show(given)}", expected)
    if len(given) != count:
        refuse_row(where, "ranks", "bad_ranks", f"has {len(given)} of them", expected)
    for place, rank in enumerate(given):
        read_number(rank, where, "ranks", expected, prefix=f"has at place {place} ")
    # Places, because fp32, in which they are stored, would tie what float64 tells apart.
    place_of = {rank: place for place, rank in enumerate(sorted(set(given)), start=1)}
    if objective == "plackett_luce" and len(place_of) < count:
        first = next(rank for rank in given if list(given).count(rank) > 1)
        seen = f"has {show(first)} more than once, and plackett_luce knows no ties"
        todo = "set objective='all_pairs', where a tie is a half, or remove the row"
        refuse_row(where, "ranks", "tied_ranks", seen, "different ranks", todo)
    return [float(place_of[rank]) for rank in given]


def _refuse_equal(
    sequences: Sequence[list[int]], where: RowRef, todo: str, condition: str = ""
) -> None:
    first: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(sequences):
        other = first.setdefault(tuple(ids), index)
        if other != index:
            seen = f"gives the same {len(ids)} tokens as responses[{other}]{condition}"
            field = f"responses[{index}]"
            refuse_row(where, field, "identical", seen, "responses that differ", todo)


# ---------------------------------------------------------------- rated texts


def _encode_rating(
    row: Row,
    where: RowRef,
    rendering: Rendering,
    attributes: Sequence[str],
    max_length: int | None,
    truncation: PairTruncation,
) -> Rating:
    scores = _scores(row, where, attributes)
    if row.get("text") is not None and row.get("response") is not None:
        seen, expected = "stands beside response", "one of the two"
        refuse_row(where, "text", "two_texts", seen, expected, "remove the one that is not rated")
    field = "text" if row.get("response") is None else "response"
    if field == "response":
        [ids] = render_answers(row, where, rendering, {"response": row["response"]})
    else:
        if row.get("text") is None:
            columns = ", ".join(str(name) for name in row) or "no columns"
            seen = f"is missing; the row has {columns}"
            expected = "text or a list of messages in `text`, or `prompt` and `response`"
            refuse_row(where, "text", "missing_field", seen, expected)
        if row.get("prompt") is not None:
            seen = "stands beside text, which is the whole of what is rated"
            todo = "rename text to response, or remove prompt"
            refuse_row(where, "prompt", "two_texts", seen, "prompt and response", todo)
        [ids] = render_answers(row, where, rendering, {"text": row["text"]})
    if max_length is not None and len(ids) > max_length:
        if truncation == "drop":
            _refuse_long(where, field, [ids], max_length)
        ids = truncate(ids, max_length, truncation)
    return Rating(ids, scores)


def _scores(row: Row, where: RowRef, attributes: Sequence[str]) -> list[float | None]:
    scores: list[float | None] = []
    for name in attributes or ("score",):
        value = row.get(name)
        if value is not None:
            value = read_number(value, where, name, "a finite number, such as 3.5", "bad_score")
        scores.append(value)
    if all(score is None for score in scores):
        seen = "is missing or None"
        expected = "a finite number, such as 3.5"
        todo = "remove the row: nobody rated it"
        if attributes:
            expected = f"a number in at least one of {', '.join(attributes)}"
        refuse_row(where, (*attributes, "score")[0], "missing_score", seen, expected, todo)
    return scores


def _refuse_long(
    where: RowRef, field: str, sequences: Sequence[list[int]], max_length: int
) -> NoReturn:
    longest = max(map(len, sequences))
    refuse_row(
        where,
        field,
        "too_long",
        f"is too long: {longest:,} tokens" + (" in the longest" if len(sequences) > 1 else ""),
        f"at most max_length = {max_length:,}",
        "raise max_length, truncate left or right, or let such rows be dropped",
    )
