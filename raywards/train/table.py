"""Prepared pairs as workers read them: memory-mapped Arrow shards, by index."""

from __future__ import annotations

import collections
import socket
from pathlib import Path
from typing import Any

import datasets

from raywards.errors import TrainingError

FEATURES = datasets.Features(
    {
        "chosen_ids": datasets.Sequence(datasets.Value("int32")),
        "rejected_ids": datasets.Sequence(datasets.Value("int32")),
        "margin": datasets.Value("float32"),
        "probability": datasets.Value("float32"),
        "length": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
    }
)


def count_sources(folder: Path) -> dict[str, int]:
    """Pairs of each source of a prepared folder."""
    counts: collections.Counter[str] = collections.Counter()
    for shard in sorted(folder.glob("pairs-*.arrow")):
        column = datasets.Dataset.from_file(str(shard)).data.column("source")
        counts.update(
            {pair["values"].as_py(): pair["counts"].as_py() for pair in column.value_counts()}
        )
    return dict(counts)


class PairTable:
    """The pairs of a prepared folder, memory-mapped; read by index."""

    def __init__(self, folder: Path) -> None:
        shards = sorted(folder.glob("pairs-*.arrow"))
        if not (folder / "prepared.json").is_file():
            raise TrainingError(
                f"{folder}: the prepared pairs are not there on node {socket.gethostname()}. "
                "output_dir or storage_path must be a folder that every node sees."
            )
        self._rows = datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(shard)) for shard in shards]
        )
        columns = self._rows.select_columns(["length", "tokens"]).with_format("numpy")[:]
        self.lengths: list[int] = columns["length"].tolist()
        """Tokens of each pair's longer side."""
        self.tokens: list[int] = columns["tokens"].tolist()
        """Tokens of each pair, its common prefix counted once."""

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: list[int]) -> dict[str, list[Any]]:
        """Columns `chosen_ids`, `rejected_ids` and `NUMBERS` of the pairs at `indices`."""
        columns: dict[str, list[Any]] = self._rows[indices]
        return columns
