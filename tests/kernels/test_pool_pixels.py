"""Kernels and CPU form of pooling over pixels against float64 references."""

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

NAMES = ["pool_pixels", "average_pixels"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(place, shape):
    last = "l" if shape[1] > 3 else "c"
    check("pool_pixels", place, shape)
    check("pool_pixels", place, shape, layout="l")
    check("pool_pixels", place, shape, F32, layout=last)
    check("average_pixels", place, shape, layout=last)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize(("dtype", "logits"), [(BF16, None), (F16, None)])
def test_dtypes(name, place, dtype, logits, layout):
    check(name, place, (2, 24, 6, 6), dtype, logits, layout)


@pytest.mark.parametrize("name", NAMES)
def test_in_parts_and_in_chunks(name, place, monkeypatch):
    check_small_tiles(name, place, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_views_and_expanded_batches(name, place):
    check_views(name, place)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, place):
    check_gradients(name, place)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "layout"), BATCHES, ids=str)
def test_results_repeat_and_do_not_depend_on_the_batch(name, place, shape, layout):
    check_bits(name, place, shape, layout)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_when_one_result_is_not_used(name, place):
    check_unused_results(name, place)


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_gradients_of_maxima_go_to_the_first(place, layout, dtype):
    """Many maxima are equal, among them zeros of both signs, in planes of one chunk and of several."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 7), (1, 2, 92, 92), (1, 150, 2, 2)):
        x = torch.randint(-3, 1, shape, generator=generator).to(place, dtype) * 0.5
        x = torch.where(torch.rand(shape, generator=generator).to(place) < 0.5, -x.abs(), x)
        x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
        (got,) = torch.autograd.grad(kernels.pool_pixels(x)[0][1].sum(), x)
        places = x.detach().flatten(2).max(dim=2).indices
        assert torch.equal(got.flatten(2).nonzero()[:, 2].view(places.shape), places)


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 2, 92, 92)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_nan_is_the_maximum_and_infinities_are_values(place, shape, dtype):
    x = rand(*shape, dtype=dtype, device=place)
    x[0, 0, 1, 2], x[0, 0, 2, 1], x[0, 0, 0, 0] = float("nan"), float("nan"), float("inf")
    x[0, 1] = float("-inf")
    x.requires_grad_()
    top = kernels.pool_pixels(x)[0][1]
    assert torch.allclose(top, x.flatten(2).max(dim=2).values, equal_nan=True)
    (got,) = torch.autograd.grad(top.sum(), x)
    assert got.flatten(2).nonzero()[:, 2].tolist() == [shape[3] + 2, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_small_plane_is_one_launch(name, device):
    check_launches(name, device, (2, 32, 23, 23), 1, 1)
    check_launches(name, device, (2, 4, 92, 92), 2, 1)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pool_pixels", {"x": torch.zeros(3, 4, 4)}, "x must be a floating-point"),
        ("pool_pixels", {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "x must be a floating-point"),
        (
            "pool_pixels",
            {"x": torch.zeros(2, 3, 0, 4)},
            r"x must have a channel and from 1 to .* pixels, got \(2, 3, 0, 4\)",
        ),
        ("average_pixels", {"x": torch.zeros(2, 0, 4, 4)}, "x must have a channel"),
    ],
)
def test_refuses_before_any_launch(name, change, words, device):
    check_refusal(name, change, words)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_an_error_or_right(name):
    check_second_derivative(name)
