r"""Standard-normal log-density, summed per sample.

.. math:: \log N(z; 0, I) = -\tfrac12 \sum_n \left(z_n^2 + \log 2\pi\right),
          \qquad \partial/\partial z_n = -z_n

`z` is (B, D) of any float dtype; the result is (B,) in float32, or in float64 for float64 input. It is summed
in a fixed two-stage order, so that equal input gives equal bits whatever else is in the batch. Source: Glow
(Kingma & Dhariwal, 2018), eq. 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import check_dtype
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.latent_prior import launch_latent_prior, launch_latent_prior_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import LOG_2PI, acc_dtype, sum_per_sample

# -- definition ----------------------------------------------------------------------------------------------


def latent_prior_reference(z: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    z = z.to(acc_dtype(z.dtype))
    return -0.5 * (sum_per_sample(z * z) + z.shape[1] * LOG_2PI)


def latent_prior_backward_reference(grad: Tensor, z: Tensor) -> Tensor:
    """The gradient, in plain ATen."""
    return (-z.to(grad.dtype) * grad[:, None]).to(z.dtype)


# -- op and autograd -----------------------------------------------------------------------------------------


def _prior_fake(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=acc_dtype(z.dtype))


def _prior_backward_cpu(grad: Tensor, z: Tensor) -> Tensor:
    return latent_prior_backward_reference(grad, z).contiguous()


def _prior_backward_fake(grad: Tensor, z: Tensor) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


_forward = register(
    "latent_prior",
    definition=latent_prior_reference,
    triton=launch_latent_prior,
    fake=_prior_fake,
    functions=("latent_prior",),
)
_backward = register(
    "latent_prior_backward",
    definition=latent_prior_backward_reference,
    cpu=_prior_backward_cpu,
    triton=launch_latent_prior_backward,
    fake=_prior_backward_fake,
)


class LatentPrior(torch.autograd.Function):
    """The op under autograd; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        out: Tensor = _forward(z)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative("latent_prior")
        (z,) = ctx.saved_tensors
        out: Tensor = _backward(grad, z)
        return out


@planned
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
    check_dtype("z", z)
    if takes_reference():
        return latent_prior_reference(z)
    out: Tensor = differentiate(LatentPrior, z)
    return out
