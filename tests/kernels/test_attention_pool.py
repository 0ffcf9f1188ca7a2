"""Kernels and CPU forms of CBAM's poolings and gates against float64 references; kernels on a GPU or in the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, wide
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels import _launch, _library
from fastflow.models.conditioners.blocks import CBAM

module = importlib.import_module("fastflow.kernels.attention_pool")
FORMATS = {"c": torch.contiguous_format, "l": torch.channels_last}


@pytest.fixture(params=["kernel", "cpu"])
def place(request):
    """Where ops run: their kernels, or their CPU form."""
    return request.getfixturevalue("device") if request.param == "kernel" else "cpu"


def arguments(shape, dtype=F64, logits=None, layout="c", device="cpu"):
    x = rand(*shape, dtype=dtype, device=device).contiguous(memory_format=FORMATS[layout])
    channel = rand(*shape[:2], dtype=logits or dtype, seed=1, device=device)
    return x, channel, rand(shape[0], 1, *shape[2:], dtype=logits or dtype, seed=2, device=device)


def cases(values):
    """(op, reference, arguments, terms in the sums of their gradients)."""
    x, channel, spatial = values
    pixels = x.shape[2] * x.shape[3]
    yield kernels.pool_pixels, lambda x: (module.pool_pixels_reference(x), x), (x,), (1,)
    yield kernels.average_pixels, lambda x: (module.average_pixels_reference(x), x), (x,), (1,)
    yield kernels.pool_channels, lambda x, c: (module.pool_channels_reference(x, c), x), (x, channel), (1, pixels)
    yield kernels.apply_gates, module.apply_gates_reference, (x, channel, spatial), (1, pixels, x.shape[1])


def check(device, shape, dtype=F64, logits=None, layout="c"):
    for op, reference, values, lengths in cases(arguments(shape, dtype, logits, layout, device)):
        results, grads = run(op, values)
        want, want_grads = run(reference, wide(values), [result.dtype for result in results])
        for result, wanted in zip(results, want, strict=True):
            close(result, wanted, dtype)
        for grad, wanted, value, length in zip(grads, want_grads, values, lengths, strict=True):
            close(grad, wanted, value.dtype, length)
        assert _library.is_channels_last(grads[0]) == _library.is_channels_last(values[0])
        with torch.no_grad():
            again = op(*values)
        for result, plain in zip(results, again if isinstance(again, tuple) else (again,), strict=True):
            assert torch.equal(result, plain), "another result without autograd"


SHAPES = [
    (1, 1, 1, 1),
    (0, 4, 3, 3),
    (2, 3, 5, 7),
    (3, 40, 1, 1),
    (1, 256, 3, 3),
    (2, 16, 23, 23),
    (1, 5, 46, 46),
    (2, 2, 92, 92),
    (1, 1, 184, 184),
]


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(place, shape, layout):
    check(place, shape, layout=layout)
    check(place, shape, F32, layout=layout)


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize(("dtype", "logits"), [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F64, F32)])
def test_dtypes(place, dtype, logits, layout):
    check(place, (2, 24, 12, 12), dtype, logits, layout)


def test_in_parts_and_in_chunks(place, monkeypatch):
    """Small inputs through what large ones go through: chunks joined by a second kernel, channels in turns, few samples."""
    monkeypatch.setattr(module, "PART", 200)
    monkeypatch.setattr(module, "ELEMENTS", 64)
    monkeypatch.setattr(module, "SPAN", 16)
    for layout in "cl":
        check(place, (3, 20, 4, 5), layout=layout)
        check(place, (2, 3, 5, 7), F32, layout=layout)


def test_views_and_expanded_batches(place):
    whole = rand(3, 8, 6, 6, device=place)
    for x in (whole[:, 2:7], whole[:1].expand(3, -1, -1, -1), whole.transpose(2, 3)):
        values = (x, rand(3, x.shape[1], seed=1, device=place), rand(3, 1, 6, 6, seed=2, device=place))
        for op, reference, inputs, _ in cases(values):
            for got, want in zip(op(*inputs), reference(*inputs), strict=True):
                assert torch.allclose(got, want, atol=1e-12)
            # The gradient of a sum is one number with strides of 0.
            leaves = [v.detach().requires_grad_() for v in inputs]
            got = torch.autograd.grad(sum(part.sum() for part in op(*leaves)), leaves)
            want = torch.autograd.grad(sum(part.sum() for part in reference(*leaves)), leaves)
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["c", "l"])
def test_gradcheck(place, layout):
    for op, _, values, _ in cases(arguments((2, 3, 2, 3), layout=layout, device=place)):
        assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values])


@pytest.mark.parametrize("unused", ["pooled", "x"])
def test_gradients_when_one_result_is_not_used(place, unused):
    x, channel, _ = arguments((2, 3, 4, 5), device=place)
    for op, reference, values, _ in list(cases((x, channel, None)))[:3]:
        leaves = [v.detach().requires_grad_() for v in values]
        which = 1 if unused == "pooled" else 0
        grads = [
            torch.autograd.grad((f(*leaves)[which] ** 2).sum(), leaves, allow_unused=True, materialize_grads=True)
            for f in (op, reference)
        ]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


# -- maxima ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_gradients_of_maxima_go_to_the_first(place, layout, dtype):
    """Of many equal maxima, among them zeros of both signs, in planes of one chunk and of several."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 7), (1, 2, 92, 92), (1, 150, 2, 2)):
        x = torch.randint(-3, 1, shape, generator=generator).to(place, dtype) * 0.5
        x = torch.where(torch.rand(shape, generator=generator).to(place) < 0.5, -x.abs(), x)
        x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
        (got,) = torch.autograd.grad(kernels.pool_pixels(x)[0][1].sum(), x)
        places = x.detach().flatten(2).max(dim=2).indices
        assert torch.equal(got.flatten(2).nonzero()[:, 2].view(places.shape), places)
        (got,) = torch.autograd.grad(kernels.pool_channels(x, torch.zeros(shape[:2], device=place))[0][:, 1].sum(), x)
        places = x.detach().max(dim=1).indices
        assert torch.equal(got.max(dim=1).indices, places) and bool(((got != 0).sum(dim=1) == 1).all())


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 2, 92, 92)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_nan_is_the_maximum_and_infinities_are_values(place, shape, dtype):
    x = rand(*shape, dtype=dtype, device=place)
    x[0, 0, 1, 2], x[0, 0, 2, 1], x[0, 0, 0, 0] = float("nan"), float("nan"), float("inf")
    x[0, 1] = float("-inf")
    x.requires_grad_()
    for op, want in (
        (kernels.pool_pixels(x)[0][1], x.flatten(2).max(dim=2)),
        (kernels.pool_channels(x, torch.full((1, 2), 100.0, device=place))[0][:, 1], x.max(dim=1)),
    ):
        assert torch.equal(op, want.values) or torch.allclose(op, want.values, equal_nan=True)
    (got,) = torch.autograd.grad(kernels.pool_pixels(x)[0][1].sum(), x)
    assert got.flatten(2).nonzero()[:, 2].tolist() == [shape[3] + 2, 0]


# -- bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("shape", [(4, 16, 23, 23), (4, 1, 92, 92), (5, 7, 40, 40)])
def test_results_repeat_and_do_not_depend_on_the_batch(place, shape, layout):
    values = arguments(shape, F32, layout=layout, device=place)
    for op, _, inputs, _ in cases(values):
        results, grads = run(op, inputs)
        results_again, grads_again = run(op, inputs)
        for a, b in zip((*results, *grads), (*results_again, *grads_again), strict=True):
            assert torch.equal(a, b)
        upper = [rand(*r.shape, dtype=F32, seed=7 + i, device=place) for i, r in enumerate(results)]
        for i in (0, shape[0] - 1):
            leaves = [v[i : i + 1].detach().requires_grad_() for v in inputs]
            alone = op(*leaves)
            alone = alone if isinstance(alone, tuple) else (alone,)
            # Pooled pixels are (2, B, C), all else has its batch first.
            pick = [slice(None)] if op is kernels.pool_pixels else []
            cut = [r[(*pick, slice(i, i + 1))] if j == 0 else r[i : i + 1] for j, r in enumerate(results)]
            assert all(torch.equal(a, b) for a, b in zip(alone, cut, strict=True))
            grads_in = [u[(*pick, slice(i, i + 1))] if j == 0 else u[i : i + 1] for j, u in enumerate(upper)]
            for a, b in zip(torch.autograd.grad(alone, leaves, grads_in), grads, strict=True):
                assert torch.equal(a, b[i : i + 1])


# -- what is launched, what is refused ------------------------------------------------------------------------------------


def test_a_small_plane_is_one_launch_a_pooling(device):
    for shape, extra in (((2, 32, 23, 23), 0), ((2, 4, 92, 92), 1)):
        x, channel, spatial = (v.requires_grad_() for v in arguments(shape, F32, device=device))
        with _launch.recording() as launches:
            pooled, y = kernels.pool_pixels(x)
            assert len(launches) == 1 + extra
            torch.autograd.grad((pooled, y), x, (torch.ones_like(pooled), torch.ones_like(y)))
            assert len(launches) == 2 + extra
        with _launch.recording() as launches:
            pooled, y = kernels.pool_channels(x, channel)
            assert len(launches) == 1
            torch.autograd.grad((pooled, y), (x, channel), (torch.ones_like(pooled), torch.ones_like(y)))
            assert len(launches) == 2 + extra
        with _launch.recording() as launches:
            y = kernels.apply_gates(x, channel, spatial)
            assert len(launches) == 1
            torch.autograd.grad(y, (x, channel, spatial), torch.ones_like(y))
            assert len(launches) == 3


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("pool_pixels", {"x": torch.zeros(3, 4, 4)}, "x must be a floating-point"),
        ("pool_pixels", {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "x must be a floating-point"),
        ("pool_pixels", {"x": torch.zeros(2, 3, 0, 4)}, r"x must have a channel and from 1 to .* pixels, got \(2, 3, 0, 4\)"),
        ("average_pixels", {"x": torch.zeros(2, 0, 4, 4)}, "x must have a channel"),
        ("pool_channels", {"channel_logits": torch.zeros(2, 4)}, r"channel_logits must be \(2, 3\), got \(2, 4\)"),
        ("pool_channels", {"channel_logits": torch.zeros(2, 3, dtype=torch.int32)}, "channel_logits must be float16"),
        ("pool_channels", {"channel_logits": torch.zeros(2, 3, device="meta")}, "channel_logits must be on the device of x"),
        ("apply_gates", {"channel_logits": torch.zeros(3, 2)}, r"channel_logits must be \(2, 3\)"),
        (
            "apply_gates",
            {"spatial_logits": torch.zeros(2, 1, 4, 5)},
            r"spatial_logits must be \(2, 1, 4, 4\), got \(2, 1, 4, 5\)",
        ),
        ("apply_gates", {"spatial_logits": torch.zeros(2, 1, 4, 4, device="meta")}, "spatial_logits must be on the device"),
    ],
)
def test_refuses_before_any_launch(op, change, words, device):
    names = {"pool_pixels": 1, "average_pixels": 1, "pool_channels": 2, "apply_gates": 3}[op]
    good = {"x": torch.zeros(2, 3, 4, 4), "channel_logits": torch.zeros(2, 3), "spatial_logits": torch.zeros(2, 1, 4, 4)}
    with _launch.recording() as launches, pytest.raises(ValueError, match=words):
        getattr(kernels, op)(**dict(list({**good, **change}.items())[:names]))
    assert not launches


def test_a_second_derivative_is_an_error_or_right():
    values = [v.requires_grad_() for v in arguments((1, 2, 2, 2))]
    for op, _, inputs, _ in cases(values):
        with pytest.raises(RuntimeError, match="one derivative"):
            torch.autograd.grad(sum((part**2).sum() for part in op(*inputs)), inputs, create_graph=True)
    kernels.set_backend("reference")
    try:
        for op, _, inputs, _ in cases(values):
            assert torch.autograd.gradgradcheck(op, inputs)
    finally:
        kernels.set_backend("auto")


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
    for a, b in zip(torch.autograd.grad(got, leaves, upper), torch.autograd.grad(want, leaves, upper), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_cbam_compiles_in_one_graph():
    block, x = CBAM(16), rand(2, 16, 6, 6, dtype=F32)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, want = compiled(leaves[0]), block(leaves[1])
    assert torch.allclose(got, want, atol=1e-6)
    grads = [torch.autograd.grad((y**2).sum(), leaf)[0] for y, leaf in zip((got, want), leaves, strict=True)]
    assert torch.allclose(*grads, atol=1e-6)
