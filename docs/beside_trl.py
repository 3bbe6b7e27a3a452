"""The page `trl.md`: every setting, argument, method and metric of TRL's, and what raywards has.

What can be read from the two packages is read from them: which settings there are, their defaults
and their choices, what is refused and what to use instead. Typed in here is only what code cannot
tell: why a thing is better. TRL has to be installed to make the page.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from raywards.config import RewardConfig
from raywards.train.trainer import _NOT_SUPPORTED, RewardTrainer
from raywards.trl_fields import REFUSED, REFUSED_METHODS

HEAD = """# TRL beside raywards

Made by `docs/build.py` from TRL {version}, raywards and `docs/beside_trl.py`: change them there.

A script for TRL's `RewardTrainer` runs with its imports changed. Below is everything that TRL's
`RewardConfig`, `RewardTrainer` and log have, as *same*, *better* (and how), or *refused* (with what
to use instead; a refusal is an error that says so, never silence). `tests/conformance` runs TRL's
own test cases through both and compares losses, metrics and weights; where TRL gives a wrong value,
`tests/conformance/test_where_trl_is_wrong.py` states both."""

SETTINGS = """## Settings

{count} settings: {same} are the same, {better} better, {refused} refused. Values of refused ones
that change nothing are accepted; they are in [settings](settings.md), and so are raywards' own. A
default that differs is shown as TRL's → ours, with the reason."""

ARGUMENTS = "## Arguments of RewardTrainer"
METHODS = """## Methods of RewardTrainer

TRL's trainer is transformers' `Trainer`, whose public methods are all listed."""
METRICS = """## Metrics

Names in the log, in the last record of `log_history`, and in the result of `evaluate()`. What
raywards logs beside them is in [metrics](metrics.md)."""

# Why a default is not TRL's. Which those are is computed.
OTHER_DEFAULTS = {
    "disable_tqdm": "TRL's is off unless its log level is high",
    "gradient_checkpointing": "recomputing costs a third, and activations often fit",
}

# How a setting of both is better, or what it leaves out.
BETTER = {
    "per_device_train_batch_size": "decides which pairs make a step, not what has to fit in memory",
    "per_device_eval_batch_size": "changes no figure: every held-out pair weighs the same",
    "gradient_accumulation_steps": "every pair of a step weighs the same, also in the last, short "
    "one, where TRL takes a mean of means",
    "train_sampling_strategy": "packed rows waste nothing on padding, so no order has to be bent",
    "eos_token": "wins over the one that `chat_template_path` brings",
    "chat_template_path": "never shrinks the embedding",
    "max_length": "what is dropped is counted, and `truncation` cuts instead where asked",
    "dataset_num_proc": "rows are encoded once for the cluster, not on each node",
    "bf16": "head, reward difference and loss are computed in fp32",
    "model_init_kwargs": "`torch_dtype` is honoured; `device_map` and more labels than one are "
    "refused, where TRL changes them in silence",
    "gradient_checkpointing": "only where activations would not fit, which is measured",
    "max_grad_norm": "a norm that is not finite stops the run before the update",
    "logging_steps": "pairs weigh the same, also where steps differ in size; a share of all steps "
    "(below 1) is refused",
    "eval_strategy": "figures keep the name of their set; calibration, quantiles and length bias "
    "besides",
    "eval_steps": "a share of all steps (below 1) is refused",
    "save_steps": "a share of all steps (below 1) is refused",
    "save_strategy": "a checkpoint counts only once it is whole",
    "resume_from_checkpoint": "read by `train()` itself; a run started again goes on without it, "
    "at the next pair",
    "deepspeed": "takes a stage number, too; contradictions with other settings are refused",
    "push_to_hub": "uploads the verified export, once",
    "run_name": "names the run folder: started again under it, a run continues",
    "output_dir": "the default is named after the model, whatever else is set",
}

ARGUMENT_NOTES = {
    "train_dataset": "files, folders, hub ids, `DatasetDict` and several sources, too",
    "eval_dataset": "the same kinds, and mappings of names to them",
    "model": "a head of two labels, or a lost one, is refused",
    "args": "frozen once training starts",
    "processing_class": "never changed: settings apply to a copy",
}

METHOD_NOTES = {
    "train": "restarts workers that die, and ends with a verified export",
    "evaluate": "every pair weighs the same; figures keep the name of their set",
    "save_model": "copies the export: it cannot differ from what was verified",
    "push_to_hub": "uploads the verified export",
}


class Note(NamedTuple):
    """What raywards has of a metric of TRL's."""

    verdict: str
    text: str = ""


_WEIGHED = Note("better", "every pair weighs the same; TRL averages steps or batches")
_EXTREME = Note("better", "of all rewards; TRL averages the extremes of batches")
METRIC_NOTES = {
    "loss": Note("better", "the same at each step; over several, every pair weighs the same"),
    "accuracy": Note("better", "a tie is half right, in TRL wrong; every pair weighs the same"),
    "margin": _WEIGHED,
    "mean_reward": _WEIGHED,
    "min_reward": _EXTREME,
    "max_reward": _EXTREME,
    "num_tokens": Note("better", "goes on after a resume, in TRL from zero"),
    "grad_norm": Note("same"),
    "learning_rate": Note("same"),
    "epoch": Note("same"),
    "step": Note("same"),
    "train_runtime": Note("same"),
    "train_samples_per_second": Note("same", "in pairs"),
    "train_steps_per_second": Note("same"),
    "train_loss": Note("same"),
    "total_flos": Note("refused", "Take 6 x parameters x `num_tokens`: shared prefixes cost less."),
    "eval_loss": Note("same"),
    "eval_accuracy": Note("better", "as `accuracy`; of several sets, each keeps its own"),
    "eval_margin": _WEIGHED,
    "eval_mean_reward": _WEIGHED,
    "eval_min_reward": _EXTREME,
    "eval_max_reward": _EXTREME,
    "eval_num_tokens": Note("better", "of the held-out pairs; TRL's is of those trained so far"),
    "eval_runtime": Note("same"),
    "eval_samples_per_second": Note("refused", "Divide `eval_num_pairs` by `eval_runtime`."),
    "eval_steps_per_second": Note("refused", "Batches are not of one size: count pairs."),
}

Table = Callable[[tuple[str, ...], list[tuple[str, ...]]], str]
Word = Callable[[object], str]


def page(table: Table, word: Word) -> str:
    """The whole page; `table` and `word` are those of `build.py`."""
    import trl

    settings = setting_rows(word)
    found = [row[2].replace(";", ":").partition(":")[0] for row in settings]
    counts = {verdict: found.count(verdict) for verdict in ("same", "better", "refused")}
    methods = public_methods(trl.RewardTrainer)
    parts = [
        HEAD.format(version=trl.__version__),
        SETTINGS.format(count=len(settings), **counts),
        table(("setting", "default", "raywards"), settings),
        ARGUMENTS,
        table(("argument", "raywards"), [argument_row(name) for name in arguments()]),
        METHODS,
        table(("method", "raywards"), [method_row(name) for name in methods]),
        METRICS,
        table(
            ("metric", "raywards"),
            [(f"`{name}`", _join(*note)) for name, note in METRIC_NOTES.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- settings


def setting_rows(word: Word) -> list[tuple[str, ...]]:
    """Name, default and verdict of every setting of TRL's."""
    import trl

    ours = {field.name: field for field in dataclasses.fields(RewardConfig)}
    rows = []
    for field in dataclasses.fields(trl.RewardConfig):
        default = default_of(field)
        if field.name not in ours:
            verdict = _join("refused", REFUSED[field.name].instead)
        else:
            left_out = choices(trl.RewardConfig, field) - choices(RewardConfig, ours[field.name])
            verdict = _join("better", BETTER[field.name]) if field.name in BETTER else "same"
            if left_out:
                verdict += f"; refused values: {', '.join(map(word, sorted(left_out)))}"
        shown = word(default)
        if field.name in ours and default_of(ours[field.name]) != default:
            shown += f" → {word(default_of(ours[field.name]))}: {OTHER_DEFAULTS[field.name]}"
        rows.append((f"`{field.name}`", shown, verdict))
    return rows


def other_defaults() -> set[str]:
    """Settings of both whose defaults differ."""
    import trl

    ours = {field.name: default_of(field) for field in dataclasses.fields(RewardConfig)}
    theirs = {field.name: default_of(field) for field in dataclasses.fields(trl.RewardConfig)}
    return {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def choices(cls: Any, field: dataclasses.Field[Any]) -> set[str]:
    """The words that a setting takes, where it takes only some."""
    named = set(field.metadata.get("choices") or ())
    hints = [typing.get_type_hints(cls)[field.name]]
    while hints:
        hint = hints.pop()
        if inspect.isclass(hint) and issubclass(hint, enum.Enum):
            named |= {member.value for member in hint}
        if typing.get_origin(hint) is typing.Literal:
            named |= set(typing.get_args(hint))
        else:
            hints += typing.get_args(hint)
    return named


# ---------------------------------------------------------------- arguments and methods


def arguments() -> list[str]:
    import trl

    return [name for name in inspect.signature(trl.RewardTrainer).parameters if name != "self"]


def argument_row(name: str) -> tuple[str, str]:
    if name in _NOT_SUPPORTED:
        return f"`{name}`", _join("refused", _NOT_SUPPORTED[name] + ".")
    note = ARGUMENT_NOTES.get(name, "")
    return f"`{name}`", _join("better" if note else "same", note)


def public_methods(cls: type[Any]) -> list[str]:
    return [name for name, _ in inspect.getmembers(cls, callable) if not name.startswith("_")]


def method_row(name: str) -> tuple[str, str]:
    if name in REFUSED_METHODS:
        return f"`{name}`", _join("refused", REFUSED_METHODS[name])
    assert name in public_methods(RewardTrainer), name
    note = METHOD_NOTES.get(name, "")
    return f"`{name}`", _join("better" if note else "same", note)


def _join(verdict: str, text: str = "") -> str:
    return f"{verdict}: {text}" if text else verdict
