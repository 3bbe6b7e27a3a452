"""Prepared pairs: equal to the encoded rows, found again, and never half there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny import chatml_tokenizer, llama_like_tokenizer

from raywards.errors import ConfigError, RowError
from raywards.packing import pack_groups
from raywards.preferences import encode_row
from raywards.rendering import Rendering
from raywards.sources import RowRef
from raywards.train import prepare as module
from raywards.train.prepare import EncodeSettings, Prepared, prepare
from raywards.train.table import PairTable

SETTINGS = EncodeSettings(max_length=64, truncation="drop", on_bad_row="error")
DROPPING = EncodeSettings(max_length=64, truncation="drop", on_bad_row="drop")


@pytest.fixture(scope="module")
def rendering() -> Rendering:
    return Rendering(chatml_tokenizer())


def text_rows(count: int, word: str = "good") -> list[dict[str, Any]]:
    return [{"chosen": f"{word} {i} " * (1 + i % 3), "rejected": f"bad {i}"} for i in range(count)]


def chat_rows(count: int) -> list[dict[str, Any]]:
    def chat(answer: str, i: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": answer},
        ]

    return [{"chosen": chat("yes", i), "rejected": chat("no", i)} for i in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def table_of(prepared: Prepared) -> list[dict[str, Any]]:
    table = PairTable(prepared.folder)
    columns = table.take(list(range(len(table))))
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def encoded(rows: list[dict[str, Any]], rendering: Rendering) -> list[tuple[Any, ...]]:
    pairs = [
        encode_row(row, RowRef("s", i), rendering, max_length=64, truncation="drop")
        for i, row in enumerate(rows)
    ]
    return [(pair.chosen_ids, pair.rejected_ids, pair.margin) for pair in pairs]


def read_back(prepared: Prepared) -> list[tuple[Any, ...]]:
    return [(*p["sequences"], p["margin"]) for p in table_of(prepared)]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("make", [text_rows, chat_rows])
def test_the_shards_hold_the_encoded_rows_in_order(
    make: Any, tmp_path: Path, rendering: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_PER_SHARD", 7)
    monkeypatch.setattr(module, "_ROWS_PER_CHUNK", 4)
    rows = make(30)
    prepared = prepare(
        datasets.Dataset.from_list(rows), rendering, SETTINGS, tmp_path, name="train"
    )
    assert len(list(prepared.folder.glob("pairs-*.arrow"))) == 5
    assert (prepared.num_rows, prepared.num_pairs, prepared.dropped) == (30, 30, {})
    assert prepared.conversational == (make is chat_rows)
    assert prepared.numbers == []
    expected = encoded(rows, rendering)
    assert read_back(prepared) == expected
    table = PairTable(prepared.folder)
    assert table.lengths == [max(len(chosen), len(rejected)) for chosen, rejected, _ in expected]
    assert table.tokens == [
        len(pack_groups([[chosen, rejected]]).input_ids) for chosen, rejected, _ in expected
    ]
    shared = sum(len(a) + len(b) for a, b, _ in expected) - sum(table.tokens)
    assert (shared > 0) == (make is chat_rows)
    assert table.take([29, 0])["sequences"] == [list(expected[i][:2]) for i in (29, 0)]
    assert [pair["row"] for pair in table_of(prepared)] == list(range(30))
    ends = {ids[-1] for chosen, rejected, _ in expected for ids in (chosen, rejected)}
    assert prepared.last_ids == sorted(ends)
    assert [path.name for path in tmp_path.iterdir()] == [prepared.folder.name]


@pytest.mark.parametrize("name", ["margin", "probability"])
def test_numbers_are_kept(name: str, tmp_path: Path, rendering: Rendering) -> None:
    rows = [{**row, name: i / 4} for i, row in enumerate(text_rows(4))]
    prepared = prepare(write(tmp_path / "m.jsonl", rows), rendering, SETTINGS, tmp_path, name="t")
    assert prepared.numbers == [name]
    assert PairTable(prepared.folder).take([3, 1])[name] == [0.75, 0.25]


@pytest.mark.parametrize("name", ["margin", "probability"])
def test_a_number_that_some_rows_of_a_file_have_is_missed_in_the_others(
    name: str, tmp_path: Path, rendering: Rendering
) -> None:
    rows = text_rows(4)
    write(tmp_path / "without.jsonl", rows)
    rows[1][name] = 0.5
    some = write(tmp_path / "some.jsonl", rows)
    with pytest.raises(RowError, match=f"{name} is missing or None, but other rows") as caught:
        prepare(some, rendering, SETTINGS, tmp_path, name="t")
    assert caught.value.reason == f"missing_{name}"
    for row in rows:
        row[name] = 0.5
    both = [tmp_path / "without.jsonl", write(tmp_path / "with.jsonl", rows)]
    assert prepare(both, rendering, SETTINGS, tmp_path, name="t").num_pairs == 8


RANKED = EncodeSettings(64, "drop", "error", "all_pairs")
RATED = EncodeSettings(64, "drop", "error", "regression", ("helpful", "long"))


def test_rankings_and_pairs_among_them_are_kept(tmp_path: Path, rendering: Rendering) -> None:
    rows = [
        {"prompt": "same start ", "responses": ["one", "two two", "three"], "ranks": [2, 9, 2]},
        {"chosen": "good", "rejected": "bad", "probability": 0.75},
    ]
    source = write(tmp_path / "r.jsonl", rows)
    prepared = prepare(source, rendering, RANKED, tmp_path, name="t")
    ranking, pair = table_of(prepared)
    assert ranking["ranks"] == [1.0, 2.0, 1.0]
    assert pair["ranks"] is None
    assert pair["probability"] == 0.75
    assert ranking["probability"] is None
    assert pair["sequences"] == [rendering.encode_text(text) for text in ("good", "bad")]
    texts = ["same start one", "same start two two", "same start three"]
    assert ranking["sequences"] == [rendering.encode_text(text) for text in texts]
    table = PairTable(prepared.folder)
    for index, group in enumerate((ranking, pair)):
        assert table.tokens[index] == len(pack_groups([group["sequences"]]).input_ids)
        assert table.lengths[index] == max(map(len, group["sequences"]))
    assert table.tokens[0] < sum(map(len, ranking["sequences"]))
    assert table.most_sequences == 3


def test_scores_are_kept_and_where_one_is_missing(tmp_path: Path, rendering: Rendering) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"text": "fine", "helpful": 2, "long": 0.5},
        {"text": chat, "long": -1},
        {"prompt": chat[:1], "response": chat[1:], "helpful": 0},
    ]
    source = write(tmp_path / "r.jsonl", rows)
    prepared = prepare(source, rendering, RATED, tmp_path, name="t")
    found = table_of(prepared)
    assert [row["scores"] for row in found] == [[2.0, 0.5], [None, -1.0], [0.0, None]]
    assert found[1]["sequences"] == found[2]["sequences"]
    assert found[0]["sequences"] == [rendering.encode_text("fine")]
    assert prepared.conversational
    table = PairTable(prepared.folder)
    assert table.tokens == table.lengths == [len(row["sequences"][0]) for row in found]
    assert table.most_sequences == 1
    again = prepare(source, rendering, replace(RATED, attributes=("long",), on_bad_row="drop"),
                    tmp_path, name="t")  # fmt: skip
    assert again.fingerprint != prepared.fingerprint
    assert again.dropped == {"missing_score": 1}


def test_rows_left_out_are_counted_by_reason(tmp_path: Path, rendering: Rendering) -> None:
    rows = [
        *text_rows(3),
        {"chosen": "word " * 200, "rejected": "short"},
        {"chosen": "same", "rejected": "same"},
        {"chosen": "no other side"},
        {"chosen": "", "rejected": "empty"},
        {"chosen": "same", "rejected": "same"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    prepared = prepare(source, rendering, DROPPING, tmp_path, name="train")
    assert (prepared.num_rows, prepared.num_pairs) == (8, 3)
    assert prepared.dropped == {"too_long": 1, "identical": 2, "missing_field": 1, "empty": 1}
    assert read_back(prepared) == encoded(rows[:3], rendering)


def test_long_pairs_are_dropped_and_counted_also_where_bad_rows_are_errors(
    tmp_path: Path, rendering: Rendering
) -> None:
    rows = [*text_rows(2), {"chosen": "word " * 200, "rejected": "short"}]
    source = write(tmp_path / "rows.jsonl", rows)
    assert prepare(source, rendering, SETTINGS, tmp_path, name="t").dropped == {"too_long": 1}
    cut = EncodeSettings(max_length=64, truncation="left", on_bad_row="error")
    kept = prepare(source, rendering, cut, tmp_path, name="t")
    assert (kept.num_pairs, kept.dropped) == (3, {})
    assert max(PairTable(kept.folder).lengths) == 64


def test_several_sources_in_several_formats_follow_each_other(
    tmp_path: Path, rendering: Rendering
) -> None:
    texts, chats, more = text_rows(3), chat_rows(2), text_rows(2, "better")
    parquet = tmp_path / "more.parquet"
    datasets.Dataset.from_list(more).to_parquet(str(parquet))
    sources = [write(tmp_path / "a.jsonl", texts), datasets.Dataset.from_list(chats), parquet]
    prepared = prepare(sources, rendering, SETTINGS, tmp_path / "prepared", name="train")
    assert read_back(prepared) == encoded([*texts, *chats, *more], rendering)
    assert not prepared.conversational  # 2 of 7
    places = [(pair["source"], pair["row"]) for pair in table_of(prepared)]
    assert places[:3] == [("a.jsonl", 0), ("a.jsonl", 1), ("a.jsonl", 2)]
    assert places[3:5] == [("dataset[1]", 0), ("dataset[1]", 1)]
    assert places[5:] == [("more.parquet", 0), ("more.parquet", 1)]


# ---------------------------------------------------------------- what is refused


def test_bad_rows_are_told_together_with_file_and_row(tmp_path: Path, rendering: Rendering) -> None:
    rows = [
        *text_rows(2),
        {"chosen": "same", "rejected": "same"},
        *text_rows(1),
        {"chosen": "alone"},
        {"chosen": 5, "rejected": "x"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RowError) as caught:
        prepare(source, rendering, SETTINGS, tmp_path / "prepared", name="train")
    text = str(caught.value)
    assert (caught.value.source, caught.value.row) == ("rows.jsonl", 2)
    assert caught.value.reason == "identical"
    for part in ("rows.jsonl row 2", "rows.jsonl row 4", "rows.jsonl row 5", "on_bad_row"):
        assert part in text
    assert len(text.splitlines()) < 15
    assert list((tmp_path / "prepared").iterdir()) == []


def test_a_file_full_of_bad_rows_is_one_screen(tmp_path: Path, rendering: Rendering) -> None:
    source = write(tmp_path / "rows.jsonl", [{"chosen": "x"}] * 1000)
    with pytest.raises(RowError) as caught:
        prepare(source, rendering, SETTINGS, tmp_path / "prepared", name="train")
    assert len(str(caught.value).splitlines()) < 20


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.trains)])
def test_no_pair_left_is_an_error_that_says_why(
    num_proc: int, tmp_path: Path, rendering: Rendering
) -> None:
    rows = [{"chosen": "word " * 200, "rejected": "short"}] * 3
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=r"train: no pair is left of 3 rows \(3 too_long"):
        prepare(source, rendering, SETTINGS, tmp_path / "p", name="train", num_proc=num_proc)
    assert list((tmp_path / "p").iterdir()) == []


def test_an_empty_source_is_an_error(tmp_path: Path, rendering: Rendering) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        prepare(write(tmp_path / "e.jsonl", []), rendering, SETTINGS, tmp_path, name="train")


# ---------------------------------------------------------------- found again


def test_a_second_call_finds_what_the_first_prepared(
    tmp_path: Path, rendering: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode_chunk = module._encode_chunk
    monkeypatch.setattr(
        module, "_encode_chunk", lambda *args: (calls.append(1), encode_chunk(*args))[1]
    )
    source = write(tmp_path / "rows.jsonl", text_rows(5))
    first = prepare(source, rendering, SETTINGS, tmp_path / "p", name="train")
    assert calls == [1]
    again = prepare(source, Rendering(chatml_tokenizer()), SETTINGS, tmp_path / "p", name="train")
    assert calls == [1]
    assert again == first
    # A folder without its last file is not prepared: it is made anew.
    (first.folder / "prepared.json").unlink()
    assert prepare(source, rendering, SETTINGS, tmp_path / "p", name="train") == first
    assert calls == [1, 1]


def test_a_shard_that_is_lost_or_cut_off_is_made_anew(tmp_path: Path, rendering: Rendering) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(5))
    first = prepare(source, rendering, SETTINGS, tmp_path / "p", name="train")
    expected = read_back(first)
    [shard] = first.folder.glob("pairs-*.arrow")
    for damage in (shard.unlink, lambda: shard.write_bytes(b"x"), lambda: shard.write_bytes(b"")):
        damage()
        again = prepare(source, rendering, SETTINGS, tmp_path / "p", name="train")
        assert again == first
        assert read_back(again) == expected


def test_changed_rows_settings_or_templates_are_prepared_in_another_folder(
    tmp_path: Path, rendering: Rendering
) -> None:
    rows = text_rows(5)

    def fingerprint(
        rows: list[dict[str, Any]] = rows,
        rendering: Rendering = rendering,
        settings: EncodeSettings = SETTINGS,
    ) -> str:
        source = write(tmp_path / "rows.jsonl", rows)
        return prepare(source, rendering, settings, tmp_path / "p", name="train").fingerprint

    shouting = chatml_tokenizer()
    shouting.chat_template = shouting.chat_template.replace("'\\n'", "'!'")
    found = [
        fingerprint(),
        fingerprint([*rows[:-1], {**rows[-1], "chosen": "another"}]),
        fingerprint(rows[::-1]),
        fingerprint(rows[:-1]),
        fingerprint(settings=EncodeSettings(63, "drop", "error")),
        fingerprint(settings=EncodeSettings(64, "left", "error")),
        fingerprint(settings=DROPPING),
        fingerprint(rendering=Rendering(shouting)),
        fingerprint(rendering=Rendering(llama_like_tokenizer())),
        fingerprint(rendering=Rendering(chatml_tokenizer(), control_tokens="refuse")),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint() == found[0]
    assert len(list((tmp_path / "p").iterdir())) == len(found)


@pytest.mark.trains
def test_two_processes_encode_what_one_does(tmp_path: Path, rendering: Rendering) -> None:
    rows = [*text_rows(600), {"chosen": "same", "rejected": "same"}, *chat_rows(20)]
    source = write(tmp_path / "rows.jsonl", rows)
    one = prepare(source, rendering, DROPPING, tmp_path / "one", name="train")
    two = prepare(source, rendering, DROPPING, tmp_path / "two", name="train", num_proc=2)
    assert table_of(one) == table_of(two)
    assert one.num_pairs == 620
    assert {**vars(one), "folder": 0} == {**vars(two), "folder": 0}


PREPARE_SLOWLY = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from tiny import chatml_tokenizer
from raywards.rendering import Rendering
from raywards.train import prepare as module
module._ROWS_PER_CHUNK = 2
encode_chunk = module._encode_chunk
def slowly(*args):
    time.sleep(0.05)
    return encode_chunk(*args)
module._encode_chunk = slowly
settings = module.EncodeSettings(64, "drop", "error")
module.prepare({source!r}, Rendering(chatml_tokenizer()), settings, Path({folder!r}), name="train")
"""


@pytest.mark.trains
def test_a_kill_half_way_leaves_nothing_that_looks_prepared(
    tmp_path: Path, rendering: Rendering
) -> None:
    rows, folder = text_rows(2000), tmp_path / "p"
    source = write(tmp_path / "rows.jsonl", rows)
    here = Path(__file__).parent
    code = PREPARE_SLOWLY.format(
        path=[str(here), str(here.parent)], source=str(source), folder=str(folder)
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 90
        while not list(folder.glob(".*/pairs-*.arrow")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = list(folder.iterdir())
    assert left, "it was not killed half-way"
    assert all(path.name.startswith(".") for path in left)
    assert not list(folder.rglob("prepared.json"))
    prepared = prepare(source, rendering, SETTINGS, folder, name="train")
    assert prepared.num_pairs == len(rows)
