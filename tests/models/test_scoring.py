"""The batched scorer and what turns its output into decisions."""

import numpy as np
import pytest
import torch
from helpers import build, images

from fastflow import FlowConfig
from fastflow.models import scoring


@pytest.mark.parametrize("max_rows", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("condition_from_step", [0, 3, 5])
def test_micro_batches_change_nothing(max_rows, condition_from_step):
    config = FlowConfig.tiny(3, condition_from_step=condition_from_step)
    model = build(config)
    x = images(config, 5)
    with torch.no_grad():
        whole = scoring.log_prob_all(model, x)
        parts = scoring.log_prob_all(model, x, max_rows=max_rows)
    assert whole.shape == (5, 3)
    assert (whole - parts).abs().max() < 1e-9


def test_max_rows_is_checked():
    with pytest.raises(ValueError, match="max_rows"):
        scoring.log_prob_all(build(FlowConfig.tiny(2)), torch.zeros(1, 1, 16, 16), max_rows=0)


def test_float32_log_odds_stay_close_to_float64():
    config = FlowConfig.tiny(3)
    narrow, wide = build(config, dtype=torch.float32), build(config, dtype=torch.float32).double()
    x = images(config, 6, dtype=torch.float32)
    with torch.no_grad():
        a, b = narrow.log_prob_all(x).double(), wide.log_prob_all(x.double())
    assert ((a - a[:, :1]) - (b - b[:, :1])).abs().max() < 1e-2


def test_bfloat16_conditioners_leave_the_flow_stream_alone():
    """Under autocast only the conditioners are narrow: log-odds move by a fraction of what a narrow stream would cost."""
    config = FlowConfig.tiny(3)
    model = build(config, dtype=torch.float32)
    x = images(config, 6, dtype=torch.float32)
    with torch.no_grad():
        want = model.log_prob_all(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model.log_prob_all(x)
            z, logdet = model(x, torch.zeros(6, dtype=torch.int64))
    assert got.dtype == z.dtype == logdet.dtype == torch.float32
    assert not torch.equal(got, want)
    assert ((got - got[:, :1]) - (want - want[:, :1])).abs().max() < 1.0


def test_gradients_flow_through_all_labels():
    config = FlowConfig.tiny(3, dropout=0.0)
    model = build(config)
    x = images(config, 2)
    model.zero_grad()
    scoring.log_prob_all(model, x)[:, 1].sum().backward()
    one = model.steps[0].coupling.conditioners[0].conv1.bias.grad.clone()
    model.zero_grad()
    model.log_prob(x, torch.tensor([1, 1])).sum().backward()
    assert torch.allclose(one, model.steps[0].coupling.conditioners[0].conv1.bias.grad, rtol=1e-9)


def test_slices_and_volumes():
    config = FlowConfig.tiny(3)
    model = build(config, dtype=torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 16, 16), dtype=np.uint8)
    done = []
    got = scoring.score_slices(model, pixels, batch_size=3, progress=done.append)
    assert got.shape == (7, 3) and done == [3, 6, 7]
    with torch.no_grad():
        want = model.log_prob_all(torch.from_numpy(pixels).float() / 127.5 - 1)
    assert np.abs(got - want.numpy()).max() < 1e-2
    volumes = np.array([0, 0, 2, 1, 2, 2, 0])
    joined = scoring.volume_log_probs(got, volumes)
    assert np.allclose(joined, [got[volumes == v].sum(axis=0) for v in range(3)])


def test_from_uint8_covers_the_range():
    assert scoring.from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
