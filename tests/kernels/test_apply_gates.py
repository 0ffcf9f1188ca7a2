"""Kernels and CPU form of CBAM's gates against float64 references."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64
from pooling import (
    BATCHES,
    SHAPES,
    check,
    check_bits,
    check_gradients,
    check_launches,
    check_refusal,
    check_second_derivative,
    check_small_tiles,
    check_views,
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(place, shape):
    check("apply_gates", place, shape)
    check("apply_gates", place, shape, layout="l")
    check("apply_gates", place, shape, F32, layout="l" if shape[1] > 3 else "c")


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize(
    ("dtype", "logits"), [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F64, F32)]
)
def test_dtypes(place, dtype, logits, layout):
    check("apply_gates", place, (2, 24, 6, 6), dtype, logits, layout)


def test_in_parts_and_in_chunks(place, monkeypatch):
    check_small_tiles("apply_gates", place, monkeypatch)


def test_views_and_expanded_batches(place):
    check_views("apply_gates", place)


def test_gradcheck(place):
    check_gradients("apply_gates", place)


@pytest.mark.parametrize(("shape", "layout"), BATCHES, ids=str)
def test_results_repeat_and_do_not_depend_on_the_batch(place, shape, layout):
    check_bits("apply_gates", place, shape, layout)


def test_one_launch_and_one_more_to_join_the_gradients_of_logits(device):
    check_launches("apply_gates", device, (2, 4, 6, 6), 1, 1)
    check_launches("apply_gates", device, (2, 32, 23, 23), 1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 0, 4)}, "x must have a channel and from 1 to .* pixels"),
        ({"channel_logits": torch.zeros(3, 2)}, r"channel_logits must be \(2, 3\)"),
        (
            {"spatial_logits": torch.zeros(2, 1, 4, 5)},
            r"spatial_logits must be \(2, 1, 4, 4\), got \(2, 1, 4, 5\)",
        ),
        (
            {"spatial_logits": torch.zeros(2, 1, 4, 4, device="meta")},
            "spatial_logits must be on the device",
        ),
    ],
)
def test_refuses_before_any_launch(change, words, device):
    check_refusal("apply_gates", change, words)


def test_a_second_derivative_is_an_error_or_right():
    check_second_derivative("apply_gates")
