"""What the driver keeps of a run: `metrics.jsonl`, TensorBoard files, the history, a progress line.

The log follows the lineage of the weights: when a run goes back to a checkpoint, the records of the
steps that were lost are taken out, so every step stands there once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from raywards.train.callbacks import Callbacks
from raywards.train.storage import Storage

logger = logging.getLogger(__name__)

_BOARD = "tensorboard"
_SHOWN = ("loss", "accuracy", "eval_loss", "eval_accuracy")


class RunLog:
    """Records of one run, kept by the process that called `train()`."""

    def __init__(
        self, path: Path, callbacks: Callbacks, storage: Storage, *, show_progress: bool
    ) -> None:
        self.path = path
        self.callbacks = callbacks
        self.history: list[dict[str, Any]] = read_history(path)
        self.first_step = 0
        self.finished: dict[str, Any] | None = None
        self._storage = storage
        self._show = show_progress
        self._bar: Any = None
        self._board: Any = None
        self._started = time.monotonic()
        self._total = 0

    def take(self, kind: str, record: dict[str, Any]) -> None:
        """Keep one message from rank 0 and tell the callbacks."""
        try:
            self.keep(kind, record)
        except OSError as error:  # of a full disk the next checkpoint tells, and more clearly
            if kind == "start":
                raise
            logger.warning("a %s record could not be kept: %s", kind, error)
        self.tell(kind, record)

    def tell(self, kind: str, record: dict[str, Any]) -> None:
        """Tell the callbacks of a message. Raises what they raise."""
        self.callbacks.take(kind, record, self.history)

    def keep(self, kind: str, record: dict[str, Any]) -> None:
        """Keep one message: "start", "tick", "log", "epoch", "save", "note" or "finish"."""
        if kind == "start":
            self._start(record)
        elif kind == "log":
            self._log(record)
        elif kind == "tick":
            self._advance(record["step"])
        elif kind == "note":
            self._say(record["text"])
        elif kind == "save":
            self._push()
        elif kind == "finish":
            self.finished = record

    def close(self) -> None:
        self._close_board()
        self._push()
        if self._bar is not None:
            self._bar.close()

    def _push(self) -> None:
        try:
            for name in (self.path.name, _BOARD):
                self._storage.push(name)
        except OSError as error:  # the records are in the checkpoints, too
            logger.warning("the log: %s", error)

    def _close_board(self) -> None:
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:  # a full disk, of which the run itself has told
                logger.warning("the TensorBoard files end early: %s", error)

    def _start(self, record: dict[str, Any]) -> None:
        """An attempt begins at `step`: its `history` is the lineage, and what was logged beyond it
        belongs to lost work."""
        self.first_step, total = record["step"], record["total"]
        self._total = total
        lost = [entry for entry in self.history if entry["step"] > self.first_step]
        self.history = list(record["history"])
        self._rewrite()
        self._open_board()
        self._started = time.monotonic()
        if self.first_step:
            again = f"; {len(lost)} records after it are taken back" if lost else ""
            self._say(f"Going on after step {self.first_step} of {total}{again}.")
        if self._show and sys.stderr.isatty():
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, initial=self.first_step, unit="step", dynamic_ncols=True)

    def _log(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is None:  # there was no room for it when the run started
            self._open_board()
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(_tag(name), value, record["step"])
        self._board.flush()
        if not self._show:
            return
        shown = {name: f"{record[name]:.4f}" for name in _SHOWN if name in record}
        if "pairs_per_second" in record:
            shown["pairs/s"] = f"{record['pairs_per_second']:.1f}"
        if self._bar is not None:
            self._advance(record["step"])
            self._bar.set_postfix(shown)
        else:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = self._time_left(record["step"])
            self._say(f"step {record['step']}/{self._total}  {text}  {left}".rstrip())

    def _advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _time_left(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _say(self, text: str) -> None:
        if not self._show:
            logger.info("%s", text)
        elif self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), "utf-8")
        os.replace(partial, self.path)

    def _open_board(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._board is not None:
            self._board.close()
        # TensorBoard itself drops the events after `purge_step` when it reads the folder.
        self._board = SummaryWriter(str(self.path.parent / _BOARD), purge_step=self.first_step + 1)


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; none where there is no such file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a line that was cut off is left out", path)
    return records
