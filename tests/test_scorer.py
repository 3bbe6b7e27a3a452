"""Scorer: the rewards of plain transformers, in order, and no number for a bad input."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CORPUS, chatml_tokenizer, llama_like_tokenizer, tiny_qwen2
from tiny_models import draw_ids, tiny_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raywards import Scorer
from raywards.checkpoint import MANIFEST, export_model
from raywards.errors import CheckpointError, ConversationError, ModelError, NonFiniteError
from raywards.rendering import Rendering

torch.set_num_threads(1)  # tensors this small: two threads would wait for each other

WORDS = " ".join(CORPUS).split()


def conversation(seed: int) -> list[dict[str, str]]:
    dice = random.Random(seed)
    question, answer = (" ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for _ in range(2))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [conversation(seed) for seed in range(24)]


def make_foreign(folder: Path, tokenizer: Any = None, **config: Any) -> Path:
    """A reward model that is no export, with rewards far apart."""
    tiny_qwen2(folder, tokenizer=tokenizer or chatml_tokenizer(), **config)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if value.ndim == 2:
            weights[name] = value * (40 if name == "score.weight" else 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_export(
    folder: Path, source: Path, dtype: torch.dtype = torch.float32, **training: Any
) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(source)
    rendering = Rendering(AutoTokenizer.from_pretrained(source))
    export_model(model, model.state_dict(), rendering, folder, dtype=dtype, training=training)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_foreign(tmp_path_factory.mktemp("foreign") / "rm")


@pytest.fixture(scope="module")
def export(foreign: Path) -> Path:
    return make_export(foreign.parent / "export", foreign, conversational=True)


@pytest.fixture(scope="module")
def scorer(export: Path) -> Scorer:
    return Scorer.from_pretrained(export, device="cpu")


@pytest.fixture
def damaged(export: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return Path(shutil.copytree(export, tmp_path / "export"))


@torch.inference_mode()
def plain_rewards(folder: Path, texts: list[str] | None = None) -> list[float]:
    """What a script gives that knows transformers alone: the template, padding, one forward."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if texts is None:
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in CONVERSATIONS]
    batch = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    values: list[float] = model(**batch).logits[:, 0].tolist()
    return values


def largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def spread(rewards: list[float]) -> float:
    return float(torch.tensor(rewards).std())


# ---------------------------------------------------------------- one reward


def test_scores_of_an_export_are_those_of_plain_transformers(export: Path, scorer: Scorer) -> None:
    theirs = plain_rewards(export)
    assert spread(theirs) > 0.1, "all rewards are alike: nothing is compared"
    bound = 1e-5 * max(1.0, spread(theirs))
    assert largest(scorer.score(CONVERSATIONS), theirs) <= bound
    assert all(type(reward) is float for reward in scorer.score(CONVERSATIONS[:2]))


def test_scores_of_a_foreign_model_are_those_of_plain_transformers(foreign: Path) -> None:
    theirs = plain_rewards(foreign)
    scorer = Scorer.from_pretrained(foreign, device="cpu")
    assert largest(scorer.score(CONVERSATIONS), theirs) <= 1e-5 * max(1.0, spread(theirs))
    scorer.verify()
    assert scorer.info["pooling"] == "last_non_pad_id"
    assert scorer.info["training"] is None


def test_a_foreign_model_whose_pad_is_its_eos_keeps_transformers_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    folder = make_foreign(tmp_path / "rm", tokenizer)
    texts = ["Good better best.", "bad worse worst", "no"]
    closed = [text + tokenizer.eos_token for text in texts]
    with caplog.at_level(logging.WARNING, logger="raywards"):
        scorer = Scorer.from_pretrained(folder, device="cpu")
    assert "engines disagree" in caplog.text
    theirs = plain_rewards(folder, closed)
    assert largest(scorer.score(texts), theirs) <= 1e-5 * max(1.0, spread(theirs))
    # Each alone, without padding: the EOS is still skipped.
    alone = [scorer.score([text])[0] for text in texts]
    assert largest(alone, theirs) <= 1e-5 * max(1.0, spread(theirs))


def test_an_export_of_a_model_whose_pad_was_its_eos_pools_the_eos(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    source = make_foreign(tmp_path / "rm", tokenizer)
    export = make_export(tmp_path / "export", source)
    scorer = Scorer.from_pretrained(export, device="cpu")
    texts = ["Good better best.", "bad worse worst", "no"]
    theirs = plain_rewards(export, [text + tokenizer.eos_token for text in texts])
    assert largest(scorer.score(texts), theirs) <= 1e-5 * max(1.0, spread(theirs))
    skipping = Scorer.from_pretrained(source, device="cpu").score(texts)
    assert largest(skipping, theirs) > 0.01  # else the rule would make no difference


def test_an_encoder_is_scored_as_transformers_scores_it(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = chatml_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=512, num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = Scorer.from_pretrained(tmp_path / "rm", device="cpu")
    theirs = plain_rewards(tmp_path / "rm")
    assert spread(theirs) > 0.1
    assert largest(scorer.score(CONVERSATIONS), theirs) <= 1e-5 * max(1.0, spread(theirs))
    assert scorer.info["pooling"] == "classifier"


def test_the_order_of_the_rewards_is_that_of_the_conversations(
    scorer: Scorer, export: Path
) -> None:
    rewards = scorer.score(CONVERSATIONS)
    assert len(set(rewards)) == len(rewards)
    shuffled = list(range(len(CONVERSATIONS)))
    random.Random(1).shuffle(shuffled)
    again = scorer.score([CONVERSATIONS[i] for i in shuffled])
    bound = 1e-5 * max(1.0, spread(rewards))
    assert largest(again, [rewards[i] for i in shuffled]) <= bound
    narrow = Scorer.from_pretrained(export, device="cpu", max_batch_tokens=64)
    assert largest(narrow.score(CONVERSATIONS), rewards) <= bound
    assert scorer.score([]) == []


def test_a_conversation_alone_has_the_reward_it_has_in_a_batch(scorer: Scorer) -> None:
    together = scorer.score(CONVERSATIONS)
    alone = [scorer.score([one])[0] for one in CONVERSATIONS]
    assert largest(alone, together) <= 1e-5 * max(1.0, spread(together))


def test_threads_get_the_rewards_that_one_thread_gets(scorer: Scorer) -> None:
    expected = scorer.score(CONVERSATIONS)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda one: scorer.score([one])[0], CONVERSATIONS * 3))
    assert largest(parts, expected * 3) <= 1e-5 * max(1.0, spread(expected))


# ---------------------------------------------------------------- prompts and responses


def test_a_prompt_and_a_response_make_the_conversation(scorer: Scorer) -> None:
    question, answer = CONVERSATIONS[0]
    [expected] = scorer.score([[question, answer]])
    for prompt in ([question], question["content"]):
        for response in ([answer], answer["content"]):
            assert scorer.score_responses(prompt, [response]) == [pytest.approx(expected)]
    other = CONVERSATIONS[1][1]["content"]
    rewards = scorer.score_responses([question], [answer["content"], other])
    assert rewards[0] == pytest.approx(expected, abs=1e-4)
    assert abs(rewards[1] - expected) > 1e-3


def test_a_model_trained_on_text_joins_prompt_and_response(foreign: Path, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", foreign, conversational=False)
    scorer = Scorer.from_pretrained(export, device="cpu")
    [joined] = scorer.score(["Is it cold? Yes."])
    assert scorer.score_responses("Is it cold?", [" Yes."]) == [pytest.approx(joined)]
    question = [{"role": "user", "content": "Is it cold?"}]
    [rendered] = scorer.score_responses(question, ["Yes."])
    assert abs(rendered - joined) > 1e-3


def test_rendered_text_gets_nothing_added(scorer: Scorer, export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert scorer.encode_rendered(text) == scorer.encode(CONVERSATIONS[0])


# ---------------------------------------------------------------- refused inputs


@pytest.mark.parametrize(
    ("give", "reason", "words"),
    [
        (lambda s: s.score("Hello"), "not_a_list", "wrap it"),
        (lambda s: s.score(CONVERSATIONS[0]), "not_a_list", "wrap it"),
        (lambda s: s.score([""]), "empty", "empty"),
        (lambda s: s.score([[]]), "empty", "empty list"),
        (lambda s: s.check_ids([]), "empty", "nothing to score"),
        (lambda s: s.score(["word " * 600]), "too_long", "max_length=512"),
        (lambda s: s.check_ids([1, 10**6]), "not_in_vocabulary", "input_ids[1] is 1000000"),
        (lambda s: s.check_ids([1, -1]), "not_in_vocabulary", "input_ids[1] is -1"),
        (lambda s: s.check_ids([True]), "not_in_vocabulary", "input_ids[0] is True"),
        (lambda s: s.check_ids([1.0]), "not_in_vocabulary", "input_ids[0] is 1.0"),
        (lambda s: s.check_ids([s.vocab_size]), "not_in_vocabulary", "input_ids[0]"),
        (lambda s: s.score_ids([[1], []]), "empty", "nothing to score"),
        (lambda s: s.encode(None), "malformed", "is None"),
        (lambda s: s.encode(b"Hi"), "malformed", "is bytes"),
        (lambda s: s.encode([3]), "malformed", "messages[0] is int"),
        (lambda s: s.encode_response(3, "Hi"), "malformed", "the prompt is int"),
        (lambda s: s.encode_response("Hi", None), "malformed", "the response is None"),
        (lambda s: s.encode_response({"role": "user"}, "Hi"), "malformed", "the prompt is dict"),
        (lambda s: s.encode_response([None], "Hi"), "malformed", "messages[0] is None"),
        (lambda s: s.score_responses("Hi", "Hello"), "not_a_list", "the responses are str"),
        (lambda s: s.score_ids([[10**6]]), "not_in_vocabulary", "input_ids[0]"),
    ],
)
def test_an_input_that_has_no_reward_is_refused(
    scorer: Scorer, give: Callable[[Scorer], object], reason: str, words: str
) -> None:
    with pytest.raises(ConversationError) as caught:
        give(scorer)
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_truncation_keeps_the_side_that_was_asked_for(scorer: Scorer) -> None:
    ids = list(range(10, 10 + 300)) * 2
    assert len(ids) > scorer.max_length
    assert scorer.check_ids(ids, truncation="left") == ids[-scorer.max_length :]
    assert scorer.check_ids(ids, truncation="right") == ids[: scorer.max_length]
    assert scorer.check_ids(ids[:5], truncation="left") == ids[:5]


def test_max_length_is_what_is_asked_for_and_no_more_than_the_model_takes(
    export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Scorer.from_pretrained(export, device="cpu", max_length=7).max_length == 7
    with caplog.at_level(logging.WARNING, logger="raywards"):
        assert Scorer.from_pretrained(export, device="cpu", max_length=9999).max_length == 512
    assert "512 positions" in caplog.text


# ---------------------------------------------------------------- damaged and foreign folders


def test_a_damaged_export_is_refused_by_the_name_of_the_file(damaged: Path) -> None:
    with (damaged / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has"):
        Scorer.from_pretrained(damaged)


def swap_tokenizer(folder: Path) -> None:
    llama_like_tokenizer().save_pretrained(folder)


def swap_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    assert "<|im_start|>" in file.read_text()
    file.write_text(file.read_text().replace("'\\n'", "'\\t'"))


@pytest.mark.parametrize("swap", [swap_tokenizer, swap_template])
def test_a_swapped_tokenizer_or_template_is_refused(
    damaged: Path, swap: Callable[[Path], None]
) -> None:
    swap(damaged)
    # Somebody who mends the manifest too, so that sizes are no help.
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["files"] = {n: (damaged / n).stat().st_size for n in manifest["files"]}
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="tokenizer"):
        Scorer.from_pretrained(damaged)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


def test_verify_reproduces_the_stored_rewards(scorer: Scorer, export: Path) -> None:
    scorer.verify()
    Scorer.from_pretrained(export, device="cpu", max_length=4).verify()


def test_verify_fails_when_a_weight_is_changed(damaged: Path) -> None:
    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["score.weight"][0, 0] += 0.1

    change_weights(damaged, nudge)
    scorer = Scorer.from_pretrained(damaged, device="cpu")
    with pytest.raises(CheckpointError, match="differ by"):
        scorer.verify()


def test_another_kind_of_device_may_differ_by_more_than_a_cpu(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: the numbers are the CPU's, moved by what a GPU may differ by."""
    scorer = Scorer.from_pretrained(damaged, device="cpu")
    manifest = json.loads((damaged / MANIFEST).read_text())
    sd = max(1.0, manifest["reward_sd"])

    def moved(by: float) -> None:
        rewards = [probe["reward"] + by * sd for probe in manifest["rewards"]]
        monkeypatch.setattr(scorer, "_forward", lambda sequences: rewards)

    moved(5e-5)
    with pytest.raises(CheckpointError, match="differ by"):
        scorer.verify()
    monkeypatch.setattr(scorer, "_device", torch.device("cuda"))
    scorer.verify()
    moved(2e-4)
    with pytest.raises(CheckpointError, match="differ by"):
        scorer.verify()


# ---------------------------------------------------------------- the revision


def nudge_last(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"][0, -1] += 0.1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["foreign", "export"])
def test_other_weights_or_another_rendering_are_another_revision(
    kind: str, whole: bool, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr("raywards.scorer._HASHED_WHOLE_BYTES", 1000)
    original: Path = request.getfixturevalue(kind)

    def revision(folder: Path, **settings: Any) -> str:
        told: str = Scorer.from_pretrained(folder, device="cpu", **settings).info["revision"]
        return told

    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    first = revision(original)
    assert revision(copy) == revision(copy, dtype="bfloat16") == first
    change_weights(copy, nudge_last)
    changed = revision(copy)
    assert changed != first
    if kind == "foreign":  # an export is refused
        swap_template(copy)
        assert revision(copy) not in (first, changed)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [None, "float32", "bfloat16"])
def test_verify_holds_in_every_precision(
    foreign: Path, tmp_path: Path, stored: torch.dtype, loaded: str | None
) -> None:
    export = make_export(tmp_path / "export", foreign, stored)
    scorer = Scorer.from_pretrained(export, device="cpu", dtype=loaded)
    assert scorer.info["dtype"] == (loaded or str(stored).removeprefix("torch."))
    scorer.verify()


def test_bf16_rewards_agree_between_alone_and_batched_within_the_stated_bound(
    foreign: Path, tmp_path: Path
) -> None:
    export = make_export(tmp_path / "export", foreign, torch.bfloat16)
    scorer = Scorer.from_pretrained(export, device="cpu")
    together = scorer.score(CONVERSATIONS)
    alone = [scorer.score([one])[0] for one in CONVERSATIONS]
    assert largest(alone, together) <= scorer.info["bound"]
    assert scorer.info["bound"] < spread(together)


def test_weights_that_are_nan_give_an_error_that_names_the_sequence(damaged: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][300] = math.nan

    change_weights(damaged, spoil)
    scorer = Scorer.from_pretrained(damaged, device="cpu")
    assert math.isfinite(scorer.score_ids([[5, 6]])[0])
    with pytest.raises(NonFiniteError, match=r"sequence 2 \(3 tokens\) is nan") as caught:
        scorer.score_ids([[5, 6], [7], [5, 300, 6]])
    assert caught.value.index == 2  # type: ignore[attr-defined]


def test_weights_that_are_all_nan_fail_verification(damaged: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["score.weight"].fill_(math.nan)

    change_weights(damaged, spoil)
    with pytest.raises(ModelError, match="sequence 0"):
        Scorer.from_pretrained(damaged, device="cpu").verify()


def test_a_folder_with_two_labels_is_refused(tmp_path: Path) -> None:
    tiny_qwen2(tmp_path / "two", num_labels=2)
    with pytest.raises(ModelError, match="2 labels"):
        Scorer.from_pretrained(tmp_path / "two")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config"):
        Scorer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        Scorer.from_pretrained(tmp_path / "missing")


def test_info_says_what_is_scored(scorer: Scorer, export: Path) -> None:
    info = scorer.info
    assert json.loads(json.dumps(info)) == info
    assert info["model"] == str(export)
    assert info["class"] == "Qwen2ForSequenceClassification"
    assert info["dtype"] == "float32"
    assert info["max_length"] == 512
    assert info["pooling"] == "last_token"
    assert info["training"] == {"conversational": True}
    assert info["revision"].startswith("sha256:")


@pytest.mark.trains
def test_scoring_needs_no_ray(export: Path) -> None:
    code = (
        "import sys; from raywards import Scorer; "
        f"s = Scorer.from_pretrained({str(export)!r}, device='cpu'); s.verify(); "
        "print(s.score(['Hello']), 'ray' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith("] False")


def test_a_language_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """Loaded anyway, it would give rewards from a head drawn at random in every process."""
    folder = tiny_qwen2(tmp_path / "lm", num_labels=None)
    with pytest.raises(ModelError, match="has no reward head"):
        Scorer.from_pretrained(folder)


# ---------------------------------------------------------------- windows


def test_a_sequence_beyond_the_window_is_planned_apart_and_keeps_its_reward(
    tmp_path: Path,
) -> None:
    folder = tiny_qwen2(tmp_path / "rm")
    inner = tiny_classifier("Mistral", scale=3.0, vocab_size=400, sliding_window=40)
    inner.save_pretrained(folder)
    scorer = Scorer.from_pretrained(folder, device="cpu")
    assert scorer.info["path"] == "packed"
    ids = draw_ids(12, 90, 40, 41, 7, 60, 30)
    long = {1, 3, 5}
    plan = [
        {member for group in groups for member in group.members}
        for groups in scorer._plan(ids, [len(one) for one in ids])
    ]
    assert sorted(map(sorted, plan)) == [[0, 2, 4, 6], sorted(long)]
    together = scorer.score_ids(ids)
    bound = 1e-5 * max(1.0, spread(together))
    assert largest(together, [scorer.score_ids([one])[0] for one in ids]) <= bound
    with torch.inference_mode():
        theirs = [inner(input_ids=torch.tensor([one])).logits.item() for one in ids]
        inner.config.sliding_window = None
        uncut = [inner(input_ids=torch.tensor([one])).logits.item() for one in ids]
    assert largest(together, theirs) <= bound
    moved = {i for i, (one, other) in enumerate(zip(theirs, uncut, strict=True)) if one != other}
    assert moved >= long, "the window cuts nothing"
    assert largest(theirs, uncut) > 0.01
