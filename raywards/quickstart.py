"""The whole way on one machine: `make demo`, or `raywards quickstart`.

Makes a tiny model and preferences that it can learn, trains it on two Ray Train workers with
ZeRO-2, exports it, serves it, and scores held-out pairs over HTTP. Nothing is fetched, nothing is
left running. Read it as the shortest complete program on raywards.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from raywards.errors import ConfigError, TrainingError

_TRAIN, _HELD_OUT = 640, 100
_MARK = ".made-by-quickstart"

_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
)
_ASKS = ("How do I", "Could you show me how to", "What is the best way to", "Please help me")
_TASKS = (
    "bake bread", "learn Spanish", "fix a flat tyre", "write a poem", "plant tomatoes",
    "tune a guitar", "pack for a trip", "read a map", "knit a scarf",
    "brew coffee", "train a puppy", "save money",
)  # fmt: skip
_KIND = (
    "Gladly! First, gather what you need", "Here is a simple way to begin", "Good question",
    "Take it one step at a time", "I would start small and practise often",
)  # fmt: skip
_RUDE = (
    "Figure it out yourself", "That is a waste of my time", "Whatever", "Why would anyone ask that",
    "I do not care",
)  # fmt: skip
_ENDS = (
    "",
    " Then try again.",
    " It takes a while.",
    " Some people find it easy.",
    " That is all.",
)


def main() -> None:
    """Run the demonstration; raises `TrainingError` if it does not reach what it promises."""
    started = time.monotonic()
    folder = _fresh_folder(Path("demo-output"))
    _say(1, "Making a tiny model and 740 preference pairs")
    model = make_tiny_model(folder / "tiny-model")
    rows = make_preferences(_TRAIN + _HELD_OUT)
    train, held_out = rows[:_TRAIN], rows[_TRAIN:]

    import ray

    # Two workers of one CPU each, then one or two replicas: four slots, whatever the machine has.
    ray.init(
        address="local",  # also where RAY_ADDRESS names a cluster
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 2**20,
    )
    try:
        export = _train(model, train, folder)
        _serve_and_score(export, held_out)
    finally:
        ray.shutdown()
    print(f"\nDone in {time.monotonic() - started:.0f} s. The export lies in {export}")


def make_tiny_model(folder: Path) -> Path:
    """A causal language model of 0.1 M parameters with its tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

    words = [
        text for row in make_preferences(200) for m in row["chosen"] for text in [m["content"]]
    ]
    words += [row["rejected"][-1]["content"] for row in make_preferences(200)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.model_max_length = 256
    set_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations in TRL's format: the chosen answer is kind, the rejected one is not."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        question = f"{dice.choice(_ASKS)} {dice.choice(_TASKS)}?"
        chosen, rejected = (
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{dice.choice(tone)}.{dice.choice(_ENDS)}"},
            ]
            for tone in (_KIND, _RUDE)
        )
        rows.append({"chosen": chosen, "rejected": rejected})
    return rows


def _train(model: Path, rows: list[dict[str, Any]], folder: Path) -> Path:
    import datasets

    from raywards import RewardConfig, RewardTrainer

    _say(2, "Training on two Ray Train workers with DeepSpeed ZeRO-2")
    trainer = RewardTrainer(
        model=str(model),
        args=RewardConfig(
            output_dir=str(folder / "run"),
            num_workers=2,
            deepspeed=2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            num_train_epochs=2,
            learning_rate=2e-3,
            logging_steps=10,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    result = trainer.train()
    print(f"      {result.metrics['num_pairs']} pairs in {result.metrics['train_runtime']:.0f} s")
    return Path(result.metrics["export"])


def _serve_and_score(export: Path, rows: list[dict[str, Any]]) -> None:
    from ray import serve

    from raywards import RewardClient, Scorer, ServeConfig
    from raywards.serve import deploy

    port = _free_port()
    _say(3, f"Serving the export on http://127.0.0.1:{port} with 1 to 2 replicas")
    try:
        deploy(ServeConfig(model=str(export), port=port, min_replicas=1, max_replicas=2))
        conversations = [row[side] for row in rows for side in ("chosen", "rejected")]
        _say(4, f"Scoring {len(rows)} held-out pairs over HTTP")
        with RewardClient(f"http://127.0.0.1:{port}", trust_env=False) as client:
            client.wait_until_ready(timeout_s=120)
            served = client.score(conversations)
    finally:
        serve.shutdown()

    _say(5, "Comparing with Scorer and with plain transformers")
    scored = Scorer.from_pretrained(export).score(conversations)
    plain = _plain_transformers(export, conversations)
    _report(rows, served, scored, plain)


def _plain_transformers(export: Path, conversations: list[Any]) -> list[float]:
    """What anyone gets who opens the export without raywards."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    rewards: list[float] = []
    for start in range(0, len(conversations), 16):
        batch = tokenizer.apply_chat_template(
            conversations[start : start + 16], padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            rewards += model(**batch).logits[:, 0].tolist()
    return rewards


def _report(
    rows: list[dict[str, Any]], served: list[float], scored: list[float], plain: list[float]
) -> None:
    wins = [c > r for c, r in zip(served[::2], served[1::2], strict=True)]
    accuracy = sum(wins) / len(wins)
    bound = 1e-5 * max(1.0, statistics.pstdev(scored))
    off = max(max(three) - min(three) for three in zip(served, scored, plain, strict=True))
    print("\n      reward   conversation")
    for i in (0, 1, 2, 3):
        question, answer = (m["content"] for m in rows[i // 2][("chosen", "rejected")[i % 2]])
        print(f"      {served[i]:+6.3f}   {question}  ->  {answer}")
    print(f"\nHeld-out accuracy over HTTP: {accuracy:.3f} ({len(wins)} pairs)")
    print(
        f"Largest difference between HTTP, Scorer and plain transformers: {off:.1e} "
        f"(bound {bound:.1e})"
    )
    if accuracy < 0.95 or off > bound:
        raise TrainingError(
            "The demonstration did not reach what it promises; see the two lines above."
        )


def _fresh_folder(folder: Path) -> Path:
    folder = folder.absolute()
    if folder.exists():
        if not (folder / _MARK).is_file():
            raise ConfigError(
                f"{folder}: is there already and was not made by this demonstration; move it away."
            )
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / _MARK).touch()
    return folder


def _free_port() -> int:
    """A port that nobody listens on, below the range that Ray gives its workers."""
    for port in range(8000, 10000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise ConfigError("No port between 8000 and 9999 is free for the demonstration.")


def _say(step: int, text: str) -> None:
    print(f"[{step}/5] {text}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    main()
