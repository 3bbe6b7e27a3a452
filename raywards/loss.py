"""The loss of a pair, a ranking or a rated text, as functions of tensors.

P pairs; G rankings of N responses each; R rated texts. Nothing here averages over these: the caller
divides a sum by their number in the global batch, so the loss is the same for any dealing, number
of workers and accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    probability: Tensor | None = None,
) -> Tensor:
    """Loss of each pair [P]: `-log sigmoid(chosen - rejected - margin)`.

    Bradley and Terry (1952) as in Ouyang et al. (arXiv 2203.02155), with the margin of Touvron et
    al. (arXiv 2307.09288). With `probability`, that chosen is the better one, it is the cross
    entropy between that and the model's, as in Christiano et al. (arXiv 1706.03741): a half is a
    tie. All are [P]; differences are taken in fp32.
    """
    difference = chosen.float() - rejected.float()
    if margin is not None:
        difference = difference - margin.float()
    losses = -functional.logsigmoid(difference)
    if probability is None:
        return losses
    # p * -log s(d) + (1 - p) * -log s(-d), of which the second is -log s(d) + d
    return losses + (1 - probability.float()) * difference


def smoothed(probability: Tensor, label_smoothing: float) -> Tensor:
    """`probability` [P] where a label is the wrong way round `label_smoothing` of the time.

    As in Wang et al. (arXiv 2401.06080), and for policies in TRL's DPO.
    """
    return probability + label_smoothing * (1 - 2 * probability)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Penalty of each pair [P]: `(chosen + rejected)^2`, which keeps rewards around zero.

    Eisenstein et al. (arXiv 2312.09244), equation 2.
    """
    return (chosen.float() + rejected.float()) ** 2


def plackett_luce(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Loss of each ranking [G]: `-log P(ranking) / (N - 1)`. Both are [G, N]; no ranks are equal.

    Luce (1959) and Plackett (1975): the best is chosen among all, the next among those that remain,
    and so on. As a loss of a ranking by scores it is ListMLE of Xia et al. (ICML 2008). Each of the
    N - 1 choices is Bradley and Terry's, of the best that remains against the log-sum-exp of the
    others. Their mean, and not their sum, so that a ranking weighs as much as a pair whatever its
    length, as in `all_pairs`, and a learning rate that suits one suits the other.
    """
    ordered = _best_first(rewards, ranks)
    places = range(1, ordered.shape[1])
    others = torch.stack([ordered[:, place:].logsumexp(1) for place in places], 1)
    return bradley_terry(ordered[:, :-1], others).mean(1)


def all_pairs(rewards: Tensor, ranks: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each ranking [G]: the mean of `bradley_terry` over its N (N - 1) / 2 pairs.

    Ouyang et al. (arXiv 2203.02155), equation 1. Both are [G, N]; two of equal rank are a tie, and
    its probability is a half.
    """
    ordered, in_order = _best_first(rewards, ranks), ranks.sort(1).values
    size = ordered.shape[1]
    better, worse = torch.triu_indices(size, size, 1, device=rewards.device)
    tied = in_order[:, better] == in_order[:, worse]
    probability = smoothed(1 - 0.5 * tied.float(), label_smoothing)
    return bradley_terry(ordered[:, better], ordered[:, worse], None, probability).mean(1)


def centering_of_rankings(rewards: Tensor) -> Tensor:
    """Penalty of each ranking [G]: `(2 * mean reward)^2`, which is `centering` for a pair.

    Rewards are [G, N]. Of Eisenstein et al.'s penalty on all pairs this is the part that a shift of
    all rewards changes, which is what the losses above leave open; the rest would draw the rewards
    of a ranking together.
    """
    return (2 * rewards.float().mean(1)) ** 2


def squared_error(predicted: Tensor, scores: Tensor) -> Tensor:
    """Loss of each rated text [R]: the mean of `(predicted - score)^2` over the scores it has.

    Both are [R, A], for A attributes; NaN is a score that nobody gave. Pointwise regression as in
    HelpSteer (Wang et al., arXiv 2311.09528) and ArmoRM (Wang et al., arXiv 2406.12845). A mean, so
    that a text weighs the same however many of its attributes were rated.
    """
    given = ~scores.isnan()
    # The difference itself is masked: the square of a NaN has a gradient of NaN even where unused.
    differences = torch.where(given, predicted.float() - scores.nan_to_num(), 0.0)
    return (differences**2).sum(1) / given.sum(1)


def _best_first(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Rewards [G, N] of each ranking in fp32, in the order of its ranks."""
    return rewards.float().gather(1, ranks.argsort(dim=1, stable=True))
