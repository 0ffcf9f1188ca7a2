"""Folded constants compute the same as the modules that they were folded from."""

import pytest
import torch
from helpers import build, images
from torch.nn import functional as F

from fastflow import FlowConfig
from fastflow.kernels.cpu.compiled import gelu
from fastflow.models.inference import leaves, planes
from fastflow.models.inference.fold import fold, over_phases


@pytest.mark.parametrize("size", [(16, 16), (23, 23), (5, 8), (1, 1), (46, 46)])
def test_tiles_compute_the_spatial_convolution(size):
    torch.manual_seed(0)
    weight, pooled = (
        torch.randn(1, 2, 7, 7, dtype=torch.float64),
        torch.randn(3, 2, *size, dtype=torch.float64),
    )
    got = leaves.spatial_logits(pooled, leaves.spatial_tile(weight))
    torch.testing.assert_close(got, F.conv2d(pooled, weight, padding=3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (23, 23), (5, 8), (1, 1)])
def test_phases_compute_the_strided_convolution(size):
    torch.manual_seed(0)
    weight, x = torch.randn(6, 3, 5, 5, dtype=torch.float64), torch.randn(2, 3, *size, dtype=torch.float64)
    phases = planes.to_planes(x.permute(0, 2, 3, 1), 2)
    got = F.conv2d(phases.permute(0, 3, 1, 2), over_phases(weight), padding=1)
    torch.testing.assert_close(got, F.conv2d(x, weight, stride=2, padding=2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stride", "dilation", "size"), [(1, 1, 3), (2, 1, 3), (1, 6, 3), (1, 1, 1)])
def test_convolutions_are_checked_ops(stride, dilation, size):
    torch.manual_seed(0)
    x, weight = (
        v.contiguous(memory_format=torch.channels_last)
        for v in (torch.randn(2, 4, 9, 8), torch.randn(8, 4, size, size))
    )
    arguments = x, weight, torch.randn(8), stride, dilation
    torch.library.opcheck(
        torch.ops.fastflow.convolution.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    want = F.conv2d(*arguments[:3], stride, size // 2 * dilation, dilation)
    torch.testing.assert_close(torch.ops.fastflow.convolution(*arguments), want, rtol=1e-4, atol=1e-4)


def test_planes_are_the_squeeze():
    from fastflow.kernels import squeeze2x2

    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(planes.to_planes(x.permute(0, 2, 3, 1), 2), squeeze2x2(x).permute(0, 2, 3, 1))


def test_the_rational_gelu_is_exact_to_single_precision(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.cat((torch.linspace(-12, 12, 200_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])))
    got, want = gelu(x).double(), F.gelu(x.double())
    # Single precision rounds 1 + erf before the product with x.
    assert ((got - want).abs() / (1.0 + x.double().abs())).max() < 3e-7
    # In float64 it is the exact function.
    assert torch.equal(gelu(x.double()), want)


def test_structured_masks_compute_only_what_moves():
    config = FlowConfig.paper(2)
    model = build(FlowConfig.tiny(2))
    with torch.no_grad():
        constants = fold(model, model.condition(torch.arange(2)))
    for (channels, height, width), step, flow_step in zip(
        model.config.step_shapes, constants.steps, model.steps, strict=True
    ):
        count = channels * height * width
        moved = [half.net.heads.scale.shape[1] for half in step.halves]
        assert sum(moved) == count and moved[0] == int((~flow_step.coupling.mask).sum())
        reads = [half.net.conv1.weight.shape[1] for half in step.halves]
        assert reads == ([2 * channels] * 2 if len(step.columns) == 2 else [4 * channels] * 2)
    # Every mask of the paper but the first is a matter of whole planes.
    assert config.masks.count("custom") == 1
    assert [len(step.columns) for step in constants.steps] == [
        1 if name == "custom" else 2 for name in model.config.masks
    ]


def test_halves_share_what_is_the_same():
    model = build(FlowConfig.tiny(2))
    with torch.no_grad():
        constants = fold(model, model.condition(torch.arange(2)))
    first, second = constants.steps[3].halves
    assert first.net.conv2.weight.data_ptr() == second.net.conv2.weight.data_ptr()
    assert first.net.heads.weight.data_ptr() == second.net.heads.weight.data_ptr()


def test_folding_takes_no_part_in_autograd():
    model = build(FlowConfig.tiny(2))
    constants = fold(model, model.condition(torch.arange(2)))
    half = constants.steps[2].halves[0]
    stream = torch.randn(2, *[n // 2 for n in model.config.step_shapes[2][1:]], 8, dtype=torch.float64)
    moved, logdet = planes.run_half(stream, stream.clone(), torch.tensor([0, 1]), half, constants.bound)
    assert not moved.requires_grad and not logdet.requires_grad
    assert images(model.config, 1).dtype == moved.dtype
