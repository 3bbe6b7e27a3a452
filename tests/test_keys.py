"""Who may ask: every key is compared, and a file of keys is read again when it changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from raywards.errors import ConfigError, RequestRefusedError
from raywards.serve.keys import Keys


def headers(value: str, name: str = "authorization") -> Headers:
    return Headers({name: value})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# trainers\ngrpo  first-key-of-grpo\n\neval second-key-of-eval\n")
    return file


def test_without_a_key_everybody_may_ask() -> None:
    keys = Keys()
    assert not keys.any
    assert keys.client(Headers({})) is None


def test_a_key_names_its_client(file: Path) -> None:
    keys = Keys("the-key-of-all", str(file))
    assert keys.client(headers("Bearer first-key-of-grpo")) == "grpo"
    assert keys.client(headers("bearer   second-key-of-eval")) == "eval"
    assert keys.client(headers("Bearer the-key-of-all")) == "default"


@pytest.mark.parametrize(
    "given",
    [
        Headers({}),
        headers("Bearer "),
        headers("Bearer wrong"),
        headers("first-key-of-grpo"),
        headers("Basic first-key-of-grpo"),
        headers("Bearer first-key-of-grp"),
        headers("Bearer first-key-of-grpo2"),
        headers("Bearer grpo"),
        headers("Bearer first-key-of-grpo", name="x-api-key"),
        Headers(raw=[(b"authorization", b"Bearer first-key-of-grpo")] * 2),
        Headers(raw=[(b"authorization", "Bearer schlüssel".encode("latin-1"))]),
    ],
)
def test_all_else_is_refused(given: Headers, file: Path) -> None:
    with pytest.raises(RequestRefusedError) as refused:
        Keys(None, str(file)).client(given)
    assert refused.value.status == 401
    assert "grpo" not in str(refused.value)


def test_a_key_is_replaced_without_a_gap(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywards.serve.keys._LOOK_AGAIN_S", 0.0)
    keys = Keys(None, str(file))
    old, new = headers("Bearer first-key-of-grpo"), headers("Bearer newer-key-of-grpo")
    change(file, "grpo first-key-of-grpo\ngrpo newer-key-of-grpo\n")
    assert keys.client(old) == keys.client(new) == "grpo"
    change(file, "grpo newer-key-of-grpo\n")
    assert keys.client(new) == "grpo"
    with pytest.raises(RequestRefusedError):
        keys.client(old)


@pytest.mark.parametrize("damage", ["", "grpo\n", None])
def test_a_damaged_file_changes_nothing(
    damage: str | None,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("raywards.serve.keys._LOOK_AGAIN_S", 0.0)
    keys = Keys(None, str(file))
    if damage is None:
        file.unlink()
    else:
        change(file, damage)
    assert keys.client(headers("Bearer first-key-of-grpo")) == "grpo"
    assert "the keys stay as they were" in caplog.text
    assert "first-key" not in caplog.text


@pytest.mark.parametrize(
    "text", ["", "# none\n", "grpo\n", "grpo short\n", "a b c\n", "ä keykeykey\n"]
)
def test_a_file_that_is_none_is_refused_at_the_start(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as refused:
        Keys(None, str(tmp_path / "keys"))
    assert "short" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file=.*cannot be read"):
        Keys(None, str(tmp_path / "keys"))


def change(file: Path, text: str) -> None:
    """As an editor or a mounted secret does: by a new file of that name."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, file)


def test_a_key_that_is_replaced_within_a_tick_of_the_clock_is_seen(
    file: Path,
) -> None:
    keys = Keys(None, str(file))
    before = file.stat()
    file.write_text("grpo another-key-of-grpo\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    keys._looked -= 2
    assert keys.client(headers("Bearer another-key-of-grpo")) == "grpo"
    with pytest.raises(RequestRefusedError):
        keys.client(headers("Bearer first-key-of-grpo"))
