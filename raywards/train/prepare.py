"""Rows to prepared pairs on disk, once for the whole run: validated, encoded, with their lengths.

A prepared folder holds Arrow shards that `datasets` maps, and a `prepared.json` written last.
Its name carries a fingerprint of the rows, the rendering and the settings, so a run that is started
again finds it, and changed data makes a new one.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets.arrow_writer import ArrowWriter

from raywards.config import Objective
from raywards.errors import ConfigError, RowError
from raywards.groups import columns_of, encode_group, is_conversational
from raywards.packing import shared_prefix
from raywards.preferences import NUMBERS, REASONS
from raywards.rendering import Rendering
from raywards.sources import RowRef, RowSet, read_rows
from raywards.train.table import FEATURES

logger = logging.getLogger(__name__)

_FORMAT = 4
_ROWS_PER_SHARD = 50_000
_ROWS_PER_CHUNK = 256
_BAD_ROWS_SHOWN = 5


@dataclass(frozen=True)
class EncodeSettings:
    """What decides how a row becomes a pair, beside the rendering."""

    max_length: int | None
    truncation: Literal["drop", "left", "right"]
    on_bad_row: Literal["error", "drop"]
    objective: Objective = "bradley_terry"
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, as its `prepared.json` describes it."""

    folder: Path
    fingerprint: str
    num_rows: int
    num_pairs: int
    dropped: dict[str, int]
    """Rows left out, by reason."""
    conversational: bool
    numbers: list[str]
    """Those of `NUMBERS` that some pair has."""
    last_ids: list[int]
    """Ids that end some sequence."""


def prepare(
    source: Any,
    rendering: Rendering,
    settings: EncodeSettings,
    parent: Path,
    *,
    name: str,
    split: str = "train",
    num_proc: int = 1,
) -> Prepared:
    """Encode every row of `source` into a folder below `parent`, or find it there already.

    Raises `RowError` for the first rows that cannot become pairs (unless they are to be dropped),
    and `ConfigError` where no pair is left.
    """
    row_sets = read_rows(source, split=split)
    fingerprint = _fingerprint(row_sets, rendering, settings)
    folder = parent / f"{name}-{fingerprint[:16]}"
    prepared = _find(folder)
    if prepared is not None:
        logger.info("%s: %d pairs are prepared already in %s", name, prepared.num_pairs, folder)
        return prepared
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        summary = _write_shards(row_sets, rendering, settings, partial, num_proc)
        _refuse_nothing_left(name, summary)
        shards = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        summary = {"format": _FORMAT, "fingerprint": fingerprint, **summary, "shards": shards}
        (partial / "prepared.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        prepared = _put(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _tell(name, prepared)
    return prepared


def _fingerprint(row_sets: list[RowSet], rendering: Rendering, settings: EncodeSettings) -> str:
    digest = hashlib.sha256(
        json.dumps([_FORMAT, rendering.fingerprint(), *vars(settings).items()]).encode()
    )
    for row_set in row_sets:
        digest.update(row_set.name.encode("utf-8", "surrogatepass"))
        for row in row_set.rows:
            text = json.dumps(row, sort_keys=True, default=str)
            digest.update(text.encode())
    return digest.hexdigest()


def _write_shards(
    row_sets: list[RowSet],
    rendering: Rendering,
    settings: EncodeSettings,
    folder: Path,
    num_proc: int,
) -> dict[str, Any]:
    """Encode in order and write shards; returns what `prepared.json` says."""
    dropped: collections.Counter[str] = collections.Counter()
    bad: list[RowError] = []
    last_ids: set[int] = set()
    num_pairs = num_rows = num_conversational = 0
    numbers: set[str] = set()
    writer, shard = None, 0
    for pairs, errors in _encode(row_sets, rendering, settings, num_proc):
        num_rows += len(pairs) + len(errors)
        for error in errors:
            if error.reason == "too_long" or settings.on_bad_row == "drop":
                dropped[error.reason] += 1
            else:
                bad.append(error)
        if len(bad) >= _BAD_ROWS_SHOWN:
            break
        for pair, conversational in pairs:
            if writer is None:
                path = folder / f"pairs-{shard:05d}.arrow"
                writer, shard = ArrowWriter(path=str(path), features=FEATURES), shard + 1
            writer.write(pair)
            num_pairs += 1
            num_conversational += conversational
            numbers.update(name for name in NUMBERS if pair[name] is not None)
            last_ids.update(ids[-1] for ids in pair["sequences"])
            if num_pairs % _ROWS_PER_SHARD == 0:
                writer.finalize()
                writer = None
    if writer is not None:
        writer.finalize()
    if bad:
        raise _together(bad, num_rows)
    return {
        "num_rows": num_rows,
        "num_pairs": num_pairs,
        "dropped": dict(dropped),
        "conversational": 2 * num_conversational > num_pairs,
        "numbers": sorted(numbers),
        "last_ids": sorted(last_ids),
    }


_Encoded = tuple[list[tuple[dict[str, Any], bool]], list[RowError]]


def _encode(
    row_sets: list[RowSet], rendering: Rendering, settings: EncodeSettings, num_proc: int
) -> Iterator[_Encoded]:
    """Encoded chunks in the order of the rows, from this process or from `num_proc` others."""
    work = (
        (rendering, settings, refs, rows, required)
        for row_set in row_sets
        for required in [[name for name in NUMBERS if row_set.has(name)]]
        for refs, rows in _chunks(row_set)
    )
    if num_proc <= 1:
        yield from (_encode_chunk(*task) for task in work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=context) as pool:
        waiting: collections.deque[Future[_Encoded]] = collections.deque()
        for task in work:
            waiting.append(pool.submit(_encode_chunk, *task))
            if len(waiting) >= 4 * num_proc:  # keep memory flat: rows are read as they are needed
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode_chunk(
    rendering: Rendering,
    settings: EncodeSettings,
    refs: list[RowRef],
    rows: list[Mapping[str, Any]],
    required: list[str],
) -> _Encoded:
    pairs: list[tuple[dict[str, Any], bool]] = []
    errors: list[RowError] = []
    for where, row in zip(refs, rows, strict=True):
        try:
            group = encode_group(
                row,
                where,
                rendering,
                objective=settings.objective,
                attributes=settings.attributes,
                max_length=settings.max_length,
                truncation=settings.truncation,
                required=required,
            )
        except RowError as error:
            errors.append(error)
            continue
        lengths = [len(ids) for ids in group.sequences]
        encoded = {
            **columns_of(group),
            "length": max(lengths),
            "tokens": sum(lengths) - (len(lengths) - 1) * shared_prefix(group.sequences),
            "num_sequences": len(lengths),
            "source": where.source,
            "row": where.row,
        }
        pairs.append((encoded, is_conversational(row)))
    return pairs, errors


def _chunks(row_set: RowSet) -> Iterator[tuple[list[RowRef], list[Mapping[str, Any]]]]:
    iterator, start = iter(row_set.rows), 0
    while rows := list(itertools.islice(iterator, _ROWS_PER_CHUNK)):
        yield [row_set.where(start + i) for i in range(len(rows))], rows
        start += len(rows)


def _together(bad: list[RowError], num_rows: int) -> RowError:
    """The first bad row's error, with the next ones of the `num_rows` read listed below it."""
    first, *others = bad
    lines = [
        f"  {error.source} row {error.row}: {error.reason} ({REASONS[error.reason]})"
        for error in others[: _BAD_ROWS_SHOWN - 1]
    ]
    if len(bad) > _BAD_ROWS_SHOWN:
        lines.append(f"  and {len(bad) - _BAD_ROWS_SHOWN} more among the {num_rows} rows read")
    listed = ["Other rows that cannot become pairs:", *lines] if others else []
    message = "\n".join([str(first), *listed])
    message += "\nMend them, or set on_bad_row='drop' to leave such rows out and count them."
    return RowError(message, **vars(first))


def _refuse_nothing_left(name: str, summary: dict[str, Any]) -> None:
    if summary["num_pairs"] == 0:
        reasons = _reasons(summary["dropped"])
        raise ConfigError(
            f"{name}: no pair is left of {summary['num_rows']} rows"
            + (f" ({reasons}). Raise max_length, or mend the data." if reasons else ".")
        )


def _tell(name: str, prepared: Prepared) -> None:
    left_out = f"; left out: {_reasons(prepared.dropped)}" if prepared.dropped else ""
    having = f", with {' and '.join(prepared.numbers)}" if prepared.numbers else ""
    logger.info(
        "%s: %d pairs from %d rows%s%s",
        name,
        prepared.num_pairs,
        prepared.num_rows,
        having,
        left_out,
    )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in dropped.items())


def _put(partial: Path, folder: Path) -> Prepared:
    """Give a finished folder its name; another run that was faster with the same is as good."""
    prepared = _find(folder)
    if prepared is None:
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or of an older format
        os.replace(partial, folder)
        prepared = _find(folder)
        assert prepared is not None
    return prepared


def _find(folder: Path) -> Prepared | None:
    """What a prepared folder holds, or None where it is not whole."""
    try:
        summary = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        shards = summary.pop("shards")
        whole = all((folder / name).stat().st_size == size for name, size in shards.items())
    except (OSError, ValueError, KeyError):
        return None
    summary.pop("format")
    return Prepared(folder=folder, **summary) if whole else None
