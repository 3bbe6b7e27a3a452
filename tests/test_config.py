"""Settings: TRL's names, one screen for each mistake, flags over YAML, and no secret told."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from raywards.config import (
    RewardConfig,
    RunPaths,
    ScoreConfig,
    ServeConfig,
    TrainJob,
    as_dict,
    attribute_weights,
    check_objective,
    freeze,
    worker_range,
)
from raywards.errors import ConfigError
from raywards.rowset import show
from raywards.settings import field_names, help_text, read_settings
from raywards.sources import read_rows
from raywards.trl_fields import REFUSED

CONFIGS = sorted((Path(__file__).parent.parent / "jobs" / "configs").glob("*.yaml"))
REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl"]

# Defaults of TRL that are not ours, and why.
# Refused although TRL's RewardConfig has no such field: arguments of TRL's trainer.
NOT_FIELDS_OF_TRL = {"data_collator"}


def read(*argv: str) -> tuple[TrainJob, RewardConfig]:
    job, config = read_settings([*REQUIRED, *argv], [TrainJob, RewardConfig])
    return job, config


def one_screen(error: ConfigError) -> str:
    text = str(error)
    assert len(text.splitlines()) <= 12, text
    assert all(len(line) <= 300 for line in text.splitlines()), text
    assert "pydantic" not in text
    return text


# ---------------------------------------------------------------- mistakes

MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"learning_rat": 1e-4}, ["learning_rat:", "Did you mean 'learning_rate'?"]),
    ({"warmup_step": 3}, ["Did you mean 'warmup_steps'?"]),
    ({"per_device_batch_size": 3}, ["Did you mean 'per_device_"]),
    ({"zzzz": 1}, ["zzzz: no such setting."]),
    ({"learning_rate": "fast"}, ["learning_rate:", "number", "'fast'"]),
    ({"learning_rate": -1}, ["learning_rate:", "greater than or equal to 0", "-1"]),
    ({"num_train_epochs": 0}, ["num_train_epochs:", "greater than 0"]),
    ({"max_steps": 0}, ["max_steps:", "positive number of steps"]),
    ({"max_steps": -2}, ["max_steps:", "positive number of steps"]),
    ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size:", "got 0"]),
    ({"per_device_train_batch_size": 1.5}, ["per_device_train_batch_size:", "integer"]),
    ({"max_tokens_per_row": 0}, ["max_tokens_per_row:", "got 0"]),
    ({"gradient_checkpointing": "often"}, ["gradient_checkpointing:", "'often'"]),
    ({"gradient_accumulation_steps": "two"}, ["gradient_accumulation_steps:", "'two'"]),
    ({"adam_beta1": 1.0}, ["adam_beta1:", "less than 1"]),
    ({"seed": -1}, ["seed:"]),
    ({"bf16": "maybe"}, ["bf16:", "'maybe'"]),
    ({"truncation": "middle"}, ["truncation:", "'drop', 'left' or 'right'", "'middle'"]),
    ({"eval_strategy": "sometimes"}, ["eval_strategy:", "'no', 'steps' or 'epoch'"]),
    ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type:", "'cosine'"]),
    ({"model_init_kwargs": "dtype"}, ["model_init_kwargs:", "mapping", "'dtype'"]),
    ({"model_init_kwargs": '{"dtype": '}, ["model_init_kwargs:", "mapping"]),
    ({"dataset_weights": {"a": 0}}, ["dataset_weights", "greater than 0", "got 0"]),
    ({"dataset_weights": '{"a": -1}'}, ["dataset_weights", "greater than 0"]),
    ({"dataset_weights": "a"}, ["dataset_weights", "mapping"]),
    ({"resources_per_worker": "[1]"}, ["resources_per_worker:", "mapping"]),
    ({"resources_per_worker": 4}, ["resources_per_worker"]),
    ({"output_dir": "s3://bucket"}, ["output_dir:", "given as storage_path"]),
    ({"max_failures": -2}, ["max_failures:"]),
    ({"num_workers": -1}, ["num_workers:", "a number of workers"]),
    ({"logging_steps": 0}, ["logging_steps:"]),
    ({"output_dir": 3}, ["output_dir:", "string"]),
    ({"max_length": 0}, ["max_length:"]),
    ({"on_bad_row": "ignore"}, ["on_bad_row:", "'error' or 'drop'"]),
    ({"objective": "dpo"}, ["objective:", "'plackett_luce'", "'dpo'"]),
    ({"attributes": "helpfulness"}, ["attributes:", "mapping", "'helpfulness'"]),
    ({"attributes": {"helpful": "much"}}, ["attributes:", "'helpful' is 'much'", "weight"]),
    ({"attributes": {"helpful": True}}, ["attributes:", "is True"]),
    ({"attributes": {"helpful": float("inf")}}, ["attributes:", "finite number"]),
    ({"attributes": {"text": 1}}, ["attributes:", "'text' is no column of scores"]),
    ({"attributes": {2: 1}}, ["attributes"]),
    ({"attributes": {"a": 0, "b": 0.0}}, ["attributes:", "every reward would be 0"]),
    ({"attributes": {}}, ["attributes:", "every reward would be 0"]),
]

# Settings that mean nothing together.
DISAGREEING: list[tuple[dict[str, Any], list[str]]] = [
    ({"attributes": {"a": 1}}, ["attributes: objective='bradley_terry'", "'regression'"]),
    ({"attributes": {"a": 1}, "objective": "all_pairs"}, ["attributes: objective='all_pairs'"]),
    (
        {"label_smoothing": 0.1, "objective": "plackett_luce"},
        ["label_smoothing=0.1:", "'all_pairs' or 'bradley_terry'"],
    ),
    ({"label_smoothing": 0.1, "objective": "regression"}, ["label_smoothing=0.1:"]),
    (
        {"center_rewards_coefficient": 0.01, "objective": "regression"},
        ["center_rewards_coefficient:", "where zero is"],
    ),
]


@pytest.mark.parametrize(("settings", "told"), DISAGREEING)
def test_settings_that_mean_nothing_under_an_objective_are_refused_by_name(
    settings: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardConfig(**settings)
    assert all(part in one_screen(caught.value) for part in told), str(caught.value)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=told[0].partition(":")[0]):
        read("--config", str(file))
    config = RewardConfig()
    for name, value in settings.items():
        setattr(config, name, value)  # in any order: the last one may mend it
    with pytest.raises(ConfigError) as caught:
        check_objective(config)
    assert told[0] in str(caught.value)


def test_settings_that_go_with_an_objective_are_taken() -> None:
    RewardConfig(objective="all_pairs", label_smoothing=0.1, center_rewards_coefficient=0.01)
    RewardConfig(objective="plackett_luce", center_rewards_coefficient=0.01)
    RewardConfig(objective="regression", center_rewards_coefficient=0.0, label_smoothing=0.0)
    _, config = read("--objective", "regression", "--attributes", '{"b": 1, "a": -0.5}')
    assert attribute_weights(config) == {"a": -0.5, "b": 1.0}
    assert list(attribute_weights(config)) == ["a", "b"], "resuming needs one order"
    assert attribute_weights(RewardConfig()) == {}
    assert RewardConfig(**json.loads(json.dumps(as_dict(config)))) == config


@pytest.mark.parametrize(("settings", "told"), MISTAKES, ids=lambda case: str(case)[:50])
def test_a_wrong_setting_is_one_screen_that_names_it(
    settings: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError) as caught:
        RewardConfig(**settings)
    assert all(part in one_screen(caught.value) for part in [name, *told]), str(caught.value)

    config = RewardConfig()
    with pytest.raises(ConfigError) as caught:
        setattr(config, name, value)
    assert all(part in one_screen(caught.value) for part in [name, *told]), str(caught.value)
    assert config == RewardConfig()

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError) as caught:
        read("--config", str(file))
    assert all(part in one_screen(caught.value) for part in [name, *told]), str(caught.value)


def test_several_mistakes_are_told_together_and_many_are_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        RewardConfig(learning_rate=-1, seed=-1, bf16="perhaps")
    assert all(name in one_screen(caught.value) for name in ("learning_rate", "seed", "bf16"))
    numbers = [f.name for f in dataclasses.fields(RewardConfig) if f.type is not str][:30]
    with pytest.raises(ConfigError, match=r"and \d+ more"):
        RewardConfig(**{name: object() for name in numbers})


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--learning-rat", "1"], "Did you mean 'learning_rate'?"),
        (["--learning_rat"], "Did you mean 'learning_rate'?"),
        (["--learning_rate"], "--learning_rate: expected a value after it"),
        (["--config"], "--config: expected a value after it"),
        (["--learning_rate", "--bf16"], "--learning_rate: expected a value after it"),
        (["learning_rate", "1"], "'learning_rate': expected a flag"),
        (["-lr", "1"], "'-lr': expected a flag"),
        (["--bf16", "yep"], "bf16:"),
        (["--max_steps=ten"], "max_steps:"),
        (["--dtype", "bf16"], "dtype:"),
        (["--fp16"], "fp16: raywards does not support"),
        (["--fp16", "True"], "Use `bf16=True`"),
        (["--report_to", "wandbb"], "report_to: expected tensorboard, wandb, mlflow, trackio"),
        (["--report_to", '["wandb", "comet_ml"]'], "got 'comet_ml'"),
    ],
)
def test_a_wrong_flag_is_one_screen_that_names_it(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    assert told in one_screen(caught.value)


def test_a_required_flag_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="model_name_or_path: is required"):
        read_settings(["--dataset_name", "d"], [TrainJob, RewardConfig])


# ---------------------------------------------------------------- TRL's settings


@pytest.mark.parametrize("name", REFUSED)
def test_what_raywards_does_not_take_from_trl_is_refused_with_advice(name: str) -> None:
    strange = "something-else"
    with pytest.raises(ConfigError) as caught:
        RewardConfig(**{name: strange})
    assert name in one_screen(caught.value)
    assert REFUSED[name].instead in str(caught.value)
    with pytest.raises(ConfigError, match=name):
        setattr(RewardConfig(), name, strange)
    with pytest.raises(ConfigError, match=name):
        read(f"--{name}", strange)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, refused in REFUSED.items() for value in refused.neutral],
)
def test_a_value_that_changes_nothing_is_accepted(name: str, value: Any, tmp_path: Path) -> None:
    assert RewardConfig(**{name: value}) == RewardConfig()
    config = RewardConfig()
    setattr(config, name, value)
    assert config == RewardConfig()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    assert read("--config", str(file))[1] == RewardConfig()
    if value != [] and not isinstance(value, list):
        assert read(f"--{name}={value}")[1] == RewardConfig()


def test_every_setting_of_trl_is_ours_or_refused_and_nothing_is_both() -> None:
    trl = pytest.importorskip("trl")
    theirs = {field.name for field in dataclasses.fields(trl.RewardConfig)}
    ours = set(field_names(RewardConfig))
    assert len(theirs) > 100
    assert theirs - ours - set(REFUSED) == set()
    assert set(REFUSED) - theirs == NOT_FIELDS_OF_TRL
    assert ours & set(REFUSED) == set()


def default_of(field: Any) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def test_a_default_of_trl_that_is_refused_is_accepted_when_spelled_out() -> None:
    trl = pytest.importorskip("trl")
    fields = {f.name: default_of(f) for f in dataclasses.fields(trl.RewardConfig)}
    refused = {name: fields[name] for name in REFUSED if name in fields}
    assert RewardConfig(**refused) == RewardConfig()


def test_the_enums_of_transformers_are_taken() -> None:
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

    config = RewardConfig(
        eval_strategy=IntervalStrategy.STEPS,
        save_strategy=SaveStrategy.EPOCH,
        lr_scheduler_type=SchedulerType.COSINE,
        logging_strategy=IntervalStrategy.STEPS,
    )
    assert (config.eval_strategy, config.save_strategy) == ("steps", "epoch")
    assert config.lr_scheduler_type == "cosine"


FLAGS = [
    "--output_dir", "out", "--learning_rate", "3e-5", "--bf16", "False", "--max_steps", "7",
    "--eval_strategy", "steps", "--model_init_kwargs", '{"dtype": "bfloat16"}',
    "--deepspeed", "3", "--max_length", "64", "--num_workers", "2",
    "--dataset_weights", '{"a.jsonl": 2}',
]  # fmt: skip
PARSED = RewardConfig(
    output_dir="out", learning_rate=3e-5, bf16=False, max_steps=7, eval_strategy="steps",
    model_init_kwargs={"dtype": "bfloat16"}, deepspeed=3, max_length=64, num_workers=2,
    dataset_weights={"a.jsonl": 2.0},
)  # fmt: skip


def test_hf_argument_parser_parses_it() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(RewardConfig)  # type: ignore[arg-type]
    [config] = parser.parse_args_into_dataclasses(FLAGS)
    assert config == PARSED
    assert "Peak learning rate of AdamW" in parser.format_help()
    [from_dict] = parser.parse_dict({"learning_rate": 0.5, "deepspeed": {"steps_per_print": 1}})
    assert from_dict.learning_rate == 0.5
    assert from_dict.deepspeed == {"steps_per_print": 1}


def test_trl_parser_parses_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    file = tmp_path / "config.yaml"
    file.write_text("dataset_name: d\nlearning_rate: 0.1\nlogging_steps: 3\n")
    parser = trl.TrlParser((trl.ScriptArguments, RewardConfig, trl.ModelConfig))
    script, config, _ = parser.parse_args_and_config(["--config", str(file), *FLAGS])
    assert script.dataset_name == "d"
    expected = copy.copy(PARSED)
    expected.logging_steps = 3
    assert config == expected


def test_our_own_flags_say_the_same() -> None:
    assert read(*FLAGS)[1] == PARSED


# ---------------------------------------------------------------- YAML and flags


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model_name_or_path: from-yaml\nlearning_rate: 1e-3\nseed: 1\n"
        "lr_scheduler_kwargs: {min_lr: 1e-6}\neval_strategy: no\nrun_name: none\n"
    )
    job, config = read_settings(
        ["--config", str(file), "--dataset_name=a.jsonl,b.jsonl", "--seed", "2", "--use-cpu"],
        [TrainJob, RewardConfig],
    )
    assert job.model_name_or_path == "from-yaml"
    assert job.dataset_name == ["a.jsonl", "b.jsonl"]
    assert (config.learning_rate, config.seed, config.use_cpu) == (1e-3, 2, True)
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert config.eval_strategy == "no"
    assert config.run_name is None
    assert config.logging_steps == 10


def test_what_is_measured_by_default_can_be_set_and_unset() -> None:
    config = RewardConfig()
    assert (config.max_tokens_per_row, config.gradient_checkpointing) == (None, None)
    _, config = read("--max_tokens_per_row", "4096", "--gradient_checkpointing", "false")
    assert (config.max_tokens_per_row, config.gradient_checkpointing) == (4096, False)
    assert read("--gradient_checkpointing")[1].gradient_checkpointing is True
    _, config = read("--max_tokens_per_row", "none", "--gradient_checkpointing", "none")
    assert config == RewardConfig()


def test_none_and_json_are_read_from_flags() -> None:
    _, config = read(
        "--max_length", "None", "--run_name", "null", "--gradient_checkpointing_kwargs",
        '{"use_reentrant": true}', "--deepspeed", '{"zero_optimization": {"stage": 1}}',
        "--resources_per_worker={CPU: 4, GPU: 1}",
    )  # fmt: skip
    assert config.max_length is None
    assert config.run_name is None
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}
    assert config.resources_per_worker == {"CPU": 4, "GPU": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no such file"),
        ("learning_rate: [1", "not valid YAML"),
        ("- learning_rate", "got a list"),
        ("just text", "got a str"),
        ("seed: 1\nseed: 2", "'seed' appears twice"),
        ("config: other.yaml", "config: no such setting"),
        (b"\xff\xfe\xfa", "not valid YAML"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(
    content: str | bytes | None, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        read("--config", str(file))
    assert told in one_screen(caught.value)


def test_a_config_file_that_is_missing_is_answered_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "one_gpu.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"Did you mean 'one_gpu\.yaml'\?"):
        read("--config", str(tmp_path / "one_gpus.yaml"))


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read("--config", str(tmp_path / "empty.yaml"))[1] == RewardConfig()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_configs_of_the_jobs_can_be_read(file: Path) -> None:
    job, config = read_settings(["--config", str(file)], [TrainJob, RewardConfig])
    written = yaml.safe_load(file.read_text())
    assert {name for name in written if name not in field_names(TrainJob)} <= set(
        field_names(RewardConfig)
    )
    assert job.model_name_or_path == written["model_name_or_path"]
    assert config.num_workers == written["num_workers"]
    assert isinstance(config.learning_rate, float)
    from raywards.train.zero import default_stage, stage_of, zero_config

    _, most = worker_range(config)
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * most
    settings = zero_config(
        config,
        config.deepspeed or default_stage(most_ranks=most, half_weights=False),
        num_ranks=most,
        global_batch=pairs,
        bf16=bool(config.bf16),
    )
    assert stage_of(settings) == (3 if "zero3" in file.stem else 0)
    assert settings["train_batch_size"] == pairs


@pytest.mark.parametrize(
    ("given", "workers"),
    [
        *((3, (3, 3)), ("3", (3, 3)), (0, (0, 0)), ((2, 2), (2, 2))),
        *(([1, 4], (1, 4)), ("[1, 4]", (1, 4)), ("1,4", (1, 4))),
    ],
)
def test_workers_are_a_number_or_a_range(given: Any, workers: tuple[int, int]) -> None:
    assert worker_range(RewardConfig(num_workers=given)) == workers


@pytest.mark.parametrize("given", [-1, [4, 1], [0, 2], [1], [1, 2, 3], "many", 1.5, True, None])
def test_what_is_no_number_of_workers_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="num_workers: expected a number of workers"):
        RewardConfig(num_workers=given)


def test_there_are_configs_of_three_sizes() -> None:
    assert {f.stem for f in CONFIGS} >= {"tiny_cpu", "one_gpu", "eight_gpus_zero3"}


def test_help_names_every_setting_with_its_meaning() -> None:
    text = help_text([TrainJob, RewardConfig])
    for cls in (TrainJob, RewardConfig):
        for name in field_names(cls):
            assert f"--{name}  (" in text
    for cls in (RewardConfig, ServeConfig, ScoreConfig, TrainJob):
        fields: Any = getattr(cls, "__pydantic_fields__", None) or cls.model_fields  # type: ignore[union-attr]
        assert len(fields) > 5
        assert [name for name, field in fields.items() if not field.description] == []


# ---------------------------------------------------------------- the splits that are named


@pytest.mark.parametrize("kind", ["file", "glob", "folder", "saved", "table"])
def test_a_source_without_splits_has_no_held_out_rows(tmp_path: Path, kind: str) -> None:
    table = datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    (tmp_path / "rows").mkdir()
    table.to_json(tmp_path / "rows" / "pairs.jsonl")
    table.save_to_disk(tmp_path / "saved")
    source = {
        "file": tmp_path / "rows" / "pairs.jsonl",
        "glob": f"{tmp_path}/rows/*.jsonl",
        "folder": tmp_path / "rows",
        "saved": tmp_path / "saved",
        "table": table,
    }[kind]
    assert [len(rows) for rows in read_rows(source, split="test")] == [1]
    with pytest.raises(ConfigError, match=r"has no split 'test'.*--eval_dataset_name"):
        read_rows(source, split="test", strict_split=True)


def test_a_strict_split_is_found_where_there_are_splits(tmp_path: Path) -> None:
    tables = {
        name: datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}] * count)
        for name, count in (("train", 3), ("test", 2))
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows").mkdir()
    for name, table in tables.items():
        table.to_json(tmp_path / "rows" / f"{name}.jsonl")
    for source in (tmp_path / "saved", tmp_path / "rows", datasets.DatasetDict(tables)):
        assert [len(r) for r in read_rows(source, split="test", strict_split=True)] == [2]


def test_an_error_about_a_row_quotes_a_short_piece_of_it() -> None:
    turns = [{"role": "user" * 50, "content": "text " * 50, "name": "n" * 99}] * 9
    for value in (turns, "text " * 50, {"a": turns}, 10**400):
        assert len(show(value)) <= 120 + len("list ")


# ---------------------------------------------------------------- the object itself


def test_a_frozen_config_refuses_assignment() -> None:
    config = RewardConfig(seed=3)
    config.seed = 4
    freeze(config)
    with pytest.raises(ConfigError, match="seed: training has started"):
        config.seed = 5
    assert config.seed == 4


def test_a_config_survives_pickle_and_copies() -> None:
    config = RewardConfig(output_dir="x", deepspeed={"a": 1}, model_init_kwargs='{"dtype": "auto"}')
    for clone in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert clone == config
        with pytest.raises(ConfigError, match="learning_rat"):
            clone.learning_rat = 1
    assert dataclasses.replace(config, seed=9).seed == 9
    serving = ServeConfig(model="m", api_key="eight-of")  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(serving)) == serving


def test_a_config_as_a_dict_makes_the_same_config_and_is_plain_json() -> None:
    config = RewardConfig(output_dir="x", deepspeed=3, model_init_kwargs={"dtype": "auto"})
    assert RewardConfig(**json.loads(json.dumps(as_dict(config)))) == config


SECRET = "hf_DoNotTellAnyone"


def test_no_secret_is_told() -> None:
    config = RewardConfig(hub_token=SECRET, model_init_kwargs={"token": SECRET, "revision": "v1"})
    assert config.hub_token == SECRET
    assert SECRET not in repr(RewardConfig(hub_token=SECRET))
    assert SECRET not in str(as_dict(config))
    assert as_dict(config)["model_init_kwargs"] == {"revision": "v1"}
    assert config.model_init_kwargs == {"token": SECRET, "revision": "v1"}
    serving = ServeConfig(model="m", api_key=SECRET)  # type: ignore[arg-type]
    assert SECRET not in repr(serving) + str(serving.model_dump())
    for wrong in (
        lambda: RewardConfig(hub_token=[SECRET]),
        lambda: ServeConfig(model="m", api_key=[SECRET]),
    ):  # type: ignore[list-item, arg-type]
        with pytest.raises(ConfigError) as caught:
            wrong()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["", "seven-7", "with space", "schl\u00fcssel9", "new\nline-1", "k" * 513]
)
def test_a_key_that_no_client_could_send_or_anybody_guess_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^ServeConfig: api_key .* expected 8 to 512") as caught:
        ServeConfig(model="m", api_key=key)  # type: ignore[arg-type]
    assert not key or key not in str(caught.value)


def test_paths_are_absolute_and_storage_holds_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = RunPaths.of(RewardConfig(output_dir="runs/one"))
    assert paths.run == tmp_path / "runs/one"
    assert paths.export == tmp_path / "runs/one/export"
    shared = RunPaths.of(RewardConfig(output_dir="one", storage_path="/mnt/x", run_name="two"))
    assert shared.run == Path("/mnt/x/two")
    assert RunPaths.of(RewardConfig()).run.is_absolute()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "model: is required"),
        ({"modle": "m", "model": "m"}, "modle: no such setting. Did you mean 'model'?"),
        ({"model": "m", "look_back_period_s": 2}, "three times metrics_interval_s"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "max_replicas=2"),
        ({"model": "m", "max_length": 9, "max_batch_tokens": 8}, "max_batch_tokens=8"),
        ({"model": "m", "route_prefix": "rm"}, "must start with '/'"),
        ({"model": "m", "port": 70000}, "port:"),
        ({"model": "m", "dtype": "bf16"}, "dtype:"),
        ({"model": "m", "request_timeout_s": 0}, "request_timeout_s:"),
    ],
)
def test_serving_settings_that_do_not_agree_are_refused(
    settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**settings)
    assert told in one_screen(caught.value)
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with pytest.raises(ConfigError) as caught:
        read_settings(argv, [ServeConfig])
    assert told.removeprefix("modle: ") in one_screen(caught.value)


def test_serving_settings_are_frozen_and_refuse_what_is_of_training() -> None:
    config = ServeConfig(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.port = 1  # type: ignore[misc]
    with pytest.raises(ConfigError, match="fp16: no such setting"):
        read_settings(["--model", "m", "--fp16", "True"], [ServeConfig])
