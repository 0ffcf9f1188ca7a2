"""Correlations within the latent: their definition, and the same numbers from every engine."""

import numpy as np
import pytest
import torch
from helpers import build, images
from hypothesis import given
from hypothesis import strategies as st

from fastflow import FlowConfig
from fastflow.models.inference import scorer as scorers
from fastflow.models.inference.correlations import lag_correlations
from fastflow.models.inference.engines import CudaGraphs, Eager
from fastflow.models.inference.graphs import Captured, GraphPerSize
from fastflow.models.scoring import LabelScorer, score_slices, score_slices_with_latents

CONFIGS = {
    "classification": FlowConfig.tiny(3),
    "split before the label": FlowConfig.tiny(3, condition_from_step=4),
}


def defined(block: np.ndarray) -> tuple[float, float]:
    """The equation, pixel by pixel."""
    channels, height, width = block.shape
    across = down = 0.0
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                across += block[c, i, j] * block[c, i, j + 1] if j + 1 < width else 0.0
                down += block[c, i, j] * block[c, i + 1, j] if i + 1 < height else 0.0
    total = float((block**2).sum())
    return across / total, down / total


@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 99))
def test_correlations_are_as_defined(shape, seed):
    block = np.random.default_rng(seed).normal(0.5, 1.0, (2, *shape))
    wanted = [defined(one) for one in block]
    got = lag_correlations(torch.from_numpy(block))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12)
    last = lag_correlations(torch.from_numpy(np.moveaxis(block, 1, 3)), 1, 2)
    np.testing.assert_allclose(last.numpy(), wanted, rtol=0, atol=1e-12)


def test_blocks_of_zeros_and_narrow_dtypes():
    assert lag_correlations(torch.zeros(2, 3, 4, 4)).eq(0.0).all()
    block = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert lag_correlations(block).dtype == torch.float32
    torch.testing.assert_close(lag_correlations(block), lag_correlations(block.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_scorers_give_the_correlations_of_the_latent(name):
    model = build(CONFIGS[name], dtype=torch.float64)
    x = images(model.config, 3).double()
    scorer = LabelScorer(model, max_rows=2)
    found, plain = scorer.score_with_latents(x), scorer.score(x)
    assert torch.equal(found.log_probs, plain.log_probs)
    shapes = model.config.latent_shapes
    for label in range(3):
        with torch.no_grad():
            z, _ = model(x, torch.full((3,), label))
        parts = z.split([int(np.prod(shape)) for shape in shapes], dim=1)
        wanted = [
            lag_correlations(part.unflatten(1, shape)) for part, shape in zip(parts, shapes, strict=True)
        ]
        torch.testing.assert_close(
            found.correlations[:, label], torch.stack(wanted, dim=1), rtol=0, atol=1e-10
        )


def test_invalid_and_missing_images():
    model = build(FlowConfig.tiny(2), dtype=torch.float32)
    x = images(model.config, 3).float()
    x[1, 0, 0, 0] = float("nan")
    scorer = LabelScorer(model)
    found = scorer.score_with_latents(x)
    assert found.correlations[1].isnan().all() and found.log_probs[1].isnan().all()
    assert torch.equal(found.correlations[2], scorer.score_with_latents(x[2:]).correlations[0])
    assert scorer.score_with_latents(x[:0]).correlations.shape == (0, 2, len(model.config.latent_shapes), 2)


def test_slices_are_scored_in_batches():
    model = build(FlowConfig.tiny(2), dtype=torch.float32)
    slices = np.random.default_rng(0).integers(0, 256, (5, *model.config.input_shape), dtype=np.uint8)
    log_probs, correlations = score_slices_with_latents(model, slices, 2)
    np.testing.assert_array_equal(log_probs, score_slices(model, slices))
    np.testing.assert_array_equal(correlations, score_slices_with_latents(model, slices)[1])


def test_captured_passes_of_both_kinds_are_told_apart():
    model = build(FlowConfig.tiny(2), dtype=torch.float32)

    def capture(run, inputs, pool):
        out = run(*inputs)
        return Captured(out, lambda: out.copy_(run(*inputs)), pool)

    scorer = LabelScorer(model)
    assert isinstance(scorer._engine, Eager)
    graphs = CudaGraphs(scorer._engine)
    graphs.graphs = GraphPerSize(capture)
    x = images(model.config, 3).float()
    wanted = scorer.score_with_latents(x)
    with scorer._context():
        plain, _ = scorers._score(graphs, x, 2, 8)
        packed, _ = scorers._score(graphs, x, 2, 8, graphs.finish_with_latents)
    assert torch.equal(plain.float(), wanted.log_probs) and torch.equal(packed[..., 0], plain)
    assert torch.equal(packed[..., 1:].float(), wanted.correlations.flatten(2))


def test_passes_over_planes_give_the_same_correlations(monkeypatch):
    """The engine of compiled passes, with its graphs run as they are: their layout is what differs."""
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    model = build(FlowConfig.tiny(2, condition_from_step=4), dtype=torch.float32)
    x = images(model.config, 3).float()
    wanted = LabelScorer(model).score_with_latents(x)
    planes = LabelScorer(model, engine="compile")
    found = planes.score_with_latents(x)
    torch.testing.assert_close(found.correlations, wanted.correlations, rtol=0, atol=1e-5)
    assert torch.equal(found.log_probs, planes.score(x).log_probs)
