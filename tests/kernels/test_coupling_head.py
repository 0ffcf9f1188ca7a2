"""`coupling_head`: kernels (on a GPU or in the interpreter) and the form for CPUs against the definition."""

from __future__ import annotations

import pytest
import torch
from heads import arguments, mask_of
from numerics import BF16, F16, F32, F64, rand, run, same_bits, to_float64

from fastflow import kernels
from fastflow.kernels.affine_coupling import finish_step_reference
from fastflow.kernels.coupling_head import coupling_head_reference
from fastflow.kernels.registry import OPS
from fastflow.numerics import acc_dtype


def near(got, want, dtype, unit, length=1):
    """Within 8 roundings to `unit`, times the root of the number of terms."""
    assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
    if want.numel():
        got, want = got.detach().double().cpu(), want.detach().double().cpu()
        bound = 8 * torch.finfo(unit).eps * length**0.5 * max(1.0, float(want.abs().max()))
        assert float((got - want).abs().max()) <= bound, float((got - want).abs().max()) / bound


def check(
    device,
    batch,
    shape,
    features=40,
    classes=7,
    stream=F64,
    net=None,
    mask="even",
    inverse=False,
    end="next",
    ordered=False,
):
    net, acc = net or stream, acc_dtype(stream)
    values, label_index = arguments(batch, shape, features, classes, stream, net, device)
    if end == "affine":
        values.append(torch.tensor([1.7, -0.3], dtype=acc, device=device))
    mask = mask_of(mask, shape).to(device)
    next_mask = mask_of("odd", shape).to(device)
    order = kernels.pixel_order(mask, shape) if ordered else None

    def op(x, f1, f2, w1, w2, t1, t2, pair=None):
        heads = (x, (f1, f2), (w1, w2), (t1, t2), label_index, mask)
        if end == "nothing":
            return kernels.coupling_head(*heads, 0.5, inverse, order)
        return kernels.coupling_head_step(
            *heads, next_mask, 0.5, inverse, affine=pair, dtype=net, order=order
        )

    def reference(x, f1, f2, w1, w2, t1, t2, pair=None):
        y, logdet = coupling_head_reference(x, (f1, f2), (w1, w2), (t1, t2), label_index, mask, 0.5, inverse)
        if end == "nothing":
            return y, logdet
        y, masked = finish_step_reference(y, next_mask, pair, inverse, F64)
        return y, logdet, masked

    got, grads = run(op, values)
    want, want_grads = run(reference, to_float64(values), [r.dtype for r in got])
    size = shape[0] * shape[1] * shape[2]
    for value, wanted, dtype, length in zip(
        got, want, (stream, acc, net), (features, features * size, features), strict=False
    ):
        near(value, wanted, dtype, dtype, length)
    lengths = (features, size, size, batch, batch, batch, batch, batch * size)
    for grad, wanted, value, length in zip(grads, want_grads, values, lengths, strict=False):
        # Products of the backward pass may run in the dtype of the features.
        near(grad, wanted, value.dtype, stream if value is values[0] else net, features * max(1, length))
    passive = mask.expand(shape)
    if end != "affine":
        assert torch.equal(got[0][:, passive], values[0][:, passive]), "the passive part is not bit for bit"
    for grad in grads[3:5]:
        assert (grad[passive.flatten()] == 0).all()
    for grad in grads[5:7]:
        assert (grad[:, passive.flatten()] == 0).all()


# Samples come in groups, of 16 for kernels and of 4 on CPUs. The second shape has several blocks of pixels.
@pytest.mark.parametrize("batch", [0, 1, 3, 16, 17])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 15), (3, 5, 7)], ids=str)
def test_batches_and_sizes(place, batch, shape):
    check(place, batch, shape, stream=F32, features=20)
    check(place, batch, shape, stream=F32, features=20, inverse=True, end="nothing", ordered=True)


@pytest.mark.parametrize(("batch", "shape"), [(2, (1, 46, 46)), (1, (16, 23, 23))], ids=str)
def test_large_images_on_a_cpu(batch, shape):
    check("cpu", batch, shape, stream=F32, end="affine" if shape[0] == 1 else "next")


def test_more_blocks_of_pixels_than_one_turn_of_their_sum(device):
    """The features' gradient is a sum over blocks of 16 active pixels, 64 blocks at a time."""
    shape = (1, 23, 66)
    assert int((~mask_of("random", shape)).sum()) > 64 * 16
    check(device, 2, shape, features=16, mask="random", ordered=True, end="affine")


@pytest.mark.parametrize("features", [1, 16, 32, 48, 70])
def test_features(place, features):
    check(place, 5, (2, 3, 5), features=features)
    check(place, 5, (2, 3, 5), features=features, stream=F32, inverse=True)


@pytest.mark.parametrize("classes", [1, 2, 16, 40])
def test_classes(place, classes):
    check(place, 19, (1, 4, 5), classes=classes, features=16)
    check(place, 19, (1, 4, 5), classes=classes, features=16, inverse=True, end="nothing")


@pytest.mark.parametrize("mask", ["all", "none", "even", "channel", "plane", "random"])
@pytest.mark.parametrize("inverse", [False, True])
def test_masks(place, mask, inverse):
    check(place, 3, (4, 3, 5), mask=mask, inverse=inverse, features=16, ordered=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mask", ["even", "none", "all"])
def test_the_mix_of_the_next_step(place, inverse, mask):
    check(place, 17, (1, 5, 9), inverse=inverse, end="affine", mask=mask, features=16)
    check(place, 5, (1, 5, 9), inverse=inverse, end="affine", mask=mask, stream=F32, features=20)


@pytest.mark.parametrize(("stream", "net"), [(F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F32)])
@pytest.mark.parametrize("inverse", [False, True])
def test_dtypes(place, stream, net, inverse):
    check(place, 5, (2, 5, 7), stream=stream, net=net, inverse=inverse)


def test_weights_are_rounded_to_the_dtype_of_the_features(place):
    values, label_index = arguments(4, (1, 4, 4), stream=F32, net=F32, device=place)
    x, f1, f2, *weights, t1, t2 = values
    mask = mask_of("none", (1, 4, 4)).to(place)
    features = (f1.to(F16), f2.to(F16))
    got = kernels.coupling_head(x, features, tuple(weights), (t1, t2), label_index, mask)
    rounded = tuple(w.to(F16).to(F32) for w in weights)
    assert not torch.equal(rounded[0], weights[0])
    want = kernels.coupling_head(x, features, rounded, (t1, t2), label_index, mask)
    assert same_bits(got, want)


def test_layouts_and_views(place):
    values, label_index = arguments(3, (4, 3, 5), features=16, device=place)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (4, 3, 5)).to(place)
    wide_x, wide_f = rand(3, 8, 3, 5, seed=8, device=place), rand(3, 32, seed=9, device=place)
    wide_x[:, 4:], wide_f[:, 16:] = x, f1

    def op(x, f1, w1, t1):
        return kernels.coupling_head_step(x, (f1, f2), (w1, w2), (t1, t2), label_index, mask, ~mask)

    want, want_grads = run(op, [x, f1, w1, t1])
    last = x.contiguous(memory_format=torch.channels_last)
    for arguments_ in ([last, f1, w1, t1], [wide_x[:, 4:], wide_f[:, 16:], w1.t().contiguous().t(), t1]):
        leaves = [v.detach().requires_grad_() for v in arguments_]
        got = op(*leaves)
        grads = [rand(*r.shape, dtype=r.dtype, seed=7 + i, device=place) for i, r in enumerate(got)]
        grads[0] = grads[0].contiguous(memory_format=torch.channels_last)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, want, strict=True))
        assert got[0].is_contiguous() and got[2].is_contiguous()
        for a, b in zip(torch.autograd.grad(got, leaves, grads), want_grads, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
def test_head_is_two_linear_maps_and_a_coupling(inverse):
    values, label_index = arguments(5, (2, 3, 4), features=6, classes=3)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("random", (2, 3, 4))
    raw, shift = ((f @ w.T + t[label_index]).view_as(x) for f, w, t in ((f1, w1, t1), (f2, w2, t2)))
    got = kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), label_index, mask, 0.5, inverse)
    want = kernels.affine_coupling(x, raw, shift, mask, 0.5, inverse)
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
def test_the_backward_entry_is_its_definition(inverse):
    values, label_index = arguments(5, (1, 3, 4), features=6, classes=3)
    mask, next_mask = mask_of("random", (1, 3, 4)), mask_of("odd", (1, 3, 4))
    pair = torch.tensor([1.7, -0.3], dtype=F64)
    heads = (*values, label_index, mask, None, 0, next_mask, pair, 0.5, inverse)
    forward, backward = OPS["coupling_head"], OPS["coupling_head_backward"]
    tanh_raw = forward.cpu(*heads, F64, True)[3]
    grads = (rand(5, 1, 3, 4, seed=7), rand(5, seed=8), rand(5, 1, 3, 4, seed=9), tanh_raw)
    got, want = backward.cpu(*grads, *heads), backward.definition(*grads, *heads)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12)
