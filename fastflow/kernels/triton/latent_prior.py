"""Triton kernels of the standard normal log-density: a program takes one chunk of one sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, locate, sum_chunks
from fastflow.numerics import LOG_2PI, acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 2048


@kernel
def _prior_fwd_kernel(
    z_ptr,
    partial_ptr,
    z_stride_v,
    n_v,
    n_chunks,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    n = elements(n_v, V, INT64_OFFSETS)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + b * z_stride_v * V + offs, mask=offs < n, other=0.0).to(ACC)
    tl.store(partial_ptr + b * n_chunks + chunk, tl.sum(z * z, axis=0))


@kernel
def _prior_bwd_kernel(
    grad_ptr,
    z_ptr,
    dz_ptr,
    z_stride_v,
    n_v,
    n_chunks,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    n = elements(n_v, V, INT64_OFFSETS)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    grad = tl.load(grad_ptr + b)
    z = tl.load(z_ptr + b * z_stride_v * V + offs, mask=inside, other=0.0).to(grad.dtype)
    tl.store(dz_ptr + b * n + offs, (-z * grad).to(dz_ptr.dtype.element_ty), mask=inside)


def _dense_samples(z: Tensor) -> Tensor:
    """`z` with each sample dense in memory, copied only when it is not."""
    return z if z.shape[1] <= 1 or z.stride(1) == 1 else z.contiguous()


def launch_latent_prior(z: Tensor) -> Tensor:
    """The log-density of each sample."""
    z = _dense_samples(z)
    batch, n = z.shape
    acc = acc_dtype(z.dtype)
    if z.numel() == 0:
        return torch.full((batch,), -0.5 * n * LOG_2PI, dtype=acc, device=z.device)
    chunks, v = cdiv(n, BLOCK), vector_width(n, z.stride(0))
    partial = torch.empty(batch, chunks, dtype=acc, device=z.device)
    launch(
        _prior_fwd_kernel, batch * chunks, z, 4, z, partial, z.stride(0) // v, n // v, chunks,
        V=v, BLOCK=BLOCK, ACC=triton_dtype(acc), INT64_OFFSETS=needs_int64_offsets(n, BLOCK),
    )  # fmt: skip
    return -0.5 * (sum_chunks(partial) + n * LOG_2PI)


def launch_latent_prior_backward(grad: Tensor, z: Tensor) -> Tensor:
    """The gradient of z."""
    z = _dense_samples(z)
    batch, n = z.shape
    dz = torch.empty(batch, n, dtype=z.dtype, device=z.device)
    if z.numel():
        chunks, v = cdiv(n, BLOCK), vector_width(n, z.stride(0))
        launch(
            _prior_bwd_kernel, batch * chunks, z, 4,
            grad.contiguous(), z, dz, z.stride(0) // v, n // v, chunks,
            V=v, BLOCK=BLOCK, INT64_OFFSETS=needs_int64_offsets(n, BLOCK),
        )  # fmt: skip
    return dz
