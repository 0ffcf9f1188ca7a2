"""Ops of the flow step: definition, gradients, inverses, what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow import kernels


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.5


SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


# -- affine_coupling ------------------------------------------------------------------------------------------------------


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
    mask = random_mask(3, 4, 4)
    values = [rand(2, 3, 4, 4, seed=i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda x, r, t: kernels.affine_coupling(x, r, t, mask, 0.5, inverse), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coupling_sums_in_float32(dtype):
    x, raw, shift = (rand(2, 1, 64, 64, dtype=dtype, seed=i) for i in range(3))
    mask = random_mask(1, 64, 64)
    y, logdet = kernels.affine_coupling(x, raw, shift, mask)
    want_y, want = kernels.affine_coupling(x.double(), raw.double(), shift.double(), mask)
    assert y.dtype == dtype and logdet.dtype == torch.float32
    assert (logdet.double() - want).abs().max() < 1e-3
    assert (y.double() - want_y).abs().max() < 4 * torch.finfo(dtype).eps * want_y.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_coupling_honours_strides(memory_format):
    x, raw, shift = (rand(2, 3, 4, 5, seed=i).contiguous(memory_format=memory_format) for i in range(3))
    mask = random_mask(3, 4, 5)
    plain = kernels.affine_coupling(*(v.contiguous() for v in (x, raw, shift)), mask)
    assert all(torch.equal(a, b) for a, b in zip(kernels.affine_coupling(x, raw, shift, mask), plain, strict=True))


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
    good = {"x": torch.zeros(2, 3, 4, 4), "raw_scale": torch.zeros(2, 3, 4, 4), "shift": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(ValueError, match=words):
        kernels.affine_coupling(**{**good, "mask": torch.zeros(3, 4, 4, dtype=torch.bool), **change})


# -- coupling_head --------------------------------------------------------------------------------------------------------


def head_arguments(dtype=torch.float64):
    size = 2 * 3 * 4
    return (
        rand(5, 2, 3, 4, dtype=dtype),
        (rand(5, 6, seed=1, dtype=dtype), rand(5, 6, seed=2, dtype=dtype)),
        (rand(size, 6, seed=3, dtype=dtype), rand(size, 6, seed=4, dtype=dtype)),
        (rand(3, size, seed=5, dtype=dtype), rand(3, size, seed=6, dtype=dtype)),
        torch.tensor([0, 2, 1, 1, 0]),
        random_mask(2, 3, 4),
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_head_is_two_linear_maps_and_a_coupling(inverse):
    x, features, weights, tables, rows, mask = head_arguments()
    raw, shift = ((f @ w.T + t[rows]).view_as(x) for f, w, t in zip(features, weights, tables, strict=True))
    got = kernels.coupling_head(x, features, weights, tables, rows, mask, 0.5, inverse)
    want = kernels.affine_coupling(x, raw, shift, mask, 0.5, inverse)
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


def test_head_gradients():
    x, features, weights, tables, rows, mask = head_arguments()
    leaves = [v.requires_grad_() for v in (x, *features, *weights, *tables)]
    assert torch.autograd.gradcheck(
        lambda x, f1, f2, w1, w2, t1, t2: kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), rows, mask), leaves
    )


def test_head_refuses():
    x, features, weights, tables, rows, mask = head_arguments()
    with pytest.raises(ValueError, match="tables"):
        kernels.coupling_head(x, features, weights, (tables[0][:, 1:], tables[1]), rows, mask)
    with pytest.raises(ValueError, match="features"):
        kernels.coupling_head(x, (features[0][1:], features[1]), weights, tables, rows, mask)


# -- channel_mix ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3), st.sampled_from([1, 2, 3, 8, 64]), st.integers(1, 6), st.integers(1, 6), st.booleans())
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
    values = [rand(2, channels, 4, 2).requires_grad_(), rand(c, c, seed=1).requires_grad_(), rand(c, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w, b: kernels.channel_mix(x, w, b, squeeze), values)
    values[0] = rand(2, c, 2, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w, b: kernels.channel_unmix(y, w, b, squeeze), values)


def test_mix_is_not_narrowed_by_autocast():
    x, weight, bias = rand(2, 4, 3, 3, dtype=torch.float32), rand(4, 4, seed=1).float(), rand(4, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
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


# -- squeeze --------------------------------------------------------------------------------------------------------------


@given(SHAPES)
def test_squeeze_by_its_index_and_back(shape):
    batch, channels, height, width = shape
    x = rand(batch, channels, 2 * height, 2 * width)
    y = kernels.squeeze2x2(x)
    for c in range(channels):
        for row in range(2):
            for col in range(2):
                assert torch.equal(y[:, 4 * c + 2 * row + col], x[:, c, row::2, col::2])
    assert torch.equal(kernels.unsqueeze2x2(y), x)


def test_squeeze_refuses():
    with pytest.raises(ValueError, match="even"):
        kernels.squeeze2x2(torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        kernels.unsqueeze2x2(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="floating-point"):
        kernels.squeeze2x2(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


# -- latent_prior ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 4097), (2, 33856), (0, 5), (5, 0)])
def test_prior_is_the_normal_density(shape):
    z = rand(*shape)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    assert torch.allclose(kernels.latent_prior(z), want, rtol=1e-12)
    assert torch.allclose(kernels.latent_prior(z.float()).double(), want, rtol=2e-6)


def test_a_sample_has_its_bits_whatever_is_beside_it():
    z = rand(8, 33856, dtype=torch.float32)
    together = kernels.latent_prior(z)
    assert all(torch.equal(together[i : i + 1], kernels.latent_prior(z[i : i + 1])) for i in range(8))


def test_prior_gradient_and_refusal():
    z = rand(3, 50).requires_grad_()
    assert torch.autograd.gradcheck(kernels.latent_prior, z)
    with pytest.raises(ValueError, match="2-D"):
        kernels.latent_prior(torch.zeros(3))
