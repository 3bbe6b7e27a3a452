"""A tiny model of every family that transformers can sequence-classify, and the table of them.

    python tests/families.py --write docs/families.md

A config class is shrunk by the names of its fields. Layers of each kind that the family has by
default are kept, one of a kind, and so are attention windows, at a length that the caller chooses.
Weights are drawn so large that attention prefers some tokens to others: on a fresh model's nearly
uniform attention, a soft cap or a bias that is left out would not be seen.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASS_NAMES,
)
from transformers.pytorch_utils import Conv1D

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from raywards import families
from raywards.errors import ModelError
from raywards.model import RewardModel
from raywards.packing import Group, PackedRow, pack
from raywards.settle import settle_path

FAMILIES = sorted(CLASS_NAMES)
VOCAB, PAD, EOS = 96, 1, 2
WINDOW = 80
"""Tokens of every attention window: more than the probe of `settle_path` and `NEAR` have in a
sequence, fewer than their rows have, and fewer than a sequence of `FAR`."""

SIZES: dict[str, int] = {
    # the vocabulary
    "vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 3,
    "cls_token_id": 4, "sep_token_id": 5, "mask_token_id": 6, "eod_token_id": 7,
    "decoder_start_token_id": EOS, "forced_eos_token_id": EOS, "type_vocab_size": 2,
    # hidden sizes
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "entity_emb_size": 8, "entity_vocab_size": 8,
    "input_embedding_size": 16, "output_embedding_size": 16, "prediction_head_size": 16,
    "pooler_hidden_size": 32, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    "attention_hidden_size": 64,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_head": 8, "d_kv": 8, "attention_head_dim": 16, "attention_head_size": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "kv_channels": 8,
    "query_pre_attn_scalar": 8,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "adapter_rank": 4,
    "gated_norm_rank": 4,
    # layers
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "max_window_layers": 1, "first_k_dense_replace": 1,
    # feed-forward
    "intermediate_size": 48, "ffn_dim": 48, "hidden_dim": 48, "dff": 48, "d_ff": 48, "d_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_hidden_size": 48, "feed_forward_size": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "n_group": 2, "topk_group": 1,
    # recurrent layers
    "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    # positions
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256,
    "original_max_position_embeddings": 256,
}  # fmt: skip

WINDOWS = (
    "sliding_window", "local_attention", "window_size", "attention_window", "attention_chunk_size",
    "keep_window_size", "index_topk", "block_size", "chunk_size", "local_attn_chunk_length",
    "lsh_attn_chunk_length", "local_transformer_stride",
)  # fmt: skip
"""Fields that make tokens further apart than this see each other otherwise, or not at all."""

_ALL_HEADS = {"num_key_value_heads": 4}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": {**_ALL_HEADS, "head_dim": 4},
    "axk2": _ALL_HEADS,
    "canine": {"num_hash_buckets": 256},
    "big_bird": {"block_size": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]
            },
            "full_attention": None,
        },
    },
    "deepseek_v2": {**_ALL_HEADS, "head_dim": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**_ALL_HEADS, "head_dim": 4},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 6},
    "esmc": _ALL_HEADS,
    "gemma2": {"attn_logit_softcapping": 5.0},
    "funnel": {"block_sizes": [1, 1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": 16, "patch_size": 8},
    "lilt": {"hidden_size": 48},
    "markuplm": {"max_depth": 4},
    "minicpm3": _ALL_HEADS,
    "ministral": {"head_dim": 8},
    "mistral4": {**_ALL_HEADS, "rope_parameters": _YARN},
    "ministral3": {"rope_parameters": _YARN},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "image_size": 8,
        "train_size": [8, 8], "output_shape": [1, 2, 8, 8], "output_num_channels": 8,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [8, 24], "num_buckets": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
              "num_hidden_layers": 4},
}  # fmt: skip
"""What a family needs beside its shrunken fields."""

NOT_BUILT = {"layoutlmv2": "it is made with detectron2, which the tests do not install"}
RANDOM_IN_TRAINING = {"phimoe": "in training its experts are drawn at random, as in transformers"}


@dataclass(frozen=True)
class Case:
    """Sequences, and the groups that make a row of them."""

    sequences: list[list[int]]
    groups: list[Group]

    @property
    def row(self) -> PackedRow:
        return pack(self.sequences, self.groups)

    @property
    def weights(self) -> Tensor:
        """[S] what a loss might multiply the rewards with."""
        return torch.linspace(1.0, -0.9, len(self.sequences)) * (-1) ** torch.arange(
            len(self.sequences)
        )


def _draw_cases() -> tuple[Case, Case]:
    draw = random.Random(1)

    def ids(count: int) -> list[int]:
        return draw.choices(range(8, VOCAB), k=count)

    prompt, other, long = ids(30), ids(9), ids(110)
    twice = prompt + ids(27)
    near = Case(
        [prompt + ids(20), twice, prompt, twice, prompt + ids(40), other + ids(4), other + ids(1),
         ids(75)],
        [Group(30, (0, 1, 2, 3, 4)), Group(9, (5, 6)), Group(0, (7,))],
    )  # fmt: skip
    far = Case(
        [long + ids(60), long + ids(33), long + ids(100), ids(20)],
        [Group(110, (0, 1, 2)), Group(0, (3,))],
    )
    return near, far


NEAR, FAR = _draw_cases()


# ---------------------------------------------------------------- models


def tiny_config(name: str, **settings: Any) -> PreTrainedConfig:
    """The family's config, tiny. Windows that it has by default are `WINDOW` tokens wide."""
    cls = CONFIG_MAPPING[name]
    special = deepcopy(SPECIAL.get(name, {}))  # transformers writes into what it is given
    return cls(**_shrunken(cls) | {"num_labels": 1} | special | settings)


def tiny_model(name: str, *, attention: str | None = None, **settings: Any) -> Any:
    """A classifier of the family: the same weights each time, whatever the attention."""
    cls = model_class(name)
    torch.manual_seed(0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = cls._from_config(tiny_config(name, **settings), **chosen).eval()
    draw_weights(model)
    return model


def model_class(name: str) -> Any:
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[CONFIG_MAPPING[name]]


def alone(
    name: str, case: Case, *, attention: str = "eager", **settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards and gradients of plain transformers, one sequence at a time."""
    model = tiny_model(name, attention=attention, **settings)
    rewards = rewards_alone(model, case.sequences)
    (rewards * case.weights).sum().backward()
    return rewards.detach(), gradients(model)


def rewards_alone(model: Any, sequences: list[list[int]]) -> Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def _shrunken(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Keyword arguments that make a config of `cls` tiny."""
    default = cls()
    fields = default.to_dict()
    small: dict[str, Any] = {
        field: SIZES[field] for field in fields if field in SIZES and fields[field] is not None
    }
    small |= {"pad_token_id": PAD} | {field: WINDOW for field in WINDOWS if fields.get(field)}
    small |= _one_layer_of_each_kind(default, fields)
    for field in cls.sub_configs:
        if isinstance(getattr(default, field, None), PreTrainedConfig):
            small[field] = _shrunken(type(getattr(default, field)))
    return small


def _one_layer_of_each_kind(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut down to the layers that differ."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        field: value
        for field, value in fields.items()
        if isinstance(value, list) and count is not None and len(value) == count > 3
    }
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    small = {field: [kind[i] for kind in kinds] for i, field in enumerate(lists)}
    return {**small, "num_hidden_layers": len(kinds)}


@torch.no_grad()
def draw_weights(model: nn.Module, *, gain: float = 1.5) -> None:
    """Matrices that enlarge what they take, noise on biases and norms.

    The row of the padding token is drawn too: checkpoints have one.
    """
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim < 2:
            sharper = float(name.endswith(NORMS_OF_QUERIES_AND_KEYS))
            parameter.copy_(torch.nan_to_num(parameter) + 0.2 * noise + sharper)
        elif isinstance(owner, nn.Embedding):
            parameter.copy_(noise)
        else:
            fan_in = parameter.shape[0 if isinstance(owner, Conv1D) else -1]
            parameter.copy_(noise * gain / math.sqrt(fan_in))


NORMS_OF_QUERIES_AND_KEYS = tuple(
    f"{norm}.weight"
    for norm in (
        "q_norm",
        "k_norm",
        "q_layernorm",
        "k_layernorm",
        "query_layernorm",
        "key_layernorm",
    )
)
"""They undo the size of the matrices, so they are made larger themselves."""


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    family: str
    path: str
    note: str

    @property
    def line(self) -> str:
        kind = CLASS_NAMES[self.family]
        return f"| {self.family} | `{kind}` | {self.path} | {self.note} |"


@cache
def find(name: str) -> Finding:
    """Which path `settle_path` takes for the family, and why no better one."""
    if name in NOT_BUILT:
        reason = families.why_refused(tiny_config(name))
        assert reason is not None
        return Finding(name, "refused", reason)
    model = RewardModel(tiny_model(name))
    told = _Told()
    logger = logging.getLogger("raywards.settle")
    logger.addHandler(told)
    try:
        settle_path(model)
    except ModelError as error:
        return Finding(name, "refused", _reason_in(error))
    finally:
        logger.removeHandler(told)
    return Finding(name, model.path, _note(model, told.problems))


class _Told(logging.Handler):
    """Collects why paths were not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.problems.append(record.getMessage().split(" path: ", 1)[1])


def _note(model: RewardModel, problems: list[str]) -> str:
    config = model.inner.config.get_text_config()
    notes = []
    if model.path != "packed":
        notes.append(_why_no_better(model, problems))
    windows = model.path == "packed" and model.window != math.inf
    notes += ["padded where a sequence is longer than the attention window"] if windows else []
    for field in ("keep_window_size", "index_topk"):
        if getattr(config, field, None):
            notes.append(f"sequences of more than `{field}` tokens are refused")
    if config.model_type in RANDOM_IN_TRAINING:
        notes.append(RANDOM_IN_TRAINING[config.model_type])
    return "; ".join(notes)


def _why_no_better(model: RewardModel, problems: list[str]) -> str:
    config = model.inner.config.get_text_config()
    if not model.pools_by_position:
        return "its head is not a linear `score` on the last token"
    recurrent = model._kinds & {"linear_attention", "hybrid", "mamba", "conv"}
    if recurrent:
        return "it has recurrent layers"
    if families.counts_columns(config):
        return "its attention takes a token's column for its position"
    if "indexed_attention" in model._kinds:
        return "it picks the tokens that it attends to"
    if problems and model.path == "masked":
        problem = problems[0]
        return "its layers do not pass the layout on" if "called without" in problem else problem
    if problems:
        return "it takes no mask of a row of groups"
    return "its attention is not called through transformers' interface"


def _reason_in(error: ModelError) -> str:
    return str(error).split(" here: ", 1)[1].split(". A reward has to be", 1)[0]


TABLE = """# Model families

Made by `python tests/families.py --write docs/families.md` with transformers {version}.

What becomes of each of the {count} families that transformers can sequence-classify. The test
behind this table (`tests/test_families.py`, `make test-slow`) builds a tiny model of each, and
compares rewards and gradients with transformers' eager forward on each sequence alone.

| path | families | what it is |
|---|---|---|
| packed | {packed} | common prefixes are computed once, nothing is padded |
| masked | {masked} | the same rows with the model's own attention and a [T, T] mask |
| padded | {padded} | the model's own forward on padded sequences |
| refused | {refused} | a reward would depend on what else is in the batch: loading raises |

The path is settled when a model is loaded: a probe is run on each, and the first is taken whose
rewards are those of the model's own forward on each sequence alone. A model that is not in this
table, or whose settings make it another, goes through the same probe. The log says why a path
was not taken.

Any family is padded while it trains with dropout or jitter. Rotary embeddings of type `dynamic`
change for a whole batch with a sequence beyond `max_position_embeddings`, those of type `longrope`
beyond `original_max_position_embeddings`: longer sequences are refused. Fp32 on a GPU has no packed
attention: what is packed elsewhere is masked there.

| family | class | path | why, and notes |
|---|---|---|---|
"""


def table() -> str:
    found = [find(name) for name in FAMILIES]
    paths = Counter(finding.path for finding in found)
    head = TABLE.format(version=transformers.__version__, count=len(found), **paths)
    return head + "".join(f"{finding.line}\n" for finding in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", type=Path, required=True, metavar="FILE", help="docs/families.md"
    )
    file = parser.parse_args().write
    torch.set_num_threads(1)
    logging.getLogger("raywards.settle").propagate = False
    file.write_text(table(), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
