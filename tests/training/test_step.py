"""The training step: what it computes, what it skips, and that nothing in it waits for a device."""

import copy

import pytest
import torch
from training_steps import (
    BATCH,
    CLASSES,
    OBJECTIVES,
    NoWaiting,
    assert_same,
    batches,
    new_model,
    run_steps,
    settings,
)

from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.augment import AUGMENTS
from fastflow.training.staging import Batch
from fastflow.training.step import TrainingStep


def plain_training(model, config, data):
    """The same training by the tools of PyTorch, written down step by step: (average, sum of bits/dim)."""
    torch.manual_seed(7)
    generator, negatives = torch.Generator().manual_seed(3), objectives.HardNegatives(CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    average, total = None, 0.0
    weight, temperature = config.contrast_weight, config.contrast_temperature
    for images, y in data:
        x = AUGMENTS[config.augment](from_uint8(images), generator)
        x = objectives.dequantize(x, generator)
        model.initialize(x, y)
        if config.objective == "likelihood":
            loss, lp = objectives.likelihood_loss(model, x, y)
        elif config.objective == "hybrid":
            loss, lp = objectives.hybrid_loss(model, x, y, CLASSES, weight, temperature)
        else:
            wrong = negatives.draw(y, generator)
            loss, lp, logistic = objectives.pairwise_loss(model, x, y, wrong, weight, temperature)
            negatives.update(y, wrong, logistic)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        if average is None:
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
            average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
        average.update_parameters(model)
        total += float(objectives.bits_per_dim(lp.detach(), model.config.num_dims).double().sum())
    return average.module, total


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_adam_on_clipped_gradients_and_an_average(objective, reversible):
    config = settings(objective=objective, ema=0.5)
    model = new_model(reversible=reversible)
    plain = copy.deepcopy(model)
    step = run_steps(model, config, batches(2))
    average, total = plain_training(plain, config, batches(2))
    assert_same(model, plain)
    assert_same(step.average.model(), average)
    totals = step.take_totals()
    assert totals == (total, 2 * BATCH, 0) and step.take_totals() == (0.0, 0, 0)


def test_buffers_of_the_average_are_those_of_the_model():
    config = settings(ema=0.9)
    model = new_model(task="generation", norm="batch")
    plain = copy.deepcopy(model)
    step = run_steps(model, config, batches(2))
    average, _ = plain_training(plain, config, batches(2))
    assert_same(step.average.model(), average)
    assert any("running_mean" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_that_is_skipped_leaves_running_statistics(capturable):
    model = new_model(task="generation", norm="batch")
    step = run_steps(model, settings(max_skipped=5), batches(2), capturable=capturable)
    weight = model.steps[0].coupling.conditioners[0].conv1.bias
    good = weight.detach().clone()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        weight.fill_(float("nan"))
    step(*next(batches(1)))
    with torch.no_grad():
        weight.copy_(good)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    step(*next(batches(1)))
    assert step.take_totals().skipped_steps == 1
    assert any(
        "running_mean" in name and not torch.equal(value, before[name])
        for name, value in model.state_dict().items()
    )


def test_the_batch_after_one_that_is_refused_sets_actnorm():
    model = new_model()
    head = model.steps[1].coupling.conditioners[0].scale.label_out.bias
    good = head.detach().clone()
    step = TrainingStep(model, settings(ema=0.5), torch.Generator().manual_seed(3))
    with torch.no_grad():
        head.fill_(float("nan"))
    with pytest.raises(ValueError, match="x must have finite statistics to set ActNorm"):
        step(*next(batches(1)))
    assert not model.initialized and step.average is None
    assert not any(part.actnorm.ready for part in model.steps)
    with torch.no_grad():
        head.copy_(good)
    step(*next(batches(1)))
    totals = step.take_totals()
    assert model.initialized and totals.samples == BATCH and totals.skipped_steps == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_function_that_a_gpu_captures_computes_the_same(objective):
    """In float64, where the order of sums is all that differs; nothing is drawn on the device here."""
    config = settings(objective=objective, augment="none", precision="64-true")
    model = new_model(torch.float64, dropout=0.0, dequantize="none")
    other = copy.deepcopy(model)
    run_steps(model, config, batches(1))
    step = run_steps(other, config, batches(1), capturable=True)
    step.take_totals()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_adam_clips_what_multiplying_clips():
    """The first moment holds a tenth of the clipped gradient."""
    found = []
    for capturable in (False, True):
        model = new_model(dropout=0.0, dequantize="none")
        step = run_steps(model, settings(augment="none", clip_norm=0.01), batches(1), capturable=capturable)
        moments = [step.optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()]
        found.append(torch.cat(moments))
        assert float(found[-1].norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert float((found[0] - found[1]).norm()) < 1e-5 * float(found[0].norm())


def test_the_learning_rate_is_that_of_the_next_step():
    model, config = new_model(), settings()
    before = copy.deepcopy(model)
    step = run_steps(model, config, batches(1))
    after = copy.deepcopy(model)
    step.set_learning_rate(0.0)
    step(*next(batches(1, seed=5)))
    assert_same(model, after)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


# -- steps that are not finite -------------------------------------------------------------------------------


def spoil(monkeypatch, chosen, factor=float("nan")):
    """Make the losses of the chosen steps, counted from 0, not finite."""
    original, calls = objectives.likelihood_loss, []

    def likelihood_loss(flow, x, y):
        loss, lp = original(flow, x, y)
        calls.append(len(calls))
        return (loss * factor, lp * factor) if calls[-1] in chosen else (loss, lp)

    monkeypatch.setattr(objectives, "likelihood_loss", likelihood_loss)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, capturable, factor):
    spoil(monkeypatch, {1}, factor)
    model = new_model()
    step = run_steps(model, settings(), batches(1), capturable=capturable)
    weights, state = copy.deepcopy(model), copy.deepcopy(step.optimizer.state_dict()["state"])
    step(*next(batches(1, seed=5)))
    assert_same(model, weights)
    for one, before in zip(step.optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert all(torch.equal(value, before[name]) for name, value in one.items())
    step(*next(batches(1, seed=6)))
    totals = step.take_totals()
    assert totals.samples == 2 * BATCH and totals.skipped_steps == 1
    assert 0 < totals.bits_per_dim < float("inf")


def test_gradients_that_are_not_finite_are_skipped_too(monkeypatch):
    original = objectives.likelihood_loss

    def likelihood_loss(flow, x, y):
        loss, lp = original(flow, x, y)
        # The root has an infinite slope where it is zero.
        return loss + (loss - loss).clamp_min(0.0).sqrt(), lp

    model = new_model()
    step = run_steps(model, settings(), batches(1))
    weights = copy.deepcopy(model)
    monkeypatch.setattr(objectives, "likelihood_loss", likelihood_loss)
    step(*next(batches(1, seed=5)))
    assert_same(model, weights)
    assert step.take_totals().skipped_steps == 1


@pytest.mark.parametrize(("capturable", "calls"), [(False, 3), (True, 4)])
def test_so_many_in_a_row_stop_training(monkeypatch, capturable, calls):
    """Where reports are read late, the step after the last one has begun already."""
    spoil(monkeypatch, {0, 2, 3, 4, 5})
    model = new_model()
    step = run_steps(model, settings(max_skipped=3), batches(2), capturable=capturable)
    weights = copy.deepcopy(model)
    data = batches(4, seed=5)
    for _ in range(calls - 1):
        step(*next(data))
    with pytest.raises(FloatingPointError, match=r"became nan.*skipped: 3; lower learning_rate \(0.003\)"):
        step(*next(data))
    assert_same(model, weights)


@pytest.mark.parametrize("capturable", [False, True])
def test_an_epoch_without_a_finite_step_stops_training(monkeypatch, capturable):
    spoil(monkeypatch, {1, 2})
    step = run_steps(new_model(), settings(), batches(1), capturable=capturable)
    step.take_totals()
    for images, labels in batches(2, seed=5):
        step(images, labels)
    with pytest.raises(FloatingPointError, match="set dequantize"):
        step.take_totals()


def test_hard_negatives_learn_from_finite_steps_one_step_late(monkeypatch):
    original, calls = objectives.pairwise_loss, []

    def pairwise_loss(*args):
        calls.append(None)
        return tuple(value * (float("nan") if len(calls) == 2 else 1.0) for value in original(*args))

    monkeypatch.setattr(objectives, "pairwise_loss", pairwise_loss)
    seen = []
    step = TrainingStep(
        new_model(), settings(objective="pairwise"), torch.Generator().manual_seed(3), capturable=True
    )
    for images, labels in batches(4):
        step(images, labels)
        seen.append(step.negatives.losses.clone())
    step.take_totals()
    seen.append(step.negatives.losses.clone())
    changed = [not torch.equal(a, b) for a, b in zip([1.0 - torch.eye(CLASSES), *seen], seen, strict=False)]
    assert changed == [False, True, False, True, True]
    assert torch.isfinite(seen[-1]).all()


# -- no device is waited for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "task", "reversible", "precision"),
    [
        *((objective, "classification", False, "32-true") for objective in OBJECTIVES),
        ("pairwise", "classification", True, "bf16-mixed"),
        ("likelihood", "generation", True, "32-true"),
        ("hybrid", "generation", False, "bf16-mixed"),
    ],
)
def test_the_function_waits_for_no_device(objective, task, reversible, precision):
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed")

    model = new_model(task=task, reversible=reversible, condition_from_step=1)
    step = run_steps(
        model, settings(objective=objective, ema=0.5), batches(1), autocast=autocast, capturable=True
    )
    wrong = torch.zeros(BATCH, dtype=torch.int64)
    images, labels = next(batches(1, seed=5))
    report = torch.zeros(5 + BATCH, dtype=torch.float64)
    with NoWaiting() as mode:
        step.run(Batch(images, labels, wrong, report))
    assert not mode.found
    assert torch.isfinite(report).all() and report[0] > 0
