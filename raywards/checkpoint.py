"""Folders that describe themselves: checkpoints to resume from, exports to score with.

`raywards.json`, the manifest, is written last and lists every other file with its size, so a folder
with a manifest whose files are all there is complete. This module knows nothing of DeepSpeed: the
engine writes its shards into a folder that it is handed.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import json
import logging
import math
import os
import shutil
import statistics
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from raywards.errors import CheckpointError
from raywards.loader import create_model_from_path, load_tokenizer
from raywards.model import RewardModel, stock_forward
from raywards.packing import group_by_prefix, pack, pack_alone
from raywards.rendering import Rendering
from raywards.settle import settle_path

logger = logging.getLogger(__name__)

MANIFEST = "raywards.json"
FORMAT = 1

# What an export's stored rewards are computed on. Fixed: nobody's data leaves with a model.
PROBES: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "I would rather not say, and you should not ask."),
    ("Write a line about the sea.", "Grey water folds and unfolds; the gulls keep count."),
    ("Is 91 a prime number?", "No: 91 = 7 × 13."),
    ("Is 91 a prime number?", "Yes, 91 is prime, because it is odd and it does not end in 5."),
    ("Summarise: the meeting moved to Tuesday at 10.", "The meeting is on Tuesday at 10."),
    ("Sag mir etwas über Züge.", "Züge fahren auf Schienen und halten an Bahnhöfen. 🚆"),
    ("def add(a, b):", "    return a + b\n" * 8),
)


# ---------------------------------------------------------------- manifests


def write_manifest(folder: Path, content: Mapping[str, Any], files: Mapping[str, int]) -> None:
    """Write the manifest: `content`, and `files` as name to size in bytes. Call it last."""
    manifest = {"format": FORMAT, **content, "files": dict(sorted(files.items()))}
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def add_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Add files to an export, or replace them; at no moment does its manifest list a wrong size."""
    manifest = read_manifest(folder, kind="export")
    others = {name: size for name, size in manifest.pop("files").items() if name not in files}
    write_manifest(folder, manifest, others)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_manifest(folder, manifest, others | {name: len(files[name]) for name in files})


def list_files(folder: Path) -> dict[str, int]:
    """Every file below `folder` but a manifest, as relative name to size in bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, f".{MANIFEST}.partial", ".complete")
    }


def read_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    """The manifest of a complete folder of this `kind` ("checkpoint" or "export").

    Raises `CheckpointError` where there is none, it is of another kind or a newer format, or a file
    that it lists is missing or has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so it is not a complete {kind} of raywards: it was not "
            "finished, or something else wrote it."
        )

    def size_of(name: str) -> int | None:
        return (folder / name).stat().st_size if (folder / name).is_file() else None

    return check_manifest(str(folder), path.read_bytes(), size_of, kind=kind)


def check_manifest(
    where: str, content: bytes, size_of: Callable[[str], int | None], *, kind: str
) -> dict[str, Any]:
    """The manifest with this `content`, of a folder whose files have these sizes (None: no file).

    Raises as `read_manifest` does.
    """
    try:
        manifest: dict[str, Any] = json.loads(content)
        wrote, found_kind, files = manifest["format"], manifest["kind"], manifest["files"]
        sizes = {str(name): int(size) for name, size in files.items()}
        newer = wrote > FORMAT
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where}/{MANIFEST}: is damaged ({error!r}); use another {kind}."
        ) from None
    if newer:
        raise CheckpointError(
            f"{where}: was written in format {wrote} by a newer raywards; this one reads up to "
            f"{FORMAT}. Update raywards.",
            newer=True,
        )
    if found_kind != kind:
        raise CheckpointError(f"{where}: is of kind {found_kind!r}; {kind!r} is needed here.")
    for name, size in sizes.items():
        found = size_of(name)
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{where}: is damaged: {name} {state}, and the manifest says {size} bytes. Use "
                f"another {kind}, or copy this one again."
            )
    return manifest


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints in a run folder, oldest step first.

    Raises `CheckpointError` for one of a newer raywards: passed over, the run would begin anew.
    """
    return [run / name for _, name in list_checkpoints(run)]


def list_checkpoints(run: Path) -> list[tuple[int, str]]:
    """Step and name of the complete checkpoints in a run folder; see `complete_checkpoints`."""
    return sort_complete(
        # Without a manifest it was cut off while it was written: an orphan, and no news.
        (folder.name, functools.partial(read_manifest, folder, kind="checkpoint"))
        for folder in run.glob("checkpoint-*")
        if (folder / MANIFEST).is_file()
    )


def sort_complete(
    manifests: Iterable[tuple[str, Callable[[], Mapping[str, Any]]]],
) -> list[tuple[int, str]]:
    """Step and name of those checkpoints whose manifests can be read, oldest step first."""
    found = []
    for name, read in manifests:
        try:
            found.append((int(read()["step"]), name))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError) and error.newer:
                raise
            logger.warning("passed over: %s", error)
    return sorted(found)


# ---------------------------------------------------------------- export


def export_model(
    inner: Any,
    weights: Mapping[str, Tensor],
    rendering: Rendering,
    folder: Path,
    *,
    dtype: torch.dtype,
    training: Mapping[str, Any],
    last_ids: Iterable[int] = (),
    beside: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write an ordinary Hugging Face folder to score with, and return its manifest.

    Args:
        inner: The transformers classifier, for its class and config.
        weights: Its full state dict on the CPU.
        rendering: Rendering of the training rows; its tokenizer goes into the folder.
        folder: Where; an export that is there is replaced once the new one is whole.
        dtype: Type of the stored weights.
        training: What the manifest tells of the run: base model, rows, steps, settings.
        last_ids: Ids that ended a training sequence; none of them becomes the pad token.
        beside: Further files of the folder, name to text.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)  # by an export that was killed
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    config = inner.config
    before = {name: getattr(config, name, None) for name in ("problem_type", "dtype", "use_cache")}
    try:
        # On a copy of the weights in the stated type; an integer buffer keeps its own.
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}
        config.problem_type = "regression"  # engines then return the raw reward, no sigmoid
        config.dtype = dtype
        config.use_cache = True
        inner.save_pretrained(partial, state_dict=cast)
        sequences = _probe_sequences(rendering)
        tokenizer = rendering.tokenizer
        taken = {*last_ids, *(ids[-1] for ids in sequences), tokenizer.eos_token_id}
        trust = _is_remote(inner)
        _write_pad_token(partial, tokenizer, taken, trust)
        _edit_config(partial, dtype=str(dtype).removeprefix("torch."))
        for name, text in beside.items():
            (partial / name).write_text(text, encoding="utf-8")
        manifest = _describe_export(partial, sequences, rendering, dtype, training, trust)
        write_manifest(partial, manifest, list_files(partial))
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for name, value in before.items():
            setattr(config, name, value)
    return read_manifest(folder, kind="export")


def choose_pad_token(tokenizer: Any, taken: Iterable[int | None], vocab_size: int) -> str | None:
    """A special token that never ends a sequence, or None where one has to be added.

    transformers pools at the last token that is not the pad token; vLLM and others at the last
    token. Both are the same token if the pad token ends no sequence.
    """
    ends = set(taken)
    special = {
        token.content: id_
        for id_, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and id_ not in ends and id_ < vocab_size
    }
    reserved = [t for t in special if any(w in t.lower() for w in ("pad", "reserved", "unused"))]
    own = [tokenizer.pad_token, *reserved, tokenizer.unk_token, tokenizer.bos_token]
    for token in (*own, *special):
        id_ = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if id_ is not None and id_ not in ends and id_ < vocab_size:
            return str(token)
    return None


def _is_remote(thing: Any) -> bool:
    """Whether its class came with a model: then its code was trusted, and runs already."""
    return type(thing).__module__.startswith("transformers_modules.")


def _write_pad_token(folder: Path, tokenizer: Any, taken: set[int | None], trust: bool) -> None:
    """Give the exported tokenizer and config a pad token that no sequence ends in."""
    vocab_size = _edit_config(folder)["vocab_size"]
    # A copy: training goes on with the pad token that it began with.
    tokenizer.save_pretrained(folder)
    exported = type(tokenizer).from_pretrained(folder)
    pad_token = choose_pad_token(exported, taken, vocab_size)
    if pad_token is None:
        pad_token = "<|raywards_pad|>"
        exported.add_special_tokens({"pad_token": pad_token})
        if len(exported) > vocab_size:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype="auto", trust_remote_code=trust
            )
            model.resize_token_embeddings(len(exported), mean_resizing=False)
            model.save_pretrained(folder)
    exported.pad_token = pad_token
    exported.save_pretrained(folder)
    _edit_config(folder, pad_token_id=exported.pad_token_id)


def _edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Set keys of a folder's config.json and return the part that describes the text model.

    `save_pretrained` writes the type that the model has in training, not that of the weights it is
    given, and a pad token is of the export alone.
    """
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    text: dict[str, Any] = config.get("text_config", config)
    if changes:
        config.update(changes)
        text.update(changes)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return text


def _probe_sequences(rendering: Rendering) -> list[list[int]]:
    if rendering.tokenizer.chat_template is None:
        return [rendering.encode_text(f"{prompt} {response}") for prompt, response in PROBES]
    return [
        rendering.encode_conversation(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        )
        for prompt, response in PROBES
    ]


def _describe_export(
    folder: Path,
    sequences: Sequence[list[int]],
    rendering: Rendering,
    dtype: torch.dtype,
    training: Mapping[str, Any],
    trust: bool,
) -> dict[str, Any]:
    # The tokenizer as it will be loaded: a class may rebuild itself otherwise than it was saved.
    tokenizer = load_tokenizer(str(folder), trust_remote_code=_is_remote(rendering.tokenizer))
    reloaded = Rendering(tokenizer, control_tokens=rendering.control_tokens)
    if _probe_sequences(reloaded) != sequences:
        raise CheckpointError(
            f"{folder}: the tokenizer, saved and loaded again, gives other token ids, so rewards "
            f"would be wrong. {type(rendering.tokenizer).__name__} was trained with, and "
            f"{type(reloaded.tokenizer).__name__} was loaded: pass that one as `processing_class`."
        )
    splits = [reloaded.split(ids) for ids in sequences]
    stored = _measure(folder, dtype, sequences, splits, trust)
    if not all(map(math.isfinite, stored.together)):
        raise CheckpointError(
            f"{folder}: its rewards are not finite ({stored.together}), so it is not kept: the "
            "weights hold NaN or infinity, or overflow in this precision."
        )
    spread = statistics.pstdev(stored.together)
    bounds = {"float32": 1e-5 * max(1.0, spread)}
    # What bf16 costs is measured against the same weights in fp32, also where they are bf16.
    exact, coarse = (
        stored if dtype == other else _measure(folder, other, sequences, splits, trust)
        for other in (torch.float32, torch.bfloat16)
    )
    worst = max(
        _furthest(values, exact.together)
        for values in (coarse.alone, coarse.together, coarse.plain)
    )
    # Eight probes see less than the worst that a cluster will: leave as much again.
    bounds["bfloat16"] = 2 * worst + 1e-5 * max(1.0, spread)
    stored_in = str(dtype).removeprefix("torch.")
    off = _furthest(stored.together, stored.plain)
    if not off <= bounds.get(stored_in, bounds["bfloat16"]):
        raise CheckpointError(
            f"{folder}: plain transformers gives rewards up to {off:.3g} from raywards' on the "
            "export just written, so it is not kept. Please report the model class."
        )
    return {
        "kind": "export",
        "dtype": stored_in,
        "pad_token_id": stored.pad_token_id,
        "pooling": "last_token" if stored.pools_by_position else "classifier",
        "rendering": reloaded.describe(),
        "training": dict(training),
        "rewards": [
            {"input_ids": ids, "reward": reward}
            for ids, reward in zip(sequences, stored.together, strict=True)
        ],
        "reward_sd": spread,
        "bounds": bounds,
    }


class _Measured(NamedTuple):
    """Rewards [probes] of an export in one precision, and the model that gave them."""

    together: list[float]
    alone: list[float]
    plain: list[float]
    pools_by_position: bool
    pad_token_id: int | None


def _measure(
    folder: Path,
    dtype: torch.dtype,
    sequences: Sequence[list[int]],
    splits: Sequence[int],
    trust: bool,
) -> _Measured:
    """Load the export as a user would: to cast a loaded model would round its buffers, too."""
    inner = create_model_from_path(
        str(folder),
        AutoModelForSequenceClassification,
        dtype=dtype,
        device_map=None,
        trust_remote_code=trust,
    )
    model = RewardModel(inner).eval()
    settle_path(model)
    return _Measured(
        _rewards(model, sequences, splits),
        [_rewards(model, [ids], [split])[0] for ids, split in zip(sequences, splits, strict=True)],
        _plain_rewards(model, sequences),
        model.pools_by_position,
        inner.config.get_text_config().pad_token_id,
    )


def _furthest(values: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(values, others, strict=True))


@torch.inference_mode()
def _rewards(
    model: RewardModel, sequences: Sequence[list[int]], splits: Sequence[int]
) -> list[float]:
    groups = group_by_prefix(sequences, dict(enumerate(splits)))
    rewards = [math.nan] * len(sequences)
    order = [member for group in groups for member in group.members]
    for member, reward in zip(order, model(pack(sequences, groups)).tolist(), strict=True):
        rewards[member] = reward
    return rewards


@torch.inference_mode()
def _plain_rewards(model: RewardModel, sequences: Sequence[list[int]]) -> list[float]:
    """What a script gets that knows transformers alone, whose head is as coarse as its weights."""
    batch = pack_alone(sequences).padded(model.inner.config.get_text_config().pad_token_id)
    with stock_forward(model) as inner:
        output = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    values: list[float] = output.logits[:, 0].float().tolist()
    return values


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; on Linux no moment passes without one of the two."""
    if not folder.exists():
        os.replace(new, folder)
    elif _exchange(new, folder):
        shutil.rmtree(new)
    else:
        old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
        os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (NFS, not Linux)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    done: int = renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange)
    return done == 0
