"""The loop: it learns, it repeats, it keeps what it says, it refuses what does not fit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from training_sets import LAYOUT, config, make_set, new_model

from fastflow import FlowConfig, MagicFlow
from fastflow.numerics import float32_products
from fastflow.training import objective as objectives
from fastflow.training.phases import Phase
from fastflow.training.selection import best_epochs
from fastflow.training.trainer import TrainConfig, evaluate_bits_per_dim, middle_slices, train


@pytest.mark.parametrize(
    "objective",
    [
        "likelihood",
        pytest.param("pairwise", marks=pytest.mark.slow),
        pytest.param("hybrid", marks=pytest.mark.slow),
    ],
)
def test_it_learns_and_records(tmp_path, objective):
    model, seen = new_model(), []
    history = train(
        model,
        make_set(24),
        make_set(8, seed=1),
        config(epochs=5, objective=objective),
        tmp_path,
        watch={"other": make_set(4, seed=2)},
        progress=seen.append,
    )
    assert seen == history and [r["epoch"] for r in history] == [1, 2, 3, 4, 5]
    assert history[-1]["train_bits_per_dim"] < history[0]["train_bits_per_dim"] - 0.1
    assert history[-1]["val_accuracy"] >= 0.75
    assert all(
        {"val_bits_per_dim", "other_bits_per_dim", "seconds", "learning_rate"} <= set(r) for r in history
    )
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history


def test_same_seed_same_weights(tmp_path):
    def weights(folder, **changes):
        model = new_model()
        train(
            model,
            make_set(8),
            make_set(4, seed=1),
            config(epochs=1, augment="paper", **changes),
            tmp_path / folder,
        )
        return model.state_dict()

    first, again, other = weights("a"), weights("b"), weights("c", seed=1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(("select", "ema"), [("both", 0.0), ("loss", 0.5)])
def test_the_folder_holds_the_selected_epoch(tmp_path, select, ema):
    model, val = new_model(), make_set(8, seed=1)
    history = train(model, make_set(), val, config(select=select, ema=ema), tmp_path)
    saved = MagicFlow.load(tmp_path)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert saved.metadata["training"]["select"] == select and not model.training
    assert MagicFlow.load(tmp_path / "checkpoints" / "accuracy").initialized
    found = evaluate_bits_per_dim(saved, *middle_slices(val))
    assert found == pytest.approx(
        history[saved.metadata["training"]["kept_epoch"] - 1]["val_bits_per_dim"], abs=1e-6
    )
    assert saved.metadata["training"]["kept_epoch"] == best_epochs(history)[select]
    if select == "loss":
        assert found == pytest.approx(min(r["val_bits_per_dim"] for r in history), abs=1e-6)


def test_a_schedule_decides_objective_rate_and_passes_of_each_step(tmp_path):
    phases = (Phase("likelihood", 0.5), Phase("hybrid", 0.5, weight=0.1, rate=0.25))
    settings = config(epochs=2, batch_size=8, warmup_epochs=0.0, min_learning_rate=3e-3, schedule=phases)
    history = train(new_model(), make_set(12), make_set(4, seed=1), settings, tmp_path / "schedule")
    assert [(r["phase"], r["passes"]) for r in history] == [(1, 1.0), (2, 2.0)]
    assert [r["learning_rate"] for r in history] == [3e-3, 0.25 * 3e-3]
    assert history[1]["val_nll"] >= 0.0 and 0.0 <= history[1]["val_balanced_accuracy"] <= 1.0


def test_one_phase_is_the_objective_itself(tmp_path):
    def weights(folder, **changes):
        model = new_model()
        train(model, make_set(8), None, config(epochs=1, **changes), tmp_path / folder)
        return model.state_dict()

    plain = weights("a", objective="hybrid", contrast_weight=0.3, contrast_temperature=7.0)
    phase = Phase("hybrid", weight=0.3, temperature=7.0)
    again = weights("b", schedule=(phase,))
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_without_validation_the_last_epoch_stays(tmp_path):
    model = new_model()
    history = train(model, make_set(), None, config(epochs=1, batch_size=24), tmp_path)
    assert set(history[0]) == {"epoch", "learning_rate", "train_bits_per_dim", "seconds", "phase", "passes"}
    assert MagicFlow.load(tmp_path).initialized


def test_one_class_is_chosen_by_its_loss(tmp_path):
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(1, class_names=("dark",), **LAYOUT))
    data, val = make_set(8, names=("dark",)), make_set(4, seed=1, names=("dark",))
    history = train(model, data, val, config(objective="hybrid", epochs=2), tmp_path)
    assert all("val_accuracy" not in record for record in history)
    losses = [record["val_bits_per_dim"] for record in history]
    assert model.metadata["training"]["kept_epoch"] == 1 + losses.index(min(losses))
    assert model.metadata["training"]["select"] == "loss"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["loss"]


def test_an_earlier_run_in_the_folder_leaves_nothing_behind(tmp_path):
    once = config(epochs=1, batch_size=24, seed=4)
    train(new_model(), make_set(), make_set(4, seed=1), config(epochs=1, batch_size=24), tmp_path)
    model = new_model()
    train(model, make_set(seed=3), None, once, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    train(alone := new_model(), make_set(seed=3), None, once, tmp_path / "alone")
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items())


def test_schedule_warms_up_and_ends_at_the_minimum(tmp_path):
    rates = [
        r["learning_rate"]
        for r in train(
            new_model(), make_set(), None, config(epochs=4, warmup_epochs=1.0, batch_size=24), tmp_path
        )
    ]
    assert rates[0] == pytest.approx(0.01 * 3e-3) and rates[1] == pytest.approx(3e-3)
    assert rates[1] > rates[2] > rates[3] > 1e-5


def test_conditioners_in_bfloat16_learn_too(tmp_path):
    model = new_model()
    history = train(
        model, make_set(), make_set(4, seed=1), config(precision="bf16-mixed", epochs=2), tmp_path
    )
    assert history[-1]["train_bits_per_dim"] < history[0]["train_bits_per_dim"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "allowed"), [("32-true", False), ("tf32", True)])
def test_tf32_is_allowed_where_it_was_asked_for_and_nowhere_else(tmp_path, precision, allowed):
    cudnn, matmul, seen = torch.backends.cudnn, torch.backends.cuda.matmul, []
    before = cudnn.allow_tf32, matmul.allow_tf32
    settings = config(epochs=1, precision=precision)
    train(
        new_model(),
        make_set(4),
        None,
        settings,
        tmp_path,
        progress=lambda _: seen.append((cudnn.allow_tf32, matmul.allow_tf32)),
    )
    assert seen == [(allowed, allowed)]
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


@pytest.mark.parametrize("before", [(True, False), (False, True), (True, True)])
def test_products_of_float32_are_put_back_even_after_an_error(before):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    @float32_products(tf32=not before[0])
    def fail():
        assert cudnn.allow_tf32 == matmul.allow_tf32 == (not before[0])
        raise KeyError

    found = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = before
        with pytest.raises(KeyError):
            fail()
        assert (cudnn.allow_tf32, matmul.allow_tf32) == before
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = found


def test_skipped_steps_are_counted_and_the_mean_is_of_the_others(tmp_path, monkeypatch):
    original, calls = objectives.likelihood_loss, []

    def likelihood_loss(flow, x, y):
        calls.append(None)
        loss, lp = original(flow, x, y)
        return (loss * float("nan"), lp * float("nan")) if len(calls) in (2, 4) else (loss, lp)

    monkeypatch.setattr(objectives, "likelihood_loss", likelihood_loss)
    history = train(new_model(), make_set(), None, config(), tmp_path)
    assert [record.get("skipped_steps") for record in history] == [1, 1, None]
    assert all(np.isfinite(record["train_bits_per_dim"]) for record in history)


def test_balanced_sampling_takes_a_class_imbalance(tmp_path):
    data = make_set(12)
    few = data.subset([0, 2, 4, 6, 8, 10, 1])
    history = train(new_model(), few, make_set(4, seed=1), config(sampler="balanced", epochs=1), tmp_path)
    assert np.isfinite(history[0]["train_bits_per_dim"])


def test_a_number_of_threads_gives_one_model_on_any_machine(tmp_path):
    """Weights depend on the number of threads, so a recipe can state it."""
    before = torch.get_num_threads()

    def weights(available):
        torch.set_num_threads(available)
        model = new_model()
        settings = config(epochs=1, batch_size=8, objective="pairwise", threads=1)
        train(model, make_set(8), None, settings, tmp_path / str(available))
        assert torch.get_num_threads() == available
        return model.state_dict()

    try:
        one, two = weights(1), weights(2)
    finally:
        torch.set_num_threads(before)
    differ = [name for name, value in one.items() if not torch.equal(value, two[name])]
    assert not differ
    assert TrainConfig.demo().threads == 1 and TrainConfig.paper().threads is None


def test_middle_slices_takes_one_per_volume():
    data = make_set(3, slices=5)
    images, labels = middle_slices(data)
    assert np.array_equal(images, data.images[2::5]) and labels.tolist() == [0, 1, 0]


def test_bits_per_dim_does_not_depend_on_the_batch():
    model = new_model()
    data = make_set(6)
    model.initialize(torch.rand(4, 1, 16, 16))
    model.eval()
    whole = evaluate_bits_per_dim(model, data.images, data.labels)
    assert evaluate_bits_per_dim(model, data.images, data.labels, batch_size=5) == pytest.approx(
        whole, abs=1e-5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("objective", "adversarial"),
        ("augment", "mixup"),
        ("sampler", "sorted"),
        ("select", "best"),
        ("select_tolerance", -0.1),
        ("schedule", ("hybrid",)),
        ("schedule", (Phase(share=0.5),)),
        ("ema", 1.0),
        ("precision", "8-bit"),
        ("contrast_temperature", 0.0),
        ("threads", 0),
        ("engine", "graph"),
        ("max_skipped", 0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TrainConfig(), **{field: value})


def test_sets_that_do_not_fit_are_named(tmp_path):
    good = make_set()
    empty = good.subset([])
    with pytest.raises(ValueError, match="train_set has no slices"):
        train(new_model(), empty, None, config(), tmp_path)
    with pytest.raises(ValueError, match="val_set has labels"):
        train(new_model(), good, dataclasses.replace(good, labels=good.labels + 1), config(), tmp_path)
    with pytest.raises(ValueError, match=r"train_set has images \(1, 16, 16\)"):
        train(MagicFlow(FlowConfig.tiny(2, input_shape=(1, 32, 32))), good, None, config(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = new_model()
    model.initialize(torch.rand(4, 1, 16, 16))
    with torch.no_grad():
        model.steps[0].actnorm.log_scale.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(model, make_set(), None, config(), tmp_path)


def test_defaults_are_the_published_recipe():
    c = TrainConfig.paper()
    assert (c.batch_size, c.learning_rate, c.warmup_epochs, c.epochs, c.clip_norm, c.min_learning_rate) == (
        16,
        1e-3,
        8,
        300,
        1.0,
        1e-5,
    )
    g = TrainConfig.paper("generation")
    assert (g.batch_size, g.learning_rate, g.warmup_epochs) == (8, 4e-4, 5)
