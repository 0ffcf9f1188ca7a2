"""Capture of the training step, on a graph that runs the function again: all but the CUDA graph itself."""

import numpy as np
import pytest
import torch
from training_steps import assert_same, batches, new_model, run_steps, settings

from fastflow.data.slices import SliceSet
from fastflow.models.scoring import LabelScorer
from fastflow.training.capture import WARM_UP_STEPS, graph_for
from fastflow.training.phases import Phase
from fastflow.training.step import TrainingStep
from fastflow.training.trainer import train

CPU = torch.device("cpu")


class FakeGraph:
    """Replays a function by calling it; a capture computes nothing."""

    def __init__(self, failure=None):
        self.calls, self.failure, self.function = [], failure, None

    def warm_up(self, function):
        self.calls.append("warm up")
        function()

    def capture(self, function):
        self.calls.append("capture")
        if self.failure is not None:
            raise self.failure
        self.function = function

    def replay(self):
        self.calls.append("replay")
        self.function()

    def successor(self):
        self.next = FakeGraph()
        return self.next


@pytest.mark.parametrize("objective", ["likelihood", "pairwise"])
def test_three_real_steps_a_capture_and_replays_are_the_eager_steps(objective):
    config = settings(objective=objective, ema=0.5)
    eager, captured, graph = new_model(), new_model(), FakeGraph()
    plain = run_steps(eager, config, batches(6), capturable=True)
    step = run_steps(captured, config, batches(6), graph=graph)
    assert graph.calls == ["warm up"] * WARM_UP_STEPS + ["capture"] + ["replay"] * 3
    assert step.captured and not plain.captured
    assert_same(captured, eager)
    assert_same(step.average.model(), plain.average.model())
    assert step.take_totals() == plain.take_totals()
    assert torch.equal(step.negatives.losses, plain.negatives.losses)


def take_phases(model, steps, engine="auto", **options):
    torch.manual_seed(7)
    phases = (
        Phase("likelihood", 0.5),
        Phase("hybrid", 0.5, weight=0.4, rivals=1, ramp=0.8, restart_average=True),
    )
    config = settings(schedule=phases, ema=0.5, engine=engine)
    step = TrainingStep(model, config, torch.Generator().manual_seed(3), **options)
    for i, (images, labels) in enumerate(batches(steps)):
        step.set_moment(config.moment(i, steps))
        step(images, labels)
    return step


def test_each_phase_is_captured_and_its_weight_ramps_in_the_graph():
    eager, captured, graph = new_model(), new_model(), FakeGraph()
    plain = take_phases(eager, 8, capturable=True)
    step = take_phases(captured, 8, graph=graph)
    calls = ["warm up"] * WARM_UP_STEPS + ["capture", "replay"]
    assert graph.calls == graph.next.calls == calls
    assert_same(captured, eager)
    assert_same(step.average.model(), plain.average.model())
    assert torch.equal(step.negatives.losses, plain.negatives.losses)
    assert step.staged.wrong.shape == (5, 1) and not torch.equal(plain.negatives.losses, 1.0 - torch.eye(3))


def test_inputs_stay_where_they_are():
    step = run_steps(new_model(), settings(objective="pairwise"), batches(1), graph=FakeGraph())
    before = [tensor.data_ptr() for tensor in step.staged]
    for images, labels in batches(4, seed=5):
        step(images, labels)
        assert torch.equal(step.staged.images, images) and torch.equal(step.staged.labels, labels)
        assert (step.staged.wrong != labels).all()
    assert [tensor.data_ptr() for tensor in step.staged] == before


def test_a_batch_of_another_shape_runs_eagerly():
    eager, captured, graph = new_model(), new_model(), FakeGraph()
    data = [*batches(5), *batches(1, size=3), *batches(1, seed=8)]
    run_steps(eager, settings(), data, capturable=True)
    step = run_steps(captured, settings(), data, graph=graph)
    assert graph.calls.count("replay") == 3 and graph.calls[-1] == "replay"
    assert_same(captured, eager)
    assert step.take_totals().samples == 6 * 5 + 3


@pytest.mark.parametrize("change", ["assign", "dtype", "one"])
def test_parameters_that_moved_are_named(change):
    model = new_model()
    step = run_steps(model, settings(), batches(4), graph=FakeGraph())
    if change == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    elif change == "dtype":
        model.double()
    else:
        conv = model.steps[0].conv
        conv.lower = torch.nn.Parameter(conv.lower.detach().clone())
    name = "steps.0.conv.lower" if change == "one" else "steps.0.actnorm.log_scale"
    with pytest.raises(RuntimeError, match=f"parameter {name} was moved or replaced after"):
        step(*next(batches(1)))


@pytest.mark.parametrize("captured", [False, True])
def test_a_scorer_sees_every_step(captured):
    model = new_model()
    step = run_steps(model, settings(ema=0.5), batches(4), graph=FakeGraph() if captured else None)
    assert step.captured == captured
    for trained in (model, step.average.model()):
        scorer = LabelScorer(trained.eval())
        scorer(torch.zeros(1, *model.config.input_shape))
        model.train()
        step(*next(batches(1)))
        step.average.model()
        trained.eval()
        with pytest.raises(RuntimeError, match=r"parameter steps.0.actnorm.log_scale is at version"):
            scorer(torch.zeros(1, *model.config.input_shape))


def test_values_that_change_in_place_are_no_reason_to_stop():
    model = new_model()
    step = run_steps(model, settings(), batches(4), graph=FakeGraph())
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    step(*next(batches(1)))


def test_what_cannot_be_captured_runs_eagerly_and_says_so_once():
    eager, captured = new_model(), new_model()
    graph = FakeGraph(RuntimeError("operation not permitted when stream is capturing"))
    run_steps(eager, settings(), batches(6), capturable=True)
    with pytest.warns(UserWarning, match="RuntimeError: operation not permitted") as found:
        step = run_steps(captured, settings(), batches(6), graph=graph)
    assert len(found) == 1 and found[0].filename == run_steps.__code__.co_filename
    assert graph.calls == ["warm up"] * WARM_UP_STEPS + ["capture"] and not step.captured
    assert_same(captured, eager)


def test_a_graph_that_was_asked_for_must_be_captured():
    graph = FakeGraph(RuntimeError("operation not permitted"))
    config, model = settings(engine="cuda_graph"), new_model()
    with pytest.raises(RuntimeError, match="not permitted"):
        run_steps(model, config, batches(6), graph=graph)


def test_engines_of_a_cpu(tmp_path):
    assert graph_for("auto", CPU) is None and graph_for("eager", CPU) is None
    with pytest.raises(ValueError, match="engine 'cuda_graph' needs a CUDA device, got cpu"):
        TrainingStep(new_model(), settings(engine="cuda_graph"), torch.Generator())
    image, label = np.zeros((1, 1, 16, 16), np.uint8), np.zeros(1, np.int64)
    one_slice = SliceSet(image, label, label, ("a.png",), ("a",), ("0", "1", "2"))
    kept = tmp_path / "checkpoints" / "kept"
    kept.mkdir(parents=True)
    with pytest.raises(ValueError, match="engine"):
        train(new_model(), one_slice, None, settings(engine="cuda_graph"), tmp_path, device="cpu")
    assert kept.is_dir(), "an earlier run is lost to an argument that is refused"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("objective", ["likelihood", "pairwise", "hybrid"])
def test_a_cuda_graph_gives_the_bits_of_eager_steps(objective, reversible):
    found = []
    for engine in ("eager", "cuda_graph"):
        model = new_model(reversible=reversible).cuda()
        config = settings(objective=objective, ema=0.5, engine=engine)
        step = run_steps(model, config, batches(7))
        assert step.captured == (engine == "cuda_graph")
        found.append((model, step.average.model(), step.take_totals()))
    (eager, eager_average, eager_totals), (captured, average, totals) = found
    assert_same(captured, eager)
    assert_same(average, eager_average)
    assert totals == eager_totals


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_reads_the_weight_anew_and_gives_way_to_the_next_phase():
    models = [new_model().cuda() for _ in range(2)]
    steps = [
        take_phases(m, 14, engine=engine) for m, engine in zip(models, ("eager", "cuda_graph"), strict=True)
    ]
    assert steps[1].captured and not steps[0].captured
    assert_same(*models)
    assert_same(*(step.average.model() for step in steps))
