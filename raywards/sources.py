"""Where rows come from: files, folders, saved datasets, the hub, to `RowSet`s.

    source ─read_rows─► RowSet ─row─► encode_row (preferences.py)

A `RowSet` (rowset.py) reads rows as they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from glob import glob
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from raywards.errors import ConfigError, did_you_mean
from raywards.rowset import Lines, RowRef, RowSet, as_row, parse, show

SUFFIXES = (".jsonl", ".json", ".parquet")

COLUMNS = {
    *("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids", "margin", "probability"),
    *("responses", "ranks", "text", "response", "score", "tools", "chat_template_kwargs"),
}
"""Of rows of any format, beside attributes."""

_LOOKED_AT = 4096  # bytes, to tell a list from lines


def read_rows(
    source: Any, *, split: str = "train", config: str | None = None, strict_split: bool = False
) -> list[RowSet]:
    """Open a source, or a list of sources, as sets of rows, in the order given.

    A source is a `datasets.Dataset`, a `DatasetDict` (its `split`), a stream of either kind, a path
    or glob of .jsonl, .json or .parquet files, a folder of such files, a folder written by
    `save_to_disk`, or a hub id. What looks like a path is never looked up on the hub; `config`
    names the configuration of a dataset there. A `RowSet` is taken as it is. A mapping gives its
    sources names.

    What has no splits gives all of its rows, unless `strict_split`: then it is refused, so that no
    training rows pass for held-out ones.

    Raises `ConfigError` for a source that cannot be opened or has no rows, `RowError` for a list of
    rows that are no JSON objects; a line of a file is parsed when it is read.
    """
    if names_sources(source):
        return [
            rows.of_group(str(group), str(group) if len(sets) == 1 else f"{group}/{rows.name}")
            for group, one in source.items()
            for sets in [read_rows(one, split=split, config=config, strict_split=strict_split)]
            for rows in sets
        ]
    several = isinstance(source, (list, tuple))
    sources = source if several else [source]
    if not sources:
        raise ConfigError("The list of data sources is empty: name at least one.")
    sets: list[RowSet] = []
    for index, one in enumerate(sources):
        name = f"dataset[{index}]" if several else "dataset"
        sets += _open(one, _Split(split, strict_split), name, config)
    for rows in sets:
        if not rows.is_stream and not len(rows):
            raise ConfigError(f"{rows.name} has no rows: there is nothing to train on in it.")
    return sets


def names_sources(source: Any, *, splits_too: bool = False) -> bool:
    """Whether a source is a mapping of names to sources, and no dataset or column of one.

    A `DatasetDict` is one where its splits are to be taken for sets of their own.
    """
    if not isinstance(source, Mapping) or not source:
        return False
    import datasets

    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return splits_too
    return not _are_columns(source)


def _are_columns(source: Mapping[Any, Any]) -> bool:
    """Whether a mapping is of columns to their values, or of one row, rather than of sources."""
    import datasets

    kinds = (str, PathLike, RowSet, datasets.Dataset, datasets.IterableDataset, Mapping)
    lists = [value for value in source.values() if isinstance(value, (list, tuple))]
    values = [value for value in source.values() if not isinstance(value, (list, tuple))]
    if not all(isinstance(one, kinds) for some in (values, *lists) for one in some):
        return True
    # Texts may be names of files: the names of the columns tell.
    named = source.keys() <= COLUMNS and len(lists) == len(source)
    return named or {"chosen", "rejected"} <= source.keys()


class _Split(NamedTuple):
    name: str
    strict: bool

    def check_splitless(self, source: object) -> None:
        """Raise where `source`, which has no splits, may not stand for one."""
        if self.strict:
            raise ConfigError(
                f"{source} has no split {self.name!r}: all its rows would be taken, those trained "
                "on too. Name held-out rows with --eval_dataset_name."
            )


def _open(source: Any, split: _Split, name: str, config: str | None) -> list[RowSet]:
    if isinstance(source, RowSet):
        return [source]
    if isinstance(source, (str, PathLike)):
        return _open_name(source, split, config)
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        split.check_splitless(name)
        # A torch or numpy format would hand out tensors where rows hold lists.
        return [RowSet(name, source.with_format(None))]
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        rows = _pick(source, split.name, name).with_format(None)
        return [RowSet(f"{name}[{split.name!r}]", rows)]
    hint = ""
    if isinstance(source, Mapping) and source:
        hint = " Columns become a source with datasets.Dataset.from_dict(columns)."
    if isinstance(source, (Mapping, list, tuple)):
        hint += " A list of rows becomes a source with datasets.Dataset.from_list(rows)."
    raise ConfigError(
        f"{name} is {show(source)}; expected a datasets.Dataset or DatasetDict, a path, a folder "
        f"or a hub id, or a mapping of names to these.{hint}"
    )


def _pick(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split in splits:
        return splits[split]
    raise ConfigError(
        f"{name} has no split {split!r}; it has {', '.join(map(repr, splits))}."
        + did_you_mean(split, splits)
    )


def _open_name(source: str | PathLike[str], split: _Split, config: str | None) -> list[RowSet]:
    text = fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        split.check_splitless(path)
        return [_open_file(path, path.name)]
    if any(mark in text for mark in "*?["):
        found = sorted(Path(match) for match in glob(str(path), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise ConfigError(f"No file matches {text!r} (looked from {Path.cwd()}).")
        split.check_splitless(text)
        return _open_files(files)
    if "://" in text:
        raise ConfigError(
            f"{text!r} is a URL, which raywards does not read. Load it with "
            "datasets.load_dataset and pass the Dataset, or mount or copy it and pass the path."
        )
    if isinstance(source, PathLike) or _looks_local(text):
        _refuse_missing(text, path)
    return [_open_hub(text, split.name, config)]


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


def _open_folder(folder: Path, split: _Split) -> list[RowSet]:
    import datasets

    table = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    if table or (folder / "dataset_dict.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder} is not a whole saved dataset: {error}") from error
        name = folder.name
        if isinstance(saved, datasets.DatasetDict):
            rows = _pick(saved, split.name, str(folder))
            return [RowSet(f"{name}[{split.name!r}]", rows)]
        split.check_splitless(folder)
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


def _of_split(files: list[Path], folder: Path, split: _Split) -> list[Path]:
    """Where file names say which split they are, only those of `split`; else all of them."""

    def words(file: Path) -> set[str]:
        return set(re.split(r"[^a-z]+", str(file.relative_to(folder).with_suffix("")).lower()))

    wanted = {split.name, *_SPLITS.get(split.name, ())}
    known = wanted.union(*_SPLITS.values())
    if not any(words(file) & known for file in files):
        split.check_splitless(folder)
        return files
    chosen = [file for file in files if words(file) & wanted]
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise ConfigError(
            f"The folder {folder} has no file of the split {split.name!r}; it has {names}. "
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
        return RowSet(name, Lines.open(path, name))
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


def _read_json(path: Path, name: str) -> RowSet:
    """A list of rows. Files named .json that hold one object a line are common: those too."""
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return RowSet(name, Lines.open(path, name))
    rows = parse(path.read_bytes(), RowRef(name, 0))
    return RowSet(name, [as_row(row, RowRef(name, index)) for index, row in enumerate(rows)])


def _open_hub(name: str, split: str, config: str | None) -> RowSet:
    import datasets

    try:
        return RowSet(name, datasets.load_dataset(name, config, split=split))
    # The hub's client raises its own kinds beside these: all of them are OSError.
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ConfigError(
            f"The dataset {name!r} (split {split!r}) could not be loaded from the hub, and there "
            f"is no local file or folder {name!r} in {Path.cwd()}.\n  {type(error).__name__}: "
            f"{str(error)[:300]}"
        ) from error
