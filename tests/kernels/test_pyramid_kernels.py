"""The kernels of the atrous pyramid against the float64 definition: results, gradients, launches, bits."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, same_bits, to_float64
from test_pyramid import DILATIONS, leaves, weights_of, written_out

from fastflow import kernels
from fastflow.kernels.cpu.pyramid import PyramidWeights
from fastflow.kernels.layouts import is_channels_last
from fastflow.kernels.registry import OPS
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import pyramid_weights
from fastflow.kernels.triton.pyramid import unpack


def from_leaves(x, *values):
    return kernels.atrous_pyramid(x, unpack(values, DILATIONS))


def reference(x, *values):
    return written_out(x, unpack(values, DILATIONS))


def values_of(channels, dtype, device):
    return [value.detach().to(device, dtype) for value in leaves(weights_of(channels))]


def check(device, shape, dtype=F64, last=False, view=False):
    x = rand(*shape, dtype=dtype, device=device)
    if view:
        x = rand(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, device=device)[:, shape[1] :]
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    values = values_of(shape[1], F64 if dtype == F64 else F32, device)
    got, grads = run(from_leaves, [x, *values])
    want, want_grads = run(reference, to_float64([x, *values]), [dtype])
    channels, samples = shape[1], max(1, x.numel() // shape[1])
    assert is_channels_last(got[0]) == is_channels_last(x)
    close(got[0], want[0], dtype, 9 * channels)
    close(grads[0], want_grads[0], dtype, 36 * channels)
    for grad, wanted, value in zip(grads[1:], want_grads[1:], values, strict=True):
        # The results of convolutions were rounded to the dtype of x.
        close(grad.to(dtype), wanted, dtype, 9 * channels * samples)
        assert grad.dtype == value.dtype


# Tiles hold 16 channels of float64 and 32 of float32: less than one, one, and several.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1, 1), F64),
        ((0, 3, 4, 4), F64),
        ((2, 3, 5, 7), F64),
        ((2, 17, 4, 3), F64),
        ((1, 40, 3, 5), F32),
        ((17, 2, 3, 3), F32),
    ],
    ids=str,
)
def test_shapes(device, shape, dtype):
    check(device, shape, dtype)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dtypes(device, dtype, last):
    check(device, (2, 4, 6, 5), dtype, last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_layouts(device, last, view):
    check(device, (2, 3, 5, 6), last=last, view=view)


def test_several_chunks_of_pixels(device, monkeypatch):
    monkeypatch.setattr(pyramid_weights, "MIN_CHUNK_PIXELS", 64)
    check(device, (1, 2, 33, 34), F32)


def test_gradcheck(device):
    x = rand(2, 1, 2, 3, device=device).requires_grad_()
    values = [value.requires_grad_() for value in values_of(1, F64, device)]
    assert torch.autograd.gradcheck(from_leaves, [x, *values], fast_mode=True)


def test_same_bits_twice_and_in_any_batch(device):
    x, values = rand(3, 2, 9, 8, dtype=F32, device=device), values_of(2, F32, device)
    first, second = (run(from_leaves, [x, *values]) for _ in range(2))
    assert same_bits((*first[0], *first[1]), (*second[0], *second[1]))
    # The library's convolutions on CPUs round a single image in their own way.
    few, x = x[1:].detach().requires_grad_(), x.requires_grad_()
    two, three = from_leaves(few, *values), from_leaves(x, *values)
    assert torch.equal(two, three[1:])
    upper = rand(*x.shape, dtype=F32, seed=5, device=device)
    (got,) = torch.autograd.grad(two, few, upper[1:])
    (want,) = torch.autograd.grad(three, x, upper)
    assert torch.equal(got, want[1:])
    with torch.no_grad():
        assert torch.equal(from_leaves(x, *values), three)


def test_autocast_decides_the_dtype_of_the_result(device):
    x, values = rand(2, 3, 5, 4, dtype=F32, device=device).requires_grad_(), values_of(3, F32, device)
    values = [value.requires_grad_() for value in values]
    with torch.autocast(device, dtype=BF16):
        narrow = from_leaves(x, *values)
    assert narrow.dtype == BF16
    close(narrow.float(), reference(x, *values).detach(), F32, 2**32)
    assert torch.equal(narrow, from_leaves(x.to(BF16), *values))
    grads = torch.autograd.grad(narrow.float().sum(), [x, *values])
    assert {grad.dtype for grad in grads} == {F32}


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(F32, 3, 5), (BF16, 3, 5)])
def test_launches(device, dtype, forward, backward):
    x = rand(2, 4, 40, 40, dtype=dtype, device=device).requires_grad_()
    values = [value.requires_grad_() for value in values_of(4, F32, device)]
    with launching.recording() as launches:
        y = from_leaves(x, *values)
        assert len(launches) == forward
        torch.autograd.grad(y, [x, *values], torch.ones_like(y))
        assert len(launches) == forward + backward


def test_other_numbers_of_branches_take_the_definition(device):
    weights = weights_of(2)
    fewer = PyramidWeights(
        weights.point, weights.dilated[:2], DILATIONS[:2], (weights.down[0][:, :6], weights.down[1]),
        (weights.up[0][:6], weights.up[1][:6]), (weights.output[0][:, :6], weights.output[1]),
    )  # fmt: skip
    with launching.recording() as launches:
        kernels.atrous_pyramid(rand(1, 2, 4, 4), fewer)
    assert not any(launch.kernel == "_maps_kernel" for launch in launches)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"point": (torch.zeros(3, 2, 1, 1), torch.zeros(2))}, r"point must be \(2, 2, 1, 1\) and \(2,\)"),
        ({"dilations": (1, 2)}, r"dilations must be one for each of 3 branches, got \(1, 2\)"),
        ({"down": (torch.zeros(3, 8), torch.zeros(4))}, r"down must be \(3, 8\) and \(3,\).*got \(4,\)"),
        ({"up": (torch.zeros(8, 3).int(), torch.zeros(8))}, "up must be float16"),
        (
            {"output": (torch.zeros(2, 8, 1, 1, device="meta"), torch.zeros(2))},
            "output must be on the device",
        ),
    ],
)
def test_refuses_before_any_launch(device, change, words):
    with launching.recording() as launches, pytest.raises(ValueError, match=words):
        kernels.atrous_pyramid(torch.zeros(1, 2, 4, 4), weights_of(2)._replace(**change))
    assert not launches


def test_a_second_derivative_is_an_error(device):
    x = rand(1, 2, 3, 3, device=device).requires_grad_()
    y = from_leaves(x, *values_of(2, F64, device))
    with pytest.raises(RuntimeError, match="one derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_backward_form_is_the_gradient_of_the_definition():
    """The form for CPUs of both directions, which compiled graphs may hold."""
    x, values = rand(2, 3, 5, 4), values_of(3, F64, "cpu")
    y, *kept = OPS["atrous_pyramid"].cpu(x, values, DILATIONS)
    want, want_grads = run(reference, [x, *values])
    assert torch.allclose(y, want[0], atol=1e-12)
    grad = rand(*y.shape, seed=7)
    got = OPS["atrous_pyramid_backward"].definition(grad, x, kept, values, DILATIONS)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got, want_grads, strict=True))
