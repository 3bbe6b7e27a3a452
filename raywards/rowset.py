"""The rows of one file or dataset: read as they are needed, each with its place.

Whoever refuses a row can name its file, row and line (`RowRef`). A set of rows can be cut into
parts that another process encodes, and has a digest by which prepared pairs are found again.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias, overload

import numpy
from numpy.typing import NDArray

from raywards.errors import ConfigError, RowError

Row: TypeAlias = Mapping[str, Any]

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24
_ROWS_BETWEEN_NOTES = 100_000
_ROWS_HASHED_AT_ONCE = 1000
_NEWLINE = ord("\n")


class RowRef(NamedTuple):
    """Where a row stands. `row` counts from 0; `line` counts from 1 and exists for line files."""

    source: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.source} row {self.row}{line}"


@dataclass(frozen=True)
class RowSet:
    """The rows of one file or one dataset, or some of them.

    `rows` is a `datasets.Dataset` (memory-mapped), `Lines` (read as they are needed), or a list of
    Python objects. A `datasets.IterableDataset` has to be written down before (`is_stream`).
    """

    name: str
    rows: Any
    group: str | None = None
    """The name that a mapping of sources has for it."""
    first: int = 0
    """Place of the first of `rows`, where they are a part."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_stream(self) -> bool:
        """Whether the rows can only be read from the start, one by one."""
        return not isinstance(self.rows, Sequence) and "IterableDataset" in type(self.rows).__name__

    def where(self, row: int) -> RowRef:
        """The place of `rows[row]`."""
        line = self.rows.line(row) if isinstance(self.rows, Lines) else None
        return RowRef(self.name, self.first + row, line)

    def has(self, column: str) -> bool:
        """Whether some row has a value there. Reads no other column."""
        if isinstance(self.rows, Lines):
            return self.rows.has(column)
        if isinstance(self.rows, list):
            return any(row.get(column) is not None for row in self.rows)
        if column not in self.rows.column_names:
            return False
        tables = self.rows.select_columns([column]).with_format("arrow").iter(_BLOCK_BYTES >> 10)
        return any(table.column(0).null_count < len(table) for table in tables)

    def part(self, start: int, stop: int) -> RowSet:
        """Rows `start` to `stop` (excluded), held in memory as they are stored: other processes
        need not see the file."""
        rows = self.rows
        if isinstance(rows, Lines):
            rows = rows.part(start, stop)
        elif isinstance(rows, list):
            rows = rows[start:stop]
        else:
            import datasets

            table = rows.with_format("arrow")[start:stop]
            rows = datasets.Dataset(table, info=datasets.DatasetInfo(features=rows.features))
        return replace(self, rows=rows, first=self.first + start)

    def of_group(self, group: str, name: str) -> RowSet:
        """The same rows as part of the source that a mapping calls `group`."""
        rows = self.rows.named(name) if isinstance(self.rows, Lines) else self.rows
        return replace(self, rows=rows, name=name, group=group)

    def written_down(self, file: Path, most: int | None) -> RowSet:
        """A stream as rows that can be read again: up to `most` of them, in a file of lines."""
        rows = itertools.islice(self.rows, most)
        with file.open("w", encoding="utf-8") as out:
            for count, row in enumerate(rows, start=1):
                out.write(json.dumps(row, default=str) + "\n")
                if count % _ROWS_BETWEEN_NOTES == 0:
                    logger.info("%s: %d rows of the stream are read", self.name, count)
        lines = Lines.open(file, self.name)
        if not len(lines):
            raise ConfigError(f"{self.name} has no rows: the stream is empty.")
        return replace(self, rows=lines)

    def digest(self) -> bytes:
        """SHA-256 of a file's bytes, of a dataset's columns, of a list's rows as JSON."""
        if isinstance(self.rows, Lines):
            return self.rows.sha256
        digest = hashlib.sha256()
        if isinstance(self.rows, list):
            for row in self.rows:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        else:
            _hash_table(digest, self.rows)
        return digest.digest()


class Lines(Sequence[Row]):
    """The rows of a file with one JSON object a line. Blank lines are none.

    Only where they stand is held in memory, 8 bytes a row; a line is parsed when it is asked for,
    and raises `RowError` where it is no JSON object.
    """

    def __init__(
        self,
        name: str,
        text: Path | NDArray[numpy.uint8],
        starts: NDArray[numpy.int64],
        lines: NDArray[numpy.int64] | None,
        *,
        first: int = 0,
        first_line: int = 1,
        sha256: bytes = b"",
    ) -> None:
        self.sha256 = sha256
        self._name, self._text = name, text
        self._starts = starts  # [rows + 1], of bytes in the text
        self._lines = lines  # [rows], where there are blank lines
        self._first, self._first_line = first, first_line

    @classmethod
    def open(cls, path: Path, name: str) -> Lines:
        """Find the lines of a file, which is read once, and not parsed."""
        starts: list[NDArray[numpy.int64]] = []
        blank: list[NDArray[numpy.int64]] = []
        digest = hashlib.sha256()
        size = num_lines = 0
        for block in _whole_lines(path):
            digest.update(block)
            begins, is_blank = _line_starts(block)
            starts.append(begins[~is_blank] + size)
            blank.append(numpy.flatnonzero(is_blank) + num_lines)
            size += len(block)
            num_lines += len(begins)
        lines = None
        if any(map(len, blank)):
            lines = numpy.delete(numpy.arange(1, num_lines + 1), numpy.concatenate(blank))
        places = numpy.concatenate([*starts, numpy.array([size])])
        return cls(name, path, places, lines, sha256=digest.digest())

    def named(self, name: str) -> Lines:
        """The same rows under another name."""
        renamed = copy.copy(self)
        renamed._name = name
        return renamed

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        raw = self._raw(place, place + 1).tobytes().rstrip()
        where = RowRef(self._name, self._first + place, self.line(place))
        return as_row(parse(raw, where), where)

    def line(self, row: int) -> int:
        """Number of the line that a row stands in, from 1."""
        return row + self._first_line if self._lines is None else int(self._lines[row])

    def part(self, start: int, stop: int) -> Lines:
        """Rows `start` to `stop` (excluded), with their text in memory."""
        return Lines(
            self._name,
            self._raw(start, stop),
            self._starts[start : stop + 1] - self._starts[start],
            None if self._lines is None else self._lines[start:stop],
            first=self._first + start,
            first_line=self._first_line + start,
        )

    def has(self, column: str) -> bool:
        """Whether some row has a value there. Only lines that hold the name are parsed."""
        word = json.dumps(column).encode()
        at_once = max(1, _BLOCK_BYTES * len(self) // max(1, int(self._starts[-1])))
        for start in range(0, len(self), at_once):
            stop = min(start + at_once, len(self))
            text = self._raw(start, stop).tobytes()
            begins = self._starts[start : stop + 1] - self._starts[start]
            found = text.find(word)
            while found >= 0:
                row = int(numpy.searchsorted(begins, found, side="right")) - 1
                if self[start + row].get(column) is not None:
                    return True
                found = text.find(word, int(begins[row + 1]))
        return False

    def _raw(self, start: int, stop: int) -> NDArray[numpy.uint8]:
        begin, end = int(self._starts[start]), int(self._starts[stop])
        if not isinstance(self._text, Path):
            return self._text[begin:end]
        raw = numpy.fromfile(self._text, numpy.uint8, end - begin, offset=begin)
        if len(raw) < end - begin:
            raise ConfigError(
                f"{self._text} became shorter while it was read: {int(self._starts[-1])} bytes at "
                "first. Start again when nothing writes to it."
            )
        return raw


def refuse_row(
    where: RowRef, field: str, reason: str, seen: str, expected: str, todo: str = ""
) -> NoReturn:
    """Raise the `RowError` of one field. `reason` is a key of `preferences.REASONS`."""
    lines = [f"{where}: {field} {seen}", f"  expected: {expected}", f"  to do:    {todo}"]
    raise RowError(
        "\n".join(lines if todo else lines[:2]), **where._asdict(), field=field, reason=reason
    )


def show(value: object) -> str:
    """`float 3.5`, `str 'some long te...text'`: kind and a short look."""
    if value is None:
        return "None"
    look = _short.repr(value)
    if len(look) > _LONGEST_LOOK:
        look = look[: _LONGEST_LOOK - 3] + "..."
    return f"{type(value).__name__} {look}"


_LONGEST_LOOK = 120  # SECURITY.md says so
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = _short.maxlevel = 3


def parse(raw: bytes, where: RowRef) -> Any:
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
    refuse_row(where, "row", "not_json", seen, expected)


def as_row(value: Any, where: RowRef) -> Row:
    if isinstance(value, dict):
        return value
    expected = 'an object such as {"chosen": "...", "rejected": "..."}'
    refuse_row(where, "row", "not_object", f"is {show(value)}", expected)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return row


def _whole_lines(path: Path) -> Iterator[bytes]:
    """A file in blocks that end where a line does."""
    with path.open("rb") as file:
        rest = b""
        while block := file.read(_BLOCK_BYTES):
            whole, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
                rest = tail
            else:
                rest += block
        if rest:
            yield rest


def _line_starts(block: bytes) -> tuple[NDArray[numpy.int64], NDArray[numpy.bool_]]:
    """Where each line of a block begins, and whether it is blank."""
    text = numpy.frombuffer(block, numpy.uint8)
    begins = numpy.concatenate([[0], numpy.flatnonzero(text == _NEWLINE) + 1])
    if begins[-1] == len(block):
        begins = begins[:-1]
    stops = numpy.append(begins[1:], len(block))
    is_blank = text[begins] <= ord(" ")
    for i in numpy.flatnonzero(is_blank):  # or it is indented
        is_blank[i] = not block[begins[i] : stops[i]].strip()
    return begins, is_blank


def _hash_table(digest: Any, dataset: Any) -> None:
    """Hash columns as they are stored, in batches of fixed size: however the table is cut."""
    import pyarrow

    for table in dataset.with_format("arrow").iter(_ROWS_HASHED_AT_ONCE):
        # Taken, for a slice is written with some of what stands around it.
        plain = table.replace_schema_metadata(None).take(numpy.arange(len(table))).combine_chunks()
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        digest.update(sink.getvalue())
