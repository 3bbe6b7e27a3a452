"""`raywards score`: every row once, in order, and an output that is whole or the old one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen2

from raywards import Scorer
from raywards.config import ScoreConfig
from raywards.errors import ConfigError, RowError
from raywards.score_file import score_file

torch.set_num_threads(1)

TALK = [{"role": "user", "content": "Is it cold?"}, {"role": "assistant", "content": "Yes."}]
GOOD: list[dict[str, Any]] = [
    {"messages": TALK, "id": 7},
    {"prompt": TALK[:1], "response": "Yes."},
    {"prompt": "Is it cold?", "response": "No."},
    {"text": "It is cold.", "messages": None},
    {"text": "It is cold.", "note": "half a pair: \ud83d", "ключ": "значение"},
]
# A line that has no reward, and a word of the reason.
BAD: list[tuple[bytes, str]] = [
    (b'{"prompt": "Is it cold?", "response": null}', "the response is None"),
    (b'{"prompt": 3, "response": "Yes."}', "the prompt is int"),
    (b'{"messages": "hello"}', "messages is str"),
    (b'{"messages": [3]}', "messages[0] is int"),
    (b'{"messages": {"role": "user"}}', "is dict"),
    (b'{"text": 3}', "text (int)"),
    (b'{"text": ""}', "empty"),
    (b'{"text": "\\ud83d"}', "surrogate"),
    (b'{"prompt": "Is it cold?"}', "prompt (str)"),
    (b"{}", "nothing"),
    (b'{"text": ', "not JSON"),
    (b'{"text": "\xff"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "expected an object, got list"),
    (b"null", "expected an object, got None"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "rm")


def score(folder: Path, lines: list[bytes], **settings: Any) -> tuple[dict[str, int], Path]:
    source, target = folder.parent / "in.jsonl", folder.parent / "out.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line in lines))
    config = ScoreConfig(
        model=str(folder), input=str(source), output=str(target), device="cpu", **settings
    )
    return score_file(config), target


def read(target: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def as_lines(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def test_every_row_comes_back_in_order_with_its_reward(folder: Path) -> None:
    counts, target = score(folder, [b"\xef\xbb\xbf" + as_lines(GOOD)[0], b"", *as_lines(GOOD)[1:]])
    assert counts == {"scored": len(GOOD), "bad": 0}
    rows = read(target)
    rewards = [row.pop("reward") for row in rows]
    assert rows == GOOD
    scorer = Scorer.from_pretrained(folder, device="cpu")
    [expected] = scorer.score([TALK])
    assert rewards[:2] == pytest.approx([expected, expected], abs=1e-5)
    assert rewards[3] == pytest.approx(scorer.score(["It is cold."])[0], abs=1e-5)
    assert len({round(reward, 5) for reward in rewards}) == 3


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_row_stops_the_job_and_leaves_the_old_output(
    folder: Path, line: bytes, words: str
) -> None:
    (folder.parent / "out.jsonl").write_text("old")
    with pytest.raises(RowError) as caught:
        score(folder, [*as_lines(GOOD[:2]), line])
    assert words in str(caught.value)
    assert "line 3: " in str(caught.value)
    assert "on_bad_row='keep'" in str(caught.value)
    assert caught.value.row == 2
    assert (folder.parent / "out.jsonl").read_text() == "old"
    assert not list(folder.parent.glob(".*.partial"))


def test_bad_rows_are_kept_between_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywards.score_file._ROWS_AT_ONCE", 4)
    lines = [line for bad, _ in BAD for line in (bad, as_lines(GOOD)[0])]
    counts, target = score(folder, lines, on_bad_row="keep")
    assert counts == {"scored": len(BAD), "bad": len(BAD)}
    rows = read(target)
    assert len(rows) == len(lines)
    for number, ((line, words), kept) in enumerate(zip(BAD, rows[::2], strict=True)):
        assert kept.pop("reward") is None
        assert words in kept.pop("error")
        is_object = line.endswith(b"}") and "not JSON" not in words
        assert kept == (json.loads(line) if is_object else {"line": 2 * number + 1})
    assert all(row["reward"] is not None and row["id"] == 7 for row in rows[1::2])


def test_a_reward_that_is_no_number_is_a_bad_row(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path / "rm")
    weights = load_file(folder / "model.safetensors")
    scorer = Scorer.from_pretrained(folder, device="cpu")
    spoilt = min(set(scorer.encode("better")) - set(scorer.encode("cold")))
    weights["model.embed_tokens.weight"][spoilt] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lines = as_lines([{"text": "cold"}, {"text": "better"}, {"text": "cold", "id": 1}])
    counts, target = score(folder, lines, on_bad_row="keep")
    assert counts == {"scored": 2, "bad": 1}
    rows = read(target)
    assert [row["text"] for row in rows] == ["cold", "better", "cold"]
    assert rows[1]["reward"] is None
    assert "nan" in rows[1]["error"]
    assert rows[0]["reward"] == pytest.approx(rows[2]["reward"], abs=1e-5)
    with pytest.raises(RowError, match=r"line 2: the reward of the row .* is nan"):
        score(folder, lines)


@pytest.mark.parametrize("lines", [[], [b"", b"  "]])
def test_an_empty_input_leaves_the_old_output(folder: Path, lines: list[bytes]) -> None:
    (folder.parent / "out.jsonl").write_text("old")
    with pytest.raises(ConfigError, match="has no rows"):
        score(folder, lines)
    assert (folder.parent / "out.jsonl").read_text() == "old"


@pytest.mark.trains
def test_a_kill_in_the_middle_leaves_the_old_output(folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(as_lines(GOOD * 3)))
    target.write_text("old")
    program = f"""if True:
        import os
        from raywards import Scorer, score_file
        from raywards.config import ScoreConfig
        score_file._ROWS_AT_ONCE = 4
        score_ids, calls = Scorer.score_ids, []
        def killed_at_the_third(self, sequences):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), {int(signal.SIGKILL)})
            return score_ids(self, sequences)
        Scorer.score_ids = killed_at_the_third
        score_file.score_file(ScoreConfig(
            model={str(folder)!r}, input={str(source)!r}, output={str(target)!r}, device="cpu"))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert (tmp_path / ".out.jsonl.partial").exists()  # it was writing
    config = ScoreConfig(model=str(folder), input=str(source), output=str(target), device="cpu")
    assert score_file(config) == {"scored": 3 * len(GOOD), "bad": 0}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]
