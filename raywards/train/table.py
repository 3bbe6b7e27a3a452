"""Prepared pairs, rankings or rated texts as workers read them: mapped Arrow shards, by index."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
from numpy.typing import NDArray

from raywards.errors import TrainingError

FEATURES = datasets.Features(
    {
        "sequences": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
        "margin": datasets.Value("float32"),
        "probability": datasets.Value("float32"),
        "ranks": datasets.Sequence(datasets.Value("float32")),
        "scores": datasets.Sequence(datasets.Value("float32")),
        "length": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "num_sequences": datasets.Value("int32"),
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
    }
)


LENGTHS = "lengths.npy"
"""File with [2, pairs] int32: the columns `length` and `tokens` of all shards."""


def open_shard(file: Path) -> datasets.Dataset:
    """One shard, memory-mapped. Raises `TrainingError` where it is no Arrow file any more."""
    try:
        return datasets.Dataset.from_file(str(file))
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise TrainingError(f"{file}: cannot be read ({error}). {_START_AGAIN}") from error


class PairTable:
    """The groups of a prepared folder, memory-mapped; read by index.

    Raises `TrainingError` for a folder that is not there, or a file of it that is not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            about = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TrainingError(
                f"{folder}: the prepared pairs are not there on node {socket.gethostname()}. "
                "output_dir or storage_path must be a folder that every node sees."
            ) from None
        files: dict[str, int] = about["files"]
        _refuse_damaged(folder, files)
        self._rows = datasets.concatenate_datasets(
            [open_shard(folder / name) for name in files if name != LENGTHS]
        )
        lengths = numpy.load(folder / LENGTHS, mmap_mode="r")
        self.lengths: NDArray[numpy.int32] = lengths[0]
        """Tokens of each group's longest sequence."""
        self.tokens: NDArray[numpy.int32] = lengths[1]
        """Tokens of each group, its common prefix counted once."""
        self.most_sequences: int = about["most_sequences"]
        """Sequences of the largest group: 2 for pairs."""
        parts: list[tuple[str, int]] = [(name, count) for name, count in about["sources"] if count]
        self.sources = list(dict.fromkeys(name for name, _ in parts))
        """Names of the sources that the groups come from, as `dataset_weights` has them."""
        self._names = [name for name, _ in parts]
        self._ends = numpy.cumsum([count for _, count in parts])

    def __len__(self) -> int:
        return len(self.lengths)

    def sources_of(self, indices: list[int]) -> list[str]:
        """Which of `sources` each of these groups comes from."""
        if len(self.sources) == 1:
            return self.sources * len(indices)
        places = numpy.searchsorted(self._ends, indices, side="right")
        return [self._names[place] for place in places.tolist()]

    def take(self, indices: list[int]) -> dict[str, list[Any]]:
        """All columns of the pairs at `indices`; what else is in the shards stays on disk.

        The column `source` names the file, where a source has several.
        """
        columns: dict[str, list[Any]] = self._rows[indices]
        return columns


def _refuse_damaged(folder: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            seen = "is missing" if found is None else f"has {found:,} bytes"
            raise TrainingError(
                f"{file}: {seen}; prepared.json says {size:,}. The file was lost, cut off or "
                f"changed after it was prepared. {_START_AGAIN}"
            )


_START_AGAIN = (
    "Start the run again: damaged prepared pairs are made anew, and training goes on from the "
    "last checkpoint."
)
