"""One case through `trl.RewardTrainer` and through raywards, and what has to be equal afterwards.

Both run in this process, on the CPU and in fp32, from the same folder, rows and settings. Where
TRL is not installed, the modules that import this one are skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import chatml_tokenizer

from raywards import RewardConfig, RewardTrainer

trl = pytest.importorskip("trl")

ROWS = conversation_rows(21)
"""Two batches of eight and one of five."""

METRICS = (
    "loss", "grad_norm", "learning_rate", "epoch", "accuracy", "margin", "mean_reward",
    "min_reward", "max_reward", "num_tokens",
)  # fmt: skip
TOLERANCE = 1e-5

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-3,
    # At 1e-8 AdamW moves a weight whose gradient is rounding by a whole step, either way.
    "adam_epsilon": 1e-6,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Both:
    """The same case, trained by both."""

    theirs: Any
    ours: RewardTrainer
    start: dict[str, torch.Tensor]
    """The weights that training began with."""

    def records(self, key: str = "loss") -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """What both logged that has `key`, record by record: TRL's, ours."""
        theirs, ours = (
            [record for record in trainer.state.log_history if key in record]
            for trainer in (self.theirs, self.ours)
        )
        return zip(theirs, ours, strict=True)

    def losses(self) -> tuple[list[float], list[float]]:
        pairs = [(their["loss"], our["loss"]) for their, our in self.records()]
        return [their for their, _ in pairs], [our for _, our in pairs]

    @property
    def weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What both saved, from disk."""
        return saved(self.theirs.args.output_dir), saved(self.ours.paths.export)


def saved(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def build_theirs(model: Any, folder: Path, rows: Any = ROWS, **settings: Any) -> Any:
    arguments = {k: settings.pop(k) for k in _ARGUMENTS if k in settings}
    args = trl.RewardConfig(
        output_dir=str(folder / "trl"), report_to="none", **{**SETTINGS, **settings}
    )
    return trl.RewardTrainer(_start(model), args, train_dataset=table(rows), **arguments)


def build_ours(model: Any, folder: Path, rows: Any = ROWS, **settings: Any) -> RewardTrainer:
    arguments = {k: settings.pop(k) for k in _ARGUMENTS if k in settings}
    args = RewardConfig(
        output_dir=str(folder / "ours"),
        **{"num_workers": 0, "deepspeed": 0, **SETTINGS, **settings},
    )
    return RewardTrainer(_start(model), args, train_dataset=table(rows), **arguments)


_ARGUMENTS = ("eval_dataset", "processing_class", "peft_config")


def _start(model: Any) -> Any:
    """A folder, or what a function makes: each side needs a model object of its own."""
    return model() if callable(model) else str(model)


def table(rows: Any) -> Any:
    return datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows


def train_both(
    model: Any,
    folder: Path,
    rows: Any = ROWS,
    *,
    theirs: Mapping[str, Any] | None = None,
    ours: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Both:
    """Train with both and save; `theirs` and `ours` are settings of one side alone.

    `model` is a folder, or a function that makes a model. `eval_dataset`, `processing_class` and
    `peft_config` may be among the settings.
    """
    their_trainer = build_theirs(model, folder, rows, **{**settings, **(theirs or {})})
    start = {name: value.clone() for name, value in their_trainer.model.state_dict().items()}
    their_trainer.train()
    their_trainer.save_model()
    our_trainer = build_ours(model, folder, rows, **{**settings, **(ours or {})})
    our_trainer.train()
    return Both(their_trainer, our_trainer, start)


def assert_same_run(
    both: Both,
    *,
    steps: int = 6,
    learned: float = 0.05,
    but: Collection[str] = (),
    without_gradient: Collection[str] = (),
) -> None:
    """The same metrics at every step, and the same weights in the end.

    `but` names metrics that TRL computes otherwise: see `test_where_trl_is_wrong.py`.
    `without_gradient` names weights whose gradient is zero but for rounding, which AdamW blows up.
    """
    their_losses, _ = both.losses()
    assert len(their_losses) == steps
    assert their_losses[0] - min(their_losses) > learned, "nothing was learned: it proves nothing"
    for their, our in both.records():
        for name in set(METRICS) - set(but):
            close = pytest.approx(their[name], abs=TOLERANCE, rel=TOLERANCE)
            assert our[name] == close, (name, their["step"])
    assert_same_summary(both)
    assert_same_weights(both, without_gradient)


def assert_same_summary(both: Both) -> None:
    """The last record of the history, which scripts read; the mean loss is over the steps."""
    their, our = both.theirs.state.log_history[-1], both.ours.state.log_history[-1]
    assert our["train_loss"] == pytest.approx(their["train_loss"], abs=TOLERANCE)
    assert (our["step"], our["epoch"]) == (their["step"], pytest.approx(their["epoch"]))
    assert set(their) - set(our) == {"total_flos"}
    assert both.ours.state.global_step == both.theirs.state.global_step


def assert_same_weights(both: Both, without_gradient: Collection[str] = ()) -> None:
    """By name, shape and value; and each of them was trained."""
    theirs, ours = both.weights
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - set(without_gradient):
        assert ours[name].shape == theirs[name].shape, name
        assert (ours[name] - theirs[name]).abs().max() <= TOLERANCE, name
        if name in both.start:
            assert not torch.equal(ours[name], both.start[name]), f"{name} was not trained"


# ---------------------------------------------------------------- models


_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_model(
    folder: Path, family: str, head: str = "CausalLM", *, tokenizer: Any = None, **config: Any
) -> Path:
    """A random two-layer model of any family and its tokenizer, saved into `folder`."""
    tokenizer = tokenizer or chatml_tokenizer()
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    settings = {"vocab_size": len(tokenizer), **_SIZES, **special, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}For{head}")(
            getattr(transformers, f"{family}Config")(**settings)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_SPECIAL = ("pad", "bos", "eos")


def standard_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of messages as rows of text, the prompt within."""
    return [
        {side: " ".join(message["content"] for message in row[side]) for side in row}
        for row in rows
    ]


def with_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of messages with the first of them in a column of its own."""
    return [
        {"prompt": row["chosen"][:1], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}
        for row in rows
    ]
