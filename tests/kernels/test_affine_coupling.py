"""`affine_coupling` and `coupling_step`: their equation, and kernels against the float64 definition.

Kernels run on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import BF16, F16, F32, F64, close, masks, rand, random_mask, run, same_bits, to_float64

from fastflow import kernels
from fastflow.kernels.affine_coupling import affine_coupling_reference, finish_step_reference
from fastflow.numerics import acc_dtype

# -- definition ----------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


@given(SHAPES, st.booleans(), st.sampled_from([0.5, 1.0]))
def test_coupling_by_its_equation(shape, one_channel_mask, bound):
    x, raw, shift = rand(*shape), rand(*shape, seed=1), rand(*shape, seed=2)
    mask = random_mask(1 if one_channel_mask else shape[1], *shape[2:])
    y, logdet = kernels.affine_coupling(x, raw, shift, mask, bound)
    s = bound * torch.tanh(raw)
    active = (~mask).expand(shape)
    assert torch.allclose(y, torch.where(active, x * s.exp() + shift, x), atol=1e-14)
    assert torch.allclose(logdet, (s * active).sum(dim=(1, 2, 3)), atol=1e-12)
    assert torch.equal(y[mask.expand(shape)], x[mask.expand(shape)])
    back, negative = kernels.affine_coupling(y, raw, shift, mask, bound, inverse=True)
    assert torch.allclose(back, x, atol=1e-12) and torch.equal(negative, -logdet)


@pytest.mark.parametrize("inverse", [False, True])
def test_coupling_gradients(inverse):
    mask = random_mask(3, 2, 2)
    values = [rand(2, 3, 2, 2, seed=i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(
        lambda x, r, t: kernels.affine_coupling(x, r, t, mask, 0.5, inverse), values
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_coupling_sums_in_float32(dtype):
    x, raw, shift = (rand(2, 1, 64, 64, dtype=dtype, seed=i) for i in range(3))
    mask = random_mask(1, 64, 64)
    y, logdet = kernels.affine_coupling(x, raw, shift, mask)
    want_y, want = kernels.affine_coupling(x.double(), raw.double(), shift.double(), mask)
    assert y.dtype == dtype and logdet.dtype == F32
    assert (logdet.double() - want).abs().max() < 1e-3
    assert (y.double() - want_y).abs().max() < 4 * torch.finfo(dtype).eps * want_y.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_coupling_honours_strides(memory_format):
    x, raw, shift = (rand(2, 3, 4, 5, seed=i).contiguous(memory_format=memory_format) for i in range(3))
    mask = random_mask(3, 4, 5)
    plain = kernels.affine_coupling(*(v.contiguous() for v in (x, raw, shift)), mask)
    assert same_bits(kernels.affine_coupling(x, raw, shift, mask), plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be"),
        ({"raw_scale": torch.zeros(2, 3, 4, 5)}, "raw_scale"),
        ({"shift": torch.zeros(1, 3, 4, 4)}, "shift"),
        ({"mask": torch.zeros(3, 4, 4)}, "mask must be bool"),
        ({"mask": torch.zeros(2, 4, 4, dtype=torch.bool)}, "mask must be bool"),
        ({"bound": 0.0}, "bound"),
    ],
)
def test_coupling_refuses(change, words):
    good = {
        "x": torch.zeros(2, 3, 4, 4),
        "raw_scale": torch.zeros(2, 3, 4, 4),
        "shift": torch.zeros(2, 3, 4, 4),
    }
    with pytest.raises(ValueError, match=words):
        kernels.affine_coupling(**{**good, "mask": torch.zeros(3, 4, 4, dtype=torch.bool), **change})


# -- kernels -------------------------------------------------------------------------------------------------


def check(device, shape, stream=F64, net=None, mask="even", inverse=False, affine=False, layouts="cc"):
    net, acc = net or stream, acc_dtype(stream)
    formats = {"c": torch.contiguous_format, "l": torch.channels_last}
    values = [
        rand(*shape, dtype=dtype, seed=i, device=device).contiguous(memory_format=formats[layout])
        for i, (dtype, layout) in enumerate(((stream, layouts[0]), (net, layouts[1]), (net, layouts[1])))
    ]
    if affine:
        values.append(torch.tensor([1.7, -0.3], dtype=acc, device=device))
    mask = masks(mask, shape[1:]).to(device)
    next_mask = ~masks("even", shape[1:]).to(device)

    def op(x, raw, shift, pair=None):
        return kernels.coupling_step(x, raw, shift, mask, next_mask, 0.5, inverse, affine=pair, dtype=net)

    def reference(x, raw, shift, pair=None):
        y, logdet = affine_coupling_reference(x, raw, shift, mask, 0.5, inverse)
        y, masked = finish_step_reference(y, next_mask, pair, inverse, F64)
        return y, logdet, masked

    (y, logdet, masked), grads = run(op, values)
    want, want_grads = run(reference, to_float64(values), [stream, acc, net])
    length = y[0].numel() if y.numel() else 1
    close(y, want[0], stream)
    close(logdet, want[1], acc, length)
    close(masked, want[2], net)
    for grad, wanted, value in zip(grads[:3], want_grads[:3], values, strict=False):
        close(grad, wanted, value.dtype)
    if affine:
        close(grads[3], want_grads[3], acc, y.numel())
    kept = mask.expand(shape[1:]).expand(shape)
    if not affine:
        assert torch.equal(y[kept], values[0][kept]), "the passive part is not bit for bit"
    assert all((grad[kept] == 0).all() for grad in grads[1:3])


# Odd sizes, one pixel, an empty batch, many channels, and more elements than the smaller block is for.
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (1, 1, 1, 1), (0, 2, 4, 4), (2, 1, 23, 23), (1, 1, 92, 92), (1, 64, 6, 5)],
    ids=str,
)
@pytest.mark.parametrize("inverse", [False, True])
def test_shapes(device, shape, inverse):
    check(device, shape, inverse=inverse)
    check(device, shape, stream=F32, inverse=inverse)


@pytest.mark.parametrize(
    ("stream", "net"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F32)]
)
def test_dtypes(device, stream, net):
    for inverse in (False, True):
        check(device, (2, 2, 24, 24), stream, net, inverse=inverse)


@pytest.mark.parametrize("mask", ["all", "none", "even", "odd", "plane"])
def test_masks(device, mask):
    for shape in ((2, 3, 4, 6), (1, 1, 23, 23)):
        check(device, shape, mask=mask)
        check(device, shape, mask=mask, inverse=True)


@pytest.mark.parametrize("layouts", ["cc", "ll", "cl", "lc"])
@pytest.mark.parametrize("inverse", [False, True])
def test_layouts(device, layouts, inverse):
    check(device, (2, 3, 5, 8), layouts=layouts, inverse=inverse)


@pytest.mark.parametrize("inverse", [False, True])
def test_with_the_mix_of_the_next_step(device, inverse):
    check(device, (3, 1, 23, 23), inverse=inverse, affine=True)
    check(device, (1, 1, 46, 46), stream=F32, inverse=inverse, affine=True)


def test_reads_views_of_a_batch(device):
    whole = [rand(3, 4, 6, 6, seed=i, device=device) for i in range(3)]
    views = [whole[0][:, :2], whole[1][:, 2:], whole[2][:1, :2].expand(3, -1, -1, -1)]
    mask = masks("even", (2, 6, 6)).to(device)
    got = kernels.affine_coupling(*views, mask)
    want = affine_coupling_reference(*views, mask, 0.5, False)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("large", [0.2, 3.0, 30.0, 200.0])
def test_tanh_near_and_far_from_zero(device, large):
    raw = torch.linspace(-large, large, 2048, dtype=F32, device=device).view(1, 1, 1, -1)
    zero, mask = torch.zeros_like(raw), torch.zeros(1, 1, 2048, dtype=torch.bool, device=device)
    y, _ = kernels.affine_coupling(zero + 1, raw, zero, mask, 1.0)
    assert torch.allclose(y.double().log(), raw.double().tanh(), rtol=0, atol=4e-7)
    _, total = kernels.affine_coupling(zero, raw * 1e-4, zero, mask, 1.0)
    assert abs(float(total)) < 2e-6


@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(device, inverse):
    mask = masks("even", (1, 1, 2)).to(device)
    values = [rand(2, 1, 1, 2, seed=i, device=device).requires_grad_() for i in range(3)]
    pair = torch.tensor([1.3, 0.2], dtype=F64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, r, t, a: kernels.coupling_step(x, r, t, mask, ~mask, 0.5, inverse, affine=a),
        (*values, pair),
    )


def test_a_second_derivative_is_an_error(device):
    x, raw, shift = (rand(1, 1, 2, 2, seed=i, device=device).requires_grad_() for i in range(3))
    y, _ = kernels.affine_coupling(x, raw, shift, masks("even", (1, 2, 2)).to(device))
    with pytest.raises(RuntimeError, match="set_backend"):
        torch.autograd.grad(y.sum(), raw, create_graph=True)


def test_same_bits_twice_and_in_any_batch(device):
    """Samples of three chunks each; the log-density of the result, of two, goes on from there."""
    shape = (3, 2, 33, 32)
    values = [rand(*shape, dtype=F32, seed=i, device=device) for i in range(3)]
    mask = masks("even", shape[1:]).to(device)

    def everything(*values):
        y, logdet, masked = kernels.coupling_step(*values, mask, ~mask)
        return y, logdet, masked, kernels.latent_prior(y.flatten(1))

    first, first_grads = run(everything, values)
    second, second_grads = run(everything, values)
    assert same_bits((*first, *first_grads), (*second, *second_grads))
    alone = everything(*(v[1:2] for v in values))
    assert same_bits([value[1:2] for value in first], alone)
