"""Writes the generated pages, from docstrings and tables: `python docs/build.py`.

They are `settings.md`, `bad_rows.md`, `grafana.json`, a table in `operations.md` and, where TRL is
installed, `trl.md`.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import grafana  # noqa: E402

from raywards.config import RewardConfig, ScoreConfig, ServeConfig, TrainJob  # noqa: E402
from raywards.preferences import REASONS  # noqa: E402
from raywards.serve.metrics import Metric  # noqa: E402
from raywards.settings import field_names  # noqa: E402
from raywards.trl_fields import REFUSED  # noqa: E402

SETTINGS = """# Settings

Made by `docs/build.py` from the docstrings in `raywards/config.py`: change them there.

On the command line a setting is `--name value` (a switch may stand alone), in a `--config` file
`name: value`, in Python a keyword argument. Flags win over the file. `none` or `null` unsets; a
mapping is written as JSON. An unknown name is refused with the nearest known one."""

REFUSED_SETTINGS = """## Settings of TRL that are refused

By name, never ignored. A value in the second column means what raywards does anyway: it is
accepted, so that a script which spells out TRL's default still runs."""

BAD_ROWS = """# Rows that cannot become pairs

Made by `docs/build.py` from `REASONS` in `raywards/preferences.py`: change it there.

With `on_bad_row: error` (the default) such a row stops the run before a worker starts; the message
names source, row, line and field, and lists the next ones. With `on_bad_row: drop` it is
left out and counted by reason: in the log, in `prepared.json`, in the result of `train()`, and in
the export's manifest. Two kinds stand apart. A pair that is `too_long` is dropped and counted under
either, unless `truncation` says `left` or `right`. A line of a file that is `not_json` or
`not_object` always stops the run: nobody can tell what else is wrong with that file."""

USED_BY = {
    TrainJob: "`raywards train` and `jobs/train.py`, beside `RewardConfig`",
    RewardConfig: "`RewardTrainer`, `raywards train` and `jobs/train.py`",
    ServeConfig: "`raywards serve`, `jobs/serve.py`, `raywards.serve.build` and `deploy`",
    ScoreConfig: "`raywards score` and `jobs/score.py`",
}


def pages() -> dict[str, str]:
    """Text of each generated file, by its name."""
    parts = [SETTINGS]
    for cls, used_by in USED_BY.items():
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        parts += [f"## {cls.__name__}", f"{summary} Used by {used_by}.", *tables(cls)]
    refused = [
        (f"`{name}`", ", ".join(map(word, setting.neutral)), setting.instead)
        for name, setting in sorted(REFUSED.items())
    ]
    parts += [REFUSED_SETTINGS, table(("setting", "accepted", "instead"), refused)]
    reasons = [(f"`{reason}`", meaning) for reason, meaning in REASONS.items()]
    made = {
        "settings.md": "\n\n".join(parts) + "\n",
        "grafana.json": grafana.dashboard(),
        "operations.md": with_metrics((HERE / "operations.md").read_text(encoding="utf-8")),
        "bad_rows.md": "\n\n".join([BAD_ROWS, table(("reason", "meaning"), reasons)]) + "\n",
    }
    if importlib.util.find_spec("trl") is not None:
        import beside_trl

        made["trl.md"] = beside_trl.page(table, word)
    return made


def with_metrics(page: str) -> str:
    """`page` with the table of metrics between its two marks."""
    rows = [
        (
            f"`raywards_{one.name}`",
            one.value.type.lower(),
            ", ".join(one.value.labels),
            one.value.text,
        )
        for one in Metric
    ]
    before, begin, rest = page.partition("<!-- metrics -->\n")
    _, end, after = rest.partition("<!-- end of metrics -->")
    return f"{before}{begin}{table(('metric', 'kind', 'labels', ''), rows)}\n{end}{after}"


def tables(cls: type[Any]) -> list[str]:
    """The settings, a table for each `# ---- heading (whose names they are)` of the source."""
    schema = TypeAdapter(cls).json_schema()
    groups: list[tuple[str, list[tuple[str, ...]]]] = [("", [])]
    for line in inspect.getsource(cls).splitlines():
        heading = re.match(r" +# -+ (.+?)( \(.*\))?$", line)
        setting = re.match(r"    (\w+):", line)
        if heading:
            groups.append((f"### {heading[1].capitalize()}", []))
        elif setting and setting[1] in field_names(cls):
            field = schema["properties"][setting[1]]
            required = setting[1] in schema.get("required", ())
            default = "required" if required else word(field["default"])
            text = " ".join(field["description"].split())
            groups[-1][1].append((f"`{setting[1]}`", kind(field), default, text))
    head = ("setting", "type", "default", "what it does")
    texts = [text for title, rows in groups if rows for text in (title, table(head, rows))]
    return [text for text in texts if text]


def kind(field: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in field:
        return ", ".join(map(kind, field["anyOf"]))
    if "enum" in field:
        return ", ".join(map(word, field["enum"]))
    if field["type"] == "array":
        return f"list of {kind(field['items'])}"
    words = {"object": "mapping", "string": "text", "boolean": "true or false", "null": "none"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]}" for name, sign in limits.items() if name in field]
    return " ".join([words.get(field["type"], field["type"]), " and ".join(bounds)]).strip()


def word(value: object) -> str:
    words = {"None": "none", "True": "true", "False": "false", "": '""'}
    return f"`{words.get(str(value), value)}`"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in lines)


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)
