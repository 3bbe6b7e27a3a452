"""The loss of a pair, as functions of tensors.

P pairs. Nothing here averages: the caller divides a sum by the pairs of the global batch, so the
loss is the same for any dealing, number of workers and accumulation.
"""

from __future__ import annotations

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
