"""`coupling_head`: its kernels (on a GPU or in the interpreter) and its CPU form against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, masks, rand, run

from fastflow import kernels
from fastflow.kernels import _launch, _library
from fastflow.kernels.affine_coupling import finish_step_reference
from fastflow.kernels.coupling_head import GROUP, SAMPLES, coupling_head_reference


@pytest.fixture(params=["aten", "triton"])
def place(request):
    """A device on which the op runs its ATen form, and one on which it runs its kernels."""
    return "cpu" if request.param == "aten" else request.getfixturevalue("device")


def mask_of(kind, shape):
    if kind == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3
    if kind == "channel":
        return (torch.arange(shape[0]) < shape[0] // 2)[:, None, None].expand(shape).contiguous()
    return masks(kind, shape)


def arguments(batch, shape, features=64, classes=7, stream=F64, net=None, device="cpu"):
    """x, two features, two weights, two tables; then the rows."""
    net, size = net or stream, shape[0] * shape[1] * shape[2]
    values = [rand(batch, *shape, dtype=stream, device=device)]
    values += [rand(batch, features, dtype=net, seed=i, device=device) for i in (1, 2)]
    # Numbers of the narrow dtype, so that their rounding in the op is none.
    values += [(rand(size, features, seed=i, device=device) / features**0.5).to(net).to(stream) for i in (3, 4)]
    values += [rand(classes, size, dtype=net, seed=i, device=device) for i in (5, 6)]
    return values, (torch.arange(batch, device=device) * 5 + 1) % classes


def near(got, want, dtype, unit, length=1):
    """Within 8 roundings to `unit`, times the root of the number of terms."""
    assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
    if want.numel():
        got, want = got.detach().double().cpu(), want.detach().double().cpu()
        bound = 8 * torch.finfo(unit).eps * length**0.5 * max(1.0, float(want.abs().max()))
        assert float((got - want).abs().max()) <= bound, float((got - want).abs().max()) / bound


def check(
    device, batch, shape, features=64, classes=7, stream=F64, net=None, mask="even", inverse=False, end="next", ordered=False
):
    net, acc = net or stream, _library.accumulator(stream)
    values, rows = arguments(batch, shape, features, classes, stream, net, device)
    if end == "affine":
        values.append(torch.tensor([1.7, -0.3], dtype=acc, device=device))
    mask = mask_of(mask, shape).to(device)
    following = mask_of("odd", shape).to(device)
    order = kernels.pixel_order(mask, shape) if ordered else None

    def op(x, f1, f2, w1, w2, t1, t2, pair=None):
        heads = (x, (f1, f2), (w1, w2), (t1, t2), rows, mask)
        if end == "nothing":
            return kernels.coupling_head(*heads, 0.5, inverse, order)
        return kernels.coupling_head_step(*heads, following, 0.5, inverse, affine=pair, dtype=net, order=order)

    def reference(x, f1, f2, w1, w2, t1, t2, pair=None):
        y, logdet = coupling_head_reference(x, (f1, f2), (w1, w2), (t1, t2), rows, mask, 0.5, inverse)
        if end == "nothing":
            return y, logdet
        y, masked = finish_step_reference(y, following, pair, inverse, F64)
        return y, logdet, masked

    got, grads = run(op, values)
    want, want_grads = run(reference, [v.double() for v in values], [r.dtype for r in got])
    size = shape[0] * shape[1] * shape[2]
    for value, wanted, dtype, length in zip(got, want, (stream, acc, net), (features, features * size, features), strict=False):
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


@pytest.mark.parametrize("batch", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 23, 23), (3, 5, 7)], ids=str)
def test_batches_and_sizes(place, batch, shape):
    check(place, batch, shape, stream=F32)
    check(place, batch, shape, stream=F32, inverse=True, end="nothing", ordered=True)


@pytest.mark.parametrize(("batch", "shape"), [(2, (1, 46, 46)), (1, (16, 23, 23))], ids=str)
def test_large_images(place, batch, shape):
    check(place, batch, shape, stream=F32, ordered=True, end="affine" if shape[0] == 1 else "next")


@pytest.mark.parametrize("features", [1, 16, 48, 64, 130])
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
    check(place, 3, (4, 3, 7), mask=mask, inverse=inverse, features=16, ordered=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mask", ["even", "none", "all"])
def test_the_mix_of_the_next_step(place, inverse, mask):
    check(place, 17, (1, 5, 9), inverse=inverse, end="affine", mask=mask, features=16)
    check(place, 5, (1, 5, 9), inverse=inverse, end="affine", mask=mask, stream=F32)


@pytest.mark.parametrize(("stream", "net"), [(F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F32)])
@pytest.mark.parametrize("inverse", [False, True])
def test_dtypes(place, stream, net, inverse):
    check(place, 5, (2, 5, 7), stream=stream, net=net, inverse=inverse)


def test_weights_are_rounded_to_the_dtype_of_the_features(place):
    values, rows = arguments(4, (1, 4, 4), stream=F32, net=F32, device=place)
    x, f1, f2, *weights, t1, t2 = values
    mask = mask_of("none", (1, 4, 4)).to(place)
    features = (f1.to(F16), f2.to(F16))
    got = kernels.coupling_head(x, features, tuple(weights), (t1, t2), rows, mask)
    rounded = tuple(w.to(F16).to(F32) for w in weights)
    assert not torch.equal(rounded[0], weights[0])
    want = kernels.coupling_head(x, features, rounded, (t1, t2), rows, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_layouts_and_views(place):
    values, rows = arguments(3, (4, 3, 5), device=place)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (4, 3, 5)).to(place)
    wide_x, wide_f = rand(3, 8, 3, 5, seed=8, device=place), rand(3, 128, seed=9, device=place)
    wide_x[:, 4:], wide_f[:, 64:] = x, f1

    def op(x, f1, w1, t1):
        return kernels.coupling_head_step(x, (f1, f2), (w1, w2), (t1, t2), rows, mask, ~mask)

    want, want_grads = run(op, [x, f1, w1, t1])
    last = x.contiguous(memory_format=torch.channels_last)
    for arguments_ in ([last, f1, w1, t1], [wide_x[:, 4:], wide_f[:, 64:], w1.t().contiguous().t(), t1]):
        leaves = [v.detach().requires_grad_() for v in arguments_]
        got = op(*leaves)
        grads = [rand(*r.shape, dtype=r.dtype, seed=7 + i, device=place) for i, r in enumerate(got)]
        grads[0] = grads[0].contiguous(memory_format=torch.channels_last)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, want, strict=True))
        assert got[0].is_contiguous() and got[2].is_contiguous()
        for a, b in zip(torch.autograd.grad(got, leaves, grads), want_grads, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


# -- derivatives, exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(place, inverse, affine):
    values, rows = arguments(3, (1, 1, 3), features=2, classes=2, device=place)
    if affine:
        values.append(torch.tensor([1.3, 0.2], dtype=F64, device=place))
    mask = mask_of("even", (1, 1, 3)).to(place)
    following = mask_of("odd", (1, 1, 3)).to(place)

    def op(x, f1, f2, w1, w2, t1, t2, pair=None):
        return kernels.coupling_head_step(x, (f1, f2), (w1, w2), (t1, t2), rows, mask, following, 0.7, inverse, affine=pair)

    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values])


def test_a_second_derivative_is_an_error(place):
    values, rows = arguments(2, (1, 2, 2), device=place)
    x, f1, f2, w1, w2, t1, t2 = (v.requires_grad_() for v in values)
    y, _ = kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), rows, mask_of("even", (1, 2, 2)).to(place))
    with pytest.raises(RuntimeError, match="set_backend"):
        torch.autograd.grad(y.sum(), f1, create_graph=True)


@pytest.mark.parametrize(
    ("stream", "shape"), [(F32, (1, 13, 11)), pytest.param(F32, (2, 6, 8), marks=pytest.mark.slow), (F64, (1, 3, 7))]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_same_bits_twice_and_in_any_batch(place, shape, inverse, stream):
    values, rows = arguments(33, shape, stream=stream, device=place)
    mask = mask_of("random", shape).to(place)
    size = int(mask.numel())

    def op(x, f1, f2, *rest, which=slice(None)):
        w1, w2, t1, t2 = rest or values[3:]
        heads = (x, (f1, f2), (w1, w2), (t1, t2), rows[which], mask)
        y, logdet, masked = kernels.coupling_head_step(*heads, ~mask, 0.5, inverse)
        return y, logdet, masked

    def everything(which, count):
        leaves = [v[which].detach().requires_grad_() for v in values[:3]]
        results = op(*leaves, which=which)
        weights = rand(33, size, dtype=stream, seed=9, device=place)[which]
        total = (results[0].flatten(1) * weights).sum() + (results[1] * weights[:, 0]).sum()
        return *results, *torch.autograd.grad(total, leaves)

    whole = everything(slice(None), 33)
    assert all(torch.equal(a, b) for a, b in zip(whole, everything(slice(None), 33), strict=True))
    for which in (slice(4, 5), slice(30, 33), slice(7, 25), slice(0, 32)):
        part = everything(which, which.stop - which.start)
        assert [torch.equal(a[which], b) for a, b in zip(whole, part, strict=True)] == [True] * 6, which
    pairs = [run(op, values) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip((*pairs[0][0], *pairs[0][1]), (*pairs[1][0], *pairs[1][1]), strict=True))


@pytest.mark.parametrize(("stream", "bound"), [(F32, 4e-6), (F64, 1e-14)])
def test_inverse_rebuilds_the_input(place, stream, bound):
    values, rows = arguments(18, (2, 6, 8), stream=stream, device=place)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("random", (2, 6, 8)).to(place)
    heads = ((f1, f2), (w1, w2), (t1, t2), rows, mask)
    with torch.no_grad():
        y, logdet = kernels.coupling_head(x, *heads)
        back, opposite = kernels.coupling_head(y, *heads, inverse=True)
    assert not torch.equal(y, x)
    assert torch.equal(back[:, mask], x[:, mask])
    assert float((back - x).abs().max()) <= bound
    # Log-scales are the same bits in both directions.
    assert torch.equal(opposite, -logdet)


# -- what is launched, and what is refused --------------------------------------------------------------------------------


def test_an_order_names_active_pixels_first():
    mask = mask_of("random", (2, 3, 4))
    order = kernels.pixel_order(mask)
    flat = mask.flatten()
    assert order.active == int((~flat).sum()) and order.pixels.dtype == torch.int32
    assert sorted(order.pixels.tolist()) == list(range(24))
    assert not flat[order.pixels[: order.active].long()].any() and flat[order.pixels[order.active :].long()].all()
    plane = kernels.pixel_order(mask[:1], (2, 3, 4))
    assert plane.active == 2 * int((~mask[0]).sum())


def test_programs_cover_half_of_the_pixels(device):
    values, rows = arguments(2 * SAMPLES + 1, (4, 16, 16), stream=F32, device=device)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (4, 16, 16)).to(device)
    with torch.no_grad(), _launch.recording() as launches:
        kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), rows, mask)
    head = launches[0]
    assert head.kernel == "_head_fwd_kernel" and [launch.kernel for launch in launches[1:]] == ["_sum_rows_kernel"]
    assert head.programs == 3 * (512 // head.arguments["BLOCK"]) and head.arguments["active"] == 512


def test_nothing_is_kept_without_a_backward_pass():
    values, rows = arguments(3, (1, 2, 2), stream=F32)
    x, *heads = values
    mask = mask_of("even", (1, 2, 2))
    for keep in (False, True):
        kept = torch.ops.fastflow.coupling_head(x, *heads, rows, mask, None, 0, None, None, 0.5, False, None, keep)[3]
        assert tuple(kept.shape) == ((GROUP, 4) if keep else (0,))


def test_one_channel_images_of_a_far_apart_batch(device):
    if device == "cuda":
        pytest.skip("reserves memory that only a CPU does not fill")
    import numpy as np

    values, rows = arguments(2, (1, 4, 4), features=16, stream=F16, device=device)
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (1, 4, 4))
    distance = 2**31 + 16
    far = torch.from_numpy(np.zeros(distance + 16, dtype=np.float16)).as_strided((2, 1, 4, 4), (distance, 16, 4, 1))
    far.copy_(x)
    heads = ((f1, f2), (w1, w2), (t1, t2), rows, mask)
    assert all(
        torch.equal(a, b) for a, b in zip(kernels.coupling_head(far, *heads), kernels.coupling_head(x, *heads), strict=True)
    )


def refused(**change):
    values, rows = arguments(3, (1, 2, 4), features=5, classes=2)
    x, f1, f2, w1, w2, t1, t2 = values
    good = {"x": x, "features": (f1, f2), "weights": (w1, w2), "tables": (t1, t2), "rows": rows, "bound": 0.5, "order": None}
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
        ({"rows": torch.tensor([0, 1])}, r"rows must be \(3,\) int64, got \(2,\)"),
        ({"rows": torch.tensor([0, 1, 0], dtype=torch.int32)}, "rows must be .* int64, got .*int32"),
        ({"rows": torch.tensor([0, 2, 0])}, "rows must lie from 0 to 1.*got 2"),
        ({"rows": torch.tensor([0, -1, 0])}, "rows must lie from 0 to 1.*got -1"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"order": kernels.PixelOrder(torch.arange(8), 4)}, "order must hold int32.*int64"),
        ({"order": kernels.PixelOrder(torch.arange(7, dtype=torch.int32), 4)}, r"order must hold int32 \(8,\), got .*\(7,\)"),
        ({"order": kernels.PixelOrder(torch.arange(8, dtype=torch.int32), 9)}, "order must count between 0 and 8 .*got 9"),
    ],
)
def test_refuses(change, words):
    assert refused()
    with pytest.raises(ValueError, match=words):
        refused(**change)


def test_the_step_refuses_what_its_end_does_not_take():
    values, rows = arguments(3, (2, 2, 2))
    x, f1, f2, w1, w2, t1, t2 = values
    mask = mask_of("even", (2, 2, 2))
    heads = (x, (f1, f2), (w1, w2), (t1, t2), rows, mask)
    with pytest.raises(ValueError, match="next_mask must be bool"):
        kernels.coupling_head_step(*heads, mask[:, :1])
    with pytest.raises(ValueError, match=r"affine must be .* one channel"):
        kernels.coupling_head_step(*heads, mask, affine=torch.ones(2))


def test_the_reference_backend_is_differentiable_twice():
    kernels.set_backend("reference")
    try:
        values, rows = arguments(2, (1, 1, 2), features=2, classes=2)
        mask = torch.tensor([[[True, False]]])
        assert torch.autograd.gradgradcheck(
            lambda x, f1, f2, w1, w2, t1, t2: kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), rows, mask),
            [v.requires_grad_() for v in values],
        )
    finally:
        kernels.set_backend("auto")


def test_autocast_does_not_narrow(place):
    values, rows = arguments(5, (1, 4, 6), stream=F32, device=place)
    mask = mask_of("even", (1, 4, 6)).to(place)

    def op(x, f1, f2, w1, w2, t1, t2):
        return kernels.coupling_head(x, (f1, f2), (w1, w2), (t1, t2), rows, mask)

    plain = run(op, values)
    with torch.autocast(place, dtype=BF16):
        cast = run(op, values)
    assert all(torch.equal(a, b) for a, b in zip((*plain[0], *plain[1]), (*cast[0], *cast[1]), strict=True))
