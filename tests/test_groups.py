"""Rows of rankings and rated texts to groups, and what each objective refuses."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tiny import chatml_tokenizer

from raywards.errors import RowError
from raywards.groups import Ranking, Rating, columns_of, encode_group, is_conversational
from raywards.preferences import REASONS, Pair, encode_row
from raywards.rendering import Rendering
from raywards.rowset import RowRef

RENDERING = Rendering(chatml_tokenizer())
WHERE = RowRef("rows.jsonl", 17, 18)
USER = {"role": "user", "content": "What is the weather?"}
ANSWERS = [
    {"role": "assistant", "content": text} for text in ("It is cold in Paris.", "No.", "Yes.")
]
TEXTS = ["It is cold.", "No.", "Yes."]
PAIR = {"chosen": "It is cold.", "rejected": "No."}
RANKING = {"prompt": "What? ", "responses": TEXTS, "ranks": [1, 3, 2]}
CHATS = {"prompt": [USER], "responses": [[answer] for answer in ANSWERS], "ranks": [1, 3, 2]}
RATING = {"text": "It is cold.", "score": 3.5}
ATTRIBUTES = ["helpfulness", "verbosity"]


def encode(row: Any, objective: Any = "all_pairs", **options: Any) -> Pair | Ranking | Rating:
    options = {"max_length": None, "truncation": "drop"} | options
    return encode_group(row, WHERE, RENDERING, objective=objective, **options)


def test_a_ranking_has_the_tokens_that_pairs_of_its_responses_have() -> None:
    for row in (RANKING, CHATS):
        group = encode(row)
        assert isinstance(group, Ranking)
        for index, other in ((0, 1), (1, 2), (2, 0)):
            chosen, rejected = row["responses"][index], row["responses"][other]
            pair = encode({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
            assert pair.sequences == [group.sequences[index], group.sequences[other]]
    whole = {"responses": [[USER, answer] for answer in ANSWERS], "ranks": [1, 3, 2]}
    assert encode(whole) == encode(CHATS)
    loud = encode({**CHATS, "chat_template_kwargs": {"shout": True}})
    assert all("LOUD" in RENDERING.tokenizer.decode(ids) for ids in loud.sequences)
    tooled = encode({**CHATS, "tools": '[{"name": "search"}]'})
    assert all("search" in RENDERING.tokenizer.decode(ids) for ids in tooled.sequences)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2, 3], [1.0, 2.0, 3.0]),
        ([-0.9, -0.25, -0.5], [1.0, 3.0, 2.0]),  # scores, negated
        ([2, 2, 1], [2.0, 2.0, 1.0]),
        ([7, 7.0, 7], [1.0, 1.0, 1.0]),
        ([1e17, 1e17 + 16, 1e-300], [2.0, 3.0, 1.0]),  # fp32 would tie the first two
    ],
)
def test_ranks_become_places(given: list[float], expected: list[float]) -> None:
    group = encode({**RANKING, "ranks": given})
    assert isinstance(group, Ranking)
    assert group.ranks == expected
    if len(set(expected)) == 3:
        assert encode({**RANKING, "ranks": given}, "plackett_luce") == group


@pytest.mark.parametrize("objective", ["bradley_terry", "plackett_luce", "all_pairs"])
def test_a_pair_is_a_pair_under_every_objective_of_comparisons(objective: str) -> None:
    for row in (
        PAIR,
        {**PAIR, "margin": 0.5, "probability": 0.75},
        {"chosen_ids": [5, 6], "rejected_ids": [7]},
    ):
        expected = encode_row(row, WHERE, RENDERING, max_length=None, truncation="drop")
        assert encode(row, objective) == expected
        filled = dict.fromkeys(("responses", "ranks", "text", "response", "score"))
        assert encode({**filled, **row}, objective) == expected
    with pytest.raises(RowError, match="margin is missing"):
        encode(PAIR, objective, required=["margin"])
    if objective != "bradley_terry":  # what other rows have is asked of pairs alone
        assert isinstance(encode(RANKING, objective, required=["margin"]), Ranking)


def test_a_rating_is_a_text_or_a_prompt_and_a_response() -> None:
    [chosen, _] = encode({"prompt": "What? ", **PAIR}).sequences
    assert encode(RATING, "regression") == Rating(encode(PAIR).sequences[0], [3.5])
    parted = {"prompt": "What? ", "response": "It is cold.", "score": 3}
    assert encode(parted, "regression") == Rating(chosen, [3.0])
    alone = {"response": "It is cold.", "score": 3}
    assert encode(alone, "regression") == Rating(encode(PAIR).sequences[0], [3.0])
    [ids, *_] = encode(CHATS).sequences
    assert encode({"text": [USER, ANSWERS[0]], "score": -1}, "regression") == Rating(ids, [-1.0])
    split = {"prompt": [USER], "response": [ANSWERS[0]], "score": -1}
    assert encode(split, "regression") == Rating(ids, [-1.0])


def test_attributes_are_columns_and_some_may_be_missing() -> None:
    row = {"text": "It is cold.", "helpfulness": 3, "verbosity": None, "score": "not read"}
    group = encode(row, "regression", attributes=ATTRIBUTES)
    assert isinstance(group, Rating)
    assert group.scores == [3.0, None]
    back = encode(row, "regression", attributes=ATTRIBUTES[::-1])
    assert isinstance(back, Rating)
    assert back.scores == [None, 3.0]


def test_long_groups_are_refused_or_truncated_at_the_named_side() -> None:
    ranking, rating = encode(RANKING), encode(RATING, "regression")
    longest = max(map(len, ranking.sequences))
    assert encode(RANKING, max_length=longest) == ranking
    for group, row, objective in ((ranking, RANKING, "all_pairs"), (rating, RATING, "regression")):
        with pytest.raises(RowError, match="too long") as caught:
            encode(row, objective, max_length=3)
        assert caught.value.reason == "too_long"
        left = encode(row, objective, max_length=3, truncation="left")
        assert left.sequences == [ids[-3:] for ids in group.sequences]
    right = encode(RATING, "regression", max_length=3, truncation="right")
    assert right.sequences == [rating.sequences[0][:3]]
    with pytest.raises(RowError, match="truncated at the right") as caught:
        encode(RANKING, max_length=1, truncation="right")
    assert caught.value.reason == "identical"


def test_what_is_stored_of_each_kind() -> None:
    names = {"sequences", "margin", "probability", "ranks", "scores"}
    for group in (encode({**PAIR, "margin": 0.5}), encode(RANKING), encode(RATING, "regression")):
        columns = columns_of(group)
        assert columns.keys() == names
        assert columns["sequences"] == group.sequences
    assert columns_of(encode({**PAIR, "margin": 0.5}))["margin"] == 0.5
    assert columns_of(encode(RANKING))["ranks"] == [1.0, 3.0, 2.0]
    assert columns_of(encode(RATING, "regression"))["scores"] == [3.5]


def test_rows_of_messages_are_conversational() -> None:
    assert is_conversational(CHATS)
    assert is_conversational({"text": [USER, ANSWERS[0]]})
    assert is_conversational({"chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]})
    assert not any(map(is_conversational, (RANKING, RATING, PAIR)))


# name: (row, objective, field, reason, words of the message[, options])
BAD_ROWS: dict[str, tuple[Any, ...]] = {
    "not a mapping": ([1], "regression", "row", "not_object", "list [1]"),
    "ranking for pairs": (
        RANKING,
        "bradley_terry",
        "responses",
        "other_objective",
        "makes the row a ranking, which objective='bradley_terry' does not take\n"
        "  expected: a pair\n"
        "  to do:    set objective to plackett_luce or all_pairs",
    ),
    "rating for pairs": (RATING, "bradley_terry", "text", "other_objective", "a rated text"),
    "rating for rankings": (RATING, "all_pairs", "text", "other_objective", "a pair or a ranking"),
    "pair for ratings": (PAIR, "regression", "chosen", "other_objective", "a pair, which"),
    "ids for ratings": (
        {"chosen_ids": [5], "rejected_ids": [6]},
        "regression",
        "chosen_ids",
        "other_objective",
        "expected: a rated text",
    ),
    "ranking for ratings": (RANKING, "regression", "responses", "other_objective", "a ranking"),
    "nothing for rankings": ({"prompt": "a"}, "all_pairs", "chosen", "missing_field", "prompt"),
    "no ranks": ({"responses": TEXTS}, "all_pairs", "ranks", "missing_field", "beside responses"),
    "no responses": ({"ranks": [1, 2]}, "all_pairs", "responses", "missing_field", "beside ranks"),
    "responses text": (
        {**RANKING, "responses": "a"},
        "all_pairs",
        "responses",
        "bad_responses",
        "is str 'a'",
    ),
    "one response": (
        {"responses": ["a"], "ranks": [1]},
        "all_pairs",
        "responses",
        "bad_responses",
        "has 1 of them",
    ),
    "response number": (
        {**RANKING, "responses": ["a", 3, "b"]},
        "all_pairs",
        "responses[1]",
        "not_text",
        "is int 3",
    ),
    "response None": (
        {**RANKING, "responses": ["a", None, "b"]},
        "all_pairs",
        "responses[1]",
        "missing_field",
        "is None",
    ),
    "response empty": (
        {**RANKING, "responses": ["a", "", "b"]},
        "all_pairs",
        "responses[1]",
        "empty",
        "is an empty text",
    ),
    "responses mixed": (
        {"responses": ["a", [ANSWERS[0]], "b"], "ranks": [1, 2, 3]},
        "all_pairs",
        "responses[1]",
        "mixed_types",
        "is a list of messages, but responses[0] text",
    ),
    "prompt mixed": ({**CHATS, "prompt": "a"}, "all_pairs", "prompt", "mixed_types", "is text"),
    "message in a response": (
        {**CHATS, "responses": [[ANSWERS[0]], [{"role": "assistant"}]], "ranks": [1, 2]},
        "all_pairs",
        "responses[1]",
        "malformed",
        "messages[1].content is missing",
    ),
    "responses identical": (
        {**RANKING, "responses": ["a", "b", "a<|im_end|>"]},
        "all_pairs",
        "responses[2]",
        "identical",
        "as responses[0]",
    ),
    "ranks text": ({**RANKING, "ranks": "1"}, "all_pairs", "ranks", "bad_ranks", "is str '1'"),
    "ranks few": ({**RANKING, "ranks": [1, 2]}, "all_pairs", "ranks", "bad_ranks", "has 2 of them"),
    "rank text": (
        {**RANKING, "ranks": [1, "2", 3]},
        "all_pairs",
        "ranks",
        "bad_ranks",
        "has at place 1 str '2'",
    ),
    "rank NaN": (
        {**RANKING, "ranks": [1, 2, float("nan")]},
        "all_pairs",
        "ranks",
        "bad_ranks",
        "has at place 2 nan",
    ),
    "rank bool": ({**RANKING, "ranks": [True, 2, 3]}, "all_pairs", "ranks", "bad_ranks", "True"),
    "ranks tied": (
        {**RANKING, "ranks": [1, 2, 2]},
        "plackett_luce",
        "ranks",
        "tied_ranks",
        "set objective='all_pairs', where a tie is a half",
    ),
    "margin of a ranking": (
        {**RANKING, "margin": 0.5},
        "all_pairs",
        "margin",
        "bad_margin",
        "stands beside ranks",
    ),
    "probability of a ranking": (
        {**RANKING, "probability": 0.5},
        "all_pairs",
        "probability",
        "bad_probability",
        "stands beside ranks",
    ),
    "ranking too long": (RANKING, "all_pairs", "responses", "too_long", "8", {"max_length": 2}),
    "no text": (
        {"score": 3, "prompt": "a"},
        "regression",
        "text",
        "missing_field",
        "the row has score, prompt",
    ),
    "two texts": ({**RATING, "response": "a"}, "regression", "text", "two_texts", "response"),
    "prompt and text": ({**RATING, "prompt": "a"}, "regression", "prompt", "two_texts", "rename"),
    "text number": ({"text": 3, "score": 1}, "regression", "text", "not_text", "is int 3"),
    "text empty": ({"text": "", "score": 1}, "regression", "text", "empty", "empty text"),
    "no score": ({"text": "a"}, "regression", "score", "missing_score", "nobody rated it"),
    "score text": ({"text": "a", "score": "5"}, "regression", "score", "bad_score", "str '5'"),
    "score NaN": ({"text": "a", "score": float("nan")}, "regression", "score", "bad_score", "nan"),
    "score huge": ({"text": "a", "score": 10**400}, "regression", "score", "bad_score", "inf"),
    "no attribute": (
        {"text": "a", "score": 1},
        "regression",
        "helpfulness",
        "missing_score",
        "at least one of helpfulness, verbosity",
        {"attributes": ATTRIBUTES},
    ),
    "attribute bool": (
        {"text": "a", "verbosity": True},
        "regression",
        "verbosity",
        "bad_score",
        "is bool True",
        {"attributes": ATTRIBUTES},
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_file_row_and_field(name: str) -> None:
    row, objective, field, reason, words, *rest = BAD_ROWS[name]
    with pytest.raises(RowError) as caught:
        encode(row, objective, **(rest[0] if rest else {}))
    error, message = caught.value, str(caught.value)
    assert (error.source, error.row, error.field) == ("rows.jsonl", 17, field), message
    assert error.reason == reason
    assert reason in REASONS
    assert message.startswith("rows.jsonl row 17 (line 18)")
    assert words in message
    assert len(message.splitlines()) < 12
    assert max(map(len, message.splitlines())) < 400
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
