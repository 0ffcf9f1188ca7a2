"""`head_features`: values and gradients of two linear layers with GELU."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F32, F64, rand, run, same_bits

from fastflow import kernels
from fastflow.kernels.head_features import head_features_reference


def values(dtype=F64):
    shapes = ((3, 10), (4, 10), (4, 10), (4,), (4,))
    return [rand(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def apply(v, *rest):
    return kernels.head_features(v, rest[:2], rest[2:])


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_values_and_gradients_are_those_of_two_layers(dtype):
    results, grads = run(apply, values(dtype))
    want, want_grads = run(lambda v, *rest: head_features_reference(v, rest[:2], rest[2:]), values(dtype))
    assert same_bits(results, want)
    with torch.no_grad():
        assert same_bits(apply(*values(dtype)), want)
    for got, right in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, right, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_gradients():
    assert torch.autograd.gradcheck(apply, [value.requires_grad_() for value in values()])


def test_autocast_does_not_narrow():
    inputs = values(F32)
    with torch.autocast("cpu", dtype=BF16):
        narrow = apply(*[value.requires_grad_() for value in inputs])
    assert narrow[0].dtype == F32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: rand(3)}, r"v must be \(B, N\), got \(3,\)"),
        ({2: rand(4, 9)}, r"weights must be \(4, 10\)"),
        ({3: rand(5)}, r"biases must be \(4,\)"),
        ({1: rand(4, 10, dtype=F32)}, "torch.float32"),
    ],
)
def test_refuses(change, message):
    inputs = [change.get(i, value) for i, value in enumerate(values())]
    with pytest.raises(ValueError, match=message):
        apply(*inputs)
