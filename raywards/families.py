"""What is known of model families that a probe of forty tokens does not show.

`settle_path` compares rewards on short sequences, in the precision of the weights. What goes wrong
only beyond some length, or by less than half precision hides, is named here. `docs/families.md` has
every family; `tests/test_families.py` makes it, and shows that each refusal is needed.
"""

from __future__ import annotations

from typing import Any

_MIXES = "a token's hidden state depends on the padding beside its sequence"
REFUSED = {
    "big_bird": "it attends to blocks drawn at random, until the first short batch ends that for "
    "good. Loaded with attention_type='original_full' it is exact",
    "canine": f"it pools characters by their place in the batch: {_MIXES}",
    "convbert": f"it convolves over padding: {_MIXES}",
    "fnet": f"its Fourier transform runs over padding: {_MIXES}",
    "funnel": f"it pools tokens with padding: {_MIXES}",
    "layoutlmv2": "it needs an image with each text",
    "mobilebert": f"it concatenates neighbouring embeddings, padding's included: {_MIXES}",
    "mra": "without its CUDA kernel, its attention is zero",
    "nystromformer": f"its landmarks are means over padding too: {_MIXES}",
    "reformer": "it hashes tokens at random, and by the length of the batch",
    "xlnet": "it pools the last place of the batch, padding or not",
    "yoso": f"it hashes tokens at random: {_MIXES}",
}
ENCODER_DECODER = (
    "it is an encoder-decoder: it wants as many EOS tokens in each sequence, or reads the padding"
)


def why_refused(config: Any) -> str | None:
    """Why no batch of this family has the rewards of its sequences alone, or None."""
    if config.is_encoder_decoder:
        return ENCODER_DECODER
    if getattr(config, "attention_type", None) == "original_full":
        return None
    return REFUSED.get(config.model_type)


def longest_exact(config: Any) -> float:
    """Tokens of the longest sequence whose reward does not depend on what else is in the batch.

    Beyond it, rotary frequencies change for the whole batch (dynamic and long rope), or the tokens
    that are attended to are picked by scores, whose ties fall as the batch's length has it.
    """
    limits = [getattr(config, name, None) for name in ("keep_window_size", "index_topk")]
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        elif rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    return min((limit for limit in limits if limit), default=float("inf"))


def counts_columns(config: Any) -> bool:
    """Whether attention takes a token's column for its position: wrong in a row of groups.

    ALiBi does, and so do GPT-Neo's windows and chunks, which may be wider than the probe's row.
    """
    names = ("window_size", "attention_chunk_size")
    alibi = config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)
    return alibi or any(getattr(config, name, None) is not None for name in names)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]
