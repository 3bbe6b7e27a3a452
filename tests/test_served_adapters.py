"""LoRA adapters over one base: each has the rewards that peft gives, and the base keeps its own."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import tuning_runs as runs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from served import Served, served
from tiny import chatml_tokenizer, tiny_qwen2
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    set_seed,
)

from raywards import Scorer
from raywards.config import ServeConfig
from raywards.errors import CheckpointError, ConfigError, ModelError

QUESTION = "What is the capital of France?"
ANSWERS = ["The capital of France is Paris.", "I am sorry, I cannot help with that.", "Good."]
TALKS = [
    [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    for answer in ANSWERS
]
pytestmark = pytest.mark.trains

BOUND = 1e-5
# Of several lengths, two of them answers to one question.
MORE = [*TALKS, [*TALKS[0], {"role": "user", "content": "And of Spain? " * 20}, *TALKS[1][1:]]]


def made(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter that does something, with a head of its own, as `save_pretrained` writes it."""
    set_seed(seed)
    inner = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    config = LoraConfig(
        **{
            "r": 4,
            "target_modules": "all-linear",
            "task_type": "SEQ_CLS",
            "modules_to_save": ["score"],
            **settings,
        }
    )
    model = get_peft_model(inner, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def of_peft(base: Path, adapter: Path, **loading: Any) -> list[float]:
    """What a script gives that knows transformers and peft alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    inner = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, **{"dtype": torch.float32, **loading}
    )
    model = PeftModel.from_pretrained(inner, adapter).eval()
    rewards = []
    for talk in MORE:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        rewards.append(model(**ids).logits[0, 0].item())
    return rewards


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base") / "rm")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("lm") / "lm", num_labels=None)


ADAPTERS: dict[str, dict[str, Any]] = {
    "kind": {},
    "short": {"target_modules": ["q_proj", "down_proj"], "r": 2},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: made(base, folder / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def expected(base: Path, adapters: dict[str, Path]) -> dict[str, list[float]]:
    found = {name: of_peft(base, folder) for name, folder in adapters.items()}
    found["rm"] = Scorer.from_pretrained(base).score(MORE)
    rounded = [tuple(round(reward, 3) for reward in rewards) for rewards in found.values()]
    assert len(set(rounded)) == len(rounded), "alike: proves nothing"
    return found


def test_each_scorer_has_its_rewards_and_the_base_its_bits(
    base: Path, adapters: dict[str, Path], expected: dict[str, list[float]]
) -> None:
    alone = Scorer.from_pretrained(base)
    scorer = Scorer.from_pretrained(base)
    with_each = {name: scorer.with_adapter(folder) for name, folder in adapters.items()}
    assert scorer.info["path"] == "packed"
    for _ in range(2):
        for name, one in with_each.items():
            assert one.score(MORE) == pytest.approx(expected[name], abs=BOUND)
            assert scorer.score(MORE) == alone.score(MORE)
    for name, one in with_each.items():
        one.verify()
        assert one.info["model"] == str(adapters[name])
        assert one.info["base_model"] == str(base)
    revisions = {one.info["revision"] for one in (scorer, *with_each.values())}
    assert len(revisions) == 4


def test_over_a_bfloat16_base_the_head_stays_in_fp32(
    base: Path, adapters: dict[str, Path], expected: dict[str, list[float]]
) -> None:
    plain = of_peft(base, adapters["kind"], dtype=torch.bfloat16)
    rounding = max(abs(a - b) for a, b in zip(plain, expected["kind"], strict=True))
    scorer = Scorer.from_pretrained(base, dtype="bfloat16")
    before = scorer.score(MORE)
    found = scorer.with_adapter(adapters["kind"]).score(MORE)
    assert found == pytest.approx(expected["kind"], abs=2 * rounding)
    assert all(reward * 2**12 % 1 for reward in found), "rounded to bfloat16"
    held = load_file(adapters["kind"] / "adapter_model.safetensors")[HEAD]
    heads = [p for n, p in scorer._model.inner.named_parameters() if n.startswith("score.modules")]
    assert [torch.equal(head, held) for head in heads] == [True]
    assert scorer.score(MORE) == before


def test_an_encoder_takes_adapters_too(tmp_path: Path) -> None:
    """It pads, and its head is two modules."""
    tokenizer = chatml_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    set_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    adapter = made(
        tmp_path / "bert",
        tmp_path / "adapter",
        1,
        target_modules=["query", "value"],
        modules_to_save=["classifier", "pooler"],
    )
    scorer = Scorer.from_pretrained(tmp_path / "bert")
    before = scorer.score(MORE)
    with_it = scorer.with_adapter(adapter)
    plain = of_peft(tmp_path / "bert", adapter)
    assert plain != pytest.approx(before, abs=0.05)
    for _ in range(2):
        assert with_it.score(MORE) == pytest.approx(plain, abs=BOUND)
        assert scorer.score(MORE) == before


def test_threads_get_their_own_adapters(
    base: Path, adapters: dict[str, Path], expected: dict[str, list[float]]
) -> None:
    scorer = Scorer.from_pretrained(base)
    scorers = {name: scorer.with_adapter(folder) for name, folder in adapters.items()}
    scorers["rm"] = scorer
    found: dict[str, list[list[float]]] = {name: [] for name in scorers}

    def ask(name: str) -> None:
        for _ in range(10):
            found[name].append(scorers[name].score(MORE))

    threads = [threading.Thread(target=ask, args=(name,)) for name in scorers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, times in found.items():
        assert len(times) == 10
        for rewards in times:
            assert rewards == pytest.approx(expected[name], abs=BOUND)


def test_an_adapter_folder_brings_its_base(language_model: Path, tmp_path: Path) -> None:
    """The usual case: the base is a language model, and the head is the adapter's."""
    one = made(language_model, tmp_path / "one", 1)
    two = made(language_model, tmp_path / "two", 2)
    scorer = Scorer.from_pretrained(one)
    other = scorer.with_adapter(two)
    for found, folder in ((scorer, one), (other, two), (scorer, one)):
        assert found.score(MORE) == pytest.approx(of_peft(language_model, folder), abs=BOUND)


def test_a_run_of_ours_is_served_by_its_adapter(language_model: Path, tmp_path: Path) -> None:
    """The export beside it has the template, and the rewards that the adapter must reproduce."""
    run = runs.train(
        language_model, tmp_path / "run", peft_config=LoraConfig(r=4, target_modules="all-linear")
    )
    assert runs.learned(run)
    scorer = Scorer.from_pretrained(tmp_path / "run" / "adapter")
    scorer.verify()
    export = Scorer.from_pretrained(tmp_path / "run" / "export")
    question = [{"role": "user", "content": QUESTION}]
    expected = export.score_responses(question, ANSWERS)
    assert scorer.score_responses(question, ANSWERS) == pytest.approx(expected, abs=1e-4)
    assert scorer.info["training"] == export.info["training"]
    assert scorer.info["pooling"] == export.info["pooling"]
    head = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head["base_model.model.score.weight"] *= 1.5
    save_file(head, tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not what was exported"):
        Scorer.from_pretrained(tmp_path / "run" / "adapter").verify()


# ---- served


@pytest.fixture(scope="module")
def server(base: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    with served(base, adapters={name: str(folder) for name, folder in adapters.items()}) as running:
        yield running


def rewards_of(server: Served, **body: Any) -> list[float]:
    rows = server.post("/v1/reward", {"messages": MORE, **body})["data"]
    return [row["reward"] for row in rows]


def test_each_adapter_answers_to_its_name(server: Served, expected: dict[str, list[float]]) -> None:
    for name in expected:
        assert rewards_of(server, model=name) == pytest.approx(expected[name], abs=BOUND)
    assert rewards_of(server) == pytest.approx(expected["rm"], abs=BOUND)
    info = server.http.get("/info").json()
    assert info["adapters"].keys() == ADAPTERS.keys()
    pinned = f"kind@{info['adapters']['kind']['revision']}"
    assert rewards_of(server, model=pinned) == pytest.approx(expected["kind"], abs=BOUND)
    for wrong in ("kind@sha256:0", "unkind", "kin"):
        status, reply = server.refused("/v1/reward", {"messages": MORE, "model": wrong})
        assert status == 404
        assert "kind" in reply["error"]["message"]


def test_every_dialect_that_names_a_model_reaches_them(
    server: Served, expected: dict[str, list[float]]
) -> None:
    talk = {"model": "dora", "messages": TALKS[0]}
    [found] = server.post("/classify", {**talk, "use_activation": False})["data"]
    assert found["probs"] == pytest.approx(expected["dora"][:1], abs=BOUND)
    choice = server.post("/v1/chat/completions", talk)["choices"][0]
    assert choice["logprobs"]["content"][0]["logprob"] == pytest.approx(
        expected["dora"][0], abs=BOUND
    )
    rows = server.http.post(
        "/v1/reward", json=talk, headers={"accept": "application/x-ndjson"}
    ).text.splitlines()
    assert json.loads(rows[0])["reward"] == pytest.approx(expected["dora"][0], abs=BOUND)


def test_they_are_listed_with_their_base(server: Served, adapters: dict[str, Path]) -> None:
    rows = {row["id"]: row for row in server.http.get("/v1/models").json()["data"]}
    assert rows.keys() == {"rm", *adapters}
    for name, folder in adapters.items():
        assert (rows[name]["parent"], rows[name]["root"]) == ("rm", str(folder))


def test_requests_for_all_of_them_at_once_are_each_right(
    server: Served, expected: dict[str, list[float]]
) -> None:
    wrong: list[str] = []

    def ask(name: str) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for n in range(12):
                body = {"messages": MORE[n % 4], "model": name}
                [row] = http.post("/v1/reward", json=body).json()["data"]
                if row["reward"] != pytest.approx(expected[name][n % 4], abs=BOUND):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in [*expected] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_full_or_broken_adapter_disturbs_no_other(
    base: Path, adapters: dict[str, Path], expected: dict[str, list[float]]
) -> None:
    folders = {name: str(folder) for name, folder in adapters.items()}
    with served(base, adapters=folders) as server:

        def fails(sequences: Any) -> list[float]:
            raise RuntimeError("broken")

        adapted: Any = server.service.adapters["kind"]._scorer
        adapted.score_encoded = fails
        for _ in range(3):
            status, _ = server.refused("/v1/reward", {"messages": MORE, "model": "kind"})
            assert status == 500
            for name in ("rm", "dora"):
                assert rewards_of(server, model=name) == pytest.approx(expected[name], abs=BOUND)


# ---- refused


def in_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(about | values))

    return change


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        change(held)
        save_file(held, folder / "adapter_model.safetensors")

    return changed


HEAD = "base_model.model.score.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "is no adapter"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "is no adapter"),
    "half a config": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "half the weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10" * 100),
        "is damaged",
    ),
    "another method": (in_config(peft_type="IA3"), "peft.LoraConfig"),
    "biases": (in_config(bias="all"), "merged export"),
    "an init that changes the base": (in_config(init_lora_weights="pissa"), "pissa"),
    "cut weights": (in_config(kasa_config={"beta": 1e-4}), "kasa_config"),
    "NaN": (in_weights(lambda w: w[HEAD].fill_(float("nan"))), "not finite"),
    "a layer less": (in_weights(lambda w: w.pop(next(n for n in w if "lora_A" in n))), "lacks"),
    "another rank": (in_config(r=8), "does not fit"),
    "layers that are not there": (in_config(target_modules=["c_attn"]), "does not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    name: str,
    base: Path,
    adapters: dict[str, Path],
    expected: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    damage, word = REFUSED[name]
    folder = shutil.copytree(adapters["kind"], tmp_path / "adapter")
    damage(folder)
    scorer = Scorer.from_pretrained(base)
    before = scorer.with_adapter(adapters["dora"])
    with pytest.raises(ModelError) as refused:
        scorer.with_adapter(folder)
    assert word in str(refused.value), refused.value
    assert str(folder) in str(refused.value)
    assert scorer.score(MORE) == expected["rm"]
    assert before.score(MORE) == pytest.approx(expected["dora"], abs=BOUND)
    after = scorer.with_adapter(adapters["kind"])
    assert after.score(MORE) == pytest.approx(expected["kind"], abs=BOUND)


def test_an_adapter_of_another_base_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    wider = tiny_qwen2(tmp_path / "wider", hidden_size=64)
    with pytest.raises(ModelError, match="another base"):
        Scorer.from_pretrained(wider).with_adapter(adapters["kind"])


def test_without_a_head_anywhere_it_is_refused(language_model: Path, tmp_path: Path) -> None:
    folder = made(language_model, tmp_path / "adapter", 1)
    in_weights(lambda held: held.pop(HEAD))(folder)
    in_config(modules_to_save=None)(folder)
    with pytest.raises(ModelError, match="no trained head"):
        Scorer.from_pretrained(folder)


def test_another_rendering_is_refused(
    adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters["kind"], tmp_path / "adapter")
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("LOUD", "QUIET")
    tokenizer.save_pretrained(folder)
    scorer = Scorer.from_pretrained(base)
    with pytest.raises(CheckpointError, match="chat template"):
        scorer.with_adapter(folder)


def test_settings_that_do_not_agree_are_refused() -> None:
    for settings, word in (
        ({"adapters": {"rm": "x"}}, "'rm' is this model itself"),
        ({"adapters": {"a": "x"}, "other_models": ["a"]}, "'a' is an adapter and another model"),
        ({"adapters": {"a": "x"}, "deterministic": True}, "deterministic"),
        ({"adapters": "a"}, "mapping"),
        ({"adapters": ["a"]}, "adapters"),
    ):
        with pytest.raises(ConfigError, match=word):
            ServeConfig(model="m", **settings)  # type: ignore[arg-type]
    assert ServeConfig(model="m", adapters='{"a": "x"}').adapters == {"a": "x"}  # type: ignore[arg-type]
