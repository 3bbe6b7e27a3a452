"""Scorer: conversations to rewards in one process. What a notebook and a replica hold.

It takes a raywards export, or the folder of any sequence classifier with one label. No ray.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils.hub import cached_file

from raywards.adapters import AdapterSet, base_of, digest_of, is_adapter
from raywards.checkpoint import MANIFEST, read_manifest
from raywards.conversation import kind_of
from raywards.errors import (
    CheckpointError,
    ConfigError,
    ConversationError,
    ModelError,
    NonFiniteError,
)
from raywards.invariance import make_invariant, most_tokens
from raywards.loader import (
    create_model_from_path,
    is_classifier,
    load_tokenizer,
    refuse_without_head,
)
from raywards.model import RewardModel
from raywards.packing import Group, fill_batches, fill_rows, group_by_prefix, pack
from raywards.rendering import ControlTokens, Rendering, truncate
from raywards.settle import settle_path

logger = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, Any]] | str
Truncation = Literal["error", "left", "right"]

_MAX_BATCH_SEQUENCES = 256
# A longer row is no faster on a CPU (bench/kernels.py).
_CPU_ROW_TOKENS = 4096
# The rest is for fragments, and for what else the process allocates.
_SHARE_OF_FREE_MEMORY = 0.8
# Weight files up to this size are hashed whole: a second each. Of larger ones, the header and the
# start of every tensor: no training leaves all of those as they were.
_HASHED_WHOLE_BYTES = 1 << 30
_HASHED_OF_A_TENSOR_BYTES = 1 << 16


class Scorer:
    """Rewards for conversations.

        scorer = Scorer.from_pretrained("reward-output/export")
        question = {"role": "user", "content": "Hi"}
        answer = {"role": "assistant", "content": "Hello!"}
        scorer.score([[question, answer]])

    A conversation is a list of messages, or plain text, which is closed with EOS. A reward does not
    depend on its batch-mates beyond rounding: `info["bound"]` says how far.
    """

    def __init__(
        self,
        model: RewardModel,
        rendering: Rendering,
        *,
        source: str,
        manifest: dict[str, Any] | None,
        weights: str,
        max_length: int | None = None,
        max_batch_tokens: int = 16_384,
        deterministic: bool = False,
    ) -> None:
        """`weights` is a digest of them, for `info["revision"]`."""
        self._model = model.eval()
        self._adapters = AdapterSet(model)
        self._adapter: str | None = None
        self._weights = weights
        settle_path(model)
        exact = model.max_tokens
        if deterministic:
            make_invariant(model)
            exact = most_tokens(model)
        self._deterministic = deterministic
        self._rendering = rendering
        self._manifest = manifest
        self._max_batch_tokens = max_batch_tokens
        self._device = next(model.parameters()).device
        self._config = model.inner.config.get_text_config()
        is_foreign_decoder = manifest is None and model.pools_by_position
        self._skip_id = (
            _foreign_skip_id(source, self._config, rendering) if is_foreign_decoder else None
        )
        self._control_ids = _control_ids(rendering.tokenizer)
        self.vocab_size: int = self._config.vocab_size
        self._text_may_leave_vocabulary = rendering.vocab_size > self.vocab_size
        self.max_length = _max_length(self._config, rendering.tokenizer, max_length, exact)
        self.info = self._describe(source, weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        max_batch_tokens: int = 16_384,
        deterministic: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Scorer:
        """Load an export, another reward model's folder, a hub id, or an adapter with its base.

        Args:
            folder: The export, model folder or hub id; or a peft folder, which names its base.
            dtype: Precision of the forward; default: that of the stored weights.
            device: Torch device; default: a GPU where there is one.
            max_length: Longest sequence in tokens; default: what the model can take.
            max_batch_tokens: Tokens of one forward: of a row with its common prefixes once, or, for
                a model that pads, with padding.
            deterministic: Give a sequence the same bits whatever is scored beside it. On CPUs, for
                models on the packed path.
            revision: Revision of a hub model.
            trust_remote_code: Run code that comes with the model.

        Raises:
            ModelError: This is no reward model: no folder, two labels, no head, remote code.
            CheckpointError: The export is damaged, or its tokenizer is not that of the training.
        """
        source = str(folder)
        adapter = Path(source).expanduser() if is_adapter(source) else None
        recorded = None if adapter is None else _export_beside(adapter)
        source = source if adapter is None else base_of(adapter)
        is_export = (Path(source) / MANIFEST).is_file()
        manifest = read_manifest(Path(source), kind="export") if is_export else None
        location = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        if adapter is None:
            refuse_without_head(source, location)
        inner = create_model_from_path(
            source,
            AutoModelForSequenceClassification,
            dtype="auto" if dtype is None else dtype,
            device_map=None,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
        written_by = source if adapter is None else _tokenizer_of(adapter) or source
        rendering = _rendering_of(
            written_by,
            recorded or manifest,
            revision=revision if written_by == source else None,
            trust_remote_code=trust_remote_code,
        )
        model = RewardModel(inner).to(device or _default_device())
        scorer = cls(
            model,
            rendering,
            source=source,
            manifest=manifest,
            weights=_weights_digest(_folder_of(source, inner, revision)),
            max_length=max_length,
            max_batch_tokens=max_batch_tokens,
            deterministic=deterministic,
        )
        return scorer if adapter is None else scorer.with_adapter(adapter)

    def with_adapter(self, folder: str | Path) -> Scorer:
        """A scorer of this one's model with the LoRA adapter in `folder`.

        The weights beneath are in memory once, and computed with by one at a time; both scorers may
        be used, from any thread. The rewards of this one stay what they were. Renders as this one
        does.

        Raises:
            ModelError: This is no adapter of a reward model, or one of another base.
            CheckpointError: It was trained on conversations that are rendered in another way.
            ConfigError: This scorer is `deterministic`, or peft is not installed.
        """
        if self._deterministic:
            raise ConfigError(
                f"deterministic=True: is not there with adapters ({folder}). Give the merged "
                "export, or leave it out."
            )
        path = Path(folder).expanduser()
        with_it = copy.copy(self)
        recorded = _export_beside(path)
        written_by = _tokenizer_of(path)
        if written_by is not None and (
            _rendering_of(written_by, recorded).fingerprint() != self._rendering.fingerprint()
        ):
            raise CheckpointError(
                f"{folder}: was trained with another tokenizer or chat template than "
                f"{self.info['model']} has. Serve it as a model of its own: its export, or this "
                "folder as the model."
            )
        needs_head = not is_classifier(self._model.inner.config)
        with_it._adapter = self._adapters.add(path, needs_head=needs_head)
        with_it._manifest = recorded
        with_it._skip_id = self._skip_id if recorded is None else None
        with self._adapters.using(with_it._adapter):
            settle_path(self._model)
        with_it.info = with_it._describe(str(folder), f"{self._weights} {digest_of(path)}")
        with_it.info["base_model"] = self.info["model"]
        return with_it

    @property
    def packs(self) -> bool:
        """Whether a forward costs what its tokens cost, with no padding."""
        return not self._model.pads

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward of each conversation, in order."""
        if isinstance(conversations, str) or (
            conversations and isinstance(conversations[0], Mapping)
        ):
            raise ConversationError(
                "score() takes a list of conversations, and this is a single one; wrap it: "
                "score([conversation])[0].",
                reason="not_a_list",
            )
        sequences = []
        for index, conversation in enumerate(conversations):
            try:
                sequences.append(self.encode(conversation))
            except ConversationError as error:
                raise ConversationError(f"conversations[{index}]: {error}", **vars(error)) from None
        return self.score_encoded(sequences)

    def score_responses(
        self, prompt: Conversation, responses: Sequence[Conversation]
    ) -> list[float]:
        """The reward of each response to one prompt, in order."""
        if isinstance(responses, (str, Mapping)):
            raise ConversationError(
                f"the responses are {kind_of(responses)}; expected a list of them, so wrap it: "
                "score_responses(prompt, [response])[0].",
                reason="not_a_list",
            )
        encoded = [self.encode_response(prompt, response) for response in responses]
        return self.score_encoded(encoded)

    def encode(
        self,
        conversation: Conversation,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncation: Truncation = "error",
    ) -> list[int]:
        """Token ids of a conversation: a list of messages, or plain text, which EOS closes.

        Raises `ConversationError` where it cannot be rendered or is longer than `max_length`.
        """
        if isinstance(conversation, str):
            ids = self._rendering.encode_text(conversation)
        else:
            ids = self._rendering.encode_conversation(
                conversation, chat_template_kwargs=chat_template_kwargs
            )
        return self._of_text(ids, truncation)

    def encode_response(
        self,
        prompt: Conversation,
        response: Conversation,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncation: Truncation = "error",
    ) -> list[int]:
        """Token ids of a prompt with a response.

        A prompt of messages takes a response of messages, or text, which becomes an assistant
        message. A prompt of text becomes a user message where the model was trained on
        conversations (an export says so; another model: where it has a chat template), and is
        joined to a response of text otherwise.

        Raises `ConversationError`, as `encode` does.
        """
        for name, value in (("prompt", prompt), ("response", response)):
            if not isinstance(value, (str, list, tuple)):
                raise ConversationError(
                    f"the {name} is {kind_of(value)}; expected text, or a list of messages.",
                    reason="malformed",
                )
        if isinstance(prompt, str) and isinstance(response, str) and not self._takes_messages:
            return self.encode(prompt + response, truncation=truncation)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(response, str):
            turns = [*turns, {"role": "assistant", "content": response}]
        else:
            turns = [*turns, *response]
        return self.encode(turns, chat_template_kwargs=chat_template_kwargs, truncation=truncation)

    def encode_rendered(
        self, text: str, *, special_tokens: bool = False, truncation: Truncation = "error"
    ) -> list[int]:
        """Token ids of text that a chat template has rendered already: nothing is added to it.

        With `special_tokens`, the tokenizer adds its own, as `Rendering.encode_rendered` says.
        """
        ids = self._rendering.encode_rendered(text, special_tokens=special_tokens)
        return self._of_text(ids, truncation)

    def check_ids(self, ids: Sequence[int], *, truncation: Truncation = "error") -> list[int]:
        """`ids` as they will be scored: in the vocabulary, and no longer than `max_length`."""
        checked = list(ids)
        if not checked:
            raise ConversationError("no tokens: there is nothing to score.", reason="empty")
        # The first line is the fast one; the loop finds the place.
        if set(map(type, checked)) != {int} or min(checked) < 0 or max(checked) >= self.vocab_size:
            for place, id_ in enumerate(checked):
                if type(id_) is not int or not 0 <= id_ < self.vocab_size:
                    raise ConversationError(
                        f"input_ids[{place}] is {id_!r:.40}; expected an integer from 0 to "
                        f"{self.vocab_size - 1}.",
                        reason="not_in_vocabulary",
                    )
        return self._fit(checked, truncation)

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each sequence of token ids, in order.

        Raises `ConversationError` where `check_ids` would, and `NonFiniteError` naming the first
        sequence whose reward is NaN or infinite.
        """
        return self.score_encoded([self.check_ids(ids) for ids in sequences])

    def score_encoded(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """`score_ids` of what `encode`, `encode_response`, `encode_rendered` or `check_ids` of this
        scorer gave: nothing is looked at again."""
        return self._forward(sequences)

    def split(self, ids: Sequence[int]) -> int:
        """How many of the first ids are shared with other answers to the same conversation, so far
        as a forward can make use of it; 0: none."""
        shares = not self._model.pads and len(ids) <= self._model.window
        return self._rendering.split(ids) if shares else 0

    def has_text(self, ids: Sequence[int]) -> bool:
        """Whether anything but control tokens is there, such as a BOS."""
        return not self._control_ids.issuperset(ids)

    def free_memory(self) -> None:
        """Give memory that no tensor uses back to the device, as after running out of it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def fit_memory(self) -> int:
        """Lower `max_batch_tokens` to what a GPU's free memory holds; returns what it is now.

        What a token takes is measured with one forward of the longest sequence. On a CPU nothing is
        measured: memory is shared there. **Not run on a GPU yet.**
        """
        if self._device.type == "cuda":
            ids = [self.vocab_size // 2] * min(self.max_length, self._max_batch_tokens)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            self.score_ids([ids])
            used = torch.cuda.max_memory_allocated(self._device) - before
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self._device)
            holds = int(_SHARE_OF_FREE_MEMORY * free * len(ids) / max(used, 1))
            self._max_batch_tokens = max(len(ids), min(self._max_batch_tokens, holds))
        return self._max_batch_tokens

    def verify(self) -> None:
        """Reproduce the rewards stored in the export.

        Raises `CheckpointError` where they differ, `ModelError` where one is not finite. A foreign
        model has none stored; its probe is that it gives a finite reward. The stored ones are a
        CPU's. Another kind of device sums in another order, so fp32 may differ there by 1e-4 of
        their spread (an estimate: the bound that the export states was measured on a CPU).
        """
        stored = self._manifest["rewards"] if self._manifest else []
        probes = [probe["input_ids"] for probe in stored] or [[0, min(1, self.vocab_size - 1)]]
        try:
            found = self._forward(probes)
        except NonFiniteError as error:
            raise ModelError(
                f"{self.info['model']}: cannot be served: {error} Export it again, from a "
                "checkpoint before its weights were damaged, or load it in another dtype."
            ) from None
        if self._manifest is None:
            return
        worst = max(abs(a - probe["reward"]) for a, probe in zip(found, stored, strict=True))
        # The stored rewards have the rounding of the type they were stored in.
        bounds: dict[str, float] = dict(self._manifest["bounds"])
        if self._device.type != "cpu":
            bounds["float32"] = 1e-4 * max(1.0, self._manifest["reward_sd"])
        types = (self.info["dtype"], self._manifest["dtype"])
        bound = max(bounds.get(name, bounds["bfloat16"]) for name in types)
        if self._adapter is not None and bound > bounds["float32"]:
            bound *= 2  # merged, the weights of the export were rounded once more
        if not worst <= bound:
            raise CheckpointError(
                f"{self.info['model']}: rewards differ by {worst:.3g} from those stored with the "
                f"export, and {bound:.3g} is allowed in {self.info['dtype']}. The "
                "weights, or the software that runs them, are not what was exported."
            )

    def _of_text(self, ids: list[int], truncation: Truncation) -> list[int]:
        """`check_ids` of what the tokenizer gave, which looks at each where that can find one."""
        if self._text_may_leave_vocabulary:
            return self.check_ids(ids, truncation=truncation)
        return self._fit(ids, truncation)

    def _fit(self, ids: list[int], truncation: Truncation) -> list[int]:
        """No longer than `max_length`; raises `ConversationError` where they may not be cut."""
        if len(ids) <= self.max_length:
            return ids
        if truncation == "error":
            raise ConversationError(
                f"{len(ids)} tokens are more than max_length={self.max_length}; shorten it, or ask "
                "for truncation 'left' or 'right'.",
                reason="too_long",
            )
        return truncate(ids, self.max_length, truncation)

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        rewards = [math.nan] * len(sequences)
        lengths = [len(ids) for ids in sequences]
        for groups in self._plan(sequences, lengths):
            row = pack(sequences, groups, skip_id=self._skip_id)
            with self._adapters.using(self._adapter):
                found = self._model(row.to(self._device)).tolist()
            order = (member for group in groups for member in group.members)
            for member, reward in zip(order, found, strict=True):
                rewards[member] = reward
        for i, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise NonFiniteError(
                    f"the reward of sequence {i} ({lengths[i]} tokens) is {reward}: the model's "
                    "weights or its precision are broken for this input.",
                    index=i,
                )
        return rewards

    def _plan(self, sequences: Sequence[Sequence[int]], lengths: list[int]) -> list[list[Group]]:
        most = min(self._max_batch_tokens, self._model.most_tokens)
        if self._device.type == "cpu":
            most = min(most, _CPU_ROW_TOKENS)
        limits = {"max_tokens": int(most), "max_sequences": _MAX_BATCH_SEQUENCES}
        # Beyond its attention window the model pads: such sequences go together, by length.
        longest = 0 if self._model.pads else self._model.window
        long = [i for i, length in enumerate(lengths) if length > longest]
        short = [i for i, length in enumerate(lengths) if length <= longest]
        splits = {i: self.split(sequences[i]) for i in short}
        rows = fill_rows(group_by_prefix(sequences, splits), lengths, **limits)
        return rows + fill_batches({i: lengths[i] for i in long}, **limits)

    @property
    def _takes_messages(self) -> bool:
        if self._manifest is None:
            return self._rendering.tokenizer.chat_template is not None
        return bool(self._manifest["training"].get("conversational", True))

    def _pooling(self) -> str:
        if not self._model.pools_by_position:
            return "classifier"
        return "last_token" if self._skip_id is None else "last_non_pad_id"

    def _describe(self, source: str, weights: str) -> dict[str, Any]:
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        bounds = (self._manifest or {}).get("bounds", {})
        fingerprint = self._rendering.fingerprint()
        identity = [self._manifest or _plain_config(self._config), weights, fingerprint]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        return {
            "model": source,
            "class": type(self._model.inner).__name__,
            "dtype": dtype,
            "device": str(self._device),
            "num_parameters": sum(p.numel() for p in self._model.parameters()),
            "max_length": self.max_length,
            "vocab_size": self.vocab_size,
            "pad_token_id": self._config.pad_token_id,
            "pooling": self._pooling(),
            "rendering": self._rendering.describe(),
            "path": self._model.path,
            "deterministic": self._deterministic,
            "bound": bounds.get(dtype, bounds.get("bfloat16")),
            "revision": f"sha256:{digest.hexdigest()}",
            "training": (self._manifest or {}).get("training"),
            "label": (getattr(self._model.inner.config, "id2label", None) or {}).get(0, "LABEL_0"),
            "problem_type": getattr(self._model.inner.config, "problem_type", None),
        }


def _rendering_of(
    source: str,
    manifest: dict[str, Any] | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Rendering:
    """Of the tokenizer in `source`; raises `CheckpointError` where the manifest has another."""
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    policy: ControlTokens = manifest["rendering"]["control_tokens"] if manifest else "as_text"
    rendering = Rendering(tokenizer, control_tokens=policy)
    if manifest and manifest["rendering"]["fingerprint"] != rendering.fingerprint():
        raise CheckpointError(
            f"{source}: its tokenizer or chat template is not the one it was trained with "
            f"(rendering {rendering.fingerprint()[:19]}, trained with "
            f"{manifest['rendering']['fingerprint'][:19]}), so rewards would be wrong. Restore "
            "the tokenizer files of the export."
        )
    return rendering


def _control_ids(tokenizer: Any) -> frozenset[int]:
    """`all_special_ids` has those alone that have a role, such as EOS."""
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _export_beside(adapter: Path) -> dict[str, Any] | None:
    """The manifest of the export that the same run wrote, where it is still there."""
    export = adapter.absolute().parent / "export"
    is_there = adapter.name == "adapter" and (export / MANIFEST).is_file()
    return read_manifest(export, kind="export") if is_there else None


def _tokenizer_of(adapter: Path) -> str | None:
    """The folder with the tokenizer that an adapter was trained with; None: its base's."""
    if _export_beside(adapter) is not None:
        return str(adapter.absolute().parent / "export")
    return str(adapter) if (adapter / "tokenizer_config.json").is_file() else None


def _plain_config(config: Any) -> dict[str, Any]:
    """The config without what depends on where and how it was loaded."""
    here = {"_name_or_path", "_commit_hash", "dtype", "torch_dtype", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name not in here}


def _folder_of(source: str, inner: Any, revision: str | None) -> Path:
    """The folder that `inner` was loaded from: `source`, or a snapshot in the hub's cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    commit = getattr(inner.config, "_commit_hash", None) or revision
    return Path(cached_file(source, "config.json", revision=commit, local_files_only=True)).parent


def _weights_digest(folder: Path) -> str:
    """A hash of the weight files of a model folder: their names, sizes and content."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _HASHED_WHOLE_BYTES or path.suffix != ".safetensors":
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                for piece in _pieces(file):
                    digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The header of a safetensors file, and the start of each tensor."""
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    yield header
    tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
    for name in sorted(tensors):
        start, end = tensors[name]["data_offsets"]
        file.seek(8 + len(header) + start)
        yield file.read(min(end - start, _HASHED_OF_A_TENSOR_BYTES))


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _max_length(config: Any, tokenizer: Any, asked: int | None, exact: float) -> int:
    """The lowest of what positions, tokenizer and exact rewards allow, or of what was asked for."""
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length, exact]
    able = min((int(n) for n in limits if n is not None and 0 < n < 10**9), default=1 << 20)
    if asked is not None and asked > able:
        logger.warning("max_length=%d is more than the model's %d positions", asked, able)
    return able if asked is None else min(asked, able)


def _foreign_skip_id(source: str, config: Any, rendering: Rendering) -> int | None:
    """The id that transformers' pooling skips at the end, in a model that we did not export."""
    pad_id: int | None = config.pad_token_id
    if pad_id is not None and pad_id == rendering.tokenizer.eos_token_id:
        logger.warning(
            "%s: its pad token is its EOS token, so transformers reads the reward before a "
            "closing EOS and vLLM reads it there: engines disagree on plain text. transformers' "
            "rule is kept.",
            source,
        )
    return pad_id
