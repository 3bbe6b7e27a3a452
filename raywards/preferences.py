"""Preference rows to validated pairs: every format that TRL's RewardTrainer reads, row by row.

    row ─encode_row─► Pair(chosen_ids, rejected_ids, margin, probability)

| a row has | it is |
|---|---|
| `chosen`, `rejected` as text | standard; each text is closed by EOS once |
| `chosen`, `rejected` as lists of messages | conversational; the chat template closes them |
| `prompt` besides, of the same kind | put in front of both |
| `chosen_ids`, `rejected_ids` | already tokenised: taken as they are |
| `margin` | how much better chosen is; subtracted in the loss |
| `probability` | how probable it is that chosen is the better one; a half is a tie |
| `tools`, `chat_template_kwargs` | handed to the chat template (conversational rows) |

The kind is decided for each row, so a file may mix them. A value of None counts as absent, because
a table fills missing keys with None. What cannot become a pair raises `RowError`, whose `reason` is
a key of `REASONS`: whoever drops rows counts them by it.
"""

from __future__ import annotations

import json
import math
import numbers
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NoReturn, TypeAlias

from raywards.errors import ConversationError, RowError, did_you_mean
from raywards.rendering import Rendering, truncate
from raywards.rowset import Row, RowRef, refuse_row, show

PairTruncation: TypeAlias = Literal["drop", "left", "right"]

REASONS: dict[str, str] = {
    "not_json": "a line or file is not JSON",
    "not_object": "a row is not a JSON object",
    "missing_field": "a field that is needed, such as chosen or rejected, is missing or None",
    "not_text": "a field is neither text nor a list of messages",
    "mixed_types": "prompt, chosen and rejected are not of one kind",
    "empty": "a text, a conversation or a list of ids is empty",
    "identical": "chosen and rejected are the same tokens",
    "too_long": "a sequence has more tokens than max_length",
    "malformed": "a message is malformed",
    "unsupported": "a message holds an image, audio or another part that is not text",
    "control_token": "a message holds a control token that is refused",
    "surrogate": "a text is not valid Unicode",
    "template": "the chat template refused the conversation",
    "no_template": "messages, but the tokenizer has no chat template",
    "bad_tools": "tools is not a list of JSON schemas",
    "bad_kwargs": "chat_template_kwargs is not a mapping of template variables",
    "bad_margin": "margin is not a finite number",
    "missing_margin": "margin is missing, and other rows have one",
    "bad_probability": "probability is not a number from 0 to 1",
    "missing_probability": "probability is missing, and other rows have one",
    "bad_ids": "token ids are not integers from the tokenizer's vocabulary",
    "other_objective": "the row is of a kind that another objective takes",
    "bad_responses": "responses is not a list of two or more",
    "bad_ranks": "ranks is not a list of finite numbers, one for each response",
    "tied_ranks": "two ranks are equal, and objective is plackett_luce",
    "bad_score": "a score is not a finite number",
    "missing_score": "a text has no score",
    "two_texts": "text stands beside prompt or response, so it is not clear what is rated",
}

# Columns of numbers: least, most, what is expected, and what changes nothing.
NUMBERS = {
    "margin": (-math.inf, math.inf, "a finite number, such as 0.5", 0),
    "probability": (0.0, 1.0, "a number from 0 to 1, such as 0.8", 1),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sequences, and how much and how surely the first is better (None where nobody says)."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None = None
    probability: float | None = None

    @property
    def sequences(self) -> list[list[int]]:
        return [self.chosen_ids, self.rejected_ids]


def encode_row(
    row: Row,
    where: RowRef,
    rendering: Rendering,
    *,
    max_length: int | None,
    truncation: PairTruncation,
    required: Collection[str] = (),
) -> Pair:
    """Validate one row and tokenise it.

    `max_length` is in tokens, for each of the two sequences. `required` names those of `NUMBERS`
    that other rows have (`RowSet.has`). Raises `RowError`.
    """
    if not isinstance(row, Mapping):
        refuse_row(where, "row", "not_object", f"is {show(row)}", "a mapping of columns to values")
    numbers_given = {name: _number(row, where, name, name in required) for name in NUMBERS}
    ids = _given_ids(row, where, rendering) or _rendered_ids(row, where, rendering)
    chosen, rejected = ids
    if chosen == rejected:
        refuse_row(
            where,
            "rejected",
            "identical",
            f"gives the same {len(chosen)} tokens as chosen",
            "two different answers; a pair of equal ones teaches nothing",
            "remove the row, or let bad rows be dropped and counted",
        )
    if max_length is not None and max(len(chosen), len(rejected)) > max_length:
        chosen, rejected = _shortened(ids, where, max_length, truncation)
    return Pair(chosen, rejected, **numbers_given)


def _shortened(
    ids: tuple[list[int], list[int]],
    where: RowRef,
    max_length: int,
    truncation: PairTruncation,
) -> tuple[list[int], list[int]]:
    chosen, rejected = ids
    if truncation == "drop":
        refuse_row(
            where,
            "chosen" if len(chosen) > max_length else "rejected",
            "too_long",
            f"is too long: chosen has {len(chosen):,} tokens, rejected {len(rejected):,}",
            f"at most max_length = {max_length:,} in each",
            "raise max_length, truncate left or right, or let such rows be dropped",
        )
    chosen, rejected = (truncate(side, max_length, truncation) for side in ids)
    if chosen == rejected:
        refuse_row(
            where,
            "rejected",
            "identical",
            f"equals chosen once both are truncated at the {truncation} to {max_length:,} tokens",
            "two sequences that still differ",
            "raise max_length, or truncate at the other side",
        )
    return chosen, rejected


def _number(row: Row, where: RowRef, name: str, required: bool) -> float | None:
    low, high, expected, neutral = NUMBERS[name]
    given = row.get(name)
    if given is None:
        if required:
            todo = f"give every row a {name} ({neutral} changes nothing), or remove the column"
            seen = "is missing or None, but other rows have one"
            refuse_row(where, name, f"missing_{name}", seen, expected, todo)
        return None
    return read_number(given, where, name, expected, low=low, high=high)


def read_number(
    given: Any,
    where: RowRef,
    name: str,
    expected: str,
    reason: str = "",
    *,
    prefix: str = "is ",
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """`given` as a finite float from `low` to `high`, or a refusal as `reason` or `bad_NAME`."""
    reason = reason or f"bad_{name}"
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        refuse_row(where, name, reason, prefix + show(given), expected)
    try:
        value = float(given)
    except OverflowError:
        value = math.inf
    if not (math.isfinite(value) and low <= value <= high):
        refuse_row(where, name, reason, f"{prefix}{value!r}", expected)
    return value


def _given_ids(row: Row, where: RowRef, rendering: Rendering) -> tuple[list[int], list[int]] | None:
    """The ids of a row that is already tokenised, else None."""
    names = ("chosen_ids", "rejected_ids")
    if all(row.get(name) is None for name in names):
        legacy = ("chosen_input_ids", "rejected_input_ids")
        if all(row.get(name) is None for name in legacy):
            return None
        _warn_of_legacy_columns()
        names = legacy
    missing = [name for name in names if row.get(name) is None]
    if missing:
        if row.get("chosen") is not None and row.get("rejected") is not None:
            return None  # as TRL: only both columns together make a tokenised row
        other = names[1 - names.index(missing[0])]
        refuse_row(
            where,
            missing[0],
            "missing_field",
            f"is {'None' if missing[0] in row else 'missing'}, but there is {other}",
            "token ids of both sequences, or text in chosen and rejected",
        )
    chosen, rejected = (_checked_ids(row[name], name, where, rendering) for name in names)
    return chosen, rejected


def _checked_ids(ids: Any, field: str, where: RowRef, rendering: Rendering) -> list[int]:
    size = rendering.vocab_size
    expected = f"a list of token ids, integers from 0 to {size - 1:,}"
    if not isinstance(ids, (list, tuple)):
        refuse_row(where, field, "bad_ids", f"is {show(ids)}", expected)
    if not ids:
        refuse_row(where, field, "empty", "is an empty list", expected, "remove the row")
    for position, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            seen = f"has {show(token_id)} at position {position}"
        elif not 0 <= token_id < size:
            seen = f"has the id {token_id} at position {position}"
        else:
            continue
        todo = "tokenise the rows with the tokenizer of the model that is trained"
        refuse_row(where, field, "bad_ids", seen, expected, todo)
    return list(ids)


def _rendered_ids(row: Row, where: RowRef, rendering: Rendering) -> tuple[list[int], list[int]]:
    answers = {name: row.get(name) for name in ("chosen", "rejected")}
    chosen, rejected = render_answers(row, where, rendering, answers)
    return chosen, rejected


def render_answers(
    row: Row, where: RowRef, rendering: Rendering, answers: Mapping[str, Any]
) -> list[list[int]]:
    """The ids of each of a row's `answers`, by the name of its field, behind the row's `prompt`.

    All are texts, or all are lists of messages. Raises `RowError`.
    """
    fields = {name: _answer(row, name, value, where) for name, value in answers.items()}
    prompt = row.get("prompt")
    if prompt is not None:
        if not isinstance(prompt, (str, list, tuple)):
            seen = f"is {show(prompt)}"
            refuse_row(where, "prompt", "not_text", seen, "text, or a list of messages")
        fields = {"prompt": prompt, **fields}
    kinds = {name: isinstance(value, str) for name, value in fields.items()}
    if len(set(kinds.values())) > 1:
        _refuse_mixed(where, kinds, list(answers))
    front: list[Any] = [] if prompt is None else [prompt]
    options: dict[str, Any] | None = None
    if not any(kinds.values()):
        options = {
            "tools": _tools(row, where),
            "chat_template_kwargs": row.get("chat_template_kwargs"),
        }
    sequences: list[list[int]] = []
    for name in answers:
        parts = [*front, fields[name]]
        try:
            if options is None:
                sequences.append(rendering.encode_text("".join(parts)))
            else:
                conversation = [message for part in parts for message in part]
                sequences.append(rendering.encode_conversation(conversation, **options))
        except ConversationError as error:
            _refuse_conversation(error, where, name, 0 if prompt is None else len(prompt))
    return sequences


def _answer(row: Row, name: str, value: Any, where: RowRef) -> Any:
    """`value`, which the row has in its field `name`: text or a list, not empty."""
    expected = "text, or a list of messages such as {'role': 'assistant', 'content': 'Hi'}"
    if value is None:
        columns = [column for column in row if isinstance(column, str) and column != name]
        if name.partition("[")[0] in row:  # `responses[2]` is of `responses`
            seen, todo = "is None", "remove the row, or fill it in"
        else:
            near = [column for column in columns if column not in ("chosen", "rejected", "prompt")]
            seen = f"is missing; the row has {', '.join(columns) or 'no columns'}."
            seen += did_you_mean(name, near)
            todo = f"rename the column that holds the {name} answer to {name!r}"
        refuse_row(where, name, "missing_field", seen, expected, todo)
    if isinstance(value, Mapping):
        todo = "put the message into a list"
        refuse_row(where, name, "not_text", f"is one mapping: {show(value)}", expected, todo)
    if not isinstance(value, (str, list, tuple)):
        refuse_row(where, name, "not_text", f"is {show(value)}", expected)
    if not value:
        seen = "is an empty text" if isinstance(value, str) else "is an empty list"
        todo = "remove the row: an answer that is not there cannot be compared"
        refuse_row(where, name, "empty", seen, expected, todo)
    return value


def _tools(row: Row, where: RowRef) -> Any:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except (ValueError, RecursionError) as error:
        expected = "a list of JSON schemas, or the JSON text of one"
        refuse_row(where, "tools", "bad_tools", f"is not JSON ({error}): {show(tools)}", expected)


def _refuse_mixed(where: RowRef, kinds: dict[str, bool], answers: list[str]) -> NoReturn:
    words = {True: "text", False: "a list of messages"}
    odd = next((name for name in answers if kinds[name] != kinds[answers[0]]), "prompt")
    rest = [f"{name} {words[kind]}" for name, kind in kinds.items() if name != odd][:2]
    refuse_row(
        where,
        odd,
        "mixed_types",
        f"is {words[kinds[odd]]}, but {' and '.join(rest)}",
        "all of them text, or all of them lists of messages",
        "write text as messages: prompt [{'role': 'user', 'content': ...}], "
        "chosen [{'role': 'assistant', 'content': ...}]",
    )


def _refuse_conversation(
    error: ConversationError, where: RowRef, field: str, prompt_length: int
) -> NoReturn:
    """Say in a row's words what the rendering said in a conversation's."""
    details = vars(error)
    index = details.get("message_index")
    note = ""
    if details.get("field", "messages") != "messages":
        field = details["field"]
    elif index is not None and prompt_length:
        note = f" (messages are counted from the prompt's first, of {prompt_length})"
        field = "prompt" if index < prompt_length else field
    raise RowError(
        f"{where}, {field}: {error}{note}",
        **where._asdict(),
        field=field,
        reason=error.reason,
    ) from error


@cache
def _warn_of_legacy_columns() -> None:
    warnings.warn(
        "The columns chosen_input_ids and rejected_input_ids are TRL's old names: "
        "rename them to chosen_ids and rejected_ids.",
        FutureWarning,
        stacklevel=2,
    )
