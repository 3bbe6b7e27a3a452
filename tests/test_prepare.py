"""Prepared pairs: equal to the encoded rows, found again, and never half there."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny import chatml_tokenizer, llama_like_tokenizer

from raywards import rowset
from raywards.errors import ConfigError, RowError, TrainingError
from raywards.packing import pack_groups
from raywards.preferences import encode_row
from raywards.rendering import Rendering
from raywards.rowset import RowRef, RowSet
from raywards.train import prepare as module
from raywards.train.prepare import EncodeSettings, Prepared
from raywards.train.storage import SharedFolder
from raywards.train.table import PairTable

SETTINGS = EncodeSettings(max_length=64, truncation="drop", on_bad_row="error")
DROPPING = EncodeSettings(max_length=64, truncation="drop", on_bad_row="drop")


@pytest.fixture(scope="module")
def rendering() -> Rendering:
    return Rendering(chatml_tokenizer())


def prepare(source: Any, rendering: Rendering, settings: Any, run: Path, **options: Any) -> Any:
    return module.prepare(source, rendering, settings, SharedFolder(run), **options)


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
    assert table.lengths.tolist() == [
        max(len(chosen), len(rejected)) for chosen, rejected, _ in expected
    ]
    assert table.tokens.tolist() == [
        len(pack_groups([[chosen, rejected]]).input_ids) for chosen, rejected, _ in expected
    ]
    shared = sum(len(a) + len(b) for a, b, _ in expected) - table.tokens.sum()
    assert (shared > 0) == (make is chat_rows)
    assert table.take([29, 0])["sequences"] == [list(expected[i][:2]) for i in (29, 0)]
    assert [pair["row"] for pair in table_of(prepared)] == list(range(30))
    ends = {ids[-1] for chosen, rejected, _ in expected for ids in (chosen, rejected)}
    assert prepared.last_ids == sorted(ends)
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == [prepared.folder.name]


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
    lengths = [len(row["sequences"][0]) for row in found]
    assert table.tokens.tolist() == table.lengths.tolist() == lengths
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
    assert list((tmp_path / "prepared" / "prepared").iterdir()) == []


def test_a_file_full_of_bad_rows_is_one_screen(tmp_path: Path, rendering: Rendering) -> None:
    source = write(tmp_path / "rows.jsonl", [{"chosen": "x"}] * 1000)
    with pytest.raises(RowError) as caught:
        prepare(source, rendering, SETTINGS, tmp_path / "prepared", name="train")
    assert len(str(caught.value).splitlines()) < 20


def test_no_pair_left_is_an_error_that_says_why(tmp_path: Path, rendering: Rendering) -> None:
    rows = [{"chosen": "word " * 200, "rejected": "short"}] * 3
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=r"train: no pair is left of 3 rows \(3 too_long"):
        prepare(source, rendering, SETTINGS, tmp_path / "p", name="train")
    assert list((tmp_path / "p" / "prepared").iterdir()) == []


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
    assert len(list((tmp_path / "p" / "prepared").iterdir())) == len(found)


# ---------------------------------------------------------------- Ray tasks


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_PER_SHARD", 50)
    monkeypatch.setattr(module, "_ROWS_PER_CHUNK", 20)


def files_of(prepared: Prepared) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prepared.folder.iterdir())}


@pytest.mark.ray
def test_tasks_write_the_bytes_that_one_process_writes(
    tmp_path: Path, rendering: Rendering, ray_cluster: None, cut_small: None
) -> None:
    import ray

    rows = [*text_rows(220), {"chosen": "same", "rejected": "same"}, *chat_rows(60)]
    table = datasets.Dataset.from_list(chat_rows(120)).shuffle(seed=1)
    plain = tmp_path / "list.json"
    plain.write_text(json.dumps(text_rows(70)))
    sources = {"lines": write(tmp_path / "rows.jsonl", rows), "table": table, "list": plain}
    here = prepare(sources, rendering, DROPPING, tmp_path / "here", name="train")
    assert here.sources == [("lines", 280), ("table", 120), ("list", 70)]
    assert len(list(here.folder.glob("pairs-*"))) == 6 + 3 + 2
    for at_once in (1, 3, None):
        there = prepare(
            sources, rendering, DROPPING, tmp_path / f"at-once-{at_once}", name="train",
            connect=lambda: ray, tasks_at_once=at_once,
        )  # fmt: skip
        assert files_of(there) == files_of(here)


@pytest.mark.ray
def test_tasks_tell_of_the_first_bad_rows_and_leave_nothing(
    tmp_path: Path, rendering: Rendering, ray_cluster: None, cut_small: None
) -> None:
    import ray

    rows = text_rows(400)
    for place in (60, 130, 131, 390):
        rows[place] = {"chosen": "same", "rejected": "same"}
    source = write(tmp_path / "rows.jsonl", rows)
    told = []
    for connect in (None, lambda: ray):
        with pytest.raises(RowError) as caught:
            prepare(source, rendering, SETTINGS, tmp_path / "p", name="train", connect=connect)
        told.append(str(caught.value))
        assert caught.value.row == 60
        assert list((tmp_path / "p" / "prepared").iterdir()) == []
    assert told[0] == told[1]
    assert [n for n in (60, 130, 131, 390) if f"row {n}" in told[0]] == [60, 130, 131, 390]


@pytest.mark.ray
def test_a_folder_that_tasks_do_not_see_is_told(
    tmp_path: Path, rendering: Rendering, ray_cluster: None, cut_small: None
) -> None:
    import ray

    rows = module.read_rows(write(tmp_path / "rows.jsonl", text_rows(3)))[0]
    shared = (rendering, SETTINGS, tmp_path / "elsewhere")
    [summary] = module.in_order(
        ray, module._encode_range, shared, iter([(0, rows.part(0, 3), [], 2)]), at_once=1
    )
    with pytest.raises(ConfigError, match="elsewhere: is not there on node"):
        module._gather([summary])


@pytest.mark.ray
def test_results_come_in_order_and_what_still_runs_is_ended(ray_cluster: None) -> None:
    import ray

    def slower_first(shared: float, place: int) -> int:
        time.sleep(shared if place == 0 else 0)
        return place

    results = module.in_order(ray, slower_first, 0.5, iter((i,) for i in range(6)), at_once=2)
    assert list(results) == list(range(6))
    endless = module.in_order(ray, slower_first, 600, iter([(1,), (0,)]), at_once=2)
    assert next(endless) == 1
    started = time.monotonic()
    endless.close()
    assert time.monotonic() - started < 20


# ---------------------------------------------------------------- mixtures, streams, files


def test_a_mapping_names_its_sources(tmp_path: Path, rendering: Rendering) -> None:
    write(tmp_path / "a.jsonl", text_rows(3))
    write(tmp_path / "b.jsonl", [*text_rows(2), {"chosen": "", "rejected": "x"}])
    sources = {
        "kind": datasets.Dataset.from_list(chat_rows(2)),
        "short": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
    }
    prepared = prepare(sources, rendering, DROPPING, tmp_path / "p", name="train")
    assert prepared.sources == [("kind", 2), ("short", 5)]
    names = [pair["source"] for pair in table_of(prepared)]
    assert names == ["kind"] * 2 + ["short/a.jsonl"] * 3 + ["short/b.jsonl"] * 2
    with pytest.raises(RowError, match=r"short/b\.jsonl row 2 \(line 3\)"):
        prepare(sources, rendering, SETTINGS, tmp_path / "p", name="train")
    assert module.weigh(prepared.sources, {"short": 2}) == ((2, 1.0), (5, 2))
    assert module.weigh(prepared.sources, None) == ()
    with pytest.raises(ConfigError, match=r"dataset_weights\.shor: .*Did you mean 'short'"):
        module.weigh(prepared.sources, {"shor": 2})


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("eval_trl-lib/helpful", "eval_trl-lib-helpful"), ("..", "-"), ("eval_é 1", "eval_-1"),
        ("eval_../../x", "eval_-x"), ("x" * 300, "x" * 100), ("eval_web", "eval_web"),
    ],
)  # fmt: skip
def test_a_name_is_made_safe_for_a_folder(
    name: str, folder: str, tmp_path: Path, rendering: Rendering
) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(3))
    prepared = prepare(source, rendering, SETTINGS, tmp_path / "p", name=name)
    assert prepared.folder.parent == tmp_path / "p" / "prepared"
    assert prepared.folder.name == f"{folder}-{prepared.fingerprint[:16]}"
    assert prepare(source, rendering, SETTINGS, tmp_path / "p", name=name) == prepared


def test_a_stream_is_prepared_as_its_rows_are(tmp_path: Path, rendering: Rendering) -> None:
    rows = [{**row, "margin": 0.5, "day": datetime.date(2026, 1, 1)} for row in chat_rows(30)]
    drawn: list[int] = []

    def generate() -> Iterator[dict[str, Any]]:
        for place in itertools.count():
            drawn.append(place)
            yield rows[place % 30]

    endless = datasets.IterableDataset.from_generator(generate)
    first = prepare(endless, rendering, SETTINGS, tmp_path / "p", name="train", most_of_stream=30)
    assert (first.num_rows, first.numbers) == (30, ["margin"])
    assert read_back(first) == encoded(rows, rendering)
    assert max(drawn) < 40
    again = prepare(endless, rendering, SETTINGS, tmp_path / "p", name="train", most_of_stream=30)
    assert again == first
    longer = prepare(endless, rendering, SETTINGS, tmp_path / "p", name="train", most_of_stream=31)
    assert longer.num_pairs == 31
    assert sorted((tmp_path / "p" / "prepared").iterdir()) == sorted([first.folder, longer.folder])
    whole = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert prepare(whole, rendering, SETTINGS, tmp_path / "w", name="t").num_pairs == 30
    nothing = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ConfigError, match="the stream is empty"):
        prepare(nothing, rendering, SETTINGS, tmp_path / "w", name="t")


def test_a_dataset_is_found_again_however_it_is_cut(tmp_path: Path) -> None:
    rows = [{**row, "margin": None if i % 7 else 1.0} for i, row in enumerate(chat_rows(2500))]
    whole = datasets.Dataset.from_list(rows)
    cut = datasets.concatenate_datasets([whole.select(range(999)), whole.select(range(999, 2500))])
    picked = whole.select([*range(2499, -1, -1)]).select([*range(2499, -1, -1)])
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    [saved] = module.read_rows(tmp_path / "saved")
    digests = {RowSet("r", one).digest() for one in (whole, cut, picked, saved.rows)}
    assert len(digests) == 1
    changed = whole.select(range(2499)), whole.shuffle(seed=1), whole.rename_column("margin", "m")
    assert len({RowSet("r", one).digest() for one in changed} | digests) == 4


LINES = b'\xef\xbb\xbf{"n": 0}\r\n\n \t \n  {"n": 1}\n{"n": 2, "m": null}\n\n{"n": 3, "m": 5}'


@pytest.mark.parametrize("block", [1, 5, 11, 1 << 20])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n"])
def test_lines_are_found_whatever_the_blocks(
    block: int, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowset, "_BLOCK_BYTES", block)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINES + end)
    lines = rowset.Lines.open(file, "rows.jsonl")
    assert [row["n"] for row in lines] == [0, 1, 2, 3]
    assert [lines.line(i) for i in range(4)] == [1, 4, 5, 7]
    assert lines.sha256 == hashlib.sha256(LINES + end).digest()
    assert [lines.has(name) for name in ("n", "m", "o")] == [True, True, False]
    part = RowSet("rows.jsonl", lines).part(1, 3)
    assert [row["n"] for row in part.rows] == [1, 2]
    assert str(part.where(1)) == "rows.jsonl row 2 (line 5)"
    assert not part.has("m")
    copied = pickle.loads(pickle.dumps(part))
    assert [row["n"] for row in copied.rows] == [1, 2]
    file.write_bytes(LINES[:20])
    assert lines[0] == {"n": 0}
    with pytest.raises(ConfigError, match="became shorter while it was read"):
        lines[3]


def test_a_line_that_cannot_be_read_stops_the_run_under_either_setting(
    tmp_path: Path, rendering: Rendering
) -> None:
    source = write(tmp_path / "rows.jsonl", [*text_rows(3), '{"chosen": "cut'])
    for settings in (SETTINGS, DROPPING):
        with pytest.raises(RowError, match=r"rows\.jsonl row 3 \(line 4\): row is not JSON"):
            prepare(source, rendering, settings, tmp_path / "p", name="train")
    assert list((tmp_path / "p" / "prepared").iterdir()) == []


def test_a_worker_refuses_pairs_that_are_damaged(tmp_path: Path, rendering: Rendering) -> None:
    source = write(tmp_path / "rows.jsonl", text_rows(5))
    prepared = prepare(source, rendering, SETTINGS, tmp_path / "p", name="train")
    assert len(PairTable(prepared.folder)) == 5
    [shard] = prepared.folder.glob("pairs-*")
    whole = shard.read_bytes()
    cases = [
        (lambda: shard.write_bytes(whole[:-100]), f"bytes; prepared.json says {len(whole):,}"),
        (lambda: shard.write_bytes(b"x" * len(whole)), "cannot be read"),
        (shard.unlink, "is missing"),
        ((prepared.folder / "prepared.json").unlink, "are not there on node"),
    ]
    for damage, words in cases:
        damage()
        with pytest.raises(TrainingError) as caught:
            PairTable(prepared.folder)
        assert words in str(caught.value)
        assert str(prepared.folder) in str(caught.value)


# ---------------------------------------------------------------- a kill


PREPARE_SLOWLY = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from tiny import chatml_tokenizer
from raywards.rendering import Rendering
from raywards.train import prepare as module
from raywards.train.storage import SharedFolder
module._ROWS_PER_CHUNK = 2
encode_chunk = module._encode_chunk
def slowly(*args):
    time.sleep(0.05)
    return encode_chunk(*args)
module._encode_chunk = slowly
settings = module.EncodeSettings(64, "drop", "error")
run = SharedFolder(Path({folder!r}))
module.prepare({source!r}, Rendering(chatml_tokenizer()), settings, run, name="train")
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
        while not list(folder.glob("prepared/.*/pairs-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = list((folder / "prepared").iterdir())
    assert left, "it was not killed half-way"
    assert all(path.name.startswith(".") for path in left)
    assert not list(folder.rglob("prepared.json"))
    prepared = prepare(source, rendering, SETTINGS, folder, name="train")
    assert prepared.num_pairs == len(rows)
