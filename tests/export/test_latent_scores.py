"""The score graph with correlations computes what the model does, of every layout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fastflow.export.graphs import ScoreGraph, fold
from fastflow.export.latent_scores import ScoreWithLatentsGraph

from fastflow.models.scoring import LabelScorer
from tests.export.test_graphs import CONFIGS

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from helpers import build, images


@pytest.mark.parametrize("name", ["generation", "semi-conditional", "odd size", "split at the end"])
def test_correlations_are_those_of_the_model(name: str) -> None:
    model = build(CONFIGS[name], dtype=torch.float32)
    x = images(model.config, 2).float()
    wanted = LabelScorer(model).score_with_latents(x).correlations
    with torch.no_grad():
        constants = fold(model)
        log_probs, correlations = ScoreWithLatentsGraph(model, constants)(x)
        assert torch.equal(log_probs, ScoreGraph(model, constants)(x))
    assert correlations.dtype == torch.float64 and correlations.shape == wanted.shape
    torch.testing.assert_close(correlations, wanted.double(), rtol=0, atol=1e-5)
