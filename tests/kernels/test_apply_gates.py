"""Kernels and CPU form of CBAM's gates against float64 references, and the whole block."""

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
    check_views,
)
from torch.nn import functional as F

from fastflow.models.conditioners.leaves import CBAM


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


# -- the block -----------------------------------------------------------------------------------------------


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
