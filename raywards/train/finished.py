"""What `RewardTrainer` does beside training: callbacks, copies, the model card, uploads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from raywards.checkpoint import MANIFEST, read_manifest
from raywards.config import RewardConfig, RunPaths
from raywards.errors import CheckpointError, ConfigError
from raywards.train.callbacks import Callbacks
from raywards.train.card import CARD_FILES, write_card
from raywards.train.hub import open_repo, upload
from raywards.train.runlog import read_history
from raywards.train.storage import Storage


class FinishedRun:
    """The part of `RewardTrainer` that needs settings, callbacks and the run folder alone."""

    args: RewardConfig
    paths: RunPaths
    storage: Storage
    hub_model_id: str
    callback_handler: Callbacks
    _uploaded_to: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Copy the export into `output_dir`; default: the run folder itself, as TRL does."""
        manifest = self._finished_export()
        target = Path(output_dir or self.paths.run).expanduser().absolute()
        target.mkdir(parents=True, exist_ok=True)
        for name in (*manifest["files"], "raywards.json"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.paths.export / name, target / name)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, an instance or a class. Raises `ConfigError` for one that cannot work."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Take a callback out, by itself or its class, and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Take a callback out, by itself or its class."""
        self.callback_handler.remove_callback(callback)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the card of the export again, and of its copy in the run folder if there is one.

        Args:
            model_name: Title; default: the name of the run.
            dataset_name: What it was trained on, where the sources of the rows do not say.
            tags: Tags of the hub, beside those that are always there.
        """
        self._finished_export()
        copies = [self.paths.run] if (self.paths.run / MANIFEST).is_file() else []
        for export in (self.paths.export, *copies):
            write_card(
                export,
                read_history(self.paths.metrics),
                name=model_name or self.paths.name,
                where=self._uploaded_to or str(export.relative_to(self.paths.storage)),
                dataset_name=dataset_name,
                tags=[
                    *([tags] if isinstance(tags, str) else tags or []),
                    *self.callback_handler.model.model_tags,
                ],
            )
        self.storage.push(self.paths.export.name, only=CARD_FILES)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the export to `hub_model_id`; returns the commit, or a `Future` of it.

        Args:
            commit_message: Message of the commit.
            blocking: Wait until it is uploaded.
            token: Token, if not `hub_token`.
            revision: Branch, if not `hub_revision`.
            private: Make the repository private, if not as `hub_private_repo` says.
            kwargs: Arguments of `create_model_card`: the card is written again, for the hub.

        Raises `HubError` where the hub cannot be reached or refuses; the export stays as it is.
        """
        self._finished_export()
        if unknown := sorted(set(kwargs) - {"model_name", "dataset_name", "tags"}):
            raise ConfigError(f"push_to_hub: does not take {', '.join(unknown)}.")
        callbacks = self.callback_handler
        callbacks.on_push_begin(callbacks.args, callbacks.state, callbacks.control)
        revision = revision or self.args.hub_revision
        self._open_repo(token, revision, private)
        self.create_model_card(**kwargs)
        return upload(
            self.paths.export,
            self.hub_model_id,
            message=commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision,
            blocking=blocking,
        )

    def _finished_export(self) -> dict[str, Any]:
        if not self.paths.export.is_dir():
            raise CheckpointError(
                f"{self.paths.export}: there is no export yet; call train() first."
            )
        return read_manifest(self.paths.export, kind="export")

    def _open_repo(
        self, token: str | None = None, revision: str | None = None, private: bool | None = None
    ) -> None:
        self.hub_model_id = self._uploaded_to = open_repo(
            self.hub_model_id,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )
