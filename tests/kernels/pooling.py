"""Tests of poolings and gates share arguments, references, and checks that hold for each op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numerics import F32, F64, close, rand, run, to_float64
from torch import Tensor

from fastflow import kernels
from fastflow.kernels import layouts
from fastflow.kernels.apply_gates import apply_gates_reference
from fastflow.kernels.cpu import pool_parts as cpu_parts
from fastflow.kernels.pool_channels import pool_channels_reference
from fastflow.kernels.pool_pixels import average_pixels_reference, pool_pixels_reference
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import pool_parts

FORMATS = {"c": torch.contiguous_format, "l": torch.channels_last}
# Kernels take the last of these in several chunks; `small_tiles` lets smaller images stand for large ones.
SHAPES = [
    (1, 1, 1, 1),
    (0, 4, 3, 3),
    (2, 3, 5, 7),
    (3, 40, 1, 1),
    (1, 256, 3, 3),
    (2, 16, 23, 23),
    (1, 2, 46, 92),
]

# One channel has one layout.
BATCHES = [((3, 16, 23, 23), "c"), ((3, 16, 23, 23), "l"), ((3, 1, 92, 92), "c"), ((3, 7, 40, 40), "l")]


class Case(NamedTuple):
    """An op with arguments, and the number of terms in the sums of their gradients."""

    op: Callable[..., Tensor | tuple[Tensor, Tensor]]
    reference: Callable[..., Tensor | tuple[Tensor, Tensor]]
    values: tuple[Tensor, ...]
    lengths: tuple[int, ...]


def arguments(shape, dtype=F64, logits=None, layout="c", device="cpu"):
    x = rand(*shape, dtype=dtype, device=device).contiguous(memory_format=FORMATS[layout])
    channel = rand(*shape[:2], dtype=logits or dtype, seed=1, device=device)
    return x, channel, rand(shape[0], 1, *shape[2:], dtype=logits or dtype, seed=2, device=device)


def case(name, values):
    x, channel, spatial = values
    pixels = x.shape[2] * x.shape[3]
    if name == "pool_pixels":
        return Case(kernels.pool_pixels, lambda x: (pool_pixels_reference(x), x), (x,), (1,))
    if name == "average_pixels":
        return Case(kernels.average_pixels, lambda x: (average_pixels_reference(x), x), (x,), (1,))
    if name == "pool_channels":
        return Case(
            kernels.pool_channels, lambda x, c: (pool_channels_reference(x, c), x), (x, channel), (1, pixels)
        )
    return Case(kernels.apply_gates, apply_gates_reference, (x, channel, spatial), (1, pixels, x.shape[1]))


def parts(results):
    return results if isinstance(results, tuple) else (results,)


def check(name, device, shape, dtype=F64, logits=None, layout="c"):
    """Results and gradients are those of the reference in float64, with and without autograd."""
    op, reference, values, lengths = case(name, arguments(shape, dtype, logits, layout, device))
    results, grads = run(op, values)
    want, want_grads = run(reference, to_float64(values), [result.dtype for result in results])
    for result, wanted in zip(results, want, strict=True):
        close(result, wanted, dtype)
    for grad, wanted, value, length in zip(grads, want_grads, values, lengths, strict=True):
        close(grad, wanted, value.dtype, length)
    assert layouts.is_channels_last(grads[0]) == layouts.is_channels_last(values[0])
    with torch.no_grad():
        again = parts(op(*values))
    for result, plain in zip(results, again, strict=True):
        assert torch.equal(result, plain), "another result without autograd"


def check_small_tiles(name, device, monkeypatch):
    """Small inputs take the ways of large ones: joined chunks, channels in turns, samples by one or two."""
    monkeypatch.setattr(cpu_parts, "PART_ELEMENTS", 200)
    monkeypatch.setattr(pool_parts, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(pool_parts, "MAX_RUN_PIXELS", 16)
    for layout in "cl":
        check(name, device, (2, 20, 4, 5), layout=layout)
        check(name, device, (3, 3, 5, 5), F32, layout=layout)


def check_views(name, device):
    """Slices of channels, an expanded batch and swapped axes; the gradient of a sum has strides of 0."""
    whole = rand(3, 8, 6, 6, device=device)
    for x in (whole[:, 2:7], whole[:1].expand(3, -1, -1, -1), whole.transpose(2, 3)):
        logits = (rand(3, x.shape[1], seed=1, device=device), rand(3, 1, 6, 6, seed=2, device=device))
        op, reference, inputs, _ = case(name, (x, *logits))
        leaves = [v.detach().requires_grad_() for v in inputs]
        for_op, for_reference = parts(op(*leaves)), parts(reference(*leaves))
        for got, want in zip(for_op, for_reference, strict=True):
            assert torch.allclose(got, want, atol=1e-12)
        got = torch.autograd.grad(sum(part.sum() for part in for_op), leaves)
        want = torch.autograd.grad(sum(part.sum() for part in for_reference), leaves)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


def check_gradients(name, device):
    for layout in "cl":
        op, _, values, _ = case(name, arguments((1, 2, 2, 3), layout=layout, device=device))
        assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values])


def check_unused_results(name, device):
    """Gradients are right when only one of the pooled and the handed-on x is used."""
    op, reference, values, _ = case(name, arguments((2, 3, 4, 5), device=device))
    for used in (0, 1):
        leaves = [v.detach().requires_grad_() for v in values]
        got, want = (
            torch.autograd.grad(
                (f(*leaves)[used] ** 2).sum(), leaves, allow_unused=True, materialize_grads=True
            )
            for f in (op, reference)
        )
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


def check_bits(name, device, shape, layout):
    """Results and gradients repeat, and those of a sample do not depend on the others of its batch."""
    op, _, inputs, _ = case(name, arguments(shape, F32, layout=layout, device=device))
    results, grads = run(op, inputs)
    results_again, grads_again = run(op, inputs)
    for a, b in zip((*results, *grads), (*results_again, *grads_again), strict=True):
        assert torch.equal(a, b)
    upper = [rand(*r.shape, dtype=F32, seed=7 + i, device=device) for i, r in enumerate(results)]
    for i in (0, shape[0] - 1):
        leaves = [v[i : i + 1].detach().requires_grad_() for v in inputs]
        alone = parts(op(*leaves))
        # Pooled pixels are (2, B, C), all else has its batch first.
        pick = [slice(None)] if name == "pool_pixels" else []
        cut = [r[(*pick, slice(i, i + 1))] if j == 0 else r[i : i + 1] for j, r in enumerate(results)]
        assert all(torch.equal(a, b) for a, b in zip(alone, cut, strict=True))
        grads_in = [u[(*pick, slice(i, i + 1))] if j == 0 else u[i : i + 1] for j, u in enumerate(upper)]
        for a, b in zip(torch.autograd.grad(alone, leaves, grads_in), grads, strict=True):
            assert torch.equal(a, b[i : i + 1])


def check_launches(name, device, shape, forward, backward):
    """How many kernels start."""
    op, _, inputs, _ = case(name, arguments(shape, F32, device=device))
    leaves = [v.requires_grad_() for v in inputs]
    with launching.recording() as launches:
        results = parts(op(*leaves))
        assert len(launches) == forward
        torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
        assert len(launches) == forward + backward


def check_refusal(name, change, words):
    """A ValueError with these words comes before any launch."""
    names = {"pool_pixels": 1, "average_pixels": 1, "pool_channels": 2, "apply_gates": 3}[name]
    good = {
        "x": torch.zeros(2, 3, 4, 4),
        "channel_logits": torch.zeros(2, 3),
        "spatial_logits": torch.zeros(2, 1, 4, 4),
    }
    with launching.recording() as launches, pytest.raises(ValueError, match=words):
        getattr(kernels, name)(**dict(list({**good, **change}.items())[:names]))
    assert not launches


def check_second_derivative(name):
    """A second derivative is an error, or right where the reference runs."""
    op, _, values, _ = case(name, arguments((1, 2, 2, 2)))
    inputs = [v.requires_grad_() for v in values]
    with pytest.raises(RuntimeError, match="one derivative"):
        torch.autograd.grad(sum((part**2).sum() for part in parts(op(*inputs))), inputs, create_graph=True)
    kernels.set_backend("reference")
    try:
        assert torch.autograd.gradgradcheck(op, inputs)
    finally:
        kernels.set_backend("auto")
