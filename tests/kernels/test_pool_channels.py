"""Kernels and CPU form of pooling over channels against float64 references."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, rand
from pooling import (
    BATCHES,
    FORMATS,
    SHAPES,
    check,
    check_bits,
    check_gradients,
    check_launches,
    check_refusal,
    check_second_derivative,
    check_small_tiles,
    check_unused_results,
    check_views,
)

from fastflow import kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(place, shape):
    check("pool_channels", place, shape)
    check("pool_channels", place, shape, layout="l")
    check("pool_channels", place, shape, F32, layout="l" if shape[1] > 3 else "c")


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize(
    ("dtype", "logits"), [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F64, F32)]
)
def test_dtypes(place, dtype, logits, layout):
    check("pool_channels", place, (2, 24, 6, 6), dtype, logits, layout)


def test_in_parts_and_in_chunks(place, monkeypatch):
    check_small_tiles("pool_channels", place, monkeypatch)


def test_views_and_expanded_batches(place):
    check_views("pool_channels", place)


def test_gradcheck(place):
    check_gradients("pool_channels", place)


@pytest.mark.parametrize(("shape", "layout"), BATCHES, ids=str)
def test_results_repeat_and_do_not_depend_on_the_batch(place, shape, layout):
    check_bits("pool_channels", place, shape, layout)


def test_gradients_when_one_result_is_not_used(place):
    check_unused_results("pool_channels", place)


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_gradients_of_maxima_go_to_the_first(place, layout, dtype):
    """Many maxima are equal, among them zeros of both signs, in one block of channels and in several."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 7), (1, 150, 2, 2)):
        x = torch.randint(-3, 1, shape, generator=generator).to(place, dtype) * 0.5
        x = torch.where(torch.rand(shape, generator=generator).to(place) < 0.5, -x.abs(), x)
        x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
        pooled, _ = kernels.pool_channels(x, torch.zeros(shape[:2], device=place))
        (got,) = torch.autograd.grad(pooled[:, 1].sum(), x)
        places = x.detach().max(dim=1).indices
        assert torch.equal(got.max(dim=1).indices, places) and bool(((got != 0).sum(dim=1) == 1).all())


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_nan_is_the_maximum_and_infinities_are_values(place, dtype):
    x = rand(1, 2, 3, 4, dtype=dtype, device=place)
    x[0, 0, 1, 2], x[0, 0, 2, 1], x[0, 0, 0, 0] = float("nan"), float("nan"), float("inf")
    x[0, 1] = float("-inf")
    x.requires_grad_()
    # Gates of 1 with and without the place of the maximum, which is wanted for gradients alone.
    top = kernels.pool_channels(x, torch.full((1, 2), 100.0, device=place))[0][:, 1]
    assert torch.allclose(top, x.max(dim=1).values, equal_nan=True)
    (got,) = torch.autograd.grad(top.sum(), x)
    assert torch.equal(got.max(dim=1).indices, x.detach().max(dim=1).indices)


def test_one_launch_and_one_more_to_join_the_gradients_of_logits(device):
    check_launches("pool_channels", device, (2, 32, 23, 23), 1, 1)
    check_launches("pool_channels", device, (2, 4, 92, 92), 1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 4, 4)}, "x must be a floating-point"),
        ({"channel_logits": torch.zeros(2, 4)}, r"channel_logits must be \(2, 3\), got \(2, 4\)"),
        ({"channel_logits": torch.zeros(2, 3, dtype=torch.int32)}, "channel_logits must be float16"),
        ({"channel_logits": torch.zeros(2, 3, device="meta")}, "channel_logits must be on the device of x"),
    ],
)
def test_refuses_before_any_launch(change, words, device):
    check_refusal("pool_channels", change, words)


def test_a_second_derivative_is_an_error_or_right():
    check_second_derivative("pool_channels")
