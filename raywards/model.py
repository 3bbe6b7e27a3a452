"""RewardModel: one forward for training, evaluation, Scorer and replicas.

It wraps a transformers sequence classifier with one label, or in training one for each attribute
(`heads`), and takes `PackedRow`s. How it computes
them is its `path`, the first of these that gives what the model's own forward gives:

    packed   our attention: common prefixes once, no padding, the last layer at pooled rows alone
    masked   the model's own attention with a [T, T] mask: soft caps, sinks, families of their own
    padded   the model's own forward on padded sequences: encoders, recurrent layers, what is left

The head is computed in fp32 wherever it is a linear layer on one position.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from raywards import families
from raywards.attention import LAYOUT, NAME, Stock
from raywards.errors import ModelError
from raywards.packing import Layout, PackedRow

Path = Literal["packed", "masked", "padded"]
PATHS: tuple[Path, ...] = ("packed", "masked", "padded")
# A mask of so many tokens takes 64 MiB in fp32, and its attention most of a layer's time.
_MASKED_TOKENS = 4096
_ATTENTION = {"full_attention", "sliding_attention", "attention", "indexed_attention"}


class Float32Linear(nn.Linear):
    """A linear layer to one output, or few, that computes in fp32 whatever the type of its weights.

    A bf16 head rounds rewards to 8 bits: near 10, one pair in twenty ties. A product and a sum
    instead of a GEMM: a reward then has the same bits beside any number of others.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            rewards = [(hidden * row).sum(-1, keepdim=True) for row in self.weight.float()]
            reward = rewards[0] if len(rewards) == 1 else torch.cat(rewards, -1)
            return reward if self.bias is None else reward + self.bias.float()


class RewardModel(nn.Module):
    """Sequences in a row to one fp32 reward each.

    `inner` is the transformers model: save that one. Its head and attention are switched to ours;
    names and values of its parameters do not change, and `unwrap` undoes it. Nothing is known of
    the `path` until `settle_path` has tried it.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training
        # A long sequence switches the attention of the whole model while it is computed.
        self._one_at_a_time = threading.RLock()
        head = getattr(inner, "score", None)
        self.pools_by_position = isinstance(head, nn.Linear)
        self.path: Path = "packed"
        self._stock_attention = inner.config._attn_implementation
        self.max_tokens = families.longest_exact(inner.config.get_text_config())
        self.window = _shortest_window(inner.config.get_text_config())
        self._trim: _LastLayerTrim | None = None
        self.hook_last_layer()
        if self.pools_by_position:
            # Same parameters, same name, another forward: ZeRO's hooks and `state_dict` hold.
            head.__class__ = Float32Linear
        self.use("packed" if self._may_pack() else "masked" if self._may_mask() else "padded")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_one_at_a_time"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._one_at_a_time = threading.RLock()

    @property
    def pads(self) -> bool:
        """Whether rows end in padding, so that sequences of like length belong together."""
        return self.path == "padded" or (self.training and _drops_out(self.inner))

    @property
    def most_tokens(self) -> float:
        """Tokens above which a row is too long: of a [T, T] mask."""
        return _MASKED_TOKENS if self.path == "masked" else float("inf")

    def use(self, path: Path) -> None:
        """Compute rows on this path from now on."""
        self.path = path
        ours = path == "packed"
        self._set_attention(NAME if ours else self._stock_attention)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other thread computes."""
        with self._one_at_a_time:
            yield

    def hook_last_layer(self) -> None:
        """Again after its parts have been replaced, by adapters."""
        if self._trim is not None:
            self._trim.remove()
        self._trim = _LastLayerTrim(self._backbone) if self.pools_by_position else None

    def unwrap(self) -> Any:
        """Give `inner` back as transformers made it."""
        self._set_attention(self._stock_attention)
        if self.pools_by_position:
            self.inner.score.__class__ = nn.Linear
        if self._trim is not None:
            self._trim.remove()
        return self.inner

    def forward(self, row: PackedRow) -> Tensor:
        """Rewards [S] in fp32, or [S, A] where the head has A outputs. Threads wait for each other.

        Raises `ModelError` where a sequence is longer than `max_tokens`.
        """
        if row.layout.longest_path > self.max_tokens:
            raise ModelError(
                f"a sequence of {row.layout.longest_path} tokens, and beyond {self.max_tokens} a "
                f"reward of {type(self.inner).__name__} depends on what else is in its batch "
                f"(docs/families.md). Set max_length={self.max_tokens}."
            )
        with self._one_at_a_time:
            return self._rewards(row)

    def _rewards(self, row: PackedRow) -> Tensor:
        path = self._path_of(row)
        if path == "packed":
            hidden = self._hidden(row, None, **{LAYOUT: row.layout})
        elif path == "masked":
            hidden = self._hidden(row, self._mask_of(row))
        else:
            return self._padded(row)
        return _one_or_all(self.inner.score(hidden[0, row.pooled]))

    @property
    def _backbone(self) -> Any:
        return getattr(self.inner, self.inner.base_model_prefix)

    def _hidden(self, row: PackedRow, mask: Any, **kwargs: Any) -> Tensor:
        output = self._backbone(
            input_ids=row.input_ids[None],
            attention_mask=mask,
            position_ids=row.positions[None],
            use_cache=False,
            **kwargs,
        )
        return cast(Tensor, output.last_hidden_state)

    def _padded(self, row: PackedRow) -> Tensor:
        batch = row.padded(self.inner.config.get_text_config().pad_token_id or 0)
        with self._stock():
            if not self.pools_by_position:
                output = self.inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                return _one_or_all(output.logits.float())
            # When activations are recomputed, in the backward, our attention is in place again: it
            # is told then what to stand in for.
            stand_in = {LAYOUT: Stock(self._stock_attention)} if self.path == "packed" else {}
            hidden = self._backbone(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **stand_in,
            ).last_hidden_state
        pooled = hidden[torch.arange(len(batch.pooled), device=hidden.device), batch.pooled]
        return _one_or_all(self.inner.score(pooled))

    # ---- which path

    def _may_pack(self) -> bool:
        """What can be ruled out without a forward."""
        calls_attention = self.inner._supports_attention_backend  # others never call ours
        return self._may_mask() and calls_attention and "indexed_attention" not in self._kinds

    def _may_mask(self) -> bool:
        recurrent = self._kinds - _ATTENTION
        counts_columns = families.counts_columns(self.inner.config.get_text_config())
        return self.pools_by_position and not recurrent and not counts_columns

    @property
    def _kinds(self) -> set[str]:
        return set(getattr(self.inner.config.get_text_config(), "layer_types", None) or ())

    def _path_of(self, row: PackedRow) -> Path:
        if self.pads:  # with dropout: a shared prefix would get one mask instead of two
            return "padded"
        if self.path == "packed" and row.layout.longest_path > self.window:
            return "padded"
        return self.path

    def _set_attention(self, name: str) -> None:
        if self.inner.config._attn_implementation != name:
            self.inner.set_attn_implementation(name)

    @contextmanager
    def _stock(self) -> Iterator[None]:
        """Inside, the model's own attention. A window or dropout sends a packed model here."""
        self._set_attention(self._stock_attention)
        try:
            yield
        finally:
            self._set_attention(NAME if self.path == "packed" else self._stock_attention)

    def _mask_of(self, row: PackedRow) -> Tensor | dict[str, Tensor]:
        """Who sees whom as [1, 1, T, T], one for each kind of layer where there are several."""
        config = self.inner.config.get_text_config()
        device = row.input_ids.device
        sees = torch.zeros(len(row.input_ids), len(row.input_ids), dtype=torch.bool, device=device)
        for segment in row.layout.segments:
            asked = slice(segment.query_start, segment.query_end)
            sees[asked, segment.prefix_start : segment.prefix_end] = True
            size = segment.query_end - segment.query_start
            sees[asked, asked] = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        window = getattr(config, "sliding_window", None)
        near = sees
        if window is not None:
            near = sees & (row.positions[:, None] - row.positions[None, :] < window)
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds:
            return self._additive(near if getattr(config, "use_sliding_window", True) else sees)
        return {
            kind: self._additive(near if kind == "sliding_attention" else sees) for kind in kinds
        }

    def _additive(self, sees: Tensor) -> Tensor:
        device = sees.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.inner.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)[None, None]


@contextmanager
def stock_forward(model: RewardModel) -> Iterator[Any]:
    """Inside, `model.inner` computes as transformers made it; it is what the block is given."""
    with model._stock():
        if model.pools_by_position:
            model.inner.score.__class__ = nn.Linear
        try:
            yield model.inner
        finally:
            if model.pools_by_position:
                model.inner.score.__class__ = Float32Linear


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero: of `nn.Dropout`, and what a forward reads itself.

    TRL sets the first alone; attention reads its own (`attention_dropout`), OPT all of them. The
    one that TRL should not set is kept: LoRA's, which was asked for by its name (`lora_dropout`).
    """
    kept = {module for name, module in model.named_modules() if "lora_dropout" in name.split(".")}
    for module, name in _dropouts(model):
        if module not in kept:
            setattr(module, name, 0.0)


def _one_or_all(outputs: Tensor) -> Tensor:
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs


def _drops_out(model: nn.Module) -> bool:
    """Whether training draws at random: dropout, or the noise that routers of experts add."""
    drawn = _dropouts(model, ("dropout", "layerdrop", "jitter_noise"))
    return any(getattr(module, name) > 0 for module, name in drawn)


def _dropouts(
    model: nn.Module, words: tuple[str, ...] = ("dropout", "layerdrop")
) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in words):
                yield module, name


def _shortest_window(config: Any) -> float:
    """Tokens of the longest sequence that no window or chunk of the attention cuts."""
    windows = [getattr(config, "attention_chunk_size", None)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or "sliding_attention" in kinds:
        windows.append(getattr(config, "sliding_window", None))
    return min((w for w in windows if w is not None), default=float("inf"))


class _LastLayerTrim:
    """Computes queries, attention output and MLP of the last layer at pooled positions alone.

    Nothing reads the others: a reward needs one hidden state. Keys and values stay whole. Where the
    layer has other parts, it is left as it is.
    """

    def __init__(self, backbone: Any) -> None:
        self._rows: Tensor | None = None
        self._tokens = 0
        self._handles: list[Any] = []
        layers = getattr(backbone, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return
        attention = getattr(layers[-1], "self_attn", None)
        parts = [
            getattr(attention, "q_proj", None),
            getattr(attention, "o_proj", None),
            getattr(layers[-1], "mlp", None),
        ]
        if not all(isinstance(part, nn.Module) for part in parts):
            return
        # On the attention, not on the layer: only what is inside a layer is recomputed.
        enter = cast(nn.Module, attention).register_forward_pre_hook(self._enter, with_kwargs=True)
        self._handles.append(enter)
        for part in cast(list[nn.Module], parts):
            self._handles.append(part.register_forward_pre_hook(self._take))
            self._handles.append(part.register_forward_hook(self._put))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        layout = kwargs.get(LAYOUT)
        self._rows = None
        if isinstance(layout, Layout) and layout.pooled is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            places = [segment.query_start for segment in layout.pooled.segments]
            self._rows = torch.tensor(places, device=hidden.device)
            self._tokens = hidden.shape[1]
            kwargs = {**kwargs, LAYOUT: layout.pooled}
        return args, kwargs

    def _take(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        return (args[0].index_select(1, self._rows), *args[1:])

    def _put(self, _: Any, __: Any, output: Any) -> Any:
        if self._rows is None:
            return output
        if isinstance(output, tuple):
            return (self._spread(output[0]), *output[1:])
        return self._spread(output)

    def _spread(self, part: Tensor) -> Tensor:
        whole = part.new_zeros(part.shape[0], self._tokens, *part.shape[2:])
        return whole.index_copy(1, cast(Tensor, self._rows), part)
