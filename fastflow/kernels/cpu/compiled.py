"""Ops for graphs that Inductor compiles for a CPU: one graph serves any number of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# erf on (-4, 4) as x P(x^2) / Q(x^2), highest power first: the minimax approximation in single precision that
# numerical libraries share (its error is below 3e-7). It is several times cheaper than the exponential that
# ATen's erf takes.
ERF_NUMERATOR = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
                 -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
ERF_DENOMINATOR = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
                   -1.42647390514189e-02)  # fmt: skip


def _compiled_for_cpu(x: Tensor) -> bool:
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return x.device.type == "cpu" and compiling


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def gelu(x: Tensor) -> Tensor:
    """Exact GELU; float32 graphs compiled for a CPU take a rational `erf`, right to single precision."""
    if x.dtype != torch.float32 or not _compiled_for_cpu(x):
        return F.gelu(x)
    z = (x * math.sqrt(0.5)).clamp(-4.0, 4.0)
    square = z * z
    return 0.5 * x * (1.0 + z * _horner(ERF_NUMERATOR, square) / _horner(ERF_DENOMINATOR, square))


# ATen chooses the code of a convolution by the number of samples, and a graph compiled around that choice is
# compiled again below 16 of them. As an op of its own the convolution is always that of oneDNN.
_library = torch.library.Library("fastflow", "FRAGMENT")


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int) -> Tensor:
    padding = weight.shape[2] // 2 * dilation
    if x.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        out = F.conv2d(x, weight, bias, stride, padding, dilation)
    else:
        pairs = ([n, n] for n in (padding, stride, dilation))
        out = torch.ops.aten.mkldnn_convolution(x, weight, bias, *pairs, 1)
    return out.contiguous(memory_format=torch.channels_last)


def _convolution_fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int) -> Tensor:
    size = (-(-n // stride) for n in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_library.define(f"convolution{torch.library.infer_schema(_convolution, mutates_args=())}")
_library.impl("convolution", _convolution, "CPU")
torch.library.register_fake("fastflow::convolution", _convolution_fake, lib=_library)


def conv2d(
    v: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, dilation: int = 1
) -> Tensor:
    """A convolution of odd size, padded so that a stride of 1 keeps the size of the image."""
    if _compiled_for_cpu(v):
        return torch.ops.fastflow.convolution(v, weight, bias, stride, dilation)
    return F.conv2d(v, weight, bias, stride, weight.shape[2] // 2 * dilation, dilation)
