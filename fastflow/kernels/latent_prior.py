r"""Standard-normal log-density, summed per sample.

.. math:: \log N(z; 0, I) = -\tfrac12 \sum_n \left(z_n^2 + \log 2\pi\right)

`z` (B, D), any float dtype; the result is (B,), float32 or, for float64 input, float64, summed in a fixed order.
Source: Glow (Kingma & Dhariwal, 2018), eq. 2.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastflow.kernels._library import accumulator, sum_per_sample

LOG_2PI = math.log(2.0 * math.pi)


def latent_prior_reference(z: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    z = z.to(accumulator(z.dtype))
    return -0.5 * (sum_per_sample(z * z) + z.shape[1] * LOG_2PI)


def latent_prior(z: Tensor) -> Tensor:
    """Log-density of `z` under a standard normal, per sample.

    Args:
        z: (B, D) latent.

    Returns:
        (B,) log-densities in nats, float32 or wider.

    Raises:
        ValueError: `z` is not a 2-D floating-point tensor.

    Example:
        >>> latent_prior(torch.zeros(1, 2))
        tensor([-1.8379])
    """
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"z must be a 2-D floating-point tensor, got {tuple(z.shape)} {z.dtype}")
    return latent_prior_reference(z)
