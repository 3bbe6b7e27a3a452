"""Prepared pairs, rankings or rated texts as workers read them: mapped Arrow shards, by index."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import datasets

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


class PairTable:
    """The groups of a prepared folder, memory-mapped; read by index."""

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
        names = ["length", "tokens", "num_sequences"]
        columns = self._rows.select_columns(names).with_format("numpy")[:]
        self.lengths: list[int] = columns["length"].tolist()
        """Tokens of each group's longest sequence."""
        self.tokens: list[int] = columns["tokens"].tolist()
        """Tokens of each group, its common prefix counted once."""
        self.most_sequences = int(columns["num_sequences"].max())
        """Sequences of the largest group: 2 for pairs."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sources(self) -> list[str]:
        """Names of the sources that the pairs come from."""
        return sorted(self._rows.unique("source"))

    def take(self, indices: list[int]) -> dict[str, list[Any]]:
        """Columns `sequences`, `NUMBERS`, `ranks`, `scores`, ... of the groups at `indices`."""
        columns: dict[str, list[Any]] = self._rows[indices]
        return columns
