"""Matrix products whose rounding of a sample depends on no other sample on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.cpu.execution import eager_on_cpu, on_cpu

# ATen's products and activations on CPUs round whole groups of so many samples alike, however many groups
# there are.
SAMPLE_GROUP = 4


def whole_groups(samples: Tensor) -> Tensor:
    """`samples`, on an eager CPU with copies of the first after them up to a multiple of `SAMPLE_GROUP`."""
    if not eager_on_cpu(samples):
        return samples
    extra = -len(samples) % SAMPLE_GROUP
    if not extra or not len(samples):
        return samples
    return torch.cat((samples, samples[:1].expand(extra, *samples.shape[1:])))


def grouped_linear(v: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(v, weight, bias)`` of v (R, inputs), by whole groups of samples on a CPU."""
    out = F.linear(whole_groups(v), weight, bias)
    return out if out.shape[0] == v.shape[0] else out[: v.shape[0]]


def wide_linear(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear(v, weight, bias)`` of few samples v (R, inputs) and a large matrix (outputs, inputs).

    On a CPU the product is faster with the matrix on the left, and alike for four samples and for eight.
    """
    if not eager_on_cpu(v) or len(v) == 0 or len(v) % SAMPLE_GROUP:
        return F.linear(v, weight, bias)
    products = torch.cat([torch.mm(weight, part.t()) for part in v.split(2 * SAMPLE_GROUP)], dim=1)
    return products.t().contiguous() + bias


def matmul_each(weights: Tensor, shared: Tensor) -> Tensor:
    """``weights[b] @ shared`` of each sample b; on a CPU every sample has a product of its own."""
    if on_cpu(weights):
        return torch.bmm(weights, shared.expand(weights.shape[0], -1, -1))
    return torch.matmul(weights, shared)


def linear_each(v: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(v, weight, bias)`` of v (B, inputs); on a CPU every sample has a product of its own."""
    if not on_cpu(v):
        return F.linear(v, weight, bias)
    out = matmul_each(v[:, None], weight.t()).squeeze(1)
    return out if bias is None else out + bias
