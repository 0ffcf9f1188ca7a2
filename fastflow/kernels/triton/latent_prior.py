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
    power_of_two,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import MAX_SUM_BLOCK, elements, locate
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


@kernel
def _prior_sum_kernel(partial_ptr, out_ptr, n_chunks, width, BLOCK: tl.constexpr, LOG_2PI: tl.constexpr):
    """The log-density of a sample of `width` elements from the sums of squares of its chunks."""
    sample = tl.cast(tl.program_id(0), tl.int64)
    chunk = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for start in range(0, n_chunks, BLOCK):
        there = start + chunk < n_chunks
        squares += tl.load(partial_ptr + sample * n_chunks + start + chunk, mask=there, other=0.0)
    constant = tl.cast(width, tl.float64) * LOG_2PI
    tl.store(out_ptr + sample, -0.5 * (tl.sum(squares, axis=0) + constant.to(squares.dtype)))


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
    out = torch.empty(batch, dtype=acc, device=z.device)
    launch(
        _prior_sum_kernel, batch, z, 1, partial, out, chunks, n,
        BLOCK=min(MAX_SUM_BLOCK, power_of_two(chunks)), LOG_2PI=LOG_2PI,
    )  # fmt: skip
    return out


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
