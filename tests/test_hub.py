"""The export on a hub: a real client and a real server, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_server import Hub, serve
from huggingface_hub import ModelCard
from preferences_data import conversation_rows
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import read_manifest
from raywards.errors import CheckpointError, ConfigError, HubError

pytestmark = pytest.mark.trains


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "start", num_labels=None)


def trainer(model: Path, output: Path, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 0,
        "max_steps": 1,
        "hub_token": "hf_secret",
        "disable_tqdm": True,
        **changes,
    }
    rows = datasets.Dataset.from_list(conversation_rows(8))
    return RewardTrainer(str(model), RewardConfig(**settings), train_dataset=rows)


def test_a_run_uploads_its_export_with_the_card(hub: Hub, model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path / "my-rm", push_to_hub=True, hub_private_repo=True)
    with pytest.raises(CheckpointError, match="no export yet"):
        run.push_to_hub()
    run.train()
    assert hub.repos == {"me/my-rm": "private"}
    assert run.hub_model_id == "me/my-rm"
    assert hub.messages == ["End of training"]
    export = run.paths.export
    files = hub.branches["me/my-rm@main"]
    assert files == {path.name: path.read_bytes() for path in export.iterdir()}
    assert {"model.safetensors", "config.json", "raywards.json", "curves.png"} <= files.keys()
    assert 'from_pretrained("me/my-rm")' in files["README.md"].decode()
    for path in (*export.iterdir(), run.paths.run / "run.json"):
        assert b"hf_secret" not in path.read_bytes()

    read_manifest(export, kind="export")


def test_the_arguments_of_transformers_are_taken(hub: Hub, model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path / "rm", hub_model_id="org/rm", hub_revision="v1", hub_token=None)
    run.train()
    assert hub.repos == {}
    waiting = run.push_to_hub("first", blocking=False, token="hf_secret")
    assert isinstance(waiting, Future)
    assert waiting.result(timeout=30).oid == "0" * 40
    commit = run.push_to_hub(
        "second", token="hf_secret", revision="v2", dataset_name="org/pairs", model_name="The one"
    )
    assert commit.commit_url == f"{hub.url}/org/rm/commit/{'0' * 40}"
    assert hub.messages == ["first", "second"]
    first, second = (hub.branches[f"org/rm@{name}"]["README.md"].decode() for name in ("v1", "v2"))
    assert ModelCard(first).data.datasets is None
    assert ModelCard(second).data.datasets == ["org/pairs"]
    assert "\n# The one\n" in second
    with pytest.raises(ConfigError, match="does not take language"):
        run.push_to_hub(language="en")


def test_a_hub_that_refuses_costs_no_run(hub: Hub, model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path / "rm", push_to_hub=True)
    hub.refuses = "commit"
    with pytest.raises(HubError, match=r"Upload it later with trainer\.push_to_hub\(\)") as caught:
        run.train()
    assert "403" in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert run.state.global_step == 1
    assert "loss" in run.state.log_history[0]
    read_manifest(run.paths.export, kind="export")
    hub.refuses = ""
    run.push_to_hub()
    assert hub.branches["me/rm@main"]["README.md"] == (run.paths.export / "README.md").read_bytes()


@pytest.mark.parametrize("why", ["no token", "another's token", "no network"])
def test_a_hub_that_cannot_be_written_to_is_told_before_training(
    why: str, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: None)
    token = {"no token": None, "another's token": "hf_other"}.get(why, "hf_secret")
    if why == "no network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    run = trainer(model, tmp_path / "rm", push_to_hub=True, hub_token=token)
    with pytest.raises(HubError, match="'rm' cannot be written to") as caught:
        run.train()
    assert "hub_token" in str(caught.value)
    assert not run.paths.run.exists()
