"""`raywards train|serve|score|quickstart`: what `jobs/` runs, for an installed wheel.

Settings are read before anything heavy is imported: a typo is answered in a second.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from raywards.config import HUGE_PAGES, RewardConfig, ScoreConfig, ServeConfig, TrainJob
from raywards.errors import ConfigError, RaywardsError, did_you_mean
from raywards.settings import help_text, read_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed run, 2 for a wrong input."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        import raywards

        print(raywards.__version__)
        return 0
    command = _COMMANDS.get(words[0])
    if command is None:
        hint = did_you_mean(words[0], _COMMANDS)
        print(f"raywards: no such command: {words[0]!r}.{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    return run(command, words[1:])


def run(command: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Run a command; one of our own errors becomes one screen on stderr and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("raywards").setLevel(logging.INFO)
    os.environ.setdefault(HUGE_PAGES, "1")  # torch is not there yet
    try:
        command(list(argv))
    except RaywardsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("raywards"):
            raise
        extra = command.__name__ if command.__name__ in ("train", "serve", "score") else "all"
        print(f"{error.name} is not installed: pip install 'raywards[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def train(argv: list[str]) -> None:
    """Train a reward model on preference pairs."""
    if _asks_help(argv, "train", [TrainJob, RewardConfig]):
        return
    job, config = read_settings(argv, [TrainJob, RewardConfig])
    given = dict(config.model_init_kwargs or {})
    asked = {
        "dtype": job.dtype,
        "revision": job.model_revision,
        "attn_implementation": job.attn_implementation,
    }
    config.model_init_kwargs = {**given, **{k: v for k, v in asked.items() if v is not None}}

    from raywards.sources import read_rows
    from raywards.train.trainer import RewardTrainer
    from raywards.train.tuning import lora_config, quantization_config

    held_out = None
    if config.eval_strategy != "no" or config.eval_on_start:
        if job.eval_dataset_name is not None:
            held_out = read_rows(job.eval_dataset_name, split=job.dataset_test_split)
        else:
            # Strict: a file without splits would give the training rows themselves.
            held_out = read_rows(
                job.dataset_name,
                split=job.dataset_test_split,
                config=job.dataset_config,
                strict_split=True,
            )
    trainer = RewardTrainer(
        model=job.model_name_or_path,
        args=config,
        train_dataset=read_rows(
            job.dataset_name, split=job.dataset_train_split, config=job.dataset_config
        ),
        eval_dataset=held_out,
        quantization_config=quantization_config(job, bf16=config.bf16 is not False),
        peft_config=lora_config(job),
    )
    result = trainer.train()
    for name, value in result.metrics.items():
        print(f"{name}: {value}")


def serve(argv: list[str]) -> None:
    """Serve a reward model over HTTP until interrupted."""
    if _asks_help(argv, "serve", [ServeConfig]):
        return
    [config] = read_settings(argv, [ServeConfig])

    from raywards.serve.app import run as run_service

    run_service(config)


def score(argv: list[str]) -> None:
    """Score a JSONL file of conversations."""
    if _asks_help(argv, "score", [ScoreConfig]):
        return
    [config] = read_settings(argv, [ScoreConfig])

    from raywards.score_file import score_file

    counts = score_file(config)
    print(f"{counts['scored']} rows scored, {counts['bad']} without a reward: {config.output}")


def quickstart(argv: list[str]) -> None:
    """The whole way on this machine: make data, train on two workers, serve, score."""
    if argv:
        raise ConfigError(f"usage: raywards quickstart, without options; got {' '.join(argv)!r}.")
    # Its own small cluster, for a few minutes: no token files in the home folder.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")

    from raywards.quickstart import main as run_quickstart

    run_quickstart()


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "serve": serve,
    "score": score,
    "quickstart": quickstart,
}


def _asks_help(argv: list[str], name: str, classes: list[type]) -> bool:
    if not {"-h", "--help"} & set(argv):
        return False
    print(f"usage: raywards {name} [--config FILE.yaml] [--SETTING VALUE ...]\n")
    print(help_text(classes))
    return True


def _usage() -> str:
    lines = [f"  {name:<12}{(c.__doc__ or '').splitlines()[0]}" for name, c in _COMMANDS.items()]
    return "\n".join(["usage: raywards COMMAND [--help]", "", *lines])
