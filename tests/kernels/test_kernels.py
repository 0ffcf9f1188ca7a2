"""Triton kernels of the flow step against their float64 references, forward and backward; on a GPU or in the interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numerics import BF16, F16, F32, F64, close, masks, rand, run, wide

from fastflow import kernels
from fastflow.kernels import _launch, _library
from fastflow.kernels._launch import elements, kernel, locate
from fastflow.kernels.affine_coupling import affine_coupling_reference, finish_step_reference
from fastflow.kernels.channel_mix import channel_mix_reference, channel_unmix_reference
from fastflow.kernels.latent_prior import latent_prior_reference
from fastflow.kernels.squeeze import squeeze2x2_reference, unsqueeze2x2_reference

if TYPE_CHECKING:
    import triton.language as tl

# -- affine_coupling ------------------------------------------------------------------------------------------------------


def check_coupling(device, shape, stream=F64, net=None, mask="even", inverse=False, affine=False, recompute=False, layouts="cc"):
    net, acc = net or stream, _library.accumulator(stream)
    formats = {"c": torch.contiguous_format, "l": torch.channels_last}
    values = [
        rand(*shape, dtype=dtype, seed=i, device=device).contiguous(memory_format=formats[layout])
        for i, (dtype, layout) in enumerate(((stream, layouts[0]), (net, layouts[1]), (net, layouts[1])))
    ]
    if affine:
        values.append(torch.tensor([1.7, -0.3], dtype=acc, device=device))
    mask = masks(mask, shape[1:]).to(device)
    following = ~masks("even", shape[1:]).to(device)

    def op(x, raw, shift, pair=None):
        return kernels.coupling_step(x, raw, shift, mask, following, 0.5, inverse, affine=pair, dtype=net, recompute=recompute)

    def reference(x, raw, shift, pair=None):
        y, logdet = affine_coupling_reference(x, raw, shift, mask, 0.5, inverse)
        y, masked = finish_step_reference(y, following, pair, inverse, F64)
        return y, logdet, masked

    (y, logdet, masked), grads = run(op, values)
    want, want_grads = run(reference, wide(values), [stream, acc, net])
    # A rebuilt x carries the rounding of the result it was rebuilt from.
    loose = 4 if recompute else 1
    length = y[0].numel() if y.numel() else 1
    close(y, want[0], stream)
    close(logdet, want[1], acc, length)
    close(masked, want[2], net)
    for grad, wanted, value in zip(grads[:3], want_grads[:3], values, strict=False):
        close(grad, wanted, value.dtype, loose)
    if affine:
        close(grads[3], want_grads[3], acc, y.numel())
    kept = mask.expand(shape[1:]).expand(shape)
    if not affine:
        assert torch.equal(y[kept], values[0][kept]), "the passive part is not bit for bit"
    assert all((grad[kept] == 0).all() for grad in grads[1:3])


SHAPES = [
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (0, 2, 4, 4),
    (2, 1, 23, 23),
    (2, 2, 46, 46),
    (1, 1, 92, 92),
    (1, 1, 184, 184),
    (1, 64, 6, 5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_coupling_shapes(device, shape, inverse):
    check_coupling(device, shape, inverse=inverse)
    check_coupling(device, shape, stream=F32, inverse=inverse)


@pytest.mark.parametrize(("stream", "net"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F32)])
@pytest.mark.parametrize("recompute", [False, True])
def test_coupling_dtypes(device, stream, net, recompute):
    for inverse in (False, True):
        check_coupling(device, (2, 2, 24, 24), stream, net, inverse=inverse, recompute=recompute)


@pytest.mark.parametrize("mask", ["all", "none", "even", "odd", "plane"])
def test_coupling_masks(device, mask):
    for shape in ((2, 3, 4, 6), (1, 1, 23, 23)):
        check_coupling(device, shape, mask=mask)
        check_coupling(device, shape, mask=mask, inverse=True, recompute=True)


@pytest.mark.parametrize("layouts", ["cc", "ll", "cl", "lc"])
def test_coupling_layouts(device, layouts):
    for recompute in (False, True):
        check_coupling(device, (2, 3, 5, 8), layouts=layouts, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_coupling_with_the_mix_of_the_next_step(device, inverse, recompute):
    check_coupling(device, (3, 1, 23, 23), inverse=inverse, affine=True, recompute=recompute)
    check_coupling(device, (1, 1, 46, 46), stream=F32, inverse=inverse, affine=True, recompute=recompute)


def test_coupling_reads_views_of_a_batch(device):
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


# -- channel_mix ----------------------------------------------------------------------------------------------------------


def check_mix(
    device, shape, squeeze=False, undo=False, recompute=False, stream=F64, net=None, masked=False, last=False, view=False
):
    net, acc = net or stream, _library.accumulator(stream)
    channels = shape[1] * (4 if squeeze and not undo else 1)
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
        if undo:
            return kernels.channel_unmix(x, weight, bias, squeeze, torch.linalg.inv(weight), recompute=recompute)
        if masked:
            return kernels.channel_mix_masked(x, weight, bias, mask, squeeze, dtype=net, recompute=recompute)
        return kernels.channel_mix(x, weight, bias, squeeze, recompute=recompute)

    def reference(x, weight, bias):
        if undo:
            return channel_unmix_reference(x, torch.linalg.inv(weight), bias, squeeze)
        y = channel_mix_reference(x, weight, bias, squeeze)
        return (y, y.masked_fill(~mask, 0.0)) if masked else y

    got, grads = run(op, [x, weight, bias])
    want, want_grads = run(reference, wide([x, weight, bias]), [r.dtype for r in got])
    pixels = max(1, x.numel() // x.shape[1])
    loose = 16 if recompute else 4
    for value, wanted, dtype in zip(got, want, (stream, net), strict=False):
        close(value, wanted, dtype, channels)
    close(grads[0], wanted := want_grads[0], stream, channels)
    assert wanted.shape == x.shape
    # Weight gradients are sums over all pixels, of products rounded to the stream's dtype when x was rebuilt from it.
    for grad, wanted in zip(grads[1:], want_grads[1:], strict=True):
        if recompute and stream in (BF16, F16):
            assert float((grad.double() - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())
        else:
            close(grad, wanted, acc, loose * channels * pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 12, 16, 33, 64])
@pytest.mark.parametrize("undo", [False, True])
def test_mix_channels(device, channels, undo):
    check_mix(device, (2, channels, 3, 7), undo=undo)
    check_mix(device, (1, channels, 4, 8), undo=undo, stream=F32, recompute=True)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (0, 3, 4, 4), (2, 3, 23, 23), (1, 2, 46, 46), (1, 4, 92, 92), (1, 1, 184, 184)], ids=str
)
def test_mix_sizes(device, shape):
    check_mix(device, shape, stream=F32, masked=True)
    check_mix(device, shape, undo=True, recompute=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 6, 10), (1, 2, 46, 46), (0, 1, 4, 4)], ids=str)
def test_mix_with_the_squeeze(device, shape, last, recompute):
    check_mix(device, shape, squeeze=True, masked=True, last=last, recompute=recompute)
    inner = (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2)
    check_mix(device, inner, squeeze=True, undo=True, last=last, recompute=recompute)


@pytest.mark.parametrize(("stream", "net"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)])
def test_mix_dtypes(device, stream, net):
    for recompute in (False, True):
        check_mix(device, (2, 4, 12, 12), stream=stream, net=net, masked=True, recompute=recompute)
    check_mix(device, (2, 4, 12, 12), stream=stream, undo=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_mix_layouts(device, last, view):
    check_mix(device, (2, 3, 5, 7), last=last, view=view, masked=True)
    check_mix(device, (2, 3, 5, 7), last=last, view=view, undo=True)


def test_mix_above_the_limit_falls_back_or_refuses(device):
    x, weight, bias = rand(1, 65, 2, 2, device=device), torch.eye(65, dtype=F64, device=device), rand(65, device=device)
    assert torch.allclose(kernels.channel_mix(x, weight, bias), x + bias[:, None, None])
    check_mix(device, (1, 65, 2, 3), masked=True)
    kernels.set_backend("triton")
    try:
        with pytest.raises(ValueError, match=r"65 channels, more than the 64"):
            kernels.channel_mix(x, weight, bias)
    finally:
        kernels.set_backend("auto")


# -- squeeze and prior ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", [(2, 3, 6, 10), (1, 1, 2, 2), (0, 2, 4, 4), (1, 2, 46, 46), (1, 1, 184, 184)], ids=str)
def test_squeeze_moves_every_element(device, shape, dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = rand(*shape, dtype=dtype, device=device).contiguous(memory_format=layout)
        y = kernels.squeeze2x2(x)
        assert torch.equal(y, squeeze2x2_reference(x))
        y = y.contiguous(memory_format=layout)
        assert torch.equal(kernels.unsqueeze2x2(y), unsqueeze2x2_reference(y))
    view = rand(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, device=device)[:, shape[1] :]
    assert torch.equal(kernels.squeeze2x2(view), squeeze2x2_reference(view))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4097), (2, 33856), (0, 5), (5, 0), (2, 529)], ids=str)
def test_prior(device, shape, dtype):
    z = rand(*shape, dtype=dtype, device=device)
    (got,), (grad,) = run(kernels.latent_prior, [z])
    (want,), (wanted,) = run(latent_prior_reference, wide([z]), [_library.accumulator(dtype)])
    close(got, want, _library.accumulator(dtype))
    close(grad, wanted, dtype)
    wide_view = rand(2, 64, dtype=dtype, device=device)[:, 1:50]
    close(kernels.latent_prior(wide_view), latent_prior_reference(wide_view.double()), _library.accumulator(dtype), 64)


# -- derivatives, repeatability, size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck_coupling(device, inverse, recompute):
    mask = masks("even", (1, 2, 3)).to(device)
    values = [rand(2, 1, 2, 3, seed=i, device=device).requires_grad_() for i in range(3)]
    pair = torch.tensor([1.3, 0.2], dtype=F64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, r, t, a: kernels.coupling_step(x, r, t, mask, ~mask, 0.5, inverse, affine=a, recompute=recompute),
        (*values, pair),
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("squeeze", [False, True])
def test_gradcheck_mix(device, squeeze, recompute):
    channels = 4 if squeeze else 2
    mask = masks("even", (channels, 1, 2)).to(device)
    x = rand(1, 1, 2, 4, device=device) if squeeze else rand(1, 2, 1, 2, device=device)
    weight = rand(channels, channels, seed=1, device=device) + 2 * torch.eye(channels, device=device)
    values = [v.requires_grad_() for v in (x, weight, rand(channels, seed=2, device=device))]
    assert torch.autograd.gradcheck(
        lambda x, w, b: kernels.channel_mix_masked(x, w, b, mask, squeeze, recompute=recompute), values
    )
    values[0] = rand(1, channels, 1, 2, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w, b: kernels.channel_unmix(y, w, b, squeeze, recompute=recompute), values)


def test_gradcheck_prior_and_squeeze(device):
    assert torch.autograd.gradcheck(kernels.latent_prior, rand(2, 5, device=device).requires_grad_())
    x = rand(1, 1, 2, 4, device=device).requires_grad_()
    assert torch.autograd.gradcheck(kernels.squeeze2x2, x)
    assert torch.autograd.gradgradcheck(kernels.squeeze2x2, x)
    assert torch.autograd.gradcheck(kernels.unsqueeze2x2, rand(1, 4, 1, 2, device=device).requires_grad_())


def test_a_second_derivative_is_an_error(device):
    x, raw, shift = (rand(1, 1, 2, 2, seed=i, device=device).requires_grad_() for i in range(3))
    y, _ = kernels.affine_coupling(x, raw, shift, masks("even", (1, 2, 2)).to(device))
    with pytest.raises(RuntimeError, match="set_backend"):
        torch.autograd.grad(y.sum(), raw, create_graph=True)


def test_same_bits_twice_and_in_any_batch(device):
    shape = (3, 2, 46, 46)
    values = [rand(*shape, dtype=F32, seed=i, device=device) for i in range(3)]
    mask = masks("even", shape[1:]).to(device)

    def all_of_it(*values):
        y, logdet, masked = kernels.coupling_step(*values, mask, ~mask)
        return y, logdet, masked, kernels.latent_prior(y.flatten(1))

    first, first_grads = run(all_of_it, values)
    second, second_grads = run(all_of_it, values)
    assert all(torch.equal(a, b) for a, b in zip((*first, *first_grads), (*second, *second_grads), strict=True))
    alone = all_of_it(*(v[1:2] for v in values))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))
    weight, bias = rand(2, 2, dtype=F32, device=device), rand(2, dtype=F32, device=device)
    pairs = [run(lambda x, w, b: kernels.channel_mix(x, w, b), [values[0], weight, bias]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip((*pairs[0][0], *pairs[0][1]), (*pairs[1][0], *pairs[1][1]), strict=True))
    assert torch.equal(pairs[0][0][0][1:2], kernels.channel_mix(values[0][1:2], weight, bias))


def far_apart(shape, distance, dtype=torch.float16):
    """A batch whose samples lie `distance` elements apart: memory that is reserved, of which a few pages are ever touched."""
    size = (shape[0] - 1) * distance + int(np.prod(shape[1:]))
    memory = torch.from_numpy(np.zeros(size, dtype=np.float16)).to(dtype)
    x = memory.as_strided(shape, (distance, shape[2] * shape[3], shape[3], 1))
    x.copy_(rand(*shape, dtype=dtype))
    return x


def test_addresses_beyond_two_to_the_31(monkeypatch, device):
    if device == "cuda":
        pytest.skip("reserves memory that only a CPU does not fill")
    # Two samples whose distance alone, and one whose place in the batch, passes 2^31 elements.
    x = far_apart((2, 4, 4, 4), 2**31 + 16)
    small = x.contiguous()
    mask = masks("even", (4, 4, 4))
    weight, bias = torch.eye(4) + 0.1, torch.ones(4)
    for op in (
        lambda v: kernels.affine_coupling(v, small, small, mask)[0],
        lambda v: kernels.affine_coupling(small, v, small, mask)[0],
        lambda v: kernels.channel_mix(v, weight, bias),
        lambda v: kernels.channel_mix(v, torch.eye(16), torch.ones(16), squeeze=True),
        kernels.squeeze2x2,
        kernels.unsqueeze2x2,
        lambda v: kernels.latent_prior(v.flatten(1) if v is small else v.as_strided((2, 64), (v.stride(0), 1))),
    ):
        assert torch.equal(op(x), op(small))


@kernel
def _probe_kernel(out_ptr, pid, n_chunks, n_v, WIDE: tl.constexpr):
    b, chunk = locate(pid, n_chunks, WIDE)
    tl.store(out_ptr, b * elements(n_v, 8, WIDE) + chunk * 2048)
    tl.store(out_ptr + 1, chunk * 2048)


def test_offsets_within_a_sample_beyond_two_to_the_31(device):
    """The place that a program computes, for program numbers and sizes that no memory holds."""
    assert _launch.is_wide(2**31 - 100, 2048) and not _launch.is_wide(2**31 - 5000, 2048)
    out = torch.zeros(2, dtype=torch.int64, device=device)
    n = 3 * 2**31
    chunks = n // 2048
    pid = 70_000 * chunks + chunks - 1
    _launch.launch(_probe_kernel, 1, out, 1, out, pid, chunks, n // 8, WIDE=True)
    assert out.tolist() == [70_000 * n + n - 2048, n - 2048]
    # Beyond 65,535 samples of a size that needs no int64 within a sample, but does with the batch.
    _launch.launch(_probe_kernel, 1, out, 1, out, 99_999 * 17 + 16, 17, 33856 // 8, WIDE=False)
    assert out.tolist() == [99_999 * 33856 + 16 * 2048, 16 * 2048]


def test_grids_have_one_axis_and_an_end(device):
    z = torch.empty(1, 8).expand(70_000, 8)
    with _launch.recording() as launches:
        kernels.latent_prior(z if device == "cpu" else z.to(device))
    assert launches[0].programs == 70_000
    with pytest.raises(ValueError, match="split the batch"):
        _launch.launch(_launch._sum_rows_kernel, 2**31, z, 1)


# -- autocast -------------------------------------------------------------------------------------------------------------


def test_autocast_never_narrows_the_stream(device):
    x, raw, shift = (
        rand(2, 2, 4, 4, dtype=F32, device=device),
        *(rand(2, 2, 4, 4, dtype=BF16, seed=i, device=device) for i in (1, 2)),
    )
    mask = masks("even", (2, 4, 4)).to(device)
    weight, bias = rand(2, 2, dtype=F32, device=device), rand(2, dtype=F32, device=device)

    def step(x, raw, shift, weight, bias):
        y, logdet = kernels.affine_coupling(kernels.channel_mix(x, weight, bias), raw, shift, mask)
        return y, logdet, kernels.latent_prior(y.flatten(1))

    values = [x, raw, shift, weight, bias]
    plain = run(step, values)
    with torch.autocast(device, dtype=BF16):
        cast = run(step, values)
    assert [r.dtype for r in cast[0]] == [F32, F32, F32]
    assert all(torch.equal(a, b) for a, b in zip((*plain[0], *plain[1]), (*cast[0], *cast[1]), strict=True))
