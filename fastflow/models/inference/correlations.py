r"""How the neighbours of a latent block go together, which the density of the latent does not ask.

.. math:: \text{across} = \frac{\sum_{c,i,j} z_{c,i,j}\, z_{c,i,j+1}}{\sum_{c,i,j} z_{c,i,j}^2}, \qquad
          \text{down} = \frac{\sum_{c,i,j} z_{c,i,j}\, z_{c,i+1,j}}{\sum_{c,i,j} z_{c,i,j}^2}

The mean is not subtracted, as a latent's is 0 under the model, where both ratios are 0 on average. An image
of a scanner that the model has never seen leaves neighbours of the latent correlated, while its likelihood
may be as high as that of others. Source of the effect: Kirichenko et al., 2020, "Why normalizing flows fail
to detect out-of-distribution data".
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.numerics import acc_dtype, sum_per_sample


def lag_correlations(block: Tensor, down: int = 2, across: int = 3) -> Tensor:
    """Lag-1 correlations of a latent block, see the module.

    Args:
        block: (R, ...) with four axes.
        down: the axis of the rows of pixels.
        across: the axis of the columns of pixels.

    Returns:
        (R, 2) across, down, in [-1, 1], float32 or wider. They are 0 along an axis of one pixel, and of a
        block of zeros.
    """
    block = block.to(acc_dtype(block.dtype))
    squares = _sum(block * block)
    products = [_neighbours(block, axis) for axis in (across, down)]
    shares = torch.stack(products, dim=1) / squares.clamp_min(torch.finfo(squares.dtype).tiny).unsqueeze(1)
    return shares.to(block.dtype)


def _neighbours(block: Tensor, axis: int) -> Tensor:
    size = block.shape[axis]
    if size < 2:
        return torch.zeros_like(_sum(block))
    return _sum(block.narrow(axis, 0, size - 1) * block.narrow(axis, 1, size - 1))


def _sum(values: Tensor) -> Tensor:
    """Sum per sample (R,). Runtimes sum naively, hence in float64."""
    if torch.compiler.is_exporting():
        return values.double().flatten(1).sum(dim=1)
    return sum_per_sample(values)
