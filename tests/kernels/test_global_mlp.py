"""Global fusion and context: forms for CPUs and kernels against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, same_bits, to_float64
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels.layouts import is_channels_last
from fastflow.kernels.registry import OPS
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import pool_parts

NAMES = ["global_fusion", "global_context"]


def op(name):
    if name == "global_fusion":
        return lambda x, *w: kernels.global_fusion(x, w[:2], w[2:])
    return kernels.global_context


def written_out(name):
    def fusion(x, down, down_bias, up, up_bias):
        hidden = F.gelu(F.linear(x.mean(dim=(2, 3)), down, down_bias))
        return x + F.linear(hidden, up, up_bias)[:, :, None, None]

    def context(x, down, up):
        hidden = F.relu(F.linear(x.mean(dim=(2, 3)), down))
        return x * (1.0 + torch.sigmoid(F.linear(hidden, up)))[:, :, None, None]

    return fusion if name == "global_fusion" else context


def weights(name, channels, hidden, dtype, device):
    shapes = [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    chosen = shapes if name == "global_fusion" else shapes[::2]
    return [rand(*shape, dtype=dtype, seed=i + 1, device=device) for i, shape in enumerate(chosen)]


def check(name, device, shape, dtype=F64, hidden=3, last=False, view=False):
    x = rand(*shape, dtype=dtype, device=device)
    if view:
        x = rand(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, device=device)[:, shape[1] :]
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    values = [x, *weights(name, shape[1], hidden, F64 if dtype == F64 else F32, device)]
    got, grads = run(op(name), values)
    want, want_grads = run(written_out(name), to_float64(values), [dtype])
    assert is_channels_last(got[0]) == is_channels_last(x)
    close(got[0], want[0], dtype, shape[1])
    length = max(1, x.numel())
    for grad, wanted, value in zip(grads, want_grads, values, strict=True):
        close(grad, wanted, value.dtype, shape[1] if value is values[0] else length)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "dtype", "hidden"),
    [
        ((1, 1, 1, 1), F64, 1),
        ((0, 3, 4, 4), F64, 2),
        ((2, 3, 5, 7), F64, 5),
        ((1, 40, 3, 5), F32, 50),
        ((17, 2, 3, 3), F32, 3),
        ((1, 2, 34, 62), F32, 2),
    ],
    ids=str,
)
def test_shapes(name, device, shape, dtype, hidden):
    check(name, device, shape, dtype, hidden)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last", [False, True])
def test_dtypes_and_layouts(name, device, last):
    for dtype in (BF16, F16):
        check(name, device, (2, 4, 6, 5), dtype, last=last)
    check(name, device, (2, 3, 5, 6), last=last, view=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, device):
    values = [rand(2, 2, 2, 3, device=device), *weights(name, 2, 2, F64, device)]
    assert torch.autograd.gradcheck(op(name), [v.requires_grad_() for v in values], fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_twice_and_in_any_batch(name, device, monkeypatch):
    monkeypatch.setattr(pool_parts, "MAX_RUN_PIXELS", 32)
    x, values = rand(3, 2, 9, 8, dtype=F32, device=device), weights(name, 2, 3, F32, device)
    first, second = (run(op(name), [x, *values]) for _ in range(2))
    assert same_bits((*first[0], *first[1]), (*second[0], *second[1]))
    one, three = x[1:2].detach().requires_grad_(), x.requires_grad_()
    alone, together = op(name)(one, *values), op(name)(three, *values)
    assert torch.equal(alone, together[1:2])
    upper = rand(*x.shape, dtype=F32, seed=5, device=device)
    (got,) = torch.autograd.grad(alone, one, upper[1:2])
    (want,) = torch.autograd.grad(together, three, upper)
    assert torch.equal(got, want[1:2])
    with torch.no_grad():
        assert torch.equal(op(name)(x, *values), together)


@pytest.mark.parametrize("name", NAMES)
def test_launches(name, device):
    values = [rand(2, 4, 40, 40, dtype=BF16, device=device), *weights(name, 4, 2, F32, device)]
    leaves = [value.requires_grad_() for value in values]
    with launching.recording() as launches:
        y = op(name)(*leaves)
        assert len(launches) == 3
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert len(launches) == 6


@pytest.mark.parametrize("name", NAMES)
def test_the_forms_for_cpus_are_the_definition(name):
    values = [rand(2, 3, 5, 4), *weights(name, 3, 2, F64, "cpu")]
    want, want_grads = run(written_out(name), values)
    assert torch.allclose(op(name)(*values), want[0], atol=1e-12)
    x, *layers = values
    gated = name == "global_context"
    y, *kept = OPS["global_mlp"].cpu(x, layers, gated)
    assert torch.allclose(y, want[0], atol=1e-12)
    got = OPS["global_mlp_backward"].definition(rand(*y.shape, seed=7), x, kept, layers, gated)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got, want_grads, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 4), "x must be a floating-point"),
        (1, torch.zeros(2, 3), r"down must be \(2, 4\) for x"),
        (-1, torch.zeros(3), r"(up|up's bias) must be \(4"),
        (1, torch.zeros(2, 4).int(), "down must be float16"),
        (1, torch.zeros(2, 4, device="meta"), "down must be on the device"),
    ],
)
def test_refuses_before_any_launch(name, position, value, words, device):
    values = [torch.zeros(1, 4, 3, 3), *weights(name, 4, 2, F32, "cpu")]
    values[position] = value
    with launching.recording() as launches, pytest.raises(ValueError, match=words):
        op(name)(*values)
    assert not launches


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_an_error(name, device):
    x = rand(1, 2, 3, 3, device=device).requires_grad_()
    y = op(name)(x, *weights(name, 2, 2, F64, device))
    with pytest.raises(RuntimeError, match="one derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
