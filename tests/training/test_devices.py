"""Several ranks: what each computes, that together they do what one does, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_steps import BATCH, batches, new_model, settings
from two_ranks import cases_of, slices, train_case

from fastflow.errors import OtherProcessError, ResumeError
from fastflow.training import devices
from fastflow.training.augment import PAPER
from fastflow.training.batches import iterate_batches
from fastflow.training.config import TrainConfig
from fastflow.training.gradients import GradientSum
from fastflow.training.metrics import evaluate_bits_per_dim, evaluate_labels
from fastflow.training.objective import dequantize
from fastflow.training.phases import Phase
from fastflow.training.rows import BatchRows
from fastflow.training.step import TrainingStep


class OneOf:
    """A rank of several whose sums are taken by hand: it keeps what it was asked to add up."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.asked = rank, world_size, []

    def rows(self, whole):
        return BatchRows(self.rank, self.world_size, whole)

    def sum(self, values):
        self.asked.append(values.clone())
        return values


class After(OneOf):
    """A rank whose sums hold what other ranks asked to add up."""

    def __init__(self, rank, world_size, others):
        super().__init__(rank, world_size)
        self.others = [iter(other.asked) for other in others]

    def sum(self, values):
        return values + sum(next(other) for other in self.others)


# -- rows and numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_a_batch_without_a_row_twice(world_size):
    data, config = slices(10, 0), TrainConfig(batch_size=5)
    whole = list(iterate_batches(data, 2, config, torch.Generator().manual_seed(1)))
    found = [
        list(iterate_batches(data, 2, config, torch.Generator().manual_seed(1), rows=rank.rows))
        for rank in (OneOf(i, world_size) for i in range(world_size))
    ]
    for step, (images, labels) in enumerate(whole):
        assert all(torch.equal(batches[step][1], labels) for batches in found)
        joined = torch.zeros_like(images)
        for rank, own in enumerate(found):
            joined[rank::world_size] += own[step][0]
        assert torch.equal(joined, images)


def test_batches_that_are_passed_over_change_no_other():
    data, config = slices(12, 0), TrainConfig(batch_size=4, sampler="balanced")
    whole, rest = (
        list(iterate_batches(data, 3, config, torch.Generator().manual_seed(1), first=first))
        for first in (0, 2)
    )
    assert len(rest) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole[2], rest[0], strict=True))


@pytest.mark.parametrize("change", [PAPER, dequantize])
def test_a_row_gets_the_same_numbers_on_any_rank(change):
    x = torch.rand(7, 1, 16, 16) * 1.9 - 0.95
    whole = change(x, torch.Generator().manual_seed(1))
    assert not torch.equal(whole, x)
    for rank in range(3):
        rows = BatchRows(rank, 3, 7)
        part = change(x[rows.index], torch.Generator().manual_seed(1), rows)
        assert torch.equal(part, whole[rows.index]), rank


# -- sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rivals", [(), (2,)])
def test_gradients_and_figures_of_ranks_are_added_up(rivals):
    first, second = OneOf(0, 2), OneOf(1, 2)
    parameters = [[torch.zeros(3), torch.zeros(2, 2)] for _ in range(2)]
    logistic = torch.rand(5, *rivals) + 1
    bits = torch.tensor(3.0, dtype=torch.float64)
    for rank, own in zip((first, second), parameters, strict=True):
        own[0].grad = torch.full((3,), 1.0 + rank.rank)
        # The second parameter has no gradient on the first rank.
        own[1].grad = torch.full((2, 2), 5.0) if rank.rank else None
        rows = rank.rows(5)
        GradientSum(rank)(own, rows, torch.tensor(0.25 + rank.rank), bits, logistic[rows.index])
    parameters[1][0].grad = torch.full((3,), 2.0)
    rows = second.rows(5)
    loss, total_bits, found = GradientSum(After(1, 2, [first]))(
        parameters[1], rows, torch.tensor(1.25), bits, logistic[rows.index]
    )
    assert float(loss) == 1.5 and torch.equal(found, logistic)
    assert float(total_bits) == 6.0 and total_bits.dtype == torch.float64
    assert parameters[1][0].grad.tolist() == [3.0] * 3 and parameters[1][1].grad.tolist() == [[5.0] * 2] * 2


@pytest.mark.parametrize("count", [3, 70])
def test_validation_scores_each_row_on_one_rank(count):
    model = new_model()
    model.initialize(torch.rand(4, 1, 16, 16))
    data = slices(count, 3)
    given = model.eval(), data.images, data.labels
    for evaluate, options in ((evaluate_bits_per_dim, {"batch_size": 16}), (evaluate_labels, {})):
        ranks = [OneOf(rank, 5) for rank in range(4)]
        for rank in ranks:
            evaluate(*given, **options, ranks=rank)
        scored = [np.flatnonzero(rank.asked[0].numpy().reshape(count, -1).any(axis=1)) for rank in ranks]
        assert all((rows % 5 == rank.rank).all() for rank, rows in zip(ranks, scored, strict=True))
        # The very bits of one rank.
        assert evaluate(*given, **options, ranks=After(4, 5, ranks)) == evaluate(*given, **options)


# -- micro-batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "reversible"),
    [
        (Phase("likelihood"), True),
        (Phase("pairwise"), False),
        (Phase("pairwise"), True),
        (Phase("hybrid"), False),
        (Phase("hybrid", rivals=1), False),
    ],
)
def test_micro_batches_are_one_large_batch(phase, reversible):
    """To 1e-9 in float64, with ActNorm set from the whole batch; shares of 2, 2 and 1 samples."""
    models, steps = [], []
    for accumulate in (1, 3):
        torch.manual_seed(7)
        config = settings(
            schedule=(phase,), precision="64-true", batch_size=6, accumulate=accumulate, ema=0.5
        )
        models.append(new_model(torch.float64, dropout=0.0, reversible=reversible))
        steps.append(TrainingStep(models[-1], config, torch.Generator().manual_seed(3)))
        for batch in batches(2):
            steps[-1](*batch)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=0, atol=1e-9, msg=name)
    one, several = (step.take_totals() for step in steps)
    assert several.bits_per_dim == pytest.approx(one.bits_per_dim, rel=1e-12)
    assert several.samples == one.samples == 2 * BATCH
    assert torch.allclose(steps[0].negatives.losses, steps[1].negatives.losses, atol=1e-6)


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"batch_size": 5}, 2, r"batch_size is 5, .* = 2 x 1 = 2, such as 4 or 6"),
        ({"batch_size": 2}, 3, r"batch_size is 2, .* such as 3"),
        ({"batch_size": 12, "accumulate": 4}, 2, r"= 2 x 4 = 8, such as 8 or 16"),
    ],
)
def test_batches_that_devices_cannot_share_are_named(changes, world_size, words):
    with pytest.raises(ValueError, match=words):
        devices.check_share(TrainConfig(**changes), world_size)


def test_settings_that_do_not_fit_stop_before_a_process_is_started(monkeypatch, tmp_path):
    def start(count):
        raise AssertionError("a process was to be started")

    monkeypatch.setattr(devices.launch, "processes", start)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for changes, device, words in (
        ({"devices": 2}, "cuda", "devices is 2, but this machine has 1 CUDA devices"),
        ({"devices": 2}, "auto", "devices is 2, but this machine has 1 CUDA devices"),
        ({"devices": 2, "engine": "cuda_graph"}, "cpu", "'cuda_graph' is for one device"),
        ({"devices": 3}, "cpu", "batch_size is 8"),
        ({"num_nodes": 2}, "cpu", "num_nodes is 2: set MASTER_ADDR"),
    ):
        with (
            pytest.raises(ValueError, match=words),
            devices.joined(TrainConfig(**{"batch_size": 8, **changes}), device),
        ):
            pass
    with pytest.raises(ValueError, match="norm='batch' takes its statistics from a whole batch"):
        devices_of_batch_norm(tmp_path)


def devices_of_batch_norm(folder):
    from fastflow.training.trainer import train

    model = new_model(task="generation", norm="batch")
    train(model, slices(8, 0), None, TrainConfig(batch_size=8, accumulate=2), folder)


def test_torchrun_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(devices.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert devices._counts(TrainConfig()) == (3, 2)
    assert devices._counts(TrainConfig(devices=3, num_nodes=2)) == (3, 2)
    with pytest.raises(ValueError, match="devices is 2 on num_nodes 1, but torchrun has started 3"):
        devices._counts(TrainConfig(devices=2))


@pytest.mark.parametrize("field", ["accumulate", "devices", "num_nodes"])
def test_settings_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: 0})


def test_one_rank_has_all_there_is():
    ranks = devices.alone(TrainConfig(), "cpu")
    parts = ranks.all_parts({"a": torch.arange(3)})
    assert parts["a"].shape == (1, 3) and torch.equal(ranks.own_part(parts)["a"], torch.arange(3))
    assert ranks.seed(5) == 5 and ranks.gather("a") == ["a"] and ranks.highest(3) == 3
    assert issubclass(OtherProcessError, RuntimeError)


# -- two processes -------------------------------------------------------------------------------------------


def start(mode, folder):
    script = Path(__file__).with_name("two_ranks.py")
    return subprocess.run(
        [sys.executable, script, mode, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "of_weights", "of_figures"), [("64-true", 1e-8, 1e-9), ("32-true", 2e-3, 1e-4)]
)
def test_two_ranks_train_what_one_trains(tmp_path, precision, of_weights, of_figures):
    """Adam divides gradients by their size, and so makes much of rounding where they are nearly zero."""
    done = start(precision, tmp_path)
    assert done.returncode == 0, done.stderr
    (first, threads, world_size), (second, _, _) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert (threads, world_size) == (1, 2)
    for case in cases_of(precision):
        weights, history = train_case(case, tmp_path / "alone")
        for name, value in weights.items():
            assert torch.equal(first[case][0][name], second[case][0][name]), (case, name)
            torch.testing.assert_close(first[case][0][name], value, rtol=0, atol=of_weights)
        for mine, other, alone in zip(first[case][1], second[case][1], history, strict=True):
            for name in mine.keys() - {"seconds"}:
                assert mine[name] == other[name], (case, name)
                # The temperature makes the most of what differs.
                rel = of_figures * (10 if name == "val_nll" else 1)
                assert mine[name] == pytest.approx(alone[name], rel=rel), (case, name)
        assert (tmp_path / case / "history.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "words"),
    [("kill", "ended without a message"), ("error", "process 1 of the training stopped: this one is bad")],
)
def test_a_rank_that_leaves_ends_the_others(tmp_path, mode, words):
    done = start(mode, tmp_path)
    assert done.returncode == 1
    assert f"OtherProcessError: {words}" in done.stderr or words in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_go_on_where_they_were_stopped(tmp_path):
    """The same bits as ranks that nothing stopped; one rank cannot go on with the state of two."""
    stopped = start("stop", tmp_path)
    assert "TrainingInterrupted: stopped; the state of epoch 1, after 8 steps" in stopped.stderr
    with pytest.raises(ResumeError, match="ranks was 2 and is now 1"):
        train_case("scheduled", tmp_path, dropout=0.2, resume=True)
    done = start("resume", tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        whole, resumed = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, value in whole[0].items():
            assert torch.equal(resumed[0][name], value), name
        for one, other in zip(whole[1], resumed[1], strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}
    rows = [
        (tmp_path / place / "scheduled" / "steps.csv").read_text().splitlines() for place in ("", "whole")
    ]
    assert len(rows[0]) == len(rows[1]) > 10
