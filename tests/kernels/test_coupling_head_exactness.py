"""`coupling_head`: derivatives, bits that depend on no other sample, what is launched and what is refused."""

from __future__ import annotations

import pytest
import torch
from heads import arguments, mask_of
from numerics import BF16, F16, F32, F64, far_apart, rand, run, same_bits

from fastflow import kernels
from fastflow.kernels.cpu.coupling_head import ROW_GROUP
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton.coupling_head import SAMPLES

# -- derivatives, exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(place, inverse, affine):
    values, label_index = arguments(2, (1, 1, 2), features=1, classes=1, device=place)
    if affine:
        values.append(torch.tensor([1.3, 0.2], dtype=F64, device=place))
    mask = mask_of("even", (1, 1, 2)).to(place)
    next_mask = mask_of("odd", (1, 1, 2)).to(place)

    def op(x, f1, f2, w1, w2, t1, t2, pair=None):
        return kernels.coupling_head_step(
            x, (f1, f2), (w1, w2), (t1, t2), label_index, mask, next_mask, 0.7, inverse, affine=pair
        )

    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values])


def test_gradcheck_of_the_coupling_alone():
    values, label_index = arguments(3, (2, 1, 2), features=2, classes=2)
    mask = mask_of("random", (2, 1, 2))
    assert torch.autograd.gradcheck(
        lambda x, f1, f2, w1, w2, t1, t2: kernels.coupling_head(
            x, (f1, f2), (w1, w2), (t1, t2), label_index, mask
        ),
        [v.requires_grad_() for v in values],
    )


def test_a_second_derivative_is_an_error(place):
    values, label_index = arguments(2, (1, 2, 2), device=place)
    x, f1, f2, w1, w2, t1, t2 = (v.requires_grad_() for v in values)
    y, _ = kernels.coupling_head(
        x, (f1, f2), (w1, w2), (t1, t2), label_index, mask_of("even", (1, 2, 2)).to(place)
    )
    with pytest.raises(RuntimeError, match="set_backend"):
        torch.autograd.grad(y.sum(), f1, create_graph=True)


# 20 features are two turns of the forward product and two shares of the inverse's backward pass.
@pytest.mark.parametrize(
    ("stream", "shape"),
    [(F32, (1, 10, 10)), pytest.param(F32, (2, 6, 8), marks=pytest.mark.slow), (F64, (1, 3, 7))],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_same_bits_twice_and_in_any_batch(place, shape, inverse, stream):
    # Two groups of samples of a kernel, the second one not whole; nine of the form for CPUs.
    batch = 18 if launching.interpreted() else 33
    values, label_index = arguments(batch, shape, features=20, stream=stream, device=place)
    mask = mask_of("random", shape).to(place)
    weights = [rand(batch, mask.numel(), dtype=stream, seed=i, device=place) for i in (8, 9)]

    def everything(which=slice(None)):
        """(results and gradients of samples, gradients of what all samples share)."""
        samples = [v[which].detach().requires_grad_() for v in values[:3]]
        shared = [v.detach().requires_grad_() for v in values[3:]]
        x, f1, f2 = samples
        w1, w2, t1, t2 = shared
        y, logdet, masked = kernels.coupling_head_step(
            x, (f1, f2), (w1, w2), (t1, t2), label_index[which], mask, ~mask, 0.5, inverse
        )
        first, second = (weight[which] for weight in weights)
        total = (y.flatten(1) * first).sum() + (logdet * first[:, 0]).sum()
        total = total + (masked.flatten(1) * second).sum()
        grads = torch.autograd.grad(total, samples + shared)
        return (y, logdet, masked, *grads[:3]), grads[3:]

    whole, whole_shared = everything()
    again, again_shared = everything()
    assert same_bits((*whole, *whole_shared), (*again, *again_shared))
    middle = slice(7, 25) if batch == 33 else slice(7, 17)
    for which in (slice(4, 5), slice(batch - 3, batch), middle, slice(0, batch - 1)):
        part, _ = everything(which)
        assert [torch.equal(a[which], b) for a, b in zip(whole, part, strict=True)] == [True] * 6, which


@pytest.mark.parametrize(("stream", "bound"), [(F32, 4e-6), (F64, 1e-14)])
def test_inverse_rebuilds_the_input(place, stream, bound):
    values, label_index = arguments(18, (2, 6, 8), stream=stream, device=place)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("random", (2, 6, 8)).to(place)
    heads = ((f1, f2), (w1, w2), (t1, t2), label_index, mask)
    with torch.no_grad():
        y, logdet = kernels.coupling_head(x, *heads)
        back, opposite = kernels.coupling_head(y, *heads, inverse=True)
    assert not torch.equal(y, x)
    assert torch.equal(back[:, mask], x[:, mask])
    assert float((back - x).abs().max()) <= bound
    # Log-scales are the same bits in both directions.
    assert torch.equal(opposite, -logdet)


# -- what is launched, and what is refused -------------------------------------------------------------------


def test_an_order_names_active_pixels_first():
    mask = mask_of("random", (2, 3, 4))
    order = kernels.pixel_order(mask)
    flat = mask.flatten()
    assert order.active == int((~flat).sum()) and order.pixels.dtype == torch.int32
    assert sorted(order.pixels.tolist()) == list(range(24))
    assert (
        not flat[order.pixels[: order.active].long()].any()
        and flat[order.pixels[order.active :].long()].all()
    )
    plane = kernels.pixel_order(mask[:1], (2, 3, 4))
    assert plane.active == 2 * int((~mask[0]).sum())


def test_programs_cover_half_of_the_pixels(device):
    values, label_index = arguments(2 * SAMPLES + 1, (4, 16, 16), stream=F32, device=device)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (4, 16, 16)).to(device)
    with torch.no_grad(), launching.recording() as launches:
        kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), label_index, mask)
    head = launches[0]
    assert head.kernel == "_head_fwd_kernel" and [launch.kernel for launch in launches[1:]] == [
        "_sum_chunks_kernel"
    ]
    assert head.programs == 3 * (512 // head.arguments["BLOCK"]) and head.arguments["active"] == 512


def test_nothing_is_kept_without_a_backward_pass():
    values, label_index = arguments(3, (1, 2, 2), stream=F32)
    x, *heads = values
    mask = mask_of("even", (1, 2, 2))
    for keep in (False, True):
        kept = torch.ops.fastflow.coupling_head(
            x, *heads, label_index, mask, None, 0, None, None, 0.5, False, None, keep
        )[3]
        assert tuple(kept.shape) == ((ROW_GROUP, 4) if keep else (0,))


def test_one_channel_images_of_a_far_apart_batch(device):
    if device == "cuda":
        pytest.skip("reserves memory that only a CPU does not fill")
    values, label_index = arguments(2, (1, 4, 4), features=16, stream=F16, device=device)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (1, 4, 4))
    far = far_apart((2, 1, 4, 4), 2**31 + 16)
    far.copy_(x)
    heads = ((f1, f2), (w1, w2), (t1, t2), label_index, mask)
    assert same_bits(kernels.coupling_head(far, *heads), kernels.coupling_head(x, *heads))


def refused(**change):
    values, label_index = arguments(3, (1, 2, 4), features=5, classes=2)
    x, f1, f2, w1, w2, t1, t2 = values
    good = {
        "x": x,
        "features": (f1, f2),
        "weights": (w1, w2),
        "tables": (t1, t2),
        "label_index": label_index,
        "bound": 0.5,
        "order": None,
    }
    return kernels.coupling_head(**{**good, "mask": mask_of("even", (1, 2, 4)), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": rand(3, 2, 4)}, r"x must be .*\(3, 2, 4\)"),
        ({"mask": torch.zeros(1, 2, 4)}, "mask must be bool"),
        ({"features": (rand(3, 5), rand(2, 5))}, r"features must be \(B, F\) = \(3, 5\).*got \(2, 5\)"),
        ({"features": (rand(3, 5), rand(3, 5).long())}, "features must be float16.*got torch.int64"),
        ({"features": (rand(3, 5), rand(3, 5).to("meta"))}, "features must be on the device of x"),
        ({"weights": (rand(8, 5), rand(8, 6))}, r"weights must be \(N, F\) = \(8, 5\).*got \(8, 6\)"),
        ({"weights": (rand(8, 5).to(torch.float8_e4m3fn), rand(8, 5))}, "weights must be float16.*float8"),
        ({"tables": (rand(2, 8), rand(2, 7))}, r"tables must be \(K, N\) = \(2, 8\).*got \(2, 7\)"),
        ({"tables": (rand(2, 8), rand(3, 8))}, r"tables must be \(K, N\) = \(2, 8\).*got \(3, 8\)"),
        ({"label_index": torch.tensor([0, 1])}, r"label_index must be \(3,\) int64, got \(2,\)"),
        (
            {"label_index": torch.tensor([0, 1, 0], dtype=torch.int32)},
            "label_index must be .* int64, got .*int32",
        ),
        ({"label_index": torch.tensor([0, 2, 0])}, "label_index must lie from 0 to 1.*got 2"),
        ({"label_index": torch.tensor([0, -1, 0])}, "label_index must lie from 0 to 1.*got -1"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"order": kernels.PixelOrder(torch.arange(8), 4)}, "order must hold int32.*int64"),
        (
            {"order": kernels.PixelOrder(torch.arange(7, dtype=torch.int32), 4)},
            r"order must hold int32 \(8,\), got .*\(7,\)",
        ),
        (
            {"order": kernels.PixelOrder(torch.arange(8, dtype=torch.int32), 9)},
            "order must count between 0 and 8 .*got 9",
        ),
    ],
)
def test_refuses(change, words):
    assert refused()
    with pytest.raises(ValueError, match=words):
        refused(**change)


def test_the_step_refuses_what_its_end_does_not_take():
    values, label_index = arguments(3, (2, 2, 2))
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (2, 2, 2))
    heads = (x, (f1, f2), (w1, w2), (t1, t2), label_index, mask)
    with pytest.raises(ValueError, match="next_mask must be bool"):
        kernels.coupling_head_step(*heads, mask[:, :1])
    with pytest.raises(ValueError, match=r"affine must be .* one channel"):
        kernels.coupling_head_step(*heads, mask, affine=torch.ones(2))


def test_the_old_name_of_the_label_index():
    values, label_index = arguments(3, (1, 2, 2))
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (1, 2, 2))
    heads = (x, (f1, f2), (w1, w2), (t1, t2))
    with pytest.warns(DeprecationWarning, match="rows is now called label_index"):
        got = kernels.coupling_head(*heads, rows=label_index, mask=mask)
    assert same_bits(got, kernels.coupling_head(*heads, label_index, mask))
    with pytest.warns(DeprecationWarning, match="rows is now called label_index"):
        got = kernels.coupling_head_step(*heads, rows=label_index, mask=mask, next_mask=mask)
    assert same_bits(got, kernels.coupling_head_step(*heads, label_index, mask, mask))


def test_the_reference_backend_is_differentiable_twice():
    kernels.set_backend("reference")
    try:
        values, label_index = arguments(2, (1, 1, 2), features=2, classes=2)
        mask = torch.tensor([[[True, False]]])
        assert torch.autograd.gradgradcheck(
            lambda x, f1, f2, w1, w2, t1, t2: kernels.coupling_head(
                x, (f1, f2), (w1, w2), (t1, t2), label_index, mask
            ),
            [v.requires_grad_() for v in values],
        )
    finally:
        kernels.set_backend("auto")


def test_autocast_does_not_narrow(place):
    values, label_index = arguments(5, (1, 4, 6), stream=F32, device=place)
    mask = mask_of("even", (1, 4, 6)).to(place)

    def op(x, f1, f2, w1, w2, t1, t2):
        return kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), label_index, mask)

    plain = run(op, values)
    with torch.autocast(place, dtype=BF16):
        cast = run(op, values)
    assert same_bits((*plain[0], *plain[1]), (*cast[0], *cast[1]))
