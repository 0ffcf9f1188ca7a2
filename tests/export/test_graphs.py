"""What is exported computes what the model does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fastflow.export.graphs import GRAPHS, AttributionGraph, LatentGraph, Parts, SampleGraph, ScoreGraph, fold, from_planes

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import UninitializedModelError
from fastflow.models import folded
from fastflow.models.folded import to_planes

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from helpers import build, images, labels

CONFIGS = {
    "classification": FlowConfig.tiny(3),
    "generation": FlowConfig.tiny(3, task="generation"),
    "batch norm": FlowConfig.tiny(3, task="generation", norm="batch"),
    "semi-conditional": FlowConfig.tiny(3, condition_from_step=2),
    "semi-conditional generation": FlowConfig.tiny(3, task="generation", condition_from_step=4),
    "odd size": FlowConfig.tiny(2, input_shape=(1, 20, 12)),
    "two channels, one label": FlowConfig.tiny(1, input_shape=(2, 16, 16)),
    "own conditioners": FlowConfig.tiny(3, share_halves=False),
    "split at the end": FlowConfig.tiny(3, split_after=(3, 5)),
    "stripes": FlowConfig.tiny(
        2, masks=("horizontal_stripe", "vertical_stripe", "block_checkerboard", "checkerboard", "channel", "custom")
    ),
}


@pytest.fixture(params=CONFIGS, ids=str)
def model(request: pytest.FixtureRequest) -> MagicFlow:
    return build(CONFIGS[request.param], dtype=torch.float32)


def test_every_graph_computes_what_the_model_does(model):
    x, y = images(model.config, 5, dtype=torch.float32), labels(model.config, 5)
    constants = fold(model)
    with torch.no_grad():
        z, logdet = model(x, y)
        spread, constant = model.attribution(x, y)
        found = (
            (ScoreGraph(model, constants)(x), model.log_prob_all(x)),
            *zip(LatentGraph(model, constants)(x, y), (z, logdet), strict=True),
            (SampleGraph(model, constants)(z, y), model.inverse(z, y)),
            *zip(AttributionGraph(model, constants)(x, y), (spread, constant), strict=True),
        )
    for got, want in found:
        assert got.shape == want.shape
        # Log-likelihoods are some 1e3 nats here.
        assert torch.allclose(got.double(), want.double(), rtol=1e-6, atol=5e-5)


def test_log_likelihoods_leave_in_float64(model):
    constants = fold(model)
    x = images(model.config, 2, dtype=torch.float32)
    with torch.no_grad():
        assert ScoreGraph(model, constants)(x).dtype == torch.float64
        assert LatentGraph(model, constants)(x, labels(model.config, 2))[1].dtype == torch.float64


def test_mixed_precision_narrows_the_convolutions_of_conditioners_alone():
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    graph = ScoreGraph(model, fold(model, "mixed"))
    kinds = {name: buffer.dtype for name, buffer in graph.named_buffers() if buffer.is_floating_point()}
    narrow = {name for name, dtype in kinds.items() if dtype == torch.float16}
    assert narrow
    assert all(name.endswith(("conv_weight", "conv_bias")) or ".conv" in name or "_conv" in name for name in narrow)
    for words in ("heads", "films", "mix", "norm"):
        assert all(dtype == torch.float32 for name, dtype in kinds.items() if words in name), words
    x = images(model.config, 3, dtype=torch.float32)
    with torch.no_grad():
        want = model.log_prob_all(x)
        error = graph(x).float() - want
    spread = want.max(dim=1).values - want.min(dim=1).values
    assert bool(((error.max(dim=1).values - error.min(dim=1).values) < 0.05 * spread).all())


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_what_lies_between_narrow_convolutions_is_not_rounded(task, monkeypatch):
    """Else the errors of log-odds are twice what they are."""
    model = build(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    graph, kinds = ScoreGraph(model, fold(model, "mixed")), []

    def noting(real):
        def noted(v, *arguments, **options):
            out = real(v, *arguments, **options)
            kinds.append((v.dtype, out.dtype))
            return out

        return noted

    for name in ("_conv2d", "norm_gelu", "gate", "_pyramid_block"):
        monkeypatch.setattr(folded, name, noting(getattr(folded, name)))
    with torch.no_grad():
        graph(images(model.config, 2, dtype=torch.float32))
    assert len(kinds) > 20 and set(kinds) == {(torch.float32, torch.float32)}


def test_a_tensor_in_several_places_is_one_buffer():
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    graph = ScoreGraph(model, fold(model))
    # Both halves of a step ask one conditioner.
    first, second = graph.steps[1].halves
    assert first.net.stage2.conv.weight is second.net.stage2.conv.weight
    assert len({buffer.data_ptr() for buffer in graph.buffers()}) == len(list(graph.buffers()))


def test_graphs_of_a_model_hold_the_same_tensors():
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    constants = fold(model)
    pointers = [{b.data_ptr() for b in GRAPHS[name](model, constants).buffers()} for name in GRAPHS]
    shared = set.intersection(*pointers)
    # What only some hold are inverses of the 1x1 convolutions.
    assert all(len(found - shared) <= 2 * model.config.num_steps for found in pointers)


def test_halves_of_one_shape_are_one_part():
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    parts = Parts()
    graph = LatentGraph(model, fold(model), parts)
    x, y = images(model.config, 2, dtype=torch.float32), labels(model.config, 2)
    with torch.no_grad():
        # What parts give is of the right shape only: they are calls of functions that exist in an exported graph.
        z, _ = graph(x, y)
    assert z.shape == (2, model.config.num_dims)
    # 12 halves: two of the custom mask, which move other numbers of pixels, and those of masks with structure in two sizes.
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
    with pytest.raises(ValueError, match=r"must be float32 on a CPU to be exported, it is torch\.float64 on cpu"):
        fold(build(FlowConfig.tiny(2)))
    with pytest.raises(UninitializedModelError):
        fold(MagicFlow(FlowConfig.tiny(2)).eval())
