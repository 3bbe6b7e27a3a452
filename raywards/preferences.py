"""Preference rows to validated pairs: every format that TRL's RewardTrainer reads, row by row.

    source ─read_rows─► RowSet ─row─► encode_row ─► Pair(chosen_ids, rejected_ids, margin)

| a row has | it is |
|---|---|
| `chosen`, `rejected` as text | standard; each text is closed by EOS once |
| `chosen`, `rejected` as lists of messages | conversational; the chat template closes them |
| `prompt` besides, of the same kind | put in front of both |
| `chosen_ids`, `rejected_ids` | already tokenised: taken as they are |
| `margin` | how much better chosen is; subtracted in the loss |
| `tools`, `chat_template_kwargs` | handed to the chat template (conversational rows) |

The kind is decided for each row, so a file may mix them. A value of None counts as absent, because
a table fills missing keys with None. What cannot become a pair raises `RowError`, whose `reason` is
a key of `REASONS`: whoever drops rows counts them by it.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from glob import glob
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

from raywards.errors import ConfigError, ConversationError, RowError, did_you_mean
from raywards.rendering import Rendering, truncate

Row: TypeAlias = Mapping[str, Any]
PairTruncation: TypeAlias = Literal["drop", "left", "right"]

REASONS: dict[str, str] = {
    "not_json": "a line or file is not JSON",
    "not_object": "a row is not a JSON object",
    "missing_field": "chosen or rejected is missing or None",
    "not_text": "a field is neither text nor a list of messages",
    "mixed_types": "prompt, chosen and rejected are not of one kind",
    "empty": "a text, a conversation or a list of ids is empty",
    "identical": "chosen and rejected are the same tokens",
    "too_long": "a sequence has more tokens than max_length",
    "malformed": "a message is malformed",
    "unsupported": "a message holds an image, audio or another part that is not text",
    "control_token": "a message holds a control token that is refused",
    "surrogate": "a text is not valid Unicode",
    "template": "the chat template refused the conversation",
    "no_template": "messages, but the tokenizer has no chat template",
    "bad_tools": "tools is not a list of JSON schemas",
    "bad_kwargs": "chat_template_kwargs is not a mapping of template variables",
    "bad_margin": "margin is not a finite number",
    "missing_margin": "margin is missing, and other rows have one",
    "bad_ids": "token ids are not integers from the tokenizer's vocabulary",
}

SUFFIXES = (".jsonl", ".json", ".parquet")


class RowRef(NamedTuple):
    """Where a row stands. `row` counts from 0; `line` counts from 1 and exists for line files."""

    source: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.source} row {self.row}{line}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sequences, and how much better the first is (None where nobody says)."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None


@dataclass(frozen=True)
class RowSet:
    """The rows of one file or one dataset.

    `rows` is a `datasets.Dataset` (memory-mapped: costs little memory) or, for JSON and JSONL, a
    list of Python objects: several times the file's size in memory. Turn a JSON file of many
    gigabytes into Parquet first.
    """

    name: str
    rows: Sequence[Row]
    lines: Sequence[int] | None = None  # [rows]; the line of each row, for line files

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> RowRef:
        return RowRef(self.name, row, None if self.lines is None else self.lines[row])

    def has_margin(self) -> bool:
        """Whether some row has a margin: then each row needs one. Reads no other column."""
        if isinstance(self.rows, list):
            return any(row.get("margin") is not None for row in self.rows)
        dataset: Any = self.rows
        if "margin" not in dataset.column_names:
            return False
        return any(row["margin"] is not None for row in dataset.select_columns(["margin"]))


def read_rows(source: Any, *, split: str = "train") -> list[RowSet]:
    """Open a source, or a list of sources, as sets of rows, in the order given.

    A source is a `datasets.Dataset`, a `DatasetDict` (its `split`), a path or glob of .jsonl, .json
    or .parquet files, a folder of such files, a folder written by `save_to_disk`, or a hub id. What
    looks like a path is never looked up on the hub.

    Raises `ConfigError` for a source that cannot be opened or has no rows, `RowError` for a line
    that is not a JSON object.
    """
    several = isinstance(source, (list, tuple))
    sources = source if several else [source]
    if not sources:
        raise ConfigError("The list of data sources is empty: name at least one.")
    sets: list[RowSet] = []
    for index, one in enumerate(sources):
        sets += _open(one, split, f"dataset[{index}]" if several else "dataset")
    for rows in sets:
        if not len(rows):
            raise ConfigError(f"{rows.name} has no rows: there is nothing to train on in it.")
    return sets


def encode_row(
    row: Row,
    where: RowRef,
    rendering: Rendering,
    *,
    max_length: int | None,
    truncation: PairTruncation,
    margin_required: bool = False,
) -> Pair:
    """Validate one row and tokenise it.

    `max_length` is in tokens, for each of the two sequences. `margin_required` says that other rows
    have a margin (`RowSet.has_margin`). Raises `RowError`.
    """
    if not isinstance(row, Mapping):
        _refuse(where, "row", "not_object", f"is {_seen(row)}", "a mapping of columns to values")
    margin = _margin(row, where, margin_required)
    ids = _given_ids(row, where, rendering) or _rendered_ids(row, where, rendering)
    chosen, rejected = ids
    if chosen == rejected:
        _refuse(
            where,
            "rejected",
            "identical",
            f"gives the same {len(chosen)} tokens as chosen",
            "two different answers; a pair of equal ones teaches nothing",
            "remove the row, or let bad rows be dropped and counted",
        )
    if max_length is not None and max(len(chosen), len(rejected)) > max_length:
        chosen, rejected = _shortened(ids, where, max_length, truncation)
    return Pair(chosen, rejected, margin)


def _shortened(
    ids: tuple[list[int], list[int]],
    where: RowRef,
    max_length: int,
    truncation: PairTruncation,
) -> tuple[list[int], list[int]]:
    chosen, rejected = ids
    if truncation == "drop":
        _refuse(
            where,
            "chosen" if len(chosen) > max_length else "rejected",
            "too_long",
            f"is too long: chosen has {len(chosen):,} tokens, rejected {len(rejected):,}",
            f"at most max_length = {max_length:,} in each",
            "raise max_length, truncate left or right, or let such rows be dropped",
        )
    chosen, rejected = (truncate(side, max_length, truncation) for side in ids)
    if chosen == rejected:
        _refuse(
            where,
            "rejected",
            "identical",
            f"equals chosen once both are truncated at the {truncation} to {max_length:,} tokens",
            "two sequences that still differ",
            "raise max_length, or truncate at the other side",
        )
    return chosen, rejected


def _margin(row: Row, where: RowRef, required: bool) -> float | None:
    margin = row.get("margin")
    expected = "a finite number, such as 0.5"
    if margin is None:
        if required:
            todo = "give every row a margin (0 changes nothing), or remove the column"
            seen = "is missing or None, but other rows have one"
            _refuse(where, "margin", "missing_margin", seen, expected, todo)
        return None
    if isinstance(margin, bool) or not isinstance(margin, numbers.Real):
        _refuse(where, "margin", "bad_margin", f"is {_seen(margin)}", expected)
    try:
        value = float(margin)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        _refuse(where, "margin", "bad_margin", f"is {value}", expected)
    return value


def _given_ids(row: Row, where: RowRef, rendering: Rendering) -> tuple[list[int], list[int]] | None:
    """The ids of a row that is already tokenised, else None."""
    names = ("chosen_ids", "rejected_ids")
    if all(row.get(name) is None for name in names):
        legacy = ("chosen_input_ids", "rejected_input_ids")
        if all(row.get(name) is None for name in legacy):
            return None
        _warn_of_legacy_columns()
        names = legacy
    missing = [name for name in names if row.get(name) is None]
    if missing:
        if row.get("chosen") is not None and row.get("rejected") is not None:
            return None  # as TRL: only both columns together make a tokenised row
        other = names[1 - names.index(missing[0])]
        _refuse(
            where,
            missing[0],
            "missing_field",
            f"is {'None' if missing[0] in row else 'missing'}, but there is {other}",
            "token ids of both sequences, or text in chosen and rejected",
        )
    chosen, rejected = (_checked_ids(row[name], name, where, rendering) for name in names)
    return chosen, rejected


def _checked_ids(ids: Any, field: str, where: RowRef, rendering: Rendering) -> list[int]:
    size = rendering.vocab_size
    expected = f"a list of token ids, integers from 0 to {size - 1:,}"
    if not isinstance(ids, (list, tuple)):
        _refuse(where, field, "bad_ids", f"is {_seen(ids)}", expected)
    if not ids:
        _refuse(where, field, "empty", "is an empty list", expected, "remove the row")
    for position, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            seen = f"has {_seen(token_id)} at position {position}"
        elif not 0 <= token_id < size:
            seen = f"has the id {token_id} at position {position}"
        else:
            continue
        todo = "tokenise the rows with the tokenizer of the model that is trained"
        _refuse(where, field, "bad_ids", seen, expected, todo)
    return list(ids)


def _rendered_ids(row: Row, where: RowRef, rendering: Rendering) -> tuple[list[int], list[int]]:
    answers = [_answer(row, name, where) for name in ("chosen", "rejected")]
    fields = dict(zip(("chosen", "rejected"), answers, strict=True))
    prompt = row.get("prompt")
    if prompt is not None:
        if not isinstance(prompt, (str, list, tuple)):
            seen = f"is {_seen(prompt)}"
            _refuse(where, "prompt", "not_text", seen, "text, or a list of messages")
        fields = {"prompt": prompt, **fields}
    kinds = {name: isinstance(value, str) for name, value in fields.items()}
    if len(set(kinds.values())) > 1:
        _refuse_mixed(where, kinds)
    front: list[Any] = [] if prompt is None else [prompt]
    if kinds["chosen"]:
        texts = ["".join([*front, answer]) for answer in answers]
        options: dict[str, Any] | None = None
    else:
        conversations = [[m for part in [*front, answer] for m in part] for answer in answers]
        options = {
            "tools": _tools(row, where),
            "chat_template_kwargs": row.get("chat_template_kwargs"),
        }
    sides: list[list[int]] = []
    for side, name in enumerate(("chosen", "rejected")):
        try:
            if options is None:
                sides.append(rendering.encode_text(texts[side]))
            else:
                sides.append(rendering.encode_conversation(conversations[side], **options))
        except ConversationError as error:
            _refuse_conversation(error, where, name, 0 if prompt is None else len(prompt))
    return sides[0], sides[1]


def _answer(row: Row, name: str, where: RowRef) -> Any:
    """The row's `chosen` or `rejected`: text or a list, not empty."""
    value = row.get(name)
    expected = "text, or a list of messages such as {'role': 'assistant', 'content': 'Hi'}"
    if value is None:
        columns = [column for column in row if isinstance(column, str) and column != name]
        if name in row:
            seen, todo = "is None", "remove the row, or fill it in"
        else:
            near = [column for column in columns if column not in ("chosen", "rejected", "prompt")]
            seen = f"is missing; the row has {', '.join(columns) or 'no columns'}."
            seen += did_you_mean(name, near)
            todo = f"rename the column that holds the {name} answer to {name!r}"
        _refuse(where, name, "missing_field", seen, expected, todo)
    if isinstance(value, Mapping):
        todo = "put the message into a list"
        _refuse(where, name, "not_text", f"is one mapping: {_seen(value)}", expected, todo)
    if not isinstance(value, (str, list, tuple)):
        _refuse(where, name, "not_text", f"is {_seen(value)}", expected)
    if not value:
        seen = "is an empty text" if isinstance(value, str) else "is an empty list"
        todo = "remove the row: an answer that is not there cannot be compared"
        _refuse(where, name, "empty", seen, expected, todo)
    return value


def _tools(row: Row, where: RowRef) -> Any:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except (ValueError, RecursionError) as error:
        expected = "a list of JSON schemas, or the JSON text of one"
        _refuse(where, "tools", "bad_tools", f"is not JSON ({error}): {_seen(tools)}", expected)


def _refuse_mixed(where: RowRef, kinds: dict[str, bool]) -> NoReturn:
    words = {True: "text", False: "a list of messages"}
    odd = next(
        (name for name in ("chosen", "rejected") if kinds[name] != kinds["chosen"]), "prompt"
    )
    rest = [f"{name} {words[kind]}" for name, kind in kinds.items() if name != odd]
    _refuse(
        where,
        odd,
        "mixed_types",
        f"is {words[kinds[odd]]}, but {' and '.join(rest)}",
        "all of them text, or all of them lists of messages",
        "write text as messages: prompt [{'role': 'user', 'content': ...}], "
        "chosen [{'role': 'assistant', 'content': ...}]",
    )


def _refuse_conversation(
    error: ConversationError, where: RowRef, field: str, prompt_length: int
) -> NoReturn:
    """Say in a row's words what the rendering said in a conversation's."""
    details = vars(error)
    index = details.get("message_index")
    note = ""
    if details.get("field", "messages") != "messages":
        field = details["field"]
    elif index is not None and prompt_length:
        note = f" (messages are counted from the prompt's first, of {prompt_length})"
        field = "prompt" if index < prompt_length else field
    raise RowError(
        f"{where}, {field}: {error}{note}",
        source=where.source,
        row=where.row,
        line=where.line,
        field=field,
        reason=error.reason,
    ) from error


def _refuse(
    where: RowRef, field: str, reason: str, seen: str, expected: str, todo: str = ""
) -> NoReturn:
    assert reason in REASONS, reason
    lines = [f"{where}: {field} {seen}", f"  expected: {expected}", f"  to do:    {todo}"]
    raise RowError(
        "\n".join(lines if todo else lines[:2]),
        source=where.source,
        row=where.row,
        line=where.line,
        field=field,
        reason=reason,
    )


def _seen(value: object) -> str:
    """`float 3.5`, `str 'some long te...text'`: kind and a short look."""
    if value is None:
        return "None"
    return f"{type(value).__name__} {_short.repr(value)}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = _short.maxlevel = 3


@cache
def _warn_of_legacy_columns() -> None:
    warnings.warn(
        "The columns chosen_input_ids and rejected_input_ids are TRL's old names: "
        "rename them to chosen_ids and rejected_ids.",
        FutureWarning,
        stacklevel=2,
    )


# --- reading ------------------------------------------------------------------------------------


def _open(source: Any, split: str, name: str) -> list[RowSet]:
    if isinstance(source, (str, PathLike)):
        return _open_name(source, split)
    import datasets

    if isinstance(source, datasets.Dataset):
        # A torch or numpy format would hand out tensors where rows hold lists.
        return [RowSet(name, source.with_format(None))]
    if isinstance(source, datasets.DatasetDict):
        return [RowSet(f"{name}[{split!r}]", _pick(source, split, name).with_format(None))]
    if isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ConfigError(
            f"{name} is a {type(source).__name__}. Rows are encoded once, counted and shuffled "
            "before training, and a stream has neither a length nor a place to come back to.\n"
            "  to do: take what you need into a table:\n"
            "         datasets.Dataset.from_list(list(stream.take(100_000)))"
        )
    hint = " A list of rows becomes a source with datasets.Dataset.from_list(rows)."
    raise ConfigError(
        f"{name} is {_seen(source)}; expected a datasets.Dataset or DatasetDict, a path, a folder "
        f"or a hub id.{hint if isinstance(source, (Mapping, list, tuple)) else ''}"
    )


def _pick(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split in splits:
        return splits[split]
    raise ConfigError(
        f"{name} has no split {split!r}; it has {', '.join(map(repr, splits))}."
        + did_you_mean(split, splits)
    )


def _open_name(source: str | PathLike[str], split: str) -> list[RowSet]:
    text = fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        return [_open_file(path, path.name)]
    if any(mark in text for mark in "*?["):
        found = sorted(Path(match) for match in glob(str(path), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise ConfigError(f"No file matches {text!r} (looked from {Path.cwd()}).")
        return _open_files(files)
    if "://" in text:
        raise ConfigError(
            f"{text!r} is a URL, which raywards does not read. Load it with "
            "datasets.load_dataset and pass the Dataset, or mount or copy it and pass the path."
        )
    if isinstance(source, PathLike) or _looks_local(text):
        _refuse_missing(text, path)
    return [_open_hub(text, split)]


def _looks_local(text: str) -> bool:
    """A hub id is `name` or `owner/name`; all else can only have been meant as a path."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        return True
    if Path(text).suffix in (*SUFFIXES, ".arrow", ".csv", ".tsv", ".txt", ".gz", ".zst"):
        return True
    return "/" in text and Path(text.split("/")[0]).exists()


def _refuse_missing(text: str, path: Path) -> NoReturn:
    folder = path.absolute().parent
    message = f"There is no file or folder {text!r} (tried {path.absolute()})."
    if not folder.is_dir():
        known = next(parent for parent in folder.parents if parent.is_dir())
        message += f" Its folder does not exist either; {known} does."
    else:
        message += did_you_mean(path.name, sorted(item.name for item in folder.iterdir()))
    raise ConfigError(message)


def _open_folder(folder: Path, split: str) -> list[RowSet]:
    import datasets

    table = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    if table or (folder / "dataset_dict.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder} is not a whole saved dataset: {error}") from error
        name = folder.name
        if isinstance(saved, datasets.DatasetDict):
            return [RowSet(f"{name}[{split!r}]", _pick(saved, split, str(folder)))]
        return [RowSet(name, saved.with_format(None))]
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and file.name not in ("dataset_info.json", "dataset_infos.json")
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise ConfigError(
            f"The folder {folder} holds no {', '.join(SUFFIXES)} file, and is no dataset saved by "
            "save_to_disk."
        )
    return _open_files(_of_split(files, folder, split))


_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Where file names say which split they are, only those of `split`; else all of them."""

    def words(file: Path) -> set[str]:
        return set(re.split(r"[^a-z]+", str(file.relative_to(folder).with_suffix("")).lower()))

    wanted = {split, *_SPLITS.get(split, ())}
    known = wanted.union(*_SPLITS.values())
    if not any(words(file) & known for file in files):
        return files
    chosen = [file for file in files if words(file) & wanted]
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise ConfigError(
            f"The folder {folder} has no file of the split {split!r}; it has {names}. "
            "Name the split, or the files themselves."
        )
    return chosen


def _open_files(files: Iterable[Path]) -> list[RowSet]:
    """One set a file, named by as much of the path as tells them apart."""
    files = list(files)
    distinct = len({file.name for file in files}) == len(files)
    return [_open_file(file, file.name if distinct else str(file)) for file in files]


def _open_file(path: Path, name: str) -> RowSet:
    if path.suffix == ".jsonl":
        return _read_lines(path, name)
    if path.suffix == ".json":
        return _read_json(path, name)
    if path.suffix == ".parquet":
        import datasets

        try:
            return RowSet(name, datasets.Dataset.from_parquet(str(path)))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"{path} is not a readable Parquet file: {error}") from error
    raise ConfigError(
        f"{path} has the suffix {path.suffix!r}; raywards reads {', '.join(SUFFIXES)}. Load other "
        "formats with datasets.load_dataset and pass the Dataset."
    )


def _read_lines(path: Path, name: str) -> RowSet:
    rows: list[Row] = []
    lines: list[int] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                where = RowRef(name, len(rows), number)
                rows.append(_as_row(_parse(raw.rstrip(), where), where))
                lines.append(number)
    return RowSet(name, rows, lines)


def _read_json(path: Path, name: str) -> RowSet:
    """A list of rows. Files named .json that hold one object a line are common: those too."""
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_lines(path, name)
    rows = _parse(raw, RowRef(name, 0))
    return RowSet(name, [_as_row(row, RowRef(name, index)) for index, row in enumerate(rows)])


def _parse(raw: bytes, where: RowRef) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        seen = f"is not UTF-8: byte {raw[error.start]:#04x} at {error.start}"
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        seen = f"is not JSON: {error.msg} at line {(where.line or 1) + error.lineno - 1}, "
        seen += f"column {error.colno}, near {near!r}"
    except (ValueError, RecursionError) as error:
        seen = f"is not usable JSON: {error}"
    expected = "one JSON object a line, or a list of objects (.json)"
    _refuse(where, "row", "not_json", seen, expected)


def _as_row(value: Any, where: RowRef) -> Row:
    if isinstance(value, dict):
        return value
    expected = 'an object such as {"chosen": "...", "rejected": "..."}'
    _refuse(where, "row", "not_object", f"is {_seen(value)}", expected)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return row


def _open_hub(name: str, split: str) -> RowSet:
    import datasets

    try:
        return RowSet(name, datasets.load_dataset(name, split=split))
    # The hub's client raises its own kinds beside these: all of them are OSError.
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ConfigError(
            f"The dataset {name!r} (split {split!r}) could not be loaded from the hub, and there "
            f"is no local file or folder {name!r} in {Path.cwd()}.\n  {type(error).__name__}: "
            f"{str(error)[:300]}"
        ) from error
