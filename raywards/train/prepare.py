"""Rows to prepared pairs on disk, once for the whole run: validated, encoded, with their lengths.

    rows ─range by range─► pairs-00000.arrow, pairs-00001.arrow, ...  ─► lengths.npy, prepared.json

Each range of rows becomes one shard, in this process or as Ray tasks: the bytes are the same. The
folder's name carries a fingerprint of the rows, the rendering and the settings, so a run that is
started again finds it, and changed data makes a new one. `prepared.json` is written last.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import pyarrow

from raywards.config import Objective
from raywards.errors import ConfigError, RowError, did_you_mean
from raywards.groups import columns_of, encode_group, is_conversational
from raywards.packing import shared_prefix
from raywards.preferences import NUMBERS, REASONS
from raywards.rendering import Rendering
from raywards.rowset import RowRef, RowSet
from raywards.sources import read_rows
from raywards.train.storage import Storage
from raywards.train.table import FEATURES, LENGTHS, open_shard
from raywards.train.tasks import in_order

logger = logging.getLogger(__name__)

PREPARED = "prepared"
"""Folder of the run for what is prepared."""
_FORMAT = 4
_ROWS_PER_SHARD = 20_000
_ROWS_PER_CHUNK = 1000
_BAD_ROWS_SHOWN = 5
_LONGEST_NAME = 100


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
    sources: list[tuple[str, int]]
    """Names and pairs of the sources, in the order of the rows."""
    most_sequences: int
    """Of the largest group: 2 for pairs."""

    @property
    def pairs_by_source(self) -> dict[str, int]:
        """Names may come twice among `sources`: files of one name in two folders."""
        counts: collections.Counter[str] = collections.Counter()
        for name, count in self.sources:
            counts[name] += count
        return dict(counts)


def prepare(
    source: Any,
    rendering: Rendering,
    settings: EncodeSettings,
    storage: Storage,
    *,
    name: str,
    split: str = "train",
    most_of_stream: int | None = None,
    connect: Callable[[], Any] | None = None,
    tasks_at_once: int | None = None,
) -> Prepared:
    """Encode every row of `source` into a folder of the run, or find it there already.

    Args:
        storage: Keeps the run folder; what is prepared lies in `prepared`, in it.
        most_of_stream: Rows to take of each stream; None: all.
        connect: Gives the `ray` module, connected. It is called where there are rows for more than
            one shard: they become tasks then. None: all is done in this process.
        tasks_at_once: Default: as many as the cluster has CPUs.

    Raises `RowError` for the first rows that cannot become pairs (unless they are to be dropped),
    and `ConfigError` where no pair is left.
    """
    row_sets = read_rows(source, split=split)
    parent = storage.local / PREPARED
    parent.mkdir(parents=True, exist_ok=True)
    is_seen_by_all = storage.shared or not any(rows.is_stream for rows in row_sets)
    # Names of held-out sets are people's, and may hold slashes; the fingerprint tells them apart.
    folder_name = re.sub(r"\W+", "-", name, flags=re.ASCII)[:_LONGEST_NAME]
    partial = parent / f".{folder_name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        row_sets = [
            rows.written_down(partial / f"stream-{place}.jsonl", most_of_stream)
            if rows.is_stream
            else rows
            for place, rows in enumerate(row_sets)
        ]
        fingerprint = _fingerprint(row_sets, rendering, settings)
        folder = parent / f"{folder_name}-{fingerprint[:16]}"
        in_run = f"{PREPARED}/{folder.name}"
        if _find(folder) is None:
            storage.pull(in_run)
        prepared = _find(folder)
        if prepared is not None:
            storage.push_missing(in_run)
            logger.info("%s: %d pairs are prepared already in %s", name, prepared.num_pairs, folder)
            return prepared
        many = sum(map(len, row_sets)) > _ROWS_PER_SHARD
        ray = connect() if connect and many and is_seen_by_all else None
        # Closed, so that no task still writes when the folder is removed.
        with contextlib.closing(
            _encode(row_sets, rendering, settings, partial, storage.shared, ray, tasks_at_once)
        ) as summaries:
            total = _gather(summaries)
        _refuse_nothing_left(name, total)
        _write_lengths(partial, total["num_pairs"], total["files"])
        _keep_only(partial, total["files"])
        about = {"format": _FORMAT, "fingerprint": fingerprint, **total}
        (partial / "prepared.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        prepared = _put(partial, folder)
        storage.push(in_run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _tell(name, prepared)
    return prepared


def weigh(
    sources: Sequence[tuple[str, int]], weights: Mapping[str, float] | None
) -> tuple[tuple[int, float], ...]:
    """Pairs and weight of each source, for a `TrainPlan`; empty where nothing is weighed.

    Raises `ConfigError` for a weight of a source that is not there.
    """
    known = [name for name, _ in sources]
    for name in weights or ():
        if name not in known:
            raise ConfigError(
                f"dataset_weights.{name}: there is no such source among "
                f"{', '.join(map(repr, known))}.{did_you_mean(name, known)}"
            )
    if not weights:
        return ()
    return tuple((count, weights.get(name, 1.0)) for name, count in sources if count)


def _fingerprint(row_sets: list[RowSet], rendering: Rendering, settings: EncodeSettings) -> str:
    digest = hashlib.sha256(
        json.dumps([_FORMAT, rendering.fingerprint(), *vars(settings).items()]).encode()
    )
    for rows in row_sets:
        digest.update(json.dumps([rows.name, rows.group, len(rows)]).encode())
        digest.update(rows.digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- ranges of rows


@dataclass
class _Summary:
    """What became of a range of rows. Its pairs are on disk."""

    source: str
    num_rows: int = 0
    num_pairs: int = 0
    num_conversational: int = 0
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    bad: list[RowError] = field(default_factory=list)
    numbers: set[str] = field(default_factory=set)
    last_ids: set[int] = field(default_factory=set)
    most_sequences: int = 0
    shard: tuple[str, int] | None = None
    """Name and bytes; None where no pair is left."""
    content: bytes | None = None
    """The shard itself, on its way from a node that does not see the folder it belongs into."""
    fatal: Exception | None = None
    """What `on_bad_row` has no say in."""

    def add(
        self, pairs: list[tuple[dict[str, Any], bool]], errors: list[RowError], drop: bool
    ) -> None:
        self.num_rows += len(pairs) + len(errors)
        self.num_pairs += len(pairs)
        for error in errors:
            if error.reason == "too_long" or drop:
                self.dropped[error.reason] += 1
            else:
                self.bad.append(error)
        for pair, conversational in pairs:
            self.num_conversational += conversational
            self.numbers.update(name for name in NUMBERS if pair[name] is not None)
            self.last_ids.update(ids[-1] for ids in pair["sequences"])
            self.most_sequences = max(self.most_sequences, pair["num_sequences"])


def _encode(
    row_sets: list[RowSet],
    rendering: Rendering,
    settings: EncodeSettings,
    folder: Path,
    is_shared: bool,
    ray: Any,
    at_once: int | None,
) -> Generator[_Summary, None, None]:
    """Encode range by range, here or as tasks; summaries come in the order of the rows."""
    work = (
        (place, *one)
        for place, one in enumerate(
            (rows.part(start, min(start + _ROWS_PER_SHARD, len(rows))), required, _ROWS_PER_CHUNK)
            for rows in row_sets
            for required in [[name for name in NUMBERS if rows.has(name)]]
            for start in range(0, len(rows), _ROWS_PER_SHARD)
        )
    )
    if ray is None:
        yield from (_encode_range((rendering, settings, folder), *one) for one in work)
        return
    given = (rendering, settings, folder if is_shared else None)
    with contextlib.closing(
        in_order(ray, _encode_range_as_task, given, work, at_once=at_once)
    ) as summaries:
        for summary in summaries:
            if summary.shard is not None and summary.content is not None:
                (folder / summary.shard[0]).write_bytes(summary.content)
                summary.content = None
            yield summary


def _encode_range_as_task(
    given: tuple[Rendering, EncodeSettings, Path | None], *one: Any
) -> _Summary:
    """`_encode_range` on any node. Without a folder that it sees, the summary carries the shard."""
    rendering, settings, folder = given
    if folder is not None:
        return _encode_range((rendering, settings, folder), *one)
    with tempfile.TemporaryDirectory() as own:
        summary = _encode_range((rendering, settings, Path(own)), *one)
        if summary.shard is not None:
            summary.content = (Path(own) / summary.shard[0]).read_bytes()
    return summary


def _encode_range(
    given: tuple[Rendering, EncodeSettings, Path],
    place: int,
    rows: RowSet,
    required: list[str],
    rows_per_chunk: int,
) -> _Summary:
    """Encode `rows` into the shard of their place."""
    rendering, settings, folder = given
    summary = _Summary(rows.group or rows.name)
    file = folder / f"pairs-{place:05d}.arrow"
    # A task that was taken for lost may still be writing when it runs again elsewhere.
    partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}")
    writer: Any = None
    try:
        for refs, chunk in _chunks(rows, rows_per_chunk):
            pairs, errors = _encode_chunk(rendering, settings, refs, chunk, required)
            summary.add(pairs, errors, settings.on_bad_row == "drop")
            if len(summary.bad) >= _BAD_ROWS_SHOWN:
                return summary
            if pairs and writer is None:
                writer = pyarrow.ipc.new_stream(str(partial), FEATURES.arrow_schema)
            if pairs:
                batch = [pair for pair, _ in pairs]
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, FEATURES.arrow_schema))
    except RowError as error:  # a line that cannot be read
        summary.fatal = error
    except FileNotFoundError as error:
        summary.fatal = _not_seen(error.filename or str(folder))
    finally:
        if writer is not None:
            writer.close()
    if writer is not None and summary.fatal is None:
        partial.replace(file)
        summary.shard = (file.name, file.stat().st_size)
    return summary


_Encoded = tuple[list[tuple[dict[str, Any], bool]], list[RowError]]


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


def _chunks(
    rows: RowSet, rows_per_chunk: int
) -> Iterator[tuple[list[RowRef], list[Mapping[str, Any]]]]:
    iterator, start = iter(rows.rows), 0
    while chunk := list(itertools.islice(iterator, rows_per_chunk)):
        yield [rows.where(start + i) for i in range(len(chunk))], chunk
        start += len(chunk)


def _not_seen(path: str) -> ConfigError:
    return ConfigError(
        f"{path}: is not there on node {socket.gethostname()}, which was to encode rows. Data "
        "files, and a run folder (output_dir or storage_path) that is no object storage, must be "
        "where every node sees them; or encode in the driver's process (dataset_num_proc=1)."
    )


# ---------------------------------------------------------------- all of them


def _gather(summaries: Iterable[_Summary]) -> dict[str, Any]:
    """What `prepared.json` says. Raises for bad rows as soon as there is a screenful of them."""
    dropped: collections.Counter[str] = collections.Counter()
    bad: list[RowError] = []
    last_ids: set[int] = set()
    numbers: set[str] = set()
    files: dict[str, int] = {}
    sources: list[list[Any]] = []
    num_pairs = num_rows = num_conversational = most_sequences = 0
    for summary in summaries:
        if summary.fatal is not None:
            raise summary.fatal
        num_rows += summary.num_rows
        bad += summary.bad
        if len(bad) >= _BAD_ROWS_SHOWN:
            break
        num_pairs += summary.num_pairs
        num_conversational += summary.num_conversational
        dropped.update(summary.dropped)
        numbers |= summary.numbers
        last_ids |= summary.last_ids
        most_sequences = max(most_sequences, summary.most_sequences)
        files.update([summary.shard] if summary.shard else [])
        pairs_before = sources.pop()[1] if sources and sources[-1][0] == summary.source else 0
        sources.append([summary.source, pairs_before + summary.num_pairs])
    if bad:
        raise _together(bad, num_rows)
    return {
        "num_rows": num_rows,
        "num_pairs": num_pairs,
        "dropped": dict(dropped),
        "conversational": 2 * num_conversational > num_pairs,
        "numbers": sorted(numbers),
        "last_ids": sorted(last_ids),
        "sources": sources,
        "most_sequences": most_sequences,
        "files": files,
    }


def _write_lengths(folder: Path, num_pairs: int, files: dict[str, int]) -> None:
    """One file with `length` and `tokens` of every pair, which workers map; enter it in `files`."""
    lengths = numpy.lib.format.open_memmap(
        folder / LENGTHS, mode="w+", dtype=numpy.int32, shape=(2, num_pairs)
    )
    start = 0
    for name in files:
        columns = open_shard(folder / name).select_columns(["length", "tokens"])
        values = columns.with_format("numpy")[:]
        stop = start + len(columns)
        lengths[0, start:stop], lengths[1, start:stop] = values["length"], values["tokens"]
        start = stop
    lengths.flush()
    files[LENGTHS] = (folder / LENGTHS).stat().st_size


def _keep_only(folder: Path, files: dict[str, int]) -> None:
    """Remove what streams, and tasks that were run again, have left."""
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()


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
        files = summary.pop("files")
        whole = all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return None
    summary.pop("format")
    summary["sources"] = [(name, count) for name, count in summary["sources"]]
    return Prepared(folder=folder, **summary) if whole else None
