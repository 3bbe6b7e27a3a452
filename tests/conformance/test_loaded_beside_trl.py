"""`create_model_from_path` of TRL and of raywards: the column "TRL" of docs/loader.md.

dtypes, their error text and the seeded head are compared in `tests/test_loader.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from both import trl
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen2
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import create_model_from_path as theirs

from raywards import create_model_from_path as ours
from raywards.errors import ModelError

assert trl  # importing `both` skips this module where TRL is not installed
CLASSIFIER = AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_qwen2(tmp_path_factory.mktemp("lm"), num_labels=None))


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    """To damage."""
    return tiny_qwen2(tmp_path / "rm")


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


class Probe:
    """Stands for a transformers class; what reaches `from_pretrained` is kept."""

    got: dict[str, Any]

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> Any:
        cls.got = kwargs
        return SimpleNamespace(), {"missing_keys": []}


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "xpu"])
def test_the_device_map_is_trls_on_each_backend(
    device: str, language_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr("trl.trainer.utils.PartialState", lambda: state)
    found = None if device == "cpu" else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    expected = None if device in ("cpu", "mps") else "auto"
    for load in (theirs, ours):
        load(language_model, Probe)
        assert Probe.got["device_map"] == expected
        load(language_model, Probe, device_map={"": "cpu"})
        assert Probe.got["device_map"] == {"": "cpu"}


def test_arguments_reach_from_pretrained_as_in_trl(language_model: str) -> None:
    given = {"dtype": "float16", "attn_implementation": "eager", "use_cache": False}
    theirs(language_model, Probe, **given)
    expected = dict(Probe.got)
    ours(language_model, Probe, **given)
    assert {k: v for k, v in Probe.got.items() if k in expected} == expected
    assert Probe.got.keys() - expected.keys() == {"output_loading_info", "trust_remote_code"}


def test_the_class_is_inferred_as_in_trl(language_model: str, reward_model: Path) -> None:
    for folder in (language_model, str(reward_model)):
        models = [load(folder) for load in (theirs, ours)]
        assert type(models[0]) is type(models[1])
        states = [model.state_dict() for model in models]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for load in (theirs, ours):
        assert type(load(str(reward_model), AutoModelForCausalLM)).__name__ == "Qwen2ForCausalLM"


def test_an_unknown_class_is_told_by_name_and_in_trl_it_is_an_attribute_error(
    reward_model: Path,
) -> None:
    edit(reward_model, architectures=["Qwen9ForRewards"])
    with pytest.raises(AttributeError, match="auto_map"):
        theirs(str(reward_model))
    with pytest.raises(ModelError, match="has no class 'Qwen9ForRewards'"):
        ours(str(reward_model))
    edit(reward_model, architectures=None)
    with pytest.raises(TypeError, match="not subscriptable"):
        theirs(str(reward_model))
    with pytest.raises(ModelError, match="names no `architectures`"):
        ours(str(reward_model))


def test_the_older_torch_dtype_counts_and_trl_drops_it(language_model: str) -> None:
    assert theirs(language_model, torch_dtype=torch.bfloat16).dtype == torch.float32
    assert ours(language_model, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_classifier_gets_one_label_and_in_trl_two(language_model: str) -> None:
    assert theirs(language_model, CLASSIFIER).score.out_features == 2
    assert ours(language_model, CLASSIFIER).score.out_features == 1
    assert theirs(language_model, CLASSIFIER, num_labels=3).score.out_features == 3
    with pytest.raises(ModelError, match="num_labels=3"):
        ours(language_model, CLASSIFIER, num_labels=3)


def test_a_saved_head_of_two_labels_is_told_and_in_trl_loaded_or_a_matter_of_sizes(
    tmp_path: Path,
) -> None:
    folder = str(tiny_qwen2(tmp_path, num_labels=2))
    assert theirs(folder, CLASSIFIER).score.out_features == 2
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        theirs(folder, CLASSIFIER, num_labels=1)
    for given in ({}, {"num_labels": 1}):
        with pytest.raises(ModelError, match="its head has 2 labels"):
            ours(folder, CLASSIFIER, **given)


def test_a_reward_model_that_lost_its_head_is_refused_and_in_trl_given_a_random_one(
    reward_model: Path,
) -> None:
    file = reward_model / "model.safetensors"
    weights = load_file(file)
    head = weights.pop("score.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert not torch.equal(theirs(str(reward_model), CLASSIFIER, num_labels=1).score.weight, head)
    with pytest.raises(ModelError, match=r"weights lack score\.weight"):
        ours(str(reward_model), CLASSIFIER)


def test_a_revision_decides_the_class_and_in_trl_the_main_branch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`org/name` has a language model on `main` and a reward model as `v2`."""
    repo = tmp_path / "hub" / "models--org--name"
    for ref, commit, labels in (("main", "a" * 40, None), ("v2", "b" * 40, 1)):
        folder = tiny_qwen2(tmp_path / ref, num_labels=labels)
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (repo / part).mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        for file in folder.iterdir():
            blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    names = [type(load("org/name", revision="v2")).__name__ for load in (theirs, ours)]
    assert names == ["Qwen2ForCausalLM", "Qwen2ForSequenceClassification"]
    # Told the class, TRL loads the weights of the revision, too.
    heads = [load("org/name", CLASSIFIER, revision="v2", num_labels=1) for load in (theirs, ours)]
    assert torch.equal(heads[0].score.weight, heads[1].score.weight)


def test_a_path_from_the_home_folder_is_found_and_in_trl_taken_for_a_hub_id(
    reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(reward_model.parent))
    with pytest.raises(OSError, match="~/rm"):
        theirs("~/rm")
    assert type(ours("~/rm")).__name__ == "Qwen2ForSequenceClassification"
