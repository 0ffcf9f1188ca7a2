"""Exported graphs compute what the model does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fastflow.export.graphs import (
    GRAPHS,
    AttributionGraph,
    LatentGraph,
    Parts,
    SampleGraph,
    ScoreGraph,
    fold,
)

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import UninitializedModelError
from fastflow.models.inference import leaves
from fastflow.models.inference.planes import from_planes, to_planes
from tests.export.layouts import short

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from helpers import build, images, labels

CONFIGS = {
    "classification": FlowConfig.tiny(3),
    "generation": short(3, task="generation"),
    "batch norm": short(3, task="generation", norm="batch"),
    "semi-conditional": short(3, condition_from_step=1),
    "semi-conditional generation": short(3, task="generation", condition_from_step=2),
    "odd size": short(2, input_shape=(1, 20, 12)),
    "two channels, one label": short(1, input_shape=(2, 16, 16)),
    "own conditioners": short(3, share_halves=False),
    "split at the end": short(3, split_after=(1, 2)),
    "stripes": FlowConfig.tiny(
        2,
        masks=(
            "horizontal_stripe",
            "vertical_stripe",
            "block_checkerboard",
            "checkerboard",
            "channel",
            "custom",
        ),
    ),
}


@pytest.fixture(params=CONFIGS, ids=str, scope="module")
def model(request: pytest.FixtureRequest) -> MagicFlow:
    """A model of each layout. Do not change it."""
    return build(CONFIGS[request.param], dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny() -> MagicFlow:
    """The first of the layouts. Do not change it."""
    return build(CONFIGS["classification"], dtype=torch.float32)


def test_every_graph_computes_what_the_model_does(model):
    x, y = images(model.config, 4, dtype=torch.float32), labels(model.config, 4)
    constants = fold(model)
    with torch.no_grad():
        z, logdet = model(x, y)
        attribution, constant = model.attribution(x, y)
        scores = ScoreGraph(model, constants)(x)
        latent, latent_logdet = LatentGraph(model, constants)(x, y)
        found = (
            (scores, model.log_prob_all(x)),
            (latent, z),
            (latent_logdet, logdet),
            (SampleGraph(model, constants)(z, y), model.inverse(z, y)),
            *zip(AttributionGraph(model, constants)(x, y), (attribution, constant), strict=True),
        )
    for got, want in found:
        assert got.shape == want.shape
        # Log-likelihoods are some 1e3 nats here.
        assert torch.allclose(got.double(), want.double(), rtol=1e-6, atol=5e-5)
    # Log-likelihoods leave the graphs in float64.
    assert scores.dtype == latent_logdet.dtype == torch.float64


def test_mixed_precision_narrows_the_convolutions_of_conditioners_alone(tiny):
    graph = ScoreGraph(tiny, fold(tiny, "mixed"))
    kinds = {name: buffer.dtype for name, buffer in graph.named_buffers() if buffer.is_floating_point()}
    narrow = {name for name, dtype in kinds.items() if dtype == torch.float16}
    assert narrow
    assert all(
        name.endswith(("conv_weight", "conv_bias")) or ".conv" in name or "_conv" in name for name in narrow
    )
    for words in ("heads", "films", "mix", "norm"):
        assert all(dtype == torch.float32 for name, dtype in kinds.items() if words in name), words
    x = images(tiny.config, 3, dtype=torch.float32)
    with torch.no_grad():
        want = tiny.log_prob_all(x)
        error = graph(x).float() - want
    range_ = want.max(dim=1).values - want.min(dim=1).values
    assert bool(((error.max(dim=1).values - error.min(dim=1).values) < 0.05 * range_).all())


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_what_lies_between_narrow_convolutions_is_not_rounded(task, monkeypatch):
    """Rounding there would double the errors of log-odds."""
    model = build(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    graph, kinds = ScoreGraph(model, fold(model, "mixed")), []

    def noting(real):
        def noted(leaf, v, *arguments, **options):
            out = real(leaf, v, *arguments, **options)
            kinds.append((v.dtype, out.dtype))
            return out

        return noted

    for kind in (leaves.Conv, leaves.Norm, leaves.Gates, leaves.Pyramid):
        monkeypatch.setattr(kind, "__call__", noting(kind.__call__))
    with torch.no_grad():
        graph(images(model.config, 2, dtype=torch.float32))
    assert len(kinds) > 20 and set(kinds) == {(torch.float32, torch.float32)}


def test_a_tensor_in_several_places_is_one_buffer(tiny):
    graph = ScoreGraph(tiny, fold(tiny))
    # Both halves of a step share one conditioner.
    first, second = graph.steps[1].halves
    assert first.net.conv2.weight is second.net.conv2.weight
    assert len({buffer.data_ptr() for buffer in graph.buffers()}) == len(list(graph.buffers()))


def test_graphs_of_a_model_hold_the_same_tensors(tiny):
    constants = fold(tiny)
    pointers = [{b.data_ptr() for b in GRAPHS[name](tiny, constants).buffers()} for name in GRAPHS]
    shared = set.intersection(*pointers)
    # Only some graphs hold the inverses of the 1x1 convolutions.
    assert all(len(found - shared) <= 2 * tiny.config.num_steps for found in pointers)


def test_halves_of_one_shape_are_one_part(tiny):
    parts = Parts()
    graph = LatentGraph(tiny, fold(tiny), parts)
    x, y = images(tiny.config, 2, dtype=torch.float32), labels(tiny.config, 2)
    with torch.no_grad():
        # Parts give the right shape only: they are calls of functions that exist in an exported graph.
        z, _ = graph(x, y)
    assert z.shape == (2, tiny.config.num_dims)
    # 12 halves: two of the custom mask, which move other numbers of pixels, and those of masks with structure
    # in two sizes.
    assert len(parts.parts) == 4
    part = next(iter(parts.parts.values()))
    passive, rows, image, tensors = part.example(4)
    assert image is None and len(rows) == 4
    s, shift = part(passive, rows, image, tensors)
    assert s.shape == shift.shape and len(s) == 4


@pytest.mark.parametrize("phases", [1, 2])
def test_planes_are_undone(phases):
    x = torch.randn(3, 6, 8, 2)
    assert torch.equal(from_planes(to_planes(x, phases), phases), x)


def test_refuses():
    model = build(FlowConfig.tiny(2), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"precision must be one of float32, mixed, got 'half'"):
        fold(model, "half")
    with pytest.raises(ValueError, match="evaluation mode"):
        fold(model.train())
    with pytest.raises(
        ValueError, match=r"must be float32 on a CPU to be exported, it is torch\.float64 on cpu"
    ):
        fold(build(FlowConfig.tiny(2)))
    with pytest.raises(UninitializedModelError):
        fold(MagicFlow(FlowConfig.tiny(2)).eval())
