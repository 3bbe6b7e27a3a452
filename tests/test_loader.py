"""The contract of `create_model_from_path`: a test for each row of docs/loader.md."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from tiny import CHATML_TEMPLATE, chatml_tokenizer, tiny_qwen2
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    dynamic_module_utils,
    set_seed,
)
from transformers.integrations import HfDeepSpeedConfig

from raywards.errors import ConfigError, ModelError
from raywards.loader import check_reward_model, create_model_from_path, load_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("models") / "lm", num_labels=None)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("models") / "rm")


@pytest.fixture(scope="module")
def bf16_reward_model(reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bf16"
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    return folder


@pytest.fixture
def copied(reward_model: Path, tmp_path: Path) -> Path:
    """A reward model's folder to damage."""
    return Path(shutil.copytree(reward_model, tmp_path / "copied"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(model_id: Any, *args: Any, error: type[Exception] = ModelError, **kwargs: Any) -> str:
    """The one-screen message with which a call is refused."""
    with pytest.raises(error) as caught:
        create_model_from_path(model_id, *args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    assert len(message.replace(str(model_id), "")) < 700
    return message


class Probe:
    """Stands for a transformers class; `create_model_from_path` returns what reached it."""

    @classmethod
    def from_pretrained(cls, model_id: str, output_loading_info: bool, **kwargs: Any) -> Any:
        return kwargs, {"missing_keys": []}


# --- model_id -----------------------------------------------------------------------------------


def test_a_folder_is_named_as_text_as_a_path_or_from_the_home_folder(
    reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(reward_model.parent))
    for name in (str(reward_model), reward_model, "~/rm"):
        model = create_model_from_path(name, AutoModelForSequenceClassification)
        assert torch.equal(model.score.weight, weights(reward_model)["score.weight"])
        assert len(load_tokenizer(name)) == len(chatml_tokenizer())


def test_a_missing_folder_is_refused_with_its_nearest_sibling(reward_model: Path) -> None:
    message = refused(str(reward_model.parent.parent / f"{reward_model.parent.name}x"))
    assert f"there is no such folder. Did you mean {reward_model.parent.name!r}?" in message
    assert "there is no such folder" in refused("./nowhere/at/all")
    assert "there is no such folder" in refused("")


def test_a_file_is_refused_with_the_folder_to_give(reward_model: Path) -> None:
    message = refused(reward_model / "model.safetensors")
    assert f"is a file. Give the folder that holds the model: {reward_model}" in message


def test_a_folder_that_is_no_model_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    assert "has no config.json (it has nothing)" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "has no config.json (it has adapter_config.json)" in refused(tmp_path)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_reward_model(str(tmp_path), {})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "unknown type": (lambda f: edit_config(f, model_type="zzz"), "model type `zzz`"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 1000), "deserializing"),
    "other size": (lambda f: edit_config(f, hidden_size=64), "cannot be loaded"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused(case: str, copied: Path) -> None:
    create_model_from_path(copied)
    damage, words = DAMAGE[case]
    damage(copied)
    message = refused(copied)
    assert message.startswith(f"{copied}: ")
    assert words in message


def test_a_hub_id_that_cannot_be_reached_is_refused_in_one_line(tmp_path: Path) -> None:
    message = refused("org/name", cache_dir=str(tmp_path))
    assert message.startswith("org/name: cannot be loaded: We couldn't connect")
    assert len(message.splitlines()) == 1
    with pytest.raises(ModelError, match="org/name: no tokenizer"):
        load_tokenizer("org/name")
    assert "Repo id must be" in refused("a/b/c")


def test_a_folder_without_a_tokenizer_has_none(copied: Path) -> None:
    """transformers 5 would make an empty one from the config."""
    assert load_tokenizer(str(copied)).eos_token == "<|im_end|>"
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(copied))


REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class RemoteConfig(PretrainedConfig):
    model_type = "remote"


class RemoteForSequenceClassification(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(8, 4)
        self.score = torch.nn.Linear(4, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return SequenceClassifierOutputWithPast(logits=self.score(self.embed(input_ids[:, -1])))
"""


@pytest.fixture
def remote_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes are in its own folder."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "remote"
    folder.mkdir()
    file = folder / "remote_code.py"
    file.write_text(REMOTE_CODE)
    spec = importlib.util.spec_from_file_location("remote_code", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.RemoteConfig(num_labels=1)
    module.RemoteForSequenceClassification(config).save_pretrained(folder)
    classes = {
        "AutoConfig": "remote_code.RemoteConfig",
        "AutoModelForSequenceClassification": "remote_code.RemoteForSequenceClassification",
    }
    edit_config(folder, auto_map=classes)
    return folder


@pytest.mark.parametrize("architecture", [AutoModelForSequenceClassification, None])
def test_remote_code_is_run_only_where_it_is_trusted(
    remote_model: Path, architecture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "no")
    for trust in ({}, {"trust_remote_code": False}):
        message = refused(remote_model, architecture, **trust)
        assert "needs code that comes with the model" in message
        assert "pass trust_remote_code=True" in message
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        check_reward_model(str(remote_model), {})
    assert not asked  # as transformers does where nothing is said
    model = create_model_from_path(remote_model, architecture, trust_remote_code=True)
    assert type(model).__name__ == "RemoteForSequenceClassification"
    assert model(torch.tensor([[3]])).logits.shape == (1, 1)


# --- architecture -------------------------------------------------------------------------------


def test_an_architecture_given_wins_over_the_configs(language_model: Path) -> None:
    model = create_model_from_path(language_model, AutoModelForSequenceClassification)
    assert type(model).__name__ == "Qwen2ForSequenceClassification"
    model = create_model_from_path(language_model, AutoModelForCausalLM)
    assert type(model).__name__ == "Qwen2ForCausalLM"


def test_the_architecture_is_inferred_from_the_config(
    language_model: Path, reward_model: Path
) -> None:
    assert type(create_model_from_path(language_model)).__name__ == "Qwen2ForCausalLM"
    assert type(create_model_from_path(reward_model)).__name__ == "Qwen2ForSequenceClassification"


def test_an_unknown_or_absent_architecture_is_refused_by_name(copied: Path) -> None:
    edit_config(copied, architectures=["Qwen9ForRewards"])
    assert "has no class 'Qwen9ForRewards'" in refused(copied)
    edit_config(copied, architectures=None)
    assert "names no `architectures`" in refused(copied)
    # Told which class it is, both load.
    model = create_model_from_path(copied, AutoModelForSequenceClassification)
    assert type(model).__name__ == "Qwen2ForSequenceClassification"


# --- dtype --------------------------------------------------------------------------------------

DTYPES: list[tuple[dict[str, Any], torch.dtype]] = [
    ({}, torch.float32),
    ({"dtype": "auto"}, torch.bfloat16),
    ({"dtype": None}, torch.bfloat16),
    ({"dtype": "bfloat16"}, torch.bfloat16),
    ({"dtype": "float16"}, torch.float16),
    ({"dtype": "float32"}, torch.float32),
    ({"dtype": torch.bfloat16}, torch.bfloat16),
    ({"dtype": torch.float16}, torch.float16),
    ({"dtype": torch.float32}, torch.float32),
    ({"dtype": torch.float64}, torch.float64),
]


@pytest.mark.parametrize(("given", "expected"), DTYPES, ids=str)
def test_a_dtype_is_loaded_as_trl_loads_it(
    given: dict[str, Any], expected: torch.dtype, bf16_reward_model: Path
) -> None:
    arguments = (str(bf16_reward_model), AutoModelForSequenceClassification)
    models = [create_model_from_path(*arguments, **given)]
    models += [trl_function()(*arguments, num_labels=1, **given)] if trl_function() else []
    for model in models:
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("given", ["bf16", "float64", "torch.bfloat16", "fp32", "", 16, 1.5])
def test_any_other_dtype_is_refused_in_the_words_of_trl(given: Any, reward_model: Path) -> None:
    message = refused(reward_model, error=ConfigError, dtype=given)
    assert message == refused(reward_model, error=ConfigError, torch_dtype=given)
    assert issubclass(ConfigError, ValueError)
    assert f"but got {given!r}." in message
    with pytest.raises(ConfigError):
        check_reward_model(str(reward_model), {"dtype": given})
    if trl_function():
        with pytest.raises(ValueError, match="Invalid `dtype`") as theirs:
            trl_function()(str(reward_model), dtype=given)
        begin, _, _ = str(theirs.value).partition("e.g.")
        assert begin.endswith("a string representing a valid `torch.dtype` (")
        assert message.startswith(begin)


def test_the_nearest_dtype_is_named(reward_model: Path) -> None:
    message = refused(reward_model, error=ConfigError, dtype="torch.bfloat16")
    assert "Did you mean 'bfloat16'?" in message


def test_the_older_name_torch_dtype_is_honoured(bf16_reward_model: Path) -> None:
    for given in ("auto", None, "bfloat16", torch.bfloat16):
        assert create_model_from_path(bf16_reward_model, torch_dtype=given).dtype == torch.bfloat16
    model = create_model_from_path(bf16_reward_model, dtype="float16", torch_dtype=torch.float16)
    assert model.dtype == torch.float16


def test_two_dtypes_that_disagree_are_refused(reward_model: Path) -> None:
    message = refused(reward_model, error=ConfigError, dtype="float32", torch_dtype="bfloat16")
    assert message.startswith("dtype='float32' and torch_dtype='bfloat16' disagree")


# --- device_map ---------------------------------------------------------------------------------


@pytest.fixture
def cuda_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is a GPU: the value may be looked at, but no model loaded with it."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )


def device_map(folder: Path, **given: Any) -> Any:
    return create_model_from_path(folder, Probe, **given)["device_map"]


@contextmanager
def live_deepspeed_config(stage: int) -> Iterator[None]:
    config = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
    )
    try:
        yield
    finally:
        del config  # transformers keeps a weak reference
        gc.collect()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what a CPU machine does")
def test_on_a_cpu_the_device_map_is_none(reward_model: Path) -> None:
    assert device_map(reward_model) is None
    assert create_model_from_path(reward_model).device == torch.device("cpu")


@pytest.mark.usefixtures("cuda_reported")
def test_on_a_gpu_the_device_map_is_auto(reward_model: Path) -> None:
    assert device_map(reward_model) == "auto"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the weights are placed")
def test_on_a_gpu_the_weights_are_on_it(reward_model: Path) -> None:
    assert create_model_from_path(reward_model).device.type == "cuda"
    assert create_model_from_path(reward_model, device_map=None).device.type == "cpu"


def test_on_mps_the_device_map_is_none(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: mps)
    assert device_map(reward_model) is None


@pytest.mark.usefixtures("cuda_reported")
@pytest.mark.parametrize("given", ["auto", {"": "cpu"}, None], ids=str)
def test_a_device_map_given_is_kept(given: Any, reward_model: Path) -> None:
    assert device_map(reward_model, device_map=given) == given
    with live_deepspeed_config(stage=2):
        assert device_map(reward_model, device_map=given) == given


@pytest.mark.parametrize("given", ["auto", {"": "cpu"}, None], ids=str)
def test_a_model_loads_with_each_device_map(given: Any, reward_model: Path) -> None:
    if given == "auto" and torch.accelerator.is_available():
        pytest.skip("checked where the weights go in a test of its own")
    model = create_model_from_path(reward_model, device_map=given)
    assert model.device == torch.device("cpu")


@pytest.mark.usefixtures("cuda_reported")
def test_before_torchrun_made_its_group_the_device_map_is_none(
    reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert device_map(reward_model) == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device_map(reward_model) is None
    monkeypatch.delenv("RANK")
    assert device_map(reward_model) == "auto"


@pytest.mark.usefixtures("cuda_reported")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_under_deepspeed_the_device_map_is_none(stage: int, reward_model: Path) -> None:
    with live_deepspeed_config(stage):
        assert device_map(reward_model) is None
    assert device_map(reward_model) == "auto"


@pytest.mark.usefixtures("cuda_reported")
@pytest.mark.parametrize("given", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map_under_zero_3_is_refused_with_the_reason(
    given: Any, reward_model: Path
) -> None:
    with live_deepspeed_config(stage=3):
        message = refused(reward_model, Probe, error=ConfigError, device_map=given)
        assert "cannot be used under ZeRO-3: DeepSpeed partitions every weight" in message
        assert device_map(reward_model, device_map=None) is None


WORKER = """
import os, sys, torch
from transformers import AutoModelForSequenceClassification
from raywards.loader import create_model_from_path

folder = sys.argv[1]
torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")


class Probe:
    from_pretrained = staticmethod(lambda model_id, **kwargs: (kwargs, {"missing_keys": []}))


def device_map():
    return create_model_from_path(folder, Probe)["device_map"]


torch.distributed.init_process_group("gloo")
inside = device_map()
model = create_model_from_path(folder, AutoModelForSequenceClassification)
total = model.score.weight.detach().clone()
torch.distributed.all_reduce(total)
assert torch.allclose(total, 2 * model.score.weight)  # a group of two, with the same head
torch.distributed.destroy_process_group()
del os.environ["WORLD_SIZE"]
print(inside, model.device, device_map())
"""


@pytest.mark.trains
def test_in_a_gloo_job_of_two_processes_the_device_map_is_none(reward_model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(reward_model)],
            cwd=ROOT,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=100)
            assert worker.returncode == 0, err
            assert out.split("\n")[-2] == "None cpu auto"  # "auto" once the job is over
    finally:
        for worker in workers:
            worker.kill()


# --- the head -----------------------------------------------------------------------------------


def test_a_new_head_has_one_label_and_is_said_aloud(
    language_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_seed(11)
    with caplog.at_level(logging.WARNING, logger="raywards.loader"):
        model = create_model_from_path(language_model, AutoModelForSequenceClassification)
    assert model.score.weight.shape == (1, model.config.hidden_size)
    assert "the reward head (score.weight) is new: drawn at random under seed 11" in caplog.text


def test_a_trained_head_is_loaded_without_a_word(
    reward_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="raywards.loader"):
        model = create_model_from_path(reward_model, AutoModelForSequenceClassification)
    assert torch.equal(model.score.weight, weights(reward_model)["score.weight"])
    assert caplog.text == ""


def test_an_encoder_gets_a_head_of_one_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="raywards.loader"):
        model = create_model_from_path(tmp_path, AutoModelForSequenceClassification)
    assert model.classifier.weight.shape == (1, 16)
    assert "classifier.weight" in caplog.text


def test_a_new_head_is_the_same_under_the_same_seed_and_the_same_as_trls(
    language_model: Path,
) -> None:
    def head(load: Callable[..., Any], seed: int) -> torch.Tensor:
        set_seed(seed)
        model = load(str(language_model), AutoModelForSequenceClassification, num_labels=1)
        weight: torch.Tensor = model.score.weight
        return weight

    ours = head(create_model_from_path, 7)
    assert torch.equal(ours, head(create_model_from_path, 7))
    assert not torch.equal(ours, head(create_model_from_path, 8))
    if trl_function():
        assert torch.equal(ours, head(trl_function(), 7))


def test_a_reward_model_of_two_labels_cannot_be_asked_for(language_model: Path) -> None:
    message = refused(language_model, AutoModelForSequenceClassification, num_labels=2)
    assert "num_labels=2: a reward model has one output" in message


@pytest.mark.parametrize("given", [{}, {"num_labels": 1}], ids=str)
def test_a_saved_head_of_two_labels_is_refused_with_the_version_story(
    given: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_qwen2(tmp_path, num_labels=2)
    assert weights(folder)["score.weight"].shape[0] == 2
    for architecture in (AutoModelForSequenceClassification, None):
        message = refused(folder, architecture, **given)
        assert "its head has 2 labels; a reward model has one. TRL 0.26 to 0.28" in message
    with pytest.raises(ModelError, match="its head has 2 labels"):
        check_reward_model(str(folder), {})


def test_a_saved_head_of_five_labels_is_refused_without_it(tmp_path: Path) -> None:
    message = refused(tiny_qwen2(tmp_path, num_labels=5))
    assert "its head has 5 labels" in message
    assert "TRL" not in message


def test_a_finished_reward_model_without_its_head_is_refused(copied: Path) -> None:
    kept = {name: tensor for name, tensor in weights(copied).items() if name != "score.weight"}
    assert len(kept) == len(weights(copied)) - 1
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    message = refused(copied, AutoModelForSequenceClassification)
    assert "is a finished classifier whose weights lack score.weight" in message
    assert "modules_to_save=['score']" in message


def test_a_config_given_decides_the_labels(language_model: Path) -> None:
    config = AutoConfig.from_pretrained(language_model, num_labels=1)
    model = create_model_from_path(
        language_model, AutoModelForSequenceClassification, config=config
    )
    assert model.score.weight.shape[0] == 1
    two = AutoConfig.from_pretrained(language_model)
    assert "one output" in refused(language_model, AutoModelForSequenceClassification, config=two)


def test_other_arguments_reach_from_pretrained(reward_model: Path) -> None:
    model = create_model_from_path(reward_model, attn_implementation="eager", hidden_act="relu")
    assert model.config._attn_implementation == "eager"
    assert model.config.hidden_act == "relu"
    assert create_model_from_path(reward_model, Probe, use_safetensors=True)["use_safetensors"]


# --- hub ids and revisions ----------------------------------------------------------------------

MAIN, NEWER = "a" * 40, "b" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`org/name` as the hub's client leaves it on disk: a language model, and as `v2` a reward
    model of another width with another tokenizer.
    """
    assert hub.HF_HUB_OFFLINE
    other = chatml_tokenizer()
    other.add_tokens(["<v2>"])
    other.chat_template = CHATML_TEMPLATE + "{#- v2 #}"
    language = tiny_qwen2(tmp_path / "v1", num_labels=None)
    reward = tiny_qwen2(tmp_path / "v2", hidden_size=48, tokenizer=other)
    cache = tmp_path / "hub"
    repo = cache / "models--org--name"
    for ref, commit, folder in (("main", MAIN, language), ("v2", NEWER, reward)):
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (repo / part).mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        for file in folder.iterdir():
            blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    return tmp_path


@pytest.mark.parametrize("revision", ["v2", NEWER])
def test_a_revision_reaches_config_weights_and_tokenizer(revision: str, hub_cache: Path) -> None:
    main = create_model_from_path("org/name")
    assert (type(main).__name__, main.config.hidden_size) == ("Qwen2ForCausalLM", 32)
    model = create_model_from_path("org/name", revision=revision)
    assert type(model).__name__ == "Qwen2ForSequenceClassification"  # inferred from its own config
    assert model.config.hidden_size == 48
    assert torch.equal(model.score.weight, weights(hub_cache / "v2")["score.weight"])
    tokenizers = [load_tokenizer("org/name"), load_tokenizer("org/name", revision=revision)]
    assert [("<v2>" in tokenizer.get_vocab()) for tokenizer in tokenizers] == [False, True]
    assert [("v2" in tokenizer.chat_template) for tokenizer in tokenizers] == [False, True]


def test_a_revision_decides_which_head_is_checked(hub_cache: Path) -> None:
    check_reward_model("org/name", {})
    edit_config(hub_cache / "hub" / "models--org--name" / "snapshots" / NEWER, id2label=None)
    check_reward_model("org/name", {})
    with pytest.raises(ModelError, match="its head has 2 labels"):
        check_reward_model("org/name", {"revision": "v2"})


@pytest.mark.usefixtures("hub_cache")
def test_an_unknown_revision_is_refused() -> None:
    assert "cannot be loaded" in refused("org/name", revision="v3")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer("org/name", revision="v3")


@pytest.mark.parametrize("kind", ["folder", "hub id"])
def test_the_call_in_the_readme_works_as_it_stands(kind: str, hub_cache: Path) -> None:
    model = create_model_from_path(
        "org/name" if kind == "hub id" else str(hub_cache / "v1"),
        architecture=AutoModelForSequenceClassification,
        num_labels=1,
        dtype="bfloat16",
    )
    assert type(model).__name__ == "Qwen2ForSequenceClassification"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.tensor([chatml_tokenizer()("Hello")["input_ids"]])
    reward = model(ids).logits
    assert reward.shape == (1, 1)
    assert bool(reward.isfinite())


def trl_function() -> Any:
    """TRL's function of the same name, or None where trl is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    from trl.trainer.utils import create_model_from_path as theirs

    return theirs
