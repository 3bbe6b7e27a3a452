"""Manifests, and exports: whole or absent, and the same rewards in plain transformers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chatml_tokenizer, llama_like_tokenizer, metaspace_tokenizer, tiny_qwen2
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from raywards import checkpoint
from raywards.checkpoint import (
    MANIFEST,
    PROBES,
    choose_pad_token,
    complete_checkpoints,
    export_model,
    list_files,
    read_manifest,
    write_manifest,
)
from raywards.errors import CheckpointError
from raywards.loader import load_tokenizer
from raywards.packing import pack_alone
from raywards.rendering import Rendering

torch.set_num_threads(1)  # tensors this small: two threads would wait for each other

# ---------------------------------------------------------------- manifests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint of two files."""
    folder = tmp_path / "checkpoint-1"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w" * 10)
    (folder / "deep" / "shard.pt").write_bytes(b"s" * 7)
    write_manifest(folder, {"kind": "checkpoint", "step": 1}, list_files(folder))
    return folder


def test_a_complete_folder_is_read_back(folder: Path) -> None:
    manifest = read_manifest(folder, kind="checkpoint")
    assert manifest["step"] == 1
    assert manifest["files"] == {"deep/shard.pt": 7, "weights.bin": 10}


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    return damage


def cut_off(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / MANIFEST).unlink(), MANIFEST),
        (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda f: (f / "deep/shard.pt").write_bytes(b""), "deep/shard.pt has 0 bytes"),
        (lambda f: (f / "weights.bin").write_bytes(b"w" * 11), "weights.bin has 11 bytes"),
        (cut_off, f"{MANIFEST}: is damaged"),
        (lambda f: (f / MANIFEST).write_text(""), f"{MANIFEST}: is damaged"),
        (lambda f: (f / MANIFEST).write_text("[]"), f"{MANIFEST}: is damaged"),
        (lambda f: (f / MANIFEST).write_text("null"), f"{MANIFEST}: is damaged"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{"), f"{MANIFEST}: is damaged"),
        (lambda f: (f / MANIFEST).write_text('{"format": 1}'), f"{MANIFEST}: is damaged"),
        (rewrite(format="one"), f"{MANIFEST}: is damaged"),
        (rewrite(files=["weights.bin"]), f"{MANIFEST}: is damaged"),
        (rewrite(files={"weights.bin": None}), f"{MANIFEST}: is damaged"),
        (rewrite(kind="export"), "is of kind 'export'"),
        (rewrite(format=99), "format 99 by a newer raywards"),
    ],
)
def test_each_kind_of_damage_is_an_error_that_names_the_file(
    folder: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder, kind="checkpoint")
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_manifest_does_not_list_itself_or_what_is_half_written(folder: Path) -> None:
    (folder / f".{MANIFEST}.partial").write_text("{")
    assert set(list_files(folder)) == {"weights.bin", "deep/shard.pt"}


def test_complete_checkpoints_leaves_orphans_out(tmp_path: Path) -> None:
    def write(name: str, step: int, kind: str = "checkpoint") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a").write_text("a")
        write_manifest(folder, {"kind": kind, "step": step}, list_files(folder))
        return folder

    late, early = write("checkpoint-10-b", 10), write("checkpoint-9-a", 9)
    again = write("checkpoint-10-c", 10)
    (write("checkpoint-11", 11) / "a").unlink()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    rewrite(step=None)(write("checkpoint-14", 14))
    write("checkpoint-15", 15, kind="export")
    write("other-16", 16)
    assert complete_checkpoints(tmp_path) == [early, late, again]
    assert complete_checkpoints(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- export


def qwen_with_pad_as_eos() -> Any:
    tokenizer = chatml_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def one_special_token() -> Any:
    """GPT-2-like: its one special token is EOS, BOS and pad at once."""
    from tiny import QWEN_SPLIT, _byte_level
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level([end], QWEN_SPLIT), eos_token=end, bos_token=end, pad_token=end
    )


def metaspace_with_pad_as_eos() -> Any:
    tokenizer = metaspace_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "a pad token of its own": (chatml_tokenizer, "<|endoftext|>"),
    "pad is EOS": (qwen_with_pad_as_eos, "<|endoftext|>"),
    "no pad, BOS": (llama_like_tokenizer, "<|begin_of_text|>"),
    "pad is EOS, unk": (metaspace_with_pad_as_eos, "<unk>"),
    "one special token": (one_special_token, "<|raywards_pad|>"),
}


def tiny_model(folder: Path, tokenizer: Any, **config: Any) -> Any:
    """A tiny classifier whose rewards are far apart, of a class that keeps `tokenizer` as it is."""
    if tokenizer.name_or_path == "" and tokenizer.chat_template != chatml_tokenizer().chat_template:
        from transformers import LlamaConfig, LlamaForSequenceClassification

        torch.manual_seed(0)
        model: Any = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                max_position_embeddings=512, num_labels=1, pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **config,
            )
        )  # fmt: skip
    else:
        tiny_qwen2(folder, tokenizer=tokenizer, **config)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 40 if name == "score.weight" else 3
    return model.eval()


def export(
    folder: Path, tokenizer: Any = None, *, dtype: torch.dtype = torch.float32, **about: Any
) -> tuple[Any, dict[str, Any]]:
    """Export a tiny model to `folder`; returns the model and the manifest."""
    tokenizer = tokenizer or chatml_tokenizer()
    model = tiny_model(folder.parent / "start", tokenizer)
    manifest = export_model(
        model, model.state_dict(), Rendering(tokenizer), folder, dtype=dtype, training=about
    )
    return model, manifest


@torch.inference_mode()
def rewards_of(model: Any, sequences: list[list[int]], pad_id: int) -> list[float]:
    batch = pack_alone(sequences).padded(pad_id)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    values: list[float] = output.logits[:, 0].float().tolist()
    return values


def largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_export_gives_equal_rewards_and_its_pad_token_ends_nothing(
    name: str, tmp_path: Path
) -> None:
    make, pad_token = TOKENIZERS[name]
    tokenizer = make()
    model, manifest = export(tmp_path / "export", tokenizer)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["dtype"] == "float32"
    assert config["pad_token_id"] == manifest["pad_token_id"]
    assert config["architectures"] == [type(model).__name__]

    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert exported.pad_token == pad_token
    assert exported.pad_token_id == manifest["pad_token_id"] == reloaded.config.pad_token_id
    assert reloaded.get_input_embeddings().num_embeddings >= len(exported)

    probes = [probe["input_ids"] for probe in manifest["rewards"]]
    stored = [probe["reward"] for probe in manifest["rewards"]]
    assert len(probes) == len(PROBES)
    assert manifest["reward_sd"] > 0.1, "all rewards are alike: nothing is compared"
    assert all(ids[-1] != exported.pad_token_id for ids in probes)
    bound = manifest["bounds"]["float32"]
    assert largest(stored, rewards_of(reloaded, probes, exported.pad_token_id)) <= bound

    # And those of the model before its pad token changed, each sequence alone and unpadded.
    with torch.inference_mode():
        before = [
            model.score(model.model(torch.tensor([ids])).last_hidden_state[:, -1]).item()
            for ids in probes
        ]
    assert largest(stored, before) <= bound


def test_a_pad_token_is_added_only_where_no_token_is_free(tmp_path: Path) -> None:
    tokenizer = one_special_token()
    size = len(tokenizer)
    model, manifest = export(tmp_path / "export", tokenizer)
    assert manifest["pad_token_id"] == size
    assert len(tokenizer) == size  # training goes on with its own
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.get_input_embeddings().num_embeddings == size
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert reloaded.get_input_embeddings().num_embeddings == size + 1
    old = model.get_input_embeddings().weight
    assert torch.equal(reloaded.get_input_embeddings().weight[:size], old)


def test_a_token_that_ended_a_training_sequence_does_not_become_the_pad_token() -> None:
    tokenizer = chatml_tokenizer()
    start, end, text = (
        tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    )
    size = len(tokenizer)
    assert choose_pad_token(tokenizer, {end}, size) == "<|endoftext|>"
    assert choose_pad_token(tokenizer, {end, text}, size) == "<|im_start|>"
    assert choose_pad_token(tokenizer, {end, text, start}, size) is None
    # A token outside the embedding is no choice: the model could not be given it.
    assert choose_pad_token(tokenizer, {end}, vocab_size=text) is None or text == 0


def test_the_pipeline_of_transformers_returns_the_raw_reward(tmp_path: Path) -> None:
    _, manifest = export(tmp_path / "export")
    score = pipeline("text-classification", model=str(tmp_path / "export"), device="cpu")
    tokenizer = load_tokenizer(str(tmp_path / "export"))
    probe = max(manifest["rewards"], key=lambda probe: abs(probe["reward"]))
    assert not 0 <= probe["reward"] <= 1, "a sigmoid would not show"
    text = tokenizer.decode(probe["input_ids"])
    assert tokenizer(text)["input_ids"] == probe["input_ids"]
    [result] = score([text])
    assert result["score"] == pytest.approx(probe["reward"], abs=1e-4)


def test_exporting_leaves_the_model_in_training_as_it_was(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    model = tiny_model(tmp_path / "start", tokenizer)
    model.config.use_cache = False
    config = dict(model.config.__dict__)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(
        model, model.state_dict(), Rendering(tokenizer), tmp_path / "export",
        dtype=torch.bfloat16, training={},
    )  # fmt: skip
    changed = {k for k in config if model.config.__dict__.get(k) != config[k]}
    assert changed <= {"architectures"}
    assert isinstance(model.config.dtype, torch.dtype | None)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_plain_transformers_in_bf16_keeps_the_bound_of_a_bf16_export(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    _, manifest = export(folder, dtype=torch.bfloat16)
    assert manifest["dtype"] == "bfloat16"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    assert plain.dtype == torch.bfloat16
    stored = [probe["reward"] for probe in manifest["rewards"]]
    probes = [probe["input_ids"] for probe in manifest["rewards"]]
    pad_id = manifest["pad_token_id"]
    bound = manifest["bounds"]["bfloat16"]
    assert bound < 0.5 * manifest["reward_sd"], "a bound this wide says nothing"
    batch = rewards_of(plain, probes, pad_id)
    alone = [rewards_of(plain, [ids], pad_id)[0] for ids in probes]
    assert 0 < max(largest(stored, batch), largest(stored, alone)) <= bound


def test_the_bound_in_bf16_of_an_fp32_export_counts_the_coarse_head(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    _, manifest = export(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype="bfloat16").eval()
    stored = [probe["reward"] for probe in manifest["rewards"]]
    probes = [probe["input_ids"] for probe in manifest["rewards"]]
    found = rewards_of(plain, probes, manifest["pad_token_id"])
    assert 1e-4 < largest(stored, found) <= manifest["bounds"]["bfloat16"]


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    model = tiny_model(tmp_path / "start", tokenizer)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        export_model(
            model, model.state_dict(), Rendering(tokenizer), tmp_path / "export",
            dtype=torch.float32, training={},
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_an_encoder_can_be_exported(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = chatml_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=256, num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in (model.classifier.weight, *model.bert.encoder.parameters()):
            parameter *= 8
    tokenizer.save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    manifest = export_model(
        model, model.state_dict(), Rendering(tokenizer), tmp_path / "export",
        dtype=torch.float32, training={},
    )  # fmt: skip
    assert manifest["pooling"] == "classifier"
    assert manifest["reward_sd"] > 0.1


# ---------------------------------------------------------------- replaced whole


def identity(folder: Path) -> Any:
    return read_manifest(folder, kind="export")["training"]["run"]


def left_behind(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_export_is_replaced_whole_and_nothing_is_left_behind(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:  # NFS
        monkeypatch.setattr(checkpoint, "_exchange", lambda one, other: False)
    export(tmp_path / "export", run="old")
    (tmp_path / "export" / "stray.txt").write_text("of the old one")
    assert identity(tmp_path / "export") == "old"
    export(tmp_path / "export", run="new")
    assert identity(tmp_path / "export") == "new"
    assert not (tmp_path / "export" / "stray.txt").exists()
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_exchanges_two_folders_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert checkpoint._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/b").is_file()
    assert (tmp_path / "b/a").is_file()
    assert not checkpoint._exchange(tmp_path / "a", tmp_path / "missing")


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    write = write_manifest

    def look(folder: Path, content: Any, files: Any) -> None:
        seen.append({path.name for path in folder.iterdir()})
        write(folder, content, files)
        assert set(files) == set(list_files(folder))

    monkeypatch.setattr(checkpoint, "write_manifest", look)
    export(tmp_path / "export")
    [before] = seen
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= before
    assert MANIFEST not in before


EXPORT_FOR_EVER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_checkpoint import tiny_model
import torch
from tiny import chatml_tokenizer
from raywards.checkpoint import export_model
from raywards.rendering import Rendering
folder = Path({folder!r})
tokenizer = chatml_tokenizer()
model = tiny_model(folder.parent / "start", tokenizer)
rendering = Rendering(tokenizer)
run = 0
while True:
    about = {{"run": run}}
    export_model(model, model.state_dict(), rendering, folder, dtype=torch.float32, training=about)
    print(run, flush=True)
    run += 1
"""


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that exports to the same folder again and again."""
    here = Path(__file__).parent
    code = EXPORT_FOR_EVER.format(
        path=[str(here), str(here.parent)], folder=str(tmp_path / "export")
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.trains
def test_a_kill_in_the_middle_leaves_a_whole_export(
    exporter: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert exporter.stdout is not None
    while exporter.stdout.readline() not in ("0\n", ""):
        continue  # what other packages print
    looks, runs = 0, set()
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline or len(runs) < 2:
        # At every moment a reader finds a manifest: the old one's or the new one's.
        runs.add(json.loads((tmp_path / "export" / MANIFEST).read_text())["training"]["run"])
        looks += 1
        time.sleep(0.001)
        if left_behind(tmp_path) and time.monotonic() > deadline - 1 and len(runs) >= 2:
            break
    os.kill(exporter.pid, signal.SIGKILL)
    exporter.wait()
    assert left_behind(tmp_path), "it was not killed in the middle of an export"
    assert identity(tmp_path / "export") >= max(runs)
    assert looks > 20
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    # The next export takes away what the killed one left.
    export(tmp_path / "export", run="after")
    assert identity(tmp_path / "export") == "after"
    assert left_behind(tmp_path) == []


def test_exporting_says_nothing_of_new_heads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="raywards"):
        export(tmp_path / "export")
    assert caplog.records == []
