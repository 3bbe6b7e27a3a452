"""The training cases of TRL's own tests, each through TRL and through raywards.

As in TRL's tests, every weight has to move; beyond them, every metric of every step and every
weight has to be the same.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from both import (
    ROWS,
    Both,
    assert_same_run,
    assert_same_summary,
    assert_same_weights,
    build_ours,
    build_theirs,
    standard_rows,
    table,
    tiny_model,
    train_both,
    trl,
    with_prompt,
)
from preferences_data import conversation_rows
from tiny import CHATML_TEMPLATE, chatml_tokenizer, llama_like_tokenizer, tiny_qwen2
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    dynamic_module_utils,
    set_seed,
)
from trl.trainer.reward_trainer import DataCollatorForPreference

import raywards
from raywards.errors import ConfigError, ModelError
from raywards.packing import TrainPlan, pack_groups
from raywards.train.table import PairTable

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "qwen2", num_labels=None)


# ---------------------------------------------------------------- models

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8
    },
    "Llama": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_each_family_is_trained_as_trl_trains_it(family: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / family, family, **FAMILIES[family])
    assert_same_run(train_both(folder, tmp_path))


def test_a_bias_that_shifts_both_rewards_stays_where_it_was(tmp_path: Path) -> None:
    """The loss sees differences alone, so the gradient of the last norm's bias is zero.

    In TRL it is zero but for rounding, which AdamW brings to the size of a step: the bias walks at
    random, and the rewards with it.
    """
    folder = tiny_model(tmp_path / "neox", "GPTNeoX")
    both = train_both(folder, tmp_path, adam_epsilon=1e-8)
    bias = "gpt_neox.final_layer_norm.bias"
    rewards = ("mean_reward", "min_reward", "max_reward")
    biases = "gpt_neox.layers.0.attention.query_key_value.bias"  # of keys: they cancel, too
    assert_same_run(both, but=rewards, without_gradient=(bias, biases))
    theirs, ours = both.weights
    assert 1e-5 < (theirs[bias] - both.start[bias]).abs().max() < 1e-3
    assert torch.equal(ours[bias], both.start[bias])
    for their, our in both.records():
        assert all(our[name] == pytest.approx(their[name], abs=1e-4) for name in rewards)


def loaded(folder: Path, **arguments: Any) -> Callable[[], Any]:
    """Makes a classifier from a folder, with the head that both trainers draw."""

    def load() -> Any:
        set_seed(42)
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, **{"dtype": torch.float32, **arguments}
        )

    return load


def test_a_model_object_is_trained_as_trl_trains_it(model: Path, tmp_path: Path) -> None:
    both = train_both(loaded(model), tmp_path)
    assert_same_run(both)
    by_path = train_both(model, tmp_path / "by path")
    assert both.losses() == by_path.losses()


def test_a_reward_model_is_trained_on_as_trl_trains_it(tmp_path: Path) -> None:
    both = train_both(tiny_qwen2(tmp_path / "rm"), tmp_path)
    assert_same_run(both)


REMOTE_CODE = """
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel


class RemoteConfig(Qwen2Config):
    model_type = "remote"


class RemoteForSequenceClassification(Qwen2ForSequenceClassification):
    config_class = RemoteConfig

    def __init__(self, config):
        Qwen2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Qwen2Model(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""


def test_a_model_with_code_of_its_own_is_trained_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tiny_qwen2(tmp_path / "remote")
    (folder / "remote_code.py").write_text(REMOTE_CODE)
    name = "RemoteForSequenceClassification"
    changes = {
        "model_type": "remote",
        "architectures": [name],
        "auto_map": {
            "AutoConfig": "remote_code.RemoteConfig",
            "AutoModelForSequenceClassification": f"remote_code.{name}",
        },
    }
    for file, changed in (
        ("config.json", changes),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((folder / file).read_text()) | changed
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="custom code"):
        build_theirs(folder, tmp_path)
    with pytest.raises(ModelError, match="custom code"):
        build_ours(folder, tmp_path).train()
    both = train_both(folder, tmp_path / "trusted", trust_remote_code=True)
    assert type(both.theirs.model).__name__ == type(both.ours.model).__name__ == name
    assert_same_run(both)


def test_half_precision_weights_have_masters_where_trl_trains_them_as_they_are(
    model: Path, tmp_path: Path
) -> None:
    """TRL updates fp16 weights in fp16: at 1e-6 most of them never move, so its own test takes a
    learning rate of 0.1. raywards refuses that, or keeps fp32 masters (ZeRO 1 to 3)."""
    settings = {"model_init_kwargs": {"dtype": "float16"}, "bf16": True, "learning_rate": 1e-6}
    with pytest.raises(ConfigError, match="no fp32 masters"):
        build_ours(model, tmp_path / "refused", **settings).train()
    both = train_both(model, tmp_path, ours={"deepspeed": 1}, **settings)
    theirs, ours = both.weights
    assert {tensor.dtype for tensor in (theirs | ours).values()} == {torch.float16}
    assert ours.keys() == theirs.keys()

    def moved(weights: dict[str, torch.Tensor]) -> float:
        number = sum(tensor.numel() for tensor in weights.values())
        return sum((weights[k] != both.start[k]).sum().item() for k in weights) / number

    assert moved(theirs) < 0.2 * moved(ours), (moved(theirs), moved(ours))


def test_loading_settings_of_a_loaded_model_are_refused_and_trl_warns(
    model: Path, tmp_path: Path
) -> None:
    settings = {"model_init_kwargs": {"dtype": "bfloat16"}}
    build_theirs(loaded(model), tmp_path, **settings)
    with pytest.raises(ConfigError, match="model_init_kwargs: has no effect"):
        build_ours(loaded(model), tmp_path, **settings)


def test_a_model_of_two_labels_is_refused_in_the_words_of_trl(tmp_path: Path) -> None:
    def two() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    folder = tiny_qwen2(tmp_path / "lm", num_labels=None)
    for build in (build_theirs, build_ours):
        with pytest.raises(ValueError, match="reward models require `num_labels=1`"):
            build(two, tmp_path)


# ---------------------------------------------------------------- rows

TYPES: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "standard, implicit prompt": standard_rows,
    "standard, explicit prompt": lambda rows: [
        {
            "prompt": row["chosen"][0]["content"],
            "chosen": " " + row["chosen"][1]["content"],
            "rejected": " " + row["rejected"][1]["content"],
        }
        for row in rows
    ],
    "conversational, implicit prompt": lambda rows: rows,
    "conversational, explicit prompt": with_prompt,
}


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_each_type_are_trained_as_trl_trains_them(
    kind: str, model: Path, tmp_path: Path
) -> None:
    assert_same_run(train_both(model, tmp_path, TYPES[kind](ROWS)))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.slow
def test_rows_of_each_type_under_a_tokenizer_that_adds_bos(kind: str, tmp_path: Path) -> None:
    tokenizer = llama_like_tokenizer()
    tokenizer.pad_token = "<|end_of_text|>"
    folder = tiny_model(tmp_path / "llama", "Llama", tokenizer=tokenizer)
    assert_same_run(train_both(folder, tmp_path, TYPES[kind](ROWS)))


def test_rows_of_token_ids_are_trained_as_trl_trains_them(model: Path, tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    ids = [
        {f"{side}_ids": tokenizer(row[side])["input_ids"] for side in row}
        for row in standard_rows(ROWS)
    ]
    both = train_both(model, tmp_path, ids)
    assert_same_run(both)
    older = [
        {"chosen_input_ids": row["chosen_ids"], "rejected_input_ids": row["rejected_ids"]}
        for row in ids
    ]
    with pytest.warns(FutureWarning, match="chosen_input_ids"):
        theirs = build_theirs(model, tmp_path / "older", older)
    again = build_ours(model, tmp_path / "older", older)  # warns once in a process: see its test
    for trainer in (theirs, again):
        trainer.train()
    assert Both(theirs, again, {}).losses() == both.losses()


def test_a_stream_is_trained_as_trl_trains_it(model: Path, tmp_path: Path) -> None:
    """A stream has no length, so both need `max_steps`; TRL takes its rows in their order."""
    stream = table(ROWS).to_iterable_dataset()
    both = train_both(model, tmp_path, stream, max_steps=3, train_sampling_strategy="sequential")
    assert_same_run(both, steps=3)


def test_template_variables_of_a_row_reach_the_template(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "chat_template_kwargs": {"shout": i % 2 == 0}} for i, row in enumerate(ROWS)]
    both = train_both(model, tmp_path, rows)
    assert_same_run(both)
    text = both.theirs.processing_class.decode(both.theirs.train_dataset[0]["chosen_ids"])
    assert "LOUD" in text
    assert "LOUD" not in both.theirs.processing_class.decode(
        both.theirs.train_dataset[1]["chosen_ids"]
    )


def calls(number: int, word: str) -> list[dict[str, Any]]:
    """A conversation in which the assistant calls a tool."""
    arguments = {"query": word, "days": number}
    return [
        {"role": "user", "content": f"What is the weather on day {number}?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "search", "arguments": arguments}}],
        },
        {"role": "tool", "content": f"{word} " * (number % 4 + 1)},
        {"role": "assistant", "content": f"{word} " * (number % 7 + 1)},
    ]


TOOL = {
    "type": "function",
    "function": {"name": "search", "parameters": {"properties": {"days": {"type": "integer"}}}},
}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON"])
def test_rows_with_tool_calls_are_trained_as_trl_trains_them(
    tools: Any, model: Path, tmp_path: Path
) -> None:
    rows = [
        {"chosen": calls(i, "good"), "rejected": calls(i, "bad"), "tools": tools}
        for i in range(len(ROWS))
    ]
    both = train_both(model, tmp_path, rows)
    assert_same_run(both)
    text = both.theirs.processing_class.decode(both.theirs.train_dataset[0]["chosen_ids"])
    assert '"integer"' in text
    assert "<tool_call>" in text


def test_a_pair_over_max_length_is_left_out_as_trl_leaves_it_out(
    model: Path, tmp_path: Path
) -> None:
    both = train_both(model, tmp_path, max_length=54)
    kept = len(both.theirs.train_dataset)
    assert 8 < kept < len(ROWS)
    assert both.ours.dropped["train"] == {"too_long": len(ROWS) - kept}
    assert_same_run(both, steps=4, learned=0.02)


def test_training_rows_are_required_and_have_to_be_a_dataset(model: Path, tmp_path: Path) -> None:
    """A list of rows is a TypeError in TRL; raywards takes a list for several datasets, and says
    how to make one of it."""
    for build in (build_theirs, build_ours):
        with pytest.raises(ValueError, match=r"train_dataset.* required"):
            build(model, tmp_path, None)
    rows = tuple(ROWS)
    with pytest.raises(TypeError, match="must be a `Dataset`"):
        build_theirs(model, tmp_path, rows)
    with pytest.raises(ConfigError, match=r"datasets\.Dataset\.from_list"):
        build_ours(model, tmp_path, rows).train()


# ---------------------------------------------------------------- chat templates


def test_a_template_file_is_used_as_trl_uses_it(model: Path, tmp_path: Path) -> None:
    """Also where the tokenizer is given."""
    file = tmp_path / "template.jinja"
    file.write_text(CHATML_TEMPLATE.replace("message.role +", "'the ' + message.role +"))
    both = train_both(model, tmp_path, chat_template_path=str(file))
    assert_same_run(both)
    assert both.losses() != train_both(model, tmp_path / "own").losses(), "it changed nothing"
    for folder in (both.theirs.args.output_dir, both.ours.paths.export):
        assert (Path(folder) / "chat_template.jinja").read_text() == file.read_text()
    given = train_both(
        model,
        tmp_path / "given",
        chat_template_path=str(file),
        theirs={"processing_class": AutoTokenizer.from_pretrained(model)},
        ours={"processing_class": AutoTokenizer.from_pretrained(model)},
    )
    assert given.losses() == both.losses()


def test_a_template_of_another_model_brings_its_tokens_as_in_trl(
    model: Path, tmp_path: Path
) -> None:
    """New tokens get rows of the embedding, drawn alike; its closing token is taken, too."""
    tokenizer = llama_like_tokenizer()
    tokenizer.chat_template = None
    folder = tiny_model(tmp_path / "llama", "Llama", tokenizer=tokenizer)
    before = len(tokenizer)
    both = train_both(folder, tmp_path, chat_template_path=str(model))
    assert_same_run(both)
    _, ours = both.weights
    [embedding] = [name for name in ours if "embed_tokens" in name]
    assert ours[embedding].shape[0] == 448 > before
    exported = AutoTokenizer.from_pretrained(both.ours.paths.export)
    assert exported.eos_token == both.theirs.processing_class.eos_token == "<|im_end|>"
    assert len(exported("<|im_start|>", add_special_tokens=False)["input_ids"]) == 1
    for trainer in (both.theirs, both.ours):
        assert trainer.model.config.eos_token_id == exported.eos_token_id


@pytest.mark.slow
def test_a_template_of_another_model_trains_a_gpt_neox_without_one(
    model: Path, tmp_path: Path
) -> None:
    """Where no token is new, TRL still rounds the embedding to a multiple of 64, also down."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    folder = tiny_model(tmp_path / "neox", "GPTNeoX", tokenizer=tokenizer, vocab_size=500)
    both = train_both(folder, tmp_path, chat_template_path=str(model))
    theirs, ours = both.losses()
    assert theirs[0] - theirs[-1] > 0.05
    assert ours == pytest.approx(theirs, abs=1e-5)
    name = "gpt_neox.embed_in.weight"
    assert [weights[name].shape[0] for weights in both.weights] == [384, 500]


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True], ids=["the model's", "a given tokenizer"])
def test_another_closing_token_closes_text_as_in_trl(
    given: bool, model: Path, tmp_path: Path
) -> None:
    def tokenizer() -> dict[str, Any]:
        return {"processing_class": AutoTokenizer.from_pretrained(model)} if given else {}

    both = train_both(
        model,
        tmp_path,
        standard_rows(ROWS),
        eos_token="<think>",
        theirs=tokenizer(),
        ours=tokenizer(),
    )
    assert_same_run(both)
    closing = chatml_tokenizer().convert_tokens_to_ids("<think>")
    assert both.theirs.train_dataset[0]["chosen_ids"][-1] == closing
    assert both.ours.model.config.eos_token_id == both.theirs.model.config.eos_token_id == closing


def test_an_unknown_closing_token_is_refused(model: Path, tmp_path: Path) -> None:
    for build in (build_theirs, build_ours):
        with pytest.raises(ValueError, match=r"<\|nothing\|>.* (not found|not) in the"):
            build(model, tmp_path, eos_token="<|nothing|>")


# ---------------------------------------------------------------- settings

SAME: dict[str, tuple[dict[str, Any], int]] = {
    # settings, and steps
    "data_seed": ({"data_seed": 7}, 6),
    "a seed": ({"seed": 7}, 6),
    "half epochs": ({"num_train_epochs": 1.5}, 5),
    "max_steps": ({"max_steps": 4}, 4),
    "in order, full batches": (
        {"train_sampling_strategy": "sequential", "dataloader_drop_last": True},
        4,
    ),
    "optimizer": (
        {
            "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
            "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "max_grad_norm": 0.1,
        },
        6,
    ),
    "no clipping": ({"max_grad_norm": 0.0, "warmup_steps": 0.5}, 6),
    "centering": ({"center_rewards_coefficient": 0.1}, 6),
}  # fmt: skip
USUAL = ("half epochs", "optimizer", "centering")


@pytest.mark.parametrize(
    "case",
    [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in SAME],
)
def test_a_setting_means_what_it_means_in_trl(case: str, model: Path, tmp_path: Path) -> None:
    settings, steps = SAME[case]
    assert_same_run(train_both(model, tmp_path, **settings), steps=steps)


@pytest.mark.parametrize(
    "name",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
     "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay"],
)  # fmt: skip
@pytest.mark.slow
def test_a_schedule_is_trls(name: str, model: Path, tmp_path: Path) -> None:
    more = {
        "cosine_with_min_lr": {"min_lr": 1e-4},
        "warmup_stable_decay": {"num_decay_steps": 2},
        "polynomial": {"power": 2.0},
    }
    both = train_both(
        model, tmp_path, lr_scheduler_type=name, warmup_steps=1, lr_scheduler_kwargs=more.get(name)
    )
    assert_same_run(both)


def test_margins_are_subtracted_as_in_trl(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "margin": 0.25 * (i % 4)} for i, row in enumerate(ROWS)]
    both = train_both(model, tmp_path, rows)
    assert_same_run(both)
    theirs, _ = both.losses()
    assert theirs[0] - train_both(model, tmp_path / "without").losses()[0][0] > 0.05


def test_full_accumulations_make_the_steps_of_trl(model: Path, tmp_path: Path) -> None:
    """24 pairs in micro-batches of four: none is left over. TRL's extremes are of micro-batches."""
    both = train_both(
        model,
        tmp_path,
        conversation_rows(24),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert_same_run(both, but=("min_reward", "max_reward"))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [None, True, False], ids=str)
def test_activations_are_recomputed_as_in_trl(
    reentrant: bool | None, model: Path, tmp_path: Path
) -> None:
    how = None if reentrant is None else {"use_reentrant": reentrant}
    both = train_both(
        model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=how
    )
    assert_same_run(both)


def test_zero_stages_in_one_process_train_what_trl_trains(model: Path, tmp_path: Path) -> None:
    """Of partitions over several processes are the tests in `tests/integration`."""
    for stage in (1, 2, 3):
        both = train_both(model, tmp_path / str(stage), ours={"deepspeed": stage}, max_steps=3)
        theirs, ours = both.losses()
        assert theirs[0] - theirs[-1] > 0.05
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert_same_weights(both)
        assert_same_summary(both)


# ---------------------------------------------------------------- batches

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    # TRL's own cases of its collator
    "two": [
        {"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5]},
        {"chosen_ids": [6, 7], "rejected_ids": [8]},
    ],
    "one": [{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5]}],
    "a common prefix": [
        {"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 5]},
        {"chosen_ids": [6, 7], "rejected_ids": [6, 7, 8]},
    ],
}


@pytest.mark.parametrize("pad_id", [0, 999])
@pytest.mark.parametrize("multiple", [None, 4], ids=str)
@pytest.mark.parametrize("case", EXAMPLES)
def test_a_packed_row_holds_what_trl_collates(case: str, multiple: int | None, pad_id: int) -> None:
    """TRL lays all chosen above all rejected; a packed row has pair by pair."""
    examples = EXAMPLES[case]
    theirs = DataCollatorForPreference(pad_token_id=pad_id, pad_to_multiple_of=multiple)(examples)
    row = pack_groups([[e["chosen_ids"], e["rejected_ids"]] for e in examples])
    ours = row.padded(pad_id)
    order = [*range(0, 2 * len(examples), 2), *range(1, 2 * len(examples), 2)]
    length = ours.input_ids.shape[1]
    assert torch.equal(ours.input_ids[order], theirs["input_ids"][:, :length])
    assert torch.equal(ours.attention_mask[order], theirs["attention_mask"][:, :length])
    assert not theirs["attention_mask"][:, length:].any()
    stored = row.input_ids.numel()
    assert stored <= theirs["attention_mask"].sum()
    if case == "a common prefix":
        assert stored == theirs["attention_mask"].sum() - 4


def test_the_batches_are_trls_in_trls_order(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "margin": 0.25 * (i % 4)} for i, row in enumerate(ROWS)]
    theirs = build_theirs(model, tmp_path, rows)
    ours = build_ours(model, tmp_path, rows, num_train_epochs=1)
    ours.train()
    [folder] = ours.paths.prepared.glob("train-*")
    pairs = PairTable(folder)
    plan = TrainPlan(num_pairs=len(pairs), global_batch=8, seed=42, shuffle=True, drop_last=False)
    batches = list(theirs.get_train_dataloader())
    steps = list(plan.steps(0, 3))
    assert len(batches) == len(steps) == 3
    for batch, (_, indices) in zip(batches, steps, strict=True):
        of_step = pairs.take(list(indices))
        sides = [ids for side in zip(*of_step["sequences"], strict=True) for ids in side]
        lengths = batch["attention_mask"].sum(1).tolist()
        assert [ids[:n] for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True)] == (
            sides
        )
        assert batch["margin"].tolist() == of_step["margin"]


def test_the_same_names_come_from_both_packages() -> None:
    """A script changes its import and nothing else."""
    for name in ("RewardTrainer", "RewardConfig"):
        assert hasattr(trl, name)
        assert hasattr(raywards, name)
    theirs = inspect.signature(trl.RewardTrainer.__init__).parameters
    ours = inspect.signature(raywards.RewardTrainer.__init__).parameters
    assert list(ours) == list(theirs)
