r"""Standard-normal log-density, summed per sample.

.. math:: \log N(z; 0, I) = -\tfrac12 \sum_n \left(z_n^2 + \log 2\pi\right), \qquad \partial/\partial z_n = -z_n

`z` (B, D), any float dtype; the result is (B,), float32 or, for float64 input, float64, summed in a fixed two-stage order, so
equal input gives equal bits whatever else is in the batch. Source: Glow (Kingma & Dhariwal, 2018), eq. 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastflow.kernels._launch import cdiv, elements, is_wide, kernel, launch, locate, sum_rows, triton_dtype, vector_width
from fastflow.kernels._library import (
    accumulator,
    check_dtype,
    refuse_second_derivative,
    register,
    sum_per_sample,
    takes_reference,
)

if TYPE_CHECKING:
    import triton.language as tl

LOG_2PI = math.log(2.0 * math.pi)
BLOCK = 2048


# -- definition -----------------------------------------------------------------------------------------------------------


def latent_prior_reference(z: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    z = z.to(accumulator(z.dtype))
    return -0.5 * (sum_per_sample(z * z) + z.shape[1] * LOG_2PI)


def latent_prior_backward_reference(grad: Tensor, z: Tensor) -> Tensor:
    """The gradient, in plain ATen."""
    return (-z.to(grad.dtype) * grad[:, None]).to(z.dtype)


# -- kernels --------------------------------------------------------------------------------------------------------------


@kernel
def _prior_fwd_kernel(
    z_ptr, partial_ptr, z_stride_v, n_v, n_chunks, V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr
):
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    n = elements(n_v, V, WIDE)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + b * z_stride_v * V + offs, mask=offs < n, other=0.0).to(ACC)
    tl.store(partial_ptr + b * n_chunks + chunk, tl.sum(z * z, axis=0))


@kernel
def _prior_bwd_kernel(
    grad_ptr, z_ptr, dz_ptr, z_stride_v, n_v, n_chunks, V: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    n = elements(n_v, V, WIDE)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    grad = tl.load(grad_ptr + b)
    z = tl.load(z_ptr + b * z_stride_v * V + offs, mask=inside, other=0.0).to(grad.dtype)
    tl.store(dz_ptr + b * n + offs, (-z * grad).to(dz_ptr.dtype.element_ty), mask=inside)


# -- launchers ------------------------------------------------------------------------------------------------------------


def _dense_rows(z: Tensor) -> Tensor:
    return z if z.shape[1] <= 1 or z.stride(1) == 1 else z.contiguous()


def _prior_launch(z: Tensor) -> Tensor:
    z = _dense_rows(z)
    batch, n = z.shape
    acc = accumulator(z.dtype)
    if z.numel() == 0:
        return torch.full((batch,), -0.5 * n * LOG_2PI, dtype=acc, device=z.device)
    chunks, v = cdiv(n, BLOCK), vector_width(n, z.stride(0))
    partial = torch.empty(batch, chunks, dtype=acc, device=z.device)
    launch(
        _prior_fwd_kernel, batch * chunks, z, 4, z, partial, z.stride(0) // v, n // v, chunks,
        V=v, BLOCK=BLOCK, ACC=triton_dtype(acc), WIDE=is_wide(n, BLOCK),
    )  # fmt: skip
    return -0.5 * (sum_rows(partial) + n * LOG_2PI)


def _prior_backward_launch(grad: Tensor, z: Tensor) -> Tensor:
    z = _dense_rows(z)
    batch, n = z.shape
    dz = torch.empty(batch, n, dtype=z.dtype, device=z.device)
    if z.numel():
        chunks, v = cdiv(n, BLOCK), vector_width(n, z.stride(0))
        launch(
            _prior_bwd_kernel,
            batch * chunks,
            z,
            4,
            grad.contiguous(),
            z,
            dz,
            z.stride(0) // v,
            n // v,
            chunks,
            V=v,
            BLOCK=BLOCK,
            WIDE=is_wide(n, BLOCK),
        )
    return dz


# -- op and autograd ------------------------------------------------------------------------------------------------------


_forward = register(
    "latent_prior(Tensor z) -> Tensor",
    reference=latent_prior_reference,
    triton=_prior_launch,
    fake=lambda z: z.new_empty(z.shape[0], dtype=accumulator(z.dtype)),
)
_backward = register(
    "latent_prior_backward(Tensor grad, Tensor z) -> Tensor",
    reference=lambda grad, z: latent_prior_backward_reference(grad, z).contiguous(),
    triton=_prior_backward_launch,
    fake=lambda grad, z: torch.empty(z.shape, dtype=z.dtype, device=z.device),
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
    out: Tensor = LatentPrior.apply(z)
    return out
