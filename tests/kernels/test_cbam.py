"""CBAM in one op against its float64 reference, and the module that models have."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, same_bits, to_float64
from pooling import FORMATS
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels import layouts
from fastflow.kernels.cbam import cbam_reference
from fastflow.kernels.registry import OPS
from fastflow.kernels.triton import cbam_backward, cbam_convolution, pool_parts
from fastflow.kernels.triton import launch as launching
from fastflow.models.conditioners.leaves import CBAM

SHAPES = [(1, 1, 1, 1), (0, 4, 3, 3), (2, 3, 5, 7), (3, 40, 1, 1), (1, 80, 6, 6), (1, 4, 40, 60)]


def arguments(shape, dtype=F64, weights=None, layout="c", device="cpu", hidden=None, size=7):
    """(x, down, up, spatial weight), of which the weights make gates that are neither shut nor open."""
    channels = shape[1]
    hidden = hidden or max(1, channels // 16)
    x = rand(*shape, dtype=dtype, device=device).contiguous(memory_format=FORMATS[layout])
    down, up = rand(hidden, channels, seed=1) / channels**0.5, rand(channels, hidden, seed=2)
    return x, *(v.to(device, weights or dtype) for v in (down, up, rand(1, 2, size, size, seed=3) / size))


def check(device, shape, dtype=F64, weights=None, layout="c", **sizes):
    values = arguments(shape, dtype, weights, layout, device, **sizes)
    (y,), grads = run(kernels.cbam, values)
    (want,), wanted = run(cbam_reference, to_float64(values), [y.dtype])
    # Parts of the form for CPUs have the dtype of x, in which their results are rounded.
    close(y, want, dtype, 4)
    assert layouts.is_channels_last(y) == layouts.is_channels_last(values[0])
    terms = shape[0] * shape[2] * shape[3]
    for grad, expected, value, length in zip(
        grads, wanted, values, (shape[1] + 16, terms, terms, terms * shape[1]), strict=True
    ):
        close(grad, expected, value.dtype, 4 * length)
    with torch.no_grad():
        assert torch.equal(kernels.cbam(*values), y)


def small_tiles(monkeypatch):
    """Small inputs take the ways of large ones: joined chunks, channels and taps and samples in turns."""
    monkeypatch.setattr(pool_parts, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(pool_parts, "MAX_RUN_PIXELS", 16)
    monkeypatch.setattr(cbam_convolution, "CONVOLUTION_PIXELS", 16)
    monkeypatch.setattr(cbam_backward, "SAMPLES", 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, shape):
    check(device, shape)
    check(device, shape, F32, layout="l" if shape[1] > 3 else "c")


def test_the_formulas_are_the_gradients_of_the_definition():
    values = arguments((2, 20, 4, 6), hidden=3)
    y, *kept = OPS["cbam"].cpu(*values, True)
    upper = rand(*y.shape, seed=5)
    got = OPS["cbam_backward"].definition(upper, *values, *kept)
    leaves = [v.requires_grad_() for v in values]
    want = torch.autograd.grad(cbam_reference(*leaves), leaves, upper)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["c", "l"])
def test_in_parts_and_in_chunks(device, monkeypatch, layout):
    small_tiles(monkeypatch)
    check(device, (3, 20, 4, 5), layout=layout, hidden=3, size=3)
    check(device, (2, 3, 5, 5), F32, layout=layout, hidden=5)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_windows(place, size):
    check(place, (1, 3, 4, 6), size=size)


@pytest.mark.parametrize(("dtype", "weights"), [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)])
def test_dtypes(device, dtype, weights):
    check(device, (2, 24, 6, 6), dtype, weights)


def test_views(device):
    whole = rand(3, 8, 6, 6, device=device)
    for x in (whole[:, 2:7], whole[:1].expand(3, -1, -1, -1), whole.transpose(2, 3)):
        _, *weights = arguments((3, x.shape[1], 6, 6), device=device)
        weights[0] = weights[0].repeat(2, 1).t().contiguous().t()
        weights[1] = weights[1].repeat(1, 2)
        leaves = [v.detach().requires_grad_() for v in (x, *weights)]
        y, want = kernels.cbam(*leaves), cbam_reference(*leaves)
        assert torch.allclose(y, want, atol=1e-12)
        # The gradient of a sum has strides of 0.
        got, wanted = (torch.autograd.grad(result.sum(), leaves) for result in (y, want))
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted, strict=True))


def test_gradcheck(place):
    values = [v.requires_grad_() for v in arguments((1, 3, 2, 3), device=place, hidden=2, size=3)]
    # A random direction: every element costs interpreted launches.
    assert torch.autograd.gradcheck(kernels.cbam, values, fast_mode=True)


def test_equal_maxima_pass_their_gradient_to_the_first(device):
    """As in ATen; a plane of zeros, which a GELU of very negative numbers leaves, has equal maxima alone."""
    x, *weights = arguments((2, 4, 3, 3), device=device)
    x = x.clone()
    x[0] = 0.0
    x[1, 1, 0, 1] = x[1, 1, 2, 2] = x[1, 1].max() + 1
    (_,), got = run(kernels.cbam, (x, *weights))
    (_,), want = run(cbam_reference, (x, *weights))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


def test_a_nan_stays_where_it_is_seen(device):
    x, *weights = arguments((2, 4, 3, 3), F32, device=device)
    x = x.clone()
    x[0, 1, 1, 1] = float("nan")
    y = kernels.cbam(x, *weights)
    assert y[0].isnan().all() and torch.isfinite(y[1]).all()


@pytest.mark.parametrize("layout", ["c", "l"])
def test_results_repeat_and_do_not_depend_on_the_batch(device, layout):
    values = arguments((3, 16, 23, 23), F32, layout=layout, device=device)
    (y,), grads = run(kernels.cbam, values)
    (again,), grads_again = run(kernels.cbam, values)
    assert same_bits((y, *grads), (again, *grads_again))
    upper = rand(*y.shape, dtype=F32, seed=7, device=device)
    for i in range(3):
        leaf = values[0][i : i + 1].detach().requires_grad_()
        alone = kernels.cbam(leaf, *values[1:])
        assert torch.equal(alone[0], y[i])
        (grad,) = torch.autograd.grad(alone, leaf, upper[i : i + 1])
        assert torch.equal(grad[0], grads[0][i])


def test_four_launches_and_five(device):
    for shape in ((2, 4, 6, 6), (2, 32, 23, 23), (1, 16, 92, 92)):
        leaves = [v.requires_grad_() for v in arguments(shape, F32, device=device)]
        with launching.recording() as launches:
            y = kernels.cbam(*leaves)
            assert len(launches) == 4
            torch.autograd.grad(y, leaves, torch.ones_like(y))
            assert len(launches) == 9


def test_many_channels_are_left_to_the_parts(device):
    x, *weights = arguments((1, 4097, 1, 1), F32, device=device, hidden=1)
    with launching.recording() as launches:
        kernels.cbam(x, *weights)
    assert "_gate_logits_kernel" not in {launch.kernel for launch in launches}
    kernels.set_backend("triton")
    try:
        with pytest.raises(ValueError, match="cbam kernels take at most 4096 channels"):
            kernels.cbam(x, *weights)
    finally:
        kernels.set_backend("auto")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 0, 4)}, "x must have a channel and from 1 to .* pixels"),
        ({"down": torch.zeros(1, 4)}, r"down must be \(h, 3\) with h at least 1, got \(1, 4\)"),
        ({"up": torch.zeros(3, 2)}, r"up must be \(3, 1\), got \(3, 2\)"),
        ({"spatial_weight": torch.zeros(1, 2, 4, 4)}, r"spatial_weight must be \(1, 2, k, k\) with k odd"),
        ({"spatial_weight": torch.zeros(2, 1, 7, 7)}, r"spatial_weight must be .* got \(2, 1, 7, 7\)"),
        ({"up": torch.zeros(3, 1, device="meta")}, "up must be on the device of x"),
        ({"down": torch.zeros(1, 3, dtype=torch.int32)}, "down must be float16"),
    ],
)
def test_refuses_before_any_launch(change, words, device):
    good = {
        "x": torch.zeros(2, 3, 4, 4), "down": torch.zeros(1, 3), "up": torch.zeros(3, 1),
        "spatial_weight": torch.zeros(1, 2, 7, 7),
    }  # fmt: skip
    with launching.recording() as launches, pytest.raises(ValueError, match=words):
        kernels.cbam(**{**good, **change})
    assert not launches


def test_a_second_derivative_is_an_error_or_right(device):
    values = [v.requires_grad_() for v in arguments((1, 2, 2, 2), device=device, size=3)]
    with pytest.raises(RuntimeError, match="cbam has one derivative"):
        torch.autograd.grad((kernels.cbam(*values) ** 2).sum(), values, create_graph=True)
    kernels.set_backend("reference")
    try:
        assert torch.autograd.gradgradcheck(kernels.cbam, values)
    finally:
        kernels.set_backend("auto")


# -- the module ----------------------------------------------------------------------------------------------


def published(block, x):
    """CBAM as it is written: two poolings through the shared layers, then their gates."""
    mean, peak = F.adaptive_avg_pool2d(x, 1).flatten(1), F.adaptive_max_pool2d(x, 1).flatten(1)
    x = x * torch.sigmoid(sum(block.up(F.relu(block.down(v))) for v in (mean, peak)))[:, :, None, None]
    pooled = torch.cat((x.mean(dim=1, keepdim=True), x.max(dim=1, keepdim=True).values), dim=1)
    return x * torch.sigmoid(block.spatial(pooled))


@pytest.mark.parametrize("layout", ["c", "l"])
def test_cbam_is_the_published_block(place, layout):
    torch.manual_seed(0)
    block = CBAM(32).to(place, F64)
    x = rand(3, 32, 9, 11, device=place).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    upper, leaves = rand(3, 32, 9, 11, seed=5, device=place), [x, *block.parameters()]
    got, want = block(x), published(block, x)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upper), torch.autograd.grad(want, leaves, upper), strict=True
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_cbam_compiles_in_one_graph():
    block, x = CBAM(16), rand(2, 16, 6, 6, dtype=F32)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, want = compiled(leaves[0]), block(leaves[1])
    assert torch.allclose(got, want, atol=1e-6)
    grads = [torch.autograd.grad((y**2).sum(), leaf)[0] for y, leaf in zip((got, want), leaves, strict=True)]
    assert torch.allclose(*grads, atol=1e-6)
