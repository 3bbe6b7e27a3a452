"""The loss of a pair, as functions of tensors.

P pairs. Nothing here averages: the caller divides a sum by the pairs of the global batch, so the
loss is the same for any dealing, number of workers and accumulation.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Loss of each pair [P]: `-log sigmoid(chosen - rejected - margin)`.

    Bradley and Terry (1952) as in Ouyang et al. (arXiv 2203.02155), with the margin of Touvron et
    al. (arXiv 2307.09288). `chosen`, `rejected` and `margin` are [P]; the sum is taken in fp32.
    """
    difference = chosen.float() - rejected.float()
    if margin is not None:
        difference = difference - margin.float()
    return -functional.logsigmoid(difference)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Penalty of each pair [P]: `(chosen + rejected)^2`, which keeps rewards around zero.

    Eisenstein et al. (arXiv 2312.09244), equation 2.
    """
    return (chosen.float() + rejected.float()) ** 2
