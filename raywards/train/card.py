"""The model card of an export: `README.md` and `curves.png`, from its manifest and the run's log.

It holds no row of anybody's data, no token and no absolute path.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_UP, Context
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure

from raywards.checkpoint import add_files, read_manifest
from raywards.config import RewardConfig, as_dict
from raywards.preferences import REASONS
from raywards.sources import SUFFIXES
from raywards.train.runfolder import that_decide

CARD_FILES = ("README.md", "curves.png")
PACKAGES = ("raywards", "torch", "transformers", "deepspeed")
"""Whose versions a manifest tells."""
TAGS = ("generated_from_trainer", "reward-trainer", "raywards")
_OBJECTIVES = {
    "bradley_terry": ("preference pairs", "the Bradley-Terry loss"),
    "plackett_luce": ("rankings", "the Plackett-Luce loss"),
    "all_pairs": ("rankings", "the Bradley-Terry loss of the pairs inside them"),
    "regression": ("rated texts", "the squared error of the scores"),
}
"""What a row is, and what is trained on it."""
_CONTROL_TOKENS = {"as_text": "taken as text", "refuse": "refused"}
_TEMPLATE = Path(__file__).with_name("card.md")
_REQUESTS: dict[bool, dict[str, Any]] = {
    True: {
        "messages": [
            {"role": "user", "content": "Hi!"},
            {"role": "assistant", "content": "Hello."},
        ]
    },
    False: {"input": "Hi! Hello."},
}

Record = Mapping[str, Any]


def write_card(
    export: Path,
    history: Sequence[Record],
    *,
    name: str,
    where: str,
    dataset_name: str | Sequence[str] | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Write `README.md` and `curves.png` into an export, and enter them into its manifest.

    Args:
        export: The export; a card that it has is replaced.
        history: Records of the run, as in `metrics.jsonl`.
        name: Title of the card.
        where: Hub id or folder that the examples load.
        dataset_name: What it was trained on, where the sources do not say.
        tags: More tags of the hub.
    """
    manifest = read_manifest(export, kind="export")
    facts = describe(manifest, history)
    given = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or [])
    sources = given or manifest["training"]["sources"]
    data = ModelCardData(
        base_model=hub_id(manifest["training"]["base_model"]),
        datasets=[source for source in sources if hub_id(source, owned=not given)] or None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=sorted({*TAGS, *tags}),
    )
    # Jinja takes a word of the template from here before it takes it from `data`.
    facts |= {
        "name": name,
        "where": where,
        "datasets": ", ".join(_linked(source, "datasets/") for source in given),
    }
    card = str(ModelCard.from_template(data, template_path=str(_TEMPLATE), **facts))
    contents = card.rstrip().encode() + b"\n", draw_curves(history)
    add_files(export, dict(zip(CARD_FILES, contents, strict=True)))


def describe(manifest: Record, history: Sequence[Record]) -> dict[str, Any]:
    """What the template says, in words and rounded."""
    training, rendering = manifest["training"], manifest["rendering"]
    settings = training["settings"]
    kind, loss = _OBJECTIVES[settings["objective"]]
    return {
        "kind": kind,
        "loss": loss,
        "trained": _what_was_trained(training),
        "regression": settings["objective"] == "regression",
        "attributes": ", ".join(f"{w:g} x {n}" for n, w in (settings["attributes"] or {}).items()),
        "base": _linked(training["base_model"]),
        "conversational": training["conversational"],
        "request": json.dumps(_REQUESTS[training["conversational"]]),
        "eos_token": rendering["eos_token"],
        "control_tokens": _CONTROL_TOKENS[rendering["control_tokens"]],
        "dtype": manifest["dtype"],
        "bounds": {name: _rounded_up(bound) for name, bound in manifest["bounds"].items()},
        "reward_sd": _short(manifest["reward_sd"]),
        "sources": [(_source(name), count) for name, count in training["sources"].items()],
        "num_rows": training["num_rows"],
        "num_pairs": sum(training["sources"].values()),
        "dropped": [(REASONS[reason], count) for reason, count in training["dropped"].items()],
        "fingerprint": training["pairs"],
        "exported_step": training["step"],
        "last_step": training["last_step"],
        "seen": training["num_pairs"],
        "num_tokens": training["num_tokens"],
        "global_batch": training["global_batch"],
        "max_length": settings["max_length"],
        "settings": list(_settings_that_differ(settings)),
        "versions": {package: training[package] for package in PACKAGES},
        **_describe_held_out(*last_evaluation(history, up_to=training["step"])),
    }


def _describe_held_out(at: Record, sets: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    shown = [name for name in _COLUMNS if any(name in values for values in sets.values())]
    return {
        "evaluated_at": {"step": at.get("step"), "epoch": _short(at.get("epoch"))},
        "headings": [_COLUMNS[name] for name in shown],
        "held_out": [
            {
                "name": _set_name(prefix),
                "figures": [_short(values.get(name)) for name in shown],
                **{name: _short(values.get(name)) for name in _SCALE},
            }
            for prefix, values in sets.items()
        ],
        "parts": [
            (_set_name(prefix), _part(figure, part), _COLUMNS[figure], _short(value))
            for prefix, values in sets.items()
            for name, value in values.items()
            for figure, slash, part in [name.partition("/")]
            if slash
        ],
    }


def _what_was_trained(training: Record) -> str:
    if "peft_config" in training:
        return "Adapters (`peft_config` in `raywards.json`) and the head were trained"
    if training["settings"]["freeze"]:
        return "All weights but those that `freeze` names were trained"
    return "All weights were trained"


def _settings_that_differ(settings: Record) -> Iterator[tuple[str, str]]:
    defaults = json.loads(json.dumps(as_dict(RewardConfig())))
    for setting, value in that_decide(settings).items():
        if value != defaults.get(setting):
            yield setting, _cell(_without_paths(value))


def last_evaluation(
    history: Sequence[Record], *, up_to: int
) -> tuple[Record, dict[str, dict[str, float]]]:
    """The newest record of that step or before with held-out metrics, and these by set's prefix."""
    for record in reversed([record for record in history if record["step"] <= up_to]):
        prefixes = [
            key[: -len(_COUNT)]
            for key in record
            if key.startswith("eval") and key.endswith(_COUNT)  # a source may have any name
        ]
        if prefixes:
            return record, {prefix: dict(_under(prefix, record, prefixes)) for prefix in prefixes}
    return {}, {}


def draw_curves(history: Sequence[Record]) -> bytes:
    """Loss and accuracy (or correlation) over the steps, of training and held out, as a PNG."""
    sets = last_evaluation(history, up_to=max((record["step"] for record in history), default=0))[1]
    second = "pearson" if any("pearson" in record for record in history) else "accuracy"
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", second), strict=True):
        for key, name in [(metric, "training"), *((f"{p}_{metric}", _set_name(p)) for p in sets)]:
            points = [(record["step"], record[key]) for record in history if key in record]
            if points:
                mark = None if key == metric else "o"
                axes.plot(*zip(*points, strict=True), label=name, marker=mark, linewidth=1)
        axes.set_xlabel("step")
        axes.set_title(_COLUMNS[metric])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def hub_id(name: str, *, owned: bool = False) -> str | None:
    """`name` where it is a hub id, and no file or folder; with its owner, where `owned`."""
    pattern = r"[\w.-]+/[\w.-]+" if owned else r"[\w.-]+(/[\w.-]+)?"
    local = Path(name).suffix in SUFFIXES or Path(name).exists()
    return name if re.fullmatch(pattern, name) and not local else None


# ---------------------------------------------------------------- words and cells

_COUNT = "_num_pairs"
_SCALE = ("mean_reward", "sd_reward", "min_reward", "max_reward")
_COLUMNS = {
    "num_pairs": "rows",
    "num_comparisons": "comparisons",
    "accuracy": "accuracy",
    "pearson": "correlation",
    "mae": "mean absolute error",
    "mse": "mean squared error",
    "loss": "loss",
    "log_loss": "log-loss",
    "calibration_error": "calibration error",
    "margin_p05": "margin, 5 %",
    "margin_p50": "margin, median",
    "margin_p95": "margin, 95 %",
    "length_bias": "length bias",
}
"""Figures of a held-out set that are shown, and their headings."""


def _under(prefix: str, record: Record, prefixes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Metrics of one set: `eval_a_loss` is of `eval_a`, and not of a set `eval`."""
    for key, value in record.items():
        owner = max((p for p in prefixes if key.startswith(f"{p}_")), key=len, default=None)
        if owner == prefix:
            yield key[len(prefix) + 1 :], value


def _set_name(prefix: str) -> str:
    return _cell(prefix.removeprefix("eval").removeprefix("_") or "held out")


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _rounded_up(bound: float) -> str:
    return f"{Context(prec=2, rounding=ROUND_UP).create_decimal(repr(bound)):g}"


def _linked(name: str, kind: str = "") -> str:
    """A link to the hub, or the last part of a local path."""
    if hub_id(name) is None:
        return f"`{Path(name).name}`" if name else "a model that was handed over in Python"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def _part(figure: str, name: str) -> str:
    """What a figure such as `accuracy/SOURCE` or `mae/ATTRIBUTE` is of."""
    return _source(name) if figure in ("accuracy", "loss") else _cell(name)


def _source(name: str) -> str:
    """A source of rows as sources.py names it: a hub id, a file, or `dataset` and its like."""
    if hub_id(name, owned=True):
        return _cell(_linked(name, "datasets/"))
    if re.fullmatch(r"dataset(\[.+\])?", name):
        return _cell(f"`{name}`, handed over in Python")
    return _cell(f"`{Path(name).name}`")


def _cell(value: Any) -> str:
    """Fit for a cell of a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")


def _without_paths(value: Any) -> Any:
    """The value of a setting; of local paths in it only the last part."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and "/" in value and hub_id(value) is None:
        return Path(value).name
    return value
