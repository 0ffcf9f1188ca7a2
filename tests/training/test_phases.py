"""Schedules: which step does what, their text and JSON, and what is refused."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_steps import assert_same, batches, new_model, run_steps, settings

from fastflow.training.config import TrainConfig
from fastflow.training.phases import (
    Phase,
    describe,
    format_schedule,
    mean_passes,
    moment,
    parse_schedule,
    passes,
    phase_starts,
)
from fastflow.training.step import TrainingStep

PHASES = parse_schedule("likelihood:0.8,hybrid:0.2:weight=0.1:temperature=10:rivals=3:ramp=0.5")


def test_passes_of_each_objective():
    assert [passes(name, 7) for name in ("likelihood", "pairwise", "hybrid")] == [1, 2, 7]
    assert [passes("hybrid", 7, rivals) for rivals in (1, 3, 6, 50)] == [2, 4, 7, 7]
    assert [passes(name, 1) for name in ("likelihood", "pairwise", "hybrid")] == [1, 1, 1]
    assert describe(PHASES, 7) == "likelihood 80 % of steps, 1 pass an image; hybrid 20 %, 4 passes"
    phases = TrainConfig(schedule=PHASES).phases
    assert mean_passes(phases, range(6, 10), 10, 7) == (1 + 1 + 4 + 4) / 4


def test_the_number_of_a_step_decides_phase_and_weight():
    config = TrainConfig(
        schedule=(*PHASES[:1], dataclasses.replace(PHASES[1], restart_average=True, rate=0.5))
    )
    found = [config.moment(i, 20) for i in range(20)]
    assert [m.phase for m in found] == [0] * 16 + [1] * 4
    assert [m.weight for m in found[16:]] == [0.05, 0.1, 0.1, 0.1]
    assert [m.rate for m in found] == [1.0] * 16 + [0.5] * 4
    assert [m.restarts_average for m in found] == [False] * 16 + [True] + [False] * 3
    assert config.moment(25, 20) == found[-1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 60))
def test_phases_follow_each_other_and_their_weights_end_whole(shares, steps):
    phases = [Phase("hybrid", s / sum(shares), weight=i + 1.0, ramp=0.7) for i, s in enumerate(shares)]
    found = [moment(phases, i, steps) for i in range(steps)]
    starts = phase_starts(phases, steps)
    assert [m.phase for m in found] == [
        i for i in range(len(phases)) for _ in range(starts[i], starts[i + 1])
    ]
    assert all(0 < m.weight <= m.phase + 1.0 for m in found)
    assert all(abs(starts[i + 1] - starts[i] - phases[i].share * steps) <= 1 for i in range(len(phases)))
    for start, end in itertools.pairwise(starts):
        assert start == end or found[end - 1].weight == found[end - 1].phase + 1.0


numbers = st.floats(0.001, 1000)
phase = st.builds(
    Phase,
    objective=st.just("hybrid"),
    weight=st.none() | numbers,
    temperature=st.none() | numbers,
    rivals=st.none() | st.integers(1, 9),
    ramp=st.floats(0, 1),
    rate=numbers,
    restart_average=st.booleans(),
)


@given(st.lists(phase, min_size=1, max_size=4))
def test_text_and_json_say_all_of_a_schedule(phases):
    phases = tuple(dataclasses.replace(p, share=1 / len(phases)) for p in phases)
    assert parse_schedule(format_schedule(phases)) == phases
    config = TrainConfig(schedule=phases, select="both")
    assert TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_an_empty_schedule_is_the_objective():
    config = TrainConfig(objective="pairwise", contrast_weight=0.3, contrast_temperature=4.0)
    assert config.phases == (Phase("pairwise", weight=0.3, temperature=4.0),)
    assert parse_schedule("hybrid") == (Phase("hybrid"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("likelihood:0.8,hybrid:0.3", r"schedule: the shares .* sum to 1, got 0.8 \+ 0.3 = 1.1"),
        ("likelihod", "phase 1, 'likelihod': objective must be one of .*, did you mean 'likelihood'"),
        ("likelihood:0.5,hybrid:0.5:wieght=1", "phase 2, .*'wieght' is unknown, did you mean 'weight'"),
        ("likelihood:0.5,hybrid", "phase 2, 'hybrid': a share of the steps must follow"),
        ("likelihood:most", "share must be a number, got 'most'"),
        ("hybrid:1:rivals=1.5", "rivals must be a whole number, got '1.5'"),
        ("hybrid:1:rivals", "rivals needs a value"),
        ("hybrid:1:rivals=0", "rivals must be at least 1, got 0"),
        ("pairwise:1:rivals=2", "rivals belong to the objective hybrid"),
        ("hybrid:1:ramp=2", r"ramp must lie in \[0, 1\], got 2.0"),
        ("hybrid:1:weight=-1", "weight must be at least 0, got -1.0"),
        ("hybrid:1:temperature=0", "temperature must be positive, got 0.0"),
        ("hybrid:1:rate=nan", "rate must be positive, got nan"),
        ("hybrid:1:restart_average=maybe", "restart_average must be true or false, got 'maybe'"),
        ("hybrid:0", r"share must lie in \(0, 1\], got 0.0"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)


def test_unknown_settings_are_named_with_the_nearest():
    with pytest.raises(
        ValueError, match="'learning-rate' is no setting of training, did you mean 'learning_rate'"
    ):
        TrainConfig.from_dict({"learning-rate": 1e-3})
    with pytest.raises(ValueError, match="'tempreature' is no field of a phase, did you mean 'temperature'"):
        TrainConfig.from_dict({"schedule": [{"tempreature": 1.0}]})
    with pytest.raises(ValueError, match="'zzzz' is no setting of training; there are epochs"):
        TrainConfig.from_dict({"zzzz": 1})


def test_all_rivals_are_the_step_over_all_labels():
    found = []
    for rivals in (None, 2):
        model = new_model()
        run_steps(model, settings(schedule=(Phase("hybrid", rivals=rivals),)), batches(1))
        found.append(model)
    assert_same(*found)


def test_an_average_that_restarts_forgets_the_phases_before():
    phases = (Phase("likelihood", 0.5), Phase("likelihood", 0.5, restart_average=True))
    config = settings(schedule=phases, ema=0.9)
    model = new_model()
    step = run_steps(model, config, batches(2))
    step.set_moment(config.moment(3, 6))
    assert_same(step.average.model(), model)
    before = copy.deepcopy(model)
    step(*next(batches(1, seed=4)))
    averages, weights = step.average.model().parameters(), model.parameters()
    for average, weight, start in zip(averages, weights, before.parameters(), strict=True):
        assert torch.allclose(average, start + 0.1 * (weight - start), atol=1e-6)


def test_a_step_takes_the_weight_of_its_moment():
    ramping, whole = new_model(), new_model()
    config = settings(schedule=(Phase("pairwise", weight=0.4, ramp=1.0),))
    step = TrainingStep(ramping, config, torch.Generator().manual_seed(3), capturable=True)
    torch.manual_seed(7)
    step.set_moment(config.moment(0, 4))
    step(*next(batches(1)))
    run_steps(whole, settings(schedule=(Phase("pairwise", weight=0.1),)), batches(1), capturable=True)
    assert_same(ramping, whole)
    run_steps(other := new_model(), config, batches(1), capturable=True)
    assert any(not torch.equal(a, b) for a, b in zip(other.parameters(), whole.parameters(), strict=True))
