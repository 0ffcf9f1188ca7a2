"""The atrous pyramid: its definition and its form for CPUs against the branches written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastflow.kernels.cpu.pyramid import PyramidWeights, atrous_pyramid_cpu, takes_folded_kernels
from fastflow.kernels.pyramid import atrous_pyramid, atrous_pyramid_reference

DILATIONS = (1, 2, 5)


def weights_of(channels: int, dtype: torch.dtype = torch.float64) -> PyramidWeights:
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> torch.Tensor:
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()
        )

    all_channels, hidden = 4 * channels, 3
    return PyramidWeights(
        (draw(channels, channels, 1, 1), draw(channels)),
        tuple((draw(channels, channels, 3, 3), draw(channels)) for _ in DILATIONS),
        DILATIONS,
        (draw(hidden, all_channels), draw(hidden)),
        (draw(all_channels, hidden), draw(all_channels)),
        (draw(channels, all_channels, 1, 1), draw(channels)),
    )


def leaves(weights: PyramidWeights) -> list[torch.Tensor]:
    pairs = [weights.point, *weights.dilated, weights.down, weights.up, weights.output]
    return [tensor for pair in pairs for tensor in pair]


def written_out(x: torch.Tensor, weights: PyramidWeights) -> torch.Tensor:
    branches = [F.conv2d(x, *weights.point)]
    for (weight, bias), d in zip(weights.dilated, weights.dilations, strict=True):
        branches.append(F.conv2d(x, weight, bias, padding=d, dilation=d))
    pyramid = torch.cat(branches, dim=1)
    hidden = F.relu(F.linear(pyramid.mean(dim=(2, 3)), *weights.down))
    gates = torch.sigmoid(F.linear(hidden, *weights.up))
    return F.conv2d(pyramid * gates[:, :, None, None], *weights.output)


@pytest.mark.parametrize("form", [atrous_pyramid_reference, atrous_pyramid_cpu, atrous_pyramid])
@pytest.mark.parametrize("size", [(9, 7), (4, 11)])
def test_every_form_computes_the_gated_pyramid_and_its_gradients(form, size):
    weights = weights_of(3)
    x = torch.randn(
        2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    grad = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [x, *leaves(weights)]
    want = written_out(x, weights)
    got = form(x, weights)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    wanted, found = (torch.autograd.grad(y, inputs, grad) for y in (want, got))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_large_images_take_the_folded_kernels_and_give_a_sample_the_same_bits_in_every_batch():
    weights = weights_of(2, torch.float32)
    x = torch.randn(3, 2, 104, 100, generator=torch.Generator().manual_seed(3))
    assert (
        takes_folded_kernels(x) and not takes_folded_kernels(x[:, :, :50]) and not takes_folded_kernels(x[:0])
    )
    with torch.no_grad():
        together = atrous_pyramid(x, weights)
        assert torch.equal(together, torch.cat([atrous_pyramid(image, weights) for image in x.split(1)]))
        torch.testing.assert_close(together, atrous_pyramid_reference(x, weights), rtol=1e-4, atol=1e-4)
