"""Rows to pairs: TRL's formats give TRL's tokens, and each bad row says what is wrong with it."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import test_groups
from tiny import chatml_tokenizer, llama_like_tokenizer, tiny_qwen2

from raywards import groups, preferences
from raywards.errors import ConfigError, RowError
from raywards.preferences import REASONS, Pair, encode_row
from raywards.rendering import Rendering
from raywards.rowset import RowRef
from raywards.sources import COLUMNS, read_rows

RENDERING = Rendering(chatml_tokenizer())
WHERE = RowRef("pairs.jsonl", 17, 18)
USER = {"role": "user", "content": "What is the weather?"}
GOOD = {"role": "assistant", "content": "It is cold in Paris."}
BAD = {"role": "assistant", "content": "No."}
STANDARD = {"chosen": "It is cold.", "rejected": "No."}
CONVERSATIONAL = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


def encode(row: Any, *, rendering: Rendering = RENDERING, **options: Any) -> Pair:
    options = {"max_length": None, "truncation": "drop"} | options
    return encode_row(row, WHERE, rendering, **options)


FORMATS: dict[str, list[dict[str, Any]]] = {
    "standard, implicit": [STANDARD, {"chosen": "Yes.<|im_end|>", "rejected": "The dog."}],
    "standard, explicit": [{"prompt": "What? ", **STANDARD}, {"prompt": "How? ", **STANDARD}],
    "conversational, implicit": [CONVERSATIONAL, {"chosen": [GOOD], "rejected": [BAD]}],
    "conversational, explicit": [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}],
    "tools as a list": [{**CONVERSATIONAL, "tools": [{"name": "search", "days": 3}]}],
    "tools as JSON": [{**CONVERSATIONAL, "tools": '[{"name": "search", "days": 3}]'}],
    "template variables": [{**CONVERSATIONAL, "chat_template_kwargs": {"shout": True}}],
    "tools in template variables": [
        {
            **CONVERSATIONAL,
            "tools": [{"name": "search"}],
            "chat_template_kwargs": {"tools": [{"name": "other"}]},
        }
    ],
    "already tokenised": [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6]}],
}


def test_every_format_gives_the_tokens_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    folder = str(tiny_qwen2(tmp_path / "model"))
    config = trl.RewardConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none"
    )
    for name, rows in FORMATS.items():
        table = datasets.Dataset.from_list(rows)
        trainer = trl.RewardTrainer(model=folder, args=config, train_dataset=table)
        # TRL's tokenizer and the table's rows: the comparison is of the encoding alone.
        rendering = Rendering(trainer.processing_class)
        pairs = [encode(row, rendering=rendering) for row in table]
        theirs = trainer.train_dataset
        assert [pair.chosen_ids for pair in pairs] == list(theirs["chosen_ids"]), name
        assert [pair.rejected_ids for pair in pairs] == list(theirs["rejected_ids"]), name
        # JSON rows, which no table has filled with None, give the same.
        assert [encode(row, rendering=rendering) for row in rows] == pairs, name


def test_formats_are_told_apart_row_by_row() -> None:
    rows = [row for group in FORMATS.values() for row in group]
    pairs = [encode(row) for row in rows]
    assert len({tuple(pair.chosen_ids) for pair in pairs}) >= 9
    assert pairs[0].chosen_ids[-1] == RENDERING.tokenizer.eos_token_id
    decode = RENDERING.tokenizer.decode
    assert decode(encode(FORMATS["standard, explicit"][0]).chosen_ids).startswith("What? It is")
    assert "LOUD" in decode(encode(FORMATS["template variables"][0]).chosen_ids)
    override = encode(FORMATS["tools in template variables"][0])
    assert '"other"' in decode(override.chosen_ids)
    assert '"search"' not in decode(override.chosen_ids)


def test_a_key_of_none_counts_as_absent() -> None:
    names = ("prompt", "margin", "tools", "chat_template_kwargs", "chosen_ids", "rejected_ids")
    filled = dict.fromkeys(names)
    for row in (STANDARD, CONVERSATIONAL):
        assert encode({**row, **filled}) == encode(row)
    message = {"role": "assistant", "content": "Yes.", "tool_calls": None, "name": None}
    padded = {"chosen": [message], "rejected": [BAD]}
    assert encode(padded) == encode({"chosen": [{**GOOD, "content": "Yes."}], "rejected": [BAD]})


def test_a_margin_is_a_float_and_its_absence_is_none() -> None:
    assert encode(STANDARD).margin is None
    assert encode({**STANDARD, "margin": 2}).margin == 2.0
    assert encode({**STANDARD, "margin": -0.5}, required=["margin"]).margin == -0.5


@pytest.mark.parametrize("value", [0, 0.25, 1, 1.0])
def test_a_probability_is_from_0_to_1(value: float) -> None:
    assert encode(STANDARD).probability is None
    assert encode({**STANDARD, "probability": value}).probability == value


def test_legacy_columns_work_and_warn_once() -> None:
    preferences._warn_of_legacy_columns.cache_clear()
    row = {"chosen_input_ids": [5, 6], "rejected_input_ids": [5]}
    with pytest.warns(FutureWarning, match="chosen_ids"):
        assert encode(row) == Pair([5, 6], [5], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(row)


def test_tokenised_columns_win_over_text_only_where_both_are_there() -> None:
    assert encode({**STANDARD, "chosen_ids": [5], "rejected_ids": [6]}).chosen_ids == [5]
    assert encode({**STANDARD, "chosen_ids": [5]}) == encode(STANDARD)


def test_a_long_row_is_refused_or_truncated_at_the_named_side() -> None:
    row = {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [5, 6]}
    assert encode(row, max_length=4).chosen_ids == [1, 2, 3, 4]
    assert encode(row, max_length=2, truncation="left") == Pair([3, 4], [5, 6], None)
    assert encode(row, max_length=2, truncation="right") == Pair([1, 2], [5, 6], None)
    with pytest.raises(RowError, match="chosen has 4 tokens, rejected 2"):
        encode(row, max_length=3)


def test_truncation_that_leaves_two_equal_sequences_is_refused() -> None:
    row = {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4]}
    with pytest.raises(RowError, match="truncated at the right") as caught:
        encode(row, max_length=2, truncation="right")
    assert caught.value.reason == "identical"
    assert encode(row, max_length=2, truncation="left").chosen_ids == [2, 3]


# name: (row, field, reason, words of the message[, options])
BAD_ROWS: dict[str, tuple[Any, ...]] = {
    "not a mapping": ([1], "row", "not_object", "list [1]"),
    "no rejected": ({"chosen": "a"}, "rejected", "missing_field", "is missing"),
    "no columns": ({}, "chosen", "missing_field", "no columns"),
    "typo": ({"choosen": "a", "rejected": "b"}, "chosen", "missing_field", "mean 'choosen'?"),
    "other format": ({"prompt": "a", "completion": "b"}, "chosen", "missing_field", "completion"),
    "chosen None": ({"chosen": None, "rejected": "b"}, "chosen", "missing_field", "is None"),
    "number": ({"chosen": "a", "rejected": 3.5}, "rejected", "not_text", "is float 3.5"),
    "bool": ({"chosen": True, "rejected": "b"}, "chosen", "not_text", "is bool True"),
    "one message": ({"chosen": GOOD, "rejected": [BAD]}, "chosen", "not_text", "into a list"),
    "prompt number": ({"prompt": 3, **STANDARD}, "prompt", "not_text", "is int 3"),
    "empty text": ({"chosen": "", "rejected": "b"}, "chosen", "empty", "is an empty text"),
    "empty answer": ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected", "empty", "empty"),
    "empty list": ({"chosen": [], "rejected": [BAD]}, "chosen", "empty", "is an empty list"),
    "prompt text": (
        {"prompt": "a", "chosen": [GOOD], "rejected": [BAD]},
        "prompt",
        "mixed_types",
        "prompt is text, but chosen a list of messages",
    ),
    "prompt list": ({"prompt": [USER], **STANDARD}, "prompt", "mixed_types", "prompt is a list"),
    "rejected plain": (
        {"chosen": [USER, GOOD], "rejected": "b"},
        "rejected",
        "mixed_types",
        "rejected is text, but chosen a list of messages",
    ),
    "no role": ({"chosen": [{"content": "x"}], "rejected": [BAD]}, "chosen", "malformed", "role"),
    "content number": (
        {"chosen": [USER, GOOD], "rejected": [USER, {"role": "assistant", "content": 3}]},
        "rejected",
        "malformed",
        "messages[1].content is int",
    ),
    "message in the prompt": (
        {"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]},
        "prompt",
        "malformed",
        "messages[0].content is missing",
    ),
    "message after the prompt": (
        {"prompt": [USER], "chosen": ["Hi"], "rejected": [BAD]},
        "chosen",
        "malformed",
        "messages[1] is str; expected a mapping with 'role' and 'content'. "
        "(messages are counted from the prompt's first, of 1)",
    ),
    "image": (
        {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": [BAD]},
        "chosen",
        "unsupported",
        "'image'",
    ),
    "surrogate": ({"chosen": "a\ud800", "rejected": "b"}, "chosen", "surrogate", "surrogate"),
    "template": (
        {"chosen": [GOOD], "rejected": [{"role": "bot", "content": "x"}]},
        "rejected",
        "template",
        "Unknown role bot",
    ),
    "tools not JSON": ({**CONVERSATIONAL, "tools": "[{]"}, "tools", "bad_tools", "is not JSON"),
    "tools not a list": ({**CONVERSATIONAL, "tools": '{"a": 1}'}, "tools", "bad_tools", "is dict"),
    "tools of text": ({**CONVERSATIONAL, "tools": ["f"]}, "tools", "bad_tools", "tools[0] is str"),
    "kwargs text": (
        {**CONVERSATIONAL, "chat_template_kwargs": "x"},
        "chat_template_kwargs",
        "bad_kwargs",
        "is str",
    ),
    "kwargs reserved": (
        {**CONVERSATIONAL, "chat_template_kwargs": {"tokenize": False}},
        "chat_template_kwargs",
        "bad_kwargs",
        "'tokenize'",
    ),
    "identical texts": ({"chosen": "a", "rejected": "a"}, "rejected", "identical", "same 2 tokens"),
    "identical but for EOS": (
        {"chosen": "a", "rejected": "a<|im_end|>"},
        "rejected",
        "identical",
        "same 2 tokens",
    ),
    "margin text": ({**STANDARD, "margin": "0.5"}, "margin", "bad_margin", "is str '0.5'"),
    "margin bool": ({**STANDARD, "margin": True}, "margin", "bad_margin", "is bool True"),
    "margin NaN": ({**STANDARD, "margin": float("nan")}, "margin", "bad_margin", "is nan"),
    "margin infinite": ({**STANDARD, "margin": float("inf")}, "margin", "bad_margin", "is inf"),
    "margin huge": ({**STANDARD, "margin": 10**400}, "margin", "bad_margin", "is inf"),
    "margin None": (
        {**STANDARD, "margin": None},
        "margin",
        "missing_margin",
        "other rows have one",
        {"required": ["margin"]},
    ),
    "probability above": (
        {**STANDARD, "probability": 80},
        "probability",
        "bad_probability",
        "is 80.0\n  expected: a number from 0 to 1",
    ),
    "probability below": (
        {**STANDARD, "probability": -0.1},
        "probability",
        "bad_probability",
        "is -0.1",
    ),
    "probability NaN": (
        {**STANDARD, "probability": float("nan")},
        "probability",
        "bad_probability",
        "is nan",
    ),
    "probability text": (
        {**STANDARD, "probability": "0.8"},
        "probability",
        "bad_probability",
        "is str '0.8'",
    ),
    "probability None": (
        {**STANDARD, "probability": None},
        "probability",
        "missing_probability",
        "1 changes nothing",
        {"required": ["probability"]},
    ),
    "ids of one": ({"chosen_ids": [5]}, "rejected_ids", "missing_field", "there is chosen_ids"),
    "ids empty": ({"chosen_ids": [], "rejected_ids": [5]}, "chosen_ids", "empty", "empty list"),
    "ids text": ({"chosen_ids": "5", "rejected_ids": [5]}, "chosen_ids", "bad_ids", "is str '5'"),
    "ids float": (
        {"chosen_ids": [5], "rejected_ids": [5.0]},
        "rejected_ids",
        "bad_ids",
        "has float 5.0 at position 0",
    ),
    "ids bool": ({"chosen_ids": [5, True], "rejected_ids": [5]}, "chosen_ids", "bad_ids", "bool"),
    "ids None": ({"chosen_ids": [None], "rejected_ids": [5]}, "chosen_ids", "bad_ids", "has None"),
    "ids negative": (
        {"chosen_ids": [5, -100], "rejected_ids": [5]},
        "chosen_ids",
        "bad_ids",
        "id -100 at position 1",
    ),
    "ids too large": (
        {"chosen_ids": [5], "rejected_ids": [99_999]},
        "rejected_ids",
        "bad_ids",
        "id 99999 at position 0",
    ),
    "ids identical": (
        {"chosen_ids": [5], "rejected_ids": [5]},
        "rejected",
        "identical",
        "same 1 tokens",
    ),
    "too long": (STANDARD, "chosen", "too_long", "max_length = 2", {"max_length": 2}),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_file_row_and_field(name: str) -> None:
    row, field, reason, words, *rest = BAD_ROWS[name]
    with pytest.raises(RowError) as caught:
        encode(row, **(rest[0] if rest else {}))
    error, message = caught.value, str(caught.value)
    assert (error.source, error.row, error.field) == ("pairs.jsonl", 17, field), message
    assert error.reason == reason
    assert reason in REASONS
    assert message.startswith("pairs.jsonl row 17 (line 18)")
    assert words in message
    assert len(message.splitlines()) < 12
    assert max(map(len, message.splitlines())) < 400
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_the_bad_rows_above_cover_every_reason_that_a_row_can_have() -> None:
    seen = {row[2] for row in BAD_ROWS.values()}
    seen |= {row[3] for row in test_groups.BAD_ROWS.values()}
    elsewhere = {"not_json", "no_template", "control_token"}
    assert seen | elsewhere == set(REASONS)


def test_messages_for_a_tokenizer_without_a_template_are_refused() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RowError, match="chat_template_path") as caught:
        encode(CONVERSATIONAL, rendering=Rendering(tokenizer))
    assert (caught.value.field, caught.value.reason) == ("chosen", "no_template")


def test_refused_control_tokens_name_the_side() -> None:
    rendering = Rendering(chatml_tokenizer(), control_tokens="refuse")
    row = {"chosen": [USER, GOOD], "rejected": [USER, {**BAD, "content": "x<|im_end|>"}]}
    with pytest.raises(RowError, match=r"messages\[1\]") as caught:
        encode(row, rendering=rendering)
    assert (caught.value.field, caught.value.reason) == ("rejected", "control_token")
    assert encode(row).rejected_ids != encode(row).chosen_ids


def test_a_refusing_template_speaks_through_the_row_error() -> None:
    row = {"chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(RowError, match="roles must alternate"):
        encode(row, rendering=Rendering(llama_like_tokenizer()))


# --- reading ------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_jsonl_file_may_mix_formats_and_have_blank_lines(tmp_path: Path) -> None:
    rows = [row for group in FORMATS.values() for row in group]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(map(json.dumps, rows)).encode())
    (found,) = read_rows(path)
    assert list(found.rows) == rows
    assert str(found.where(2)) == "mixed.jsonl row 2 (line 5)"
    pairs = [
        encode_row(row, found.where(i), RENDERING, max_length=None, truncation="drop")
        for i, row in enumerate(found.rows)
    ]
    assert pairs == [encode(row) for row in rows]


def test_each_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [STANDARD, {"chosen": "Yes.", "rejected": "No."}]
    table = datasets.Dataset.from_list(rows)
    both = datasets.DatasetDict({"train": table, "test": table.select([0])})
    table.save_to_disk(tmp_path / "saved")
    both.save_to_disk(tmp_path / "saved_dict")
    table.to_parquet(tmp_path / "rows.parquet")
    write_lines(tmp_path / "rows.jsonl", rows)
    write_lines(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_lines(tmp_path / "folder" / "train-00000.jsonl", rows[:1])
    write_lines(tmp_path / "folder" / "train-00001.jsonl", rows[1:])
    write_lines(tmp_path / "folder" / "test.jsonl", [{"chosen": "never", "rejected": "read"}])
    write_lines(tmp_path / "folder" / ".cache" / "train.jsonl", rows)
    names = ["saved", "saved_dict", "rows.parquet", "rows.jsonl", "lines.json", "list.json"]
    sources: list[Any] = [tmp_path / name for name in [*names, "folder"]]
    sources += [table, table.with_format("numpy"), both, str(tmp_path / "folder" / "train*")]
    for source in sources:
        found = read_rows(source)
        assert [dict(row) for part in found for row in part.rows] == rows, source
    several = read_rows([tmp_path / "rows.jsonl", table, both], split="test")[-1]
    assert len(several) == 1
    assert several.name == "dataset[2]['test']"


@pytest.mark.parametrize("name", ["margin", "probability"])
def test_a_number_is_required_where_some_row_has_one(name: str, tmp_path: Path) -> None:
    rows = [{**STANDARD, name: None}, {**STANDARD, name: 1.0}]
    sources = [datasets.Dataset.from_list(rows), write_lines(tmp_path / "a.jsonl", rows)]
    assert [found.has(name) for found in read_rows(sources)] == [True, True]
    empty = [{**STANDARD, name: None}]
    sources = [datasets.Dataset.from_list(empty), write_lines(tmp_path / "b.jsonl", empty)]
    sources.append(datasets.Dataset.from_list([STANDARD]))
    assert [found.has(name) for found in read_rows(sources)] == [False] * 3


BAD_FILES: dict[str, tuple[bytes, int, int | None, str, str]] = {
    "not json": (b'{"chosen": "a"}\n\n{"chosen": \n', 1, 3, "not_json", "at line 3, column 11"),
    "a list a line": (b'{"chosen": "a"}\n3\n', 1, 2, "not_object", "is int 3"),
    "latin-1": (b'{"chosen": "caf\xe9"}\n', 0, 1, "not_json", "is not UTF-8: byte 0xe9"),
    "a key twice": (
        b'{"chosen": "a", "chosen": "b"}\n',
        0,
        1,
        "not_json",
        "'chosen' appears twice",
    ),
    "cut off": (b'{"chosen": "a"}\n{"cho', 1, 2, "not_json", "is not JSON"),
    "too deep": (b"[" * 200_000, 0, None, "not_json", "is not"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_line_that_is_no_row_is_refused_with_its_number(name: str, tmp_path: Path) -> None:
    content, row, line, reason, words = BAD_FILES[name]
    path = tmp_path / ("bad.json" if line is None else "bad.jsonl")
    path.write_bytes(content)
    with pytest.raises(RowError) as caught:
        list(read_rows(str(path))[0].rows)
    error = caught.value
    assert (error.source, error.row, error.line) == (path.name, row, line)  # type: ignore[attr-defined]
    assert error.reason == reason
    assert reason in REASONS
    assert words in str(error)
    assert len(str(error)) < 600


def test_a_row_of_a_json_list_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"chosen": "a"}, "b"]')
    with pytest.raises(RowError, match=r"rows\.json row 1: row is str 'b'"):
        read_rows(tmp_path / "rows.json")


def no_hub(*args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"looked up on the hub: {args} {kwargs}")


LOCAL_NAMES = [
    "pairz.jsonl",
    "./pairs",
    "/nowhere/at/all/pairs.jsonl",
    "~/nowhere/pairs",
    "data/pairs",
    "a/b/c",
    "*.jsonl.bak",
    "s3://bucket/pairs.jsonl",
    "my data",
]


@pytest.mark.parametrize("name", LOCAL_NAMES)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    write_lines(tmp_path / "pairs.jsonl", [STANDARD])
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_rows(name)
    assert name in str(caught.value)


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs_train.jsonl", [STANDARD])
    with pytest.raises(ConfigError, match=r"Did you mean 'pairs_train\.jsonl'\?") as caught:
        read_rows(tmp_path / "pair_train.jsonl")
    assert str(tmp_path / "pair_train.jsonl") in str(caught.value)


def test_a_hub_id_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list([STANDARD])
    calls = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,) = read_rows("trl-lib/ultrafeedback_binarized", split="test", config="en")
    assert calls == [("trl-lib/ultrafeedback_binarized", "en", "test")]
    assert (found.name, len(found)) == ("trl-lib/ultrafeedback_binarized", 1)


def test_a_hub_id_that_cannot_be_loaded_says_that_no_file_has_that_name_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match="no local file or folder 'owner/pairs'"):
        read_rows("owner/pairs")


def test_sources_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([STANDARD])
    stream = table.to_iterable_dataset()
    (tmp_path / "rows.csv").write_text("chosen,rejected\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "splits" / "test.jsonl", [STANDARD])
    cases: list[tuple[Any, str]] = [
        (datasets.IterableDatasetDict({"training": stream}), "Did you mean 'training'"),
        ({"chosen": ["a"], "rejected": ["b"]}, "dataset is dict"),
        ({"text": ["a", "b"], "score": [1.0, 2.0]}, "Dataset.from_dict"),
        ({"responses": [["a", "b"]], "ranks": [[1, 2]]}, "Dataset.from_dict"),
        ({"prompt": ["a"], "response": ["b"], "clarity": [None]}, "Dataset.from_dict"),
        ({"prompt": ["a"], "response": ["b"]}, "Dataset.from_dict"),
        ({"chosen_ids": [[1]], "rejected_ids": [[2]]}, "Dataset.from_dict"),
        ({"text": "a", "score": 1.0}, "Dataset.from_dict"),
        ({"good": tmp_path / "empty.jsonl"}, "empty.jsonl has no rows"),
        ({}, "dataset is dict"),
        (datasets.DatasetDict({"training": table}), "Did you mean 'training'"),
        ([[STANDARD]], "Dataset.from_list"),
        (3, "is int 3"),
        ([], "is empty"),
        (tmp_path / "rows.csv", "suffix '.csv'"),
        (tmp_path / "broken.parquet", "not a readable Parquet"),
        (tmp_path / "empty.jsonl", "empty.jsonl has no rows"),
        (table.select([]), "dataset has no rows"),
        (tmp_path / "folder", "holds no .jsonl"),
        (tmp_path / "splits", "no file of the split 'train'; it has test.jsonl"),
    ]
    for source, words in cases:
        with pytest.raises(ConfigError) as caught:
            read_rows(source)
        assert words in str(caught.value), source
        assert len(str(caught.value).splitlines()) < 12


def test_a_name_that_is_also_a_column_may_be_a_sources(tmp_path: Path) -> None:
    """Only lists of texts under such names are columns."""
    write_lines(tmp_path / "a.jsonl", [STANDARD])
    table = datasets.Dataset.from_list([STANDARD])
    sources = {"text": str(tmp_path / "a.jsonl"), "prompt": [table], "code": [tmp_path / "a.jsonl"]}
    assert [rows.group for rows in read_rows(sources)] == ["text", "prompt", "code"]


def test_every_column_of_a_row_is_known_to_be_one() -> None:
    known = {name for names, _ in groups._KINDS.values() for name in names}
    assert known | preferences.NUMBERS.keys() < COLUMNS
