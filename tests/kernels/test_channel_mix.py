"""`channel_mix`, its masked form and its inverse: their equation, and kernels against the float64 definition.

Kernels run on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import BF16, F16, F32, F64, close, masks, rand, run, same_bits, to_float64

from fastflow import kernels
from fastflow.kernels.channel_mix import channel_mix_reference, channel_unmix_reference
from fastflow.numerics import acc_dtype

# -- definition ----------------------------------------------------------------------------------------------


@given(
    st.integers(0, 3), st.sampled_from([1, 2, 3, 8, 64]), st.integers(1, 6), st.integers(1, 6), st.booleans()
)
def test_mix_is_a_1x1_convolution_and_unmix_its_inverse(batch, channels, height, width, squeeze):
    x = rand(batch, channels, 2 * height, 2 * width)
    c = channels * (4 if squeeze else 1)
    weight = rand(c, c, seed=1) / c**0.5 + 2 * torch.eye(c)
    bias = rand(c, seed=2)
    y = kernels.channel_mix(x, weight, bias, squeeze=squeeze)
    inner = kernels.squeeze2x2(x) if squeeze else x
    assert torch.allclose(y, torch.einsum("ij,bjhw->bihw", weight, inner) + bias[:, None, None], atol=1e-12)
    back = kernels.channel_unmix(y, weight, bias, squeeze=squeeze)
    assert torch.allclose(back, x, atol=1e-8)
    assert torch.equal(kernels.channel_unmix(y, weight, bias, squeeze, torch.linalg.inv(weight)), back)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("squeeze", [False, True])
def test_mix_gradients(channels, squeeze):
    c = channels * (4 if squeeze else 1)
    values = [
        rand(2, channels, 2, 2).requires_grad_(),
        rand(c, c, seed=1).requires_grad_(),
        rand(c, seed=2).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: kernels.channel_mix(x, w, b, squeeze), values)
    values[0] = rand(2, c, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w, b: kernels.channel_unmix(y, w, b, squeeze), values)


def test_mix_is_not_narrowed_by_autocast():
    x, weight, bias = rand(2, 4, 3, 3, dtype=F32), rand(4, 4, seed=1).float(), rand(4, seed=2).float()
    with torch.autocast("cpu", dtype=BF16):
        narrow = kernels.channel_mix(x, weight, bias)
    assert torch.equal(narrow, kernels.channel_mix(x, weight, bias))


def test_mix_refuses():
    with pytest.raises(ValueError, match="weight"):
        kernels.channel_mix(torch.zeros(1, 2, 2, 2), torch.eye(3), torch.zeros(2))
    with pytest.raises(ValueError, match="bias"):
        kernels.channel_mix(torch.zeros(1, 2, 2, 2), torch.eye(2), torch.zeros(3))
    with pytest.raises(ValueError, match="even"):
        kernels.channel_mix(torch.zeros(1, 2, 3, 2), torch.eye(8), torch.zeros(8), squeeze=True)
    with pytest.raises(ValueError, match="inverse_weight"):
        kernels.channel_unmix(torch.zeros(1, 2, 2, 2), torch.eye(2), torch.zeros(2), False, torch.eye(3))
    with pytest.raises(ValueError, match="multiple of 4"):
        kernels.channel_unmix(torch.zeros(1, 2, 3, 2), torch.eye(2), torch.zeros(2), squeeze=True)


# -- kernels -------------------------------------------------------------------------------------------------


def check(
    device, shape, squeeze=False, inverse=False, stream=F64, net=None, masked=False, last=False, view=False
):
    net, acc = net or stream, acc_dtype(stream)
    channels = shape[1] * (4 if squeeze and not inverse else 1)
    x = rand(*shape, dtype=stream, device=device)
    if view:
        x = rand(shape[0], 2 * shape[1], *shape[2:], dtype=stream, device=device)[:, shape[1] :]
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = (rand(channels, channels, seed=1) / channels**0.5 + 2 * torch.eye(channels)).to(device, acc)
    bias = rand(channels, seed=2, dtype=acc, device=device)
    out_shape = shape if not squeeze else (shape[0], channels, shape[2] // 2, shape[3] // 2)
    mask = masks("even", out_shape[1:]).to(device)

    def op(x, weight, bias):
        if inverse:
            return kernels.channel_unmix(x, weight, bias, squeeze, torch.linalg.inv(weight))
        if masked:
            return kernels.channel_mix_masked(x, weight, bias, mask, squeeze, dtype=net)
        return kernels.channel_mix(x, weight, bias, squeeze)

    def reference(x, weight, bias):
        if inverse:
            return channel_unmix_reference(x, torch.linalg.inv(weight), bias, squeeze)
        y = channel_mix_reference(x, weight, bias, squeeze)
        return (y, y.masked_fill(~mask, 0.0)) if masked else y

    got, grads = run(op, [x, weight, bias])
    want, want_grads = run(reference, to_float64([x, weight, bias]), [r.dtype for r in got])
    pixels = max(1, x.numel() // x.shape[1])
    for value, wanted, dtype in zip(got, want, (stream, net), strict=False):
        close(value, wanted, dtype, channels)
    assert want_grads[0].shape == x.shape
    close(grads[0], want_grads[0], stream, channels)
    # The gradients of weight and bias are sums over all pixels.
    for grad, wanted in zip(grads[1:], want_grads[1:], strict=True):
        close(grad, wanted, acc, 4 * channels * pixels)


# Tiles have a power of two of channels: some of them full, some not.
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 12, 16, 24, 64])
@pytest.mark.parametrize("inverse", [False, True])
def test_channels(device, channels, inverse):
    check(device, (1, channels, 3, 7), inverse=inverse)
    check(device, (1, channels, 4, 8), inverse=inverse, stream=F32)


# One pixel, an empty batch, odd sizes of two chunks, and several chunks of both kernels.
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (0, 3, 4, 4), (2, 3, 23, 23), (1, 2, 46, 46), (1, 4, 24, 44)], ids=str
)
def test_sizes(device, shape):
    check(device, shape, stream=F32, masked=True)
    check(device, shape, inverse=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 6, 10), (1, 2, 18, 30), (0, 1, 4, 4)], ids=str)
def test_with_the_squeeze(device, shape, last):
    check(device, shape, squeeze=True, masked=True, last=last)
    inner = (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2)
    check(device, inner, squeeze=True, inverse=True, last=last)


@pytest.mark.parametrize(("stream", "net"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)])
def test_dtypes(device, stream, net):
    check(device, (2, 4, 12, 12), stream=stream, net=net, masked=True)
    check(device, (2, 4, 12, 12), stream=stream, inverse=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_layouts(device, last, view):
    check(device, (2, 3, 5, 7), last=last, view=view, masked=True)
    check(device, (2, 3, 5, 7), last=last, view=view, inverse=True)


def test_above_the_limit_falls_back_or_refuses(device):
    x, bias = rand(1, 65, 2, 2, device=device), rand(65, device=device)
    weight = torch.eye(65, dtype=F64, device=device)
    assert torch.allclose(kernels.channel_mix(x, weight, bias), x + bias[:, None, None])
    check(device, (1, 65, 2, 3), masked=True)
    kernels.set_backend("triton")
    try:
        with pytest.raises(ValueError, match=r"65 channels, more than the 64"):
            kernels.channel_mix(x, weight, bias)
    finally:
        kernels.set_backend("auto")


@pytest.mark.parametrize("squeeze", [False, True])
def test_gradcheck(device, squeeze):
    channels = 4 if squeeze else 2
    mask = masks("even", (channels, 1, 1)).to(device)
    x = rand(1, 1, 2, 2, device=device) if squeeze else rand(2, 2, 1, 1, device=device)
    weight = rand(channels, channels, seed=1, device=device) + 2 * torch.eye(channels, device=device)
    values = [v.requires_grad_() for v in (x, weight, rand(channels, seed=2, device=device))]
    assert torch.autograd.gradcheck(
        lambda x, w, b: kernels.channel_mix_masked(x, w, b, mask, squeeze), values
    )
    values[0] = rand(1, channels, 1, 1, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w, b: kernels.channel_unmix(y, w, b, squeeze), values)


def test_same_bits_twice_and_in_any_batch(device):
    """Samples of two chunks of both kernels."""
    x = rand(3, 2, 33, 32, dtype=F32, device=device)
    weight, bias = rand(2, 2, dtype=F32, device=device), rand(2, dtype=F32, device=device)
    first, second = (run(kernels.channel_mix, [x, weight, bias]) for _ in range(2))
    assert same_bits((*first[0], *first[1]), (*second[0], *second[1]))
    assert torch.equal(first[0][0][1:2], kernels.channel_mix(x[1:2], weight, bias))
