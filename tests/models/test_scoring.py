"""The batched scorer and what turns its output into decisions."""

import copy
import warnings

import numpy as np
import pytest
import torch
from changes import CHANGES
from helpers import build, images

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import InvalidImageWarning, PrecisionWarning, UninitializedModelError
from fastflow.models import scoring
from fastflow.models.inference import precision, prepare
from fastflow.models.inference import scorer as scorers
from fastflow.models.scoring import LabelScorer

LAYOUTS = {
    "tiny": {},
    "generation": {"task": "generation"},
    "batch norm": {"task": "generation", "norm": "batch"},
    "odd sizes": {"input_shape": (3, 20, 12)},
    "generation, odd sizes": {"task": "generation", "input_shape": (3, 20, 12)},
    "two conditioners": {"share_halves": False},
    "masks without planes": {"masks": ("block_checkerboard", "custom") * 3},
    "stripes": {"masks": ("vertical_stripe", "horizontal_stripe") * 3},
    "halves that move nothing": {"masks": ("channel",) * 6},
    "one label": {"num_classes": 1},
    "label-free steps": {"condition_from_step": 3},
    "one step knows labels": {"condition_from_step": 5},
    "a label-free step of one channel": {"condition_from_step": 1, "squeeze_before": (3, 4)},
}


def layout(name, **changes):
    values = {"num_classes": 3, **LAYOUTS[name], **changes}
    return FlowConfig.tiny(values.pop("num_classes"), **values)


def one_call_a_label(model, x):
    labels = range(model.config.num_classes)
    with torch.no_grad():
        return torch.stack([model.log_prob(x, torch.full((len(x),), k)) for k in labels], dim=1)


@pytest.fixture
def uncompiled(monkeypatch):
    """Folded functions as they are: what the compiler would start from."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_scores_are_those_of_one_call_a_label(name, engine, uncompiled):
    model = build(layout(name))
    x = images(model.config, 4)
    want = one_call_a_label(model, x)
    for max_rows in (None, 2, 5):
        scorer = LabelScorer(model, engine=engine, max_rows=max_rows)
        got = scorer(x)
        assert got.dtype == torch.float64 and got.shape == want.shape
        assert ((got - want) / want).abs().max() < 1e-10
        assert scorer(x[:0]).shape == (0, model.config.num_classes)


@pytest.mark.parametrize("name", ["tiny", "generation", "label-free steps", "odd sizes"])
def test_float32_scores_stay_close_to_float64(name, uncompiled):
    model = build(layout(name), dtype=torch.float32)
    x = images(model.config, 5, dtype=torch.float32)
    found = [LabelScorer(model, engine=engine)(x) for engine in ("eager", "compile")]
    want = one_call_a_label(model.double(), x.double())
    for got in found:
        assert got.dtype == torch.float32
        assert ((got - want) / want).abs().max() < 1e-5
        assert (log_odds(got) - log_odds(want)).abs().max() < 2e-3


def log_odds(log_probs):
    log_probs = log_probs.double()
    return log_probs - log_probs[:, :1]


@pytest.mark.parametrize("name", ["tiny", "generation", "label-free steps"])
def test_a_row_has_the_same_bits_in_any_batch(name):
    model = build(layout(name), dtype=torch.float32)
    x = images(model.config, 9, dtype=torch.float32)
    whole = LabelScorer(model)(x)
    for max_rows in (1, 3, 4, 7):
        assert torch.equal(LabelScorer(model, max_rows=max_rows)(x), whole)
    scorer = LabelScorer(model)
    assert torch.equal(torch.cat([scorer(row) for row in x.split(1)]), whole)
    assert torch.equal(scorer(x[3:6]), whole[3:6])


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


def test_what_no_label_changes_is_computed_once(monkeypatch):
    config = FlowConfig.tiny(3, condition_from_step=2)
    model = build(config)
    scorer = LabelScorer(model)
    batches = {i: [] for i in range(config.num_steps)}
    # The scorer's own copy, whose weight norms are computed.
    for i, conditioned in enumerate(scorer._engine.flow.steps):
        conv = conditioned.step.coupling.conditioners[0].conv1
        conv.register_forward_hook(lambda module, inputs, _, i=i: batches[i].append(len(inputs[0])))
    scorer(images(config, 4))
    # Step 2 is the first that knows labels: its first half convolves each image once.
    assert [batches[i] for i in range(4)] == [[4, 4], [4, 4], [4, 12], [12, 12]]


# -- rows and memory -----------------------------------------------------------------------------------------


class Hungry:
    """An engine that has memory for so many rows, and notes how many it was asked for."""

    def __init__(self, rows, error):
        self.rows, self.error, self.asked = rows, error, []

    def start(self, x):
        return x

    def finish(self, state, first, last):
        self.asked.append(len(state) * (last - first))
        if self.asked[-1] > self.rows:
            raise self.error
        return state.flatten(1)[:, :1].double() + torch.arange(first, last)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("limit", [1, 3, 10])
def test_an_allocation_that_fails_halves_the_rows(limit, error):
    x = torch.arange(6.0).view(6, 1, 1, 1)
    engine = Hungry(limit, error)
    scores, rows = scorers._score(engine, x, 4, 24)
    assert torch.equal(scores, x.flatten(1).double() + torch.arange(4))
    assert rows <= limit < 2 * rows + 2
    # What was found is kept: only the first block fails.
    assert all(asked <= limit for asked in engine.asked[4:])


def test_other_errors_and_single_rows_pass_through():
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(RuntimeError, match="shape"):
        scorers._score(Hungry(0, RuntimeError("shape mismatch")), x, 4, 8)
    with pytest.raises(torch.OutOfMemoryError):
        scorers._score(Hungry(0, torch.OutOfMemoryError("CUDA out of memory")), x, 4, 8)


@pytest.mark.parametrize("classes", [1, 2, 7, 50])
@pytest.mark.parametrize("max_rows", [1, 3, 7, 16, 100])
def test_labels_are_split_evenly(classes, max_rows):
    spans = list(scorers._spans(classes, max_rows))
    assert [label for first, last in spans for label in range(first, last)] == list(range(classes))
    assert max(last - first for first, last in spans) <= max_rows


def test_rows_follow_the_free_memory(monkeypatch):
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    rows = []
    for free in (1 << 40, 1 << 20, 1 << 12):
        monkeypatch.setattr(prepare, "free_memory", lambda device, free=free: free)
        rows.append(prepare.default_rows(model))
    assert rows[0] > rows[1] >= 1 and rows[2] == 1
    assert (
        prepare.default_rows(build(FlowConfig.tiny(3, input_shape=(1, 64, 64)), dtype=torch.float32))
        <= rows[0]
    )


def test_free_memory_is_a_number_of_bytes():
    assert prepare.free_memory(torch.device("cpu")) > 1 << 20


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_invalid_images_are_named_and_harm_no_other(engine, uncompiled):
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    scorer = LabelScorer(model, engine=engine)
    x = images(model.config, 6, dtype=torch.float32)
    want = scorer(x)
    x[1, 0, 3, 4], x[4, 0, 0, 0] = float("nan"), -float("inf")
    with pytest.warns(InvalidImageWarning, match=r"2 of 6 images .* rows 1, 4"):
        got = scorer(x)
    scores, invalid = scorer.score(x)
    assert invalid.tolist() == [False, True, False, False, True, False]
    assert torch.isnan(got[invalid]).all() and torch.equal(got[~invalid], want[~invalid])
    assert torch.equal(scores.nan_to_num(0.0), got.nan_to_num(0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer(x[:1])


def test_choices_are_checked():
    model = build(FlowConfig.tiny(2), dtype=torch.float32)
    for arguments, words in (
        ({"precision": "half"}, "precision must be one of float32, tf32, mixed, got 'half'"),
        ({"engine": "tensorrt"}, "engine must be one of auto, eager, compile, cuda_graph, got 'tensorrt'"),
        ({"max_rows": 0}, "max_rows must be an integer of at least 1, got 0"),
        ({"max_rows": 2.5}, "max_rows must be an integer of at least 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=words):
            LabelScorer(model, **arguments)
    with pytest.raises(ValueError, match="max_rows"):
        scoring.log_prob_all(model, torch.zeros(1, 1, 16, 16), max_rows=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 1, 16, 16\), got \(2, 1, 8, 8\)"):
        LabelScorer(model)(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"floating point, scaled to \[-1, 1\]"):
        LabelScorer(model)(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        LabelScorer(model.train())
    with pytest.raises(UninitializedModelError):
        LabelScorer(MagicFlow(FlowConfig.tiny(2)).eval())
    with pytest.raises(ValueError, match=r"mixed.* needs a float32 model"):
        LabelScorer(build(FlowConfig.tiny(2)), precision="mixed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model would be on a GPU")
def test_cuda_graphs_need_a_gpu():
    with pytest.raises(ValueError, match=r"cuda_graph.* needs a model on a CUDA device, it is on cpu"):
        LabelScorer(build(FlowConfig.tiny(2), dtype=torch.float32), engine="cuda_graph")


def test_compiling_needs_a_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(RuntimeError, match=r"engine='compile' needs a C\+\+ compiler"):
        LabelScorer(build(FlowConfig.tiny(2), dtype=torch.float32), engine="compile")


# -- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "compile"])
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_mixed_rounds_conditioners_only(task, engine, uncompiled, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    model = build(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    x = images(model.config, 6, dtype=torch.float32)
    want = LabelScorer(model)(x)
    scorer = LabelScorer(model, precision="mixed", engine=engine)
    got = scorer(x)
    assert scorer.conditioner_dtype == torch.bfloat16 and got.dtype == torch.float32
    assert not torch.equal(got, want)
    if engine == "eager":
        params = scorer._engine.flow.steps[0].label_params[0]
        assert all(table.dtype == torch.float32 for table in params.tensors())
    # A stream in bfloat16 would err by whole nats.
    assert (log_odds(got) - log_odds(want)).abs().max() < 0.5


def test_mixed_without_bfloat16_arithmetic_stays_wide(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    x = images(model.config, 2, dtype=torch.float32)
    with pytest.warns(PrecisionWarning, match="no bfloat16 arithmetic"):
        scorer = LabelScorer(model, precision="mixed")
    assert scorer.precision == "mixed" and scorer.conditioner_dtype == torch.float32
    assert torch.equal(scorer(x), LabelScorer(model)(x))


def test_bfloat16_arithmetic_is_that_of_the_device():
    assert isinstance(scoring.has_bfloat16(torch.device("cpu")), bool)
    assert not scoring.has_bfloat16(torch.device("meta"))


# -- compiled engines ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_compiled_graphs_score_any_number_of_rows(task):
    config = FlowConfig.tiny(
        3,
        task=task,
        masks=("checkerboard",) * 4,
        squeeze_before=(2,),
        split_after=(),
        widths=((16, 16, 16),) * 4,
    )
    model = build(config, dtype=torch.float32)
    x = images(config, 9, dtype=torch.float32)
    want = LabelScorer(model)(x)
    scorer = LabelScorer(model, engine="compile")
    got = [scorer(x)]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Generation conditioners are compiled again for some numbers of rows, each of which takes a minute;
    # classification conditioners never are.
    sizes = (1, 2, 4) if task == "classification" else (1, 4)
    got += [torch.cat([scorer(part) for part in x.split(size)]) for size in sizes]
    if task == "classification":
        assert compiled == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for scores in got:
        assert (log_odds(scores) - log_odds(want)).abs().max() < 2e-3
        assert ((scores - want) / want).abs().max() < 1e-5
    assert torch.equal(scorer(x), got[0])


@pytest.mark.slow
def test_paper_preset_in_float32():
    """At 184x184: 1e-5 relative and 0.02 nats of log-odds to one call per label, and to float64."""
    torch.manual_seed(0)
    config = FlowConfig.paper(7)
    model = build(config, dtype=torch.float32)
    x = images(config, 2, dtype=torch.float32)
    scorer = LabelScorer(model)
    got, want = scorer(x), one_call_a_label(model, x)
    assert ((got - want) / want).abs().max() < 1e-5 and (log_odds(got) - log_odds(want)).abs().max() < 0.02
    assert torch.equal(LabelScorer(model, max_rows=3)(x[1:]), got[1:])
    del scorer
    wide = LabelScorer(model.double())(x.double())
    assert ((got - wide) / wide).abs().max() < 1e-5 and (log_odds(got) - log_odds(wide)).abs().max() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_cuda_graphs_replay_the_eager_engine(precision):
    model = build(FlowConfig.tiny(3), dtype=torch.float32).cuda()
    x = images(model.config, 5, dtype=torch.float32).cuda()
    scorer = LabelScorer(model, precision)
    assert scorer.engine == "cuda_graph"
    # A graph is replayed after others were captured, too: what it reads must not have been freed.
    for count in (5, 1, 3, 5, 1):
        torch.cuda.empty_cache()
        want = LabelScorer(model, precision, engine="eager")(x[:count])
        assert (log_odds(scorer(x[:count])) - log_odds(want)).abs().max() < 1e-3


# -- the plain function --------------------------------------------------------------------------------------


def test_float32_log_odds_stay_close_to_float64():
    config = FlowConfig.tiny(3)
    narrow, wide = build(config, dtype=torch.float32), build(config, dtype=torch.float32).double()
    x = images(config, 6, dtype=torch.float32)
    with torch.no_grad():
        a, b = narrow.log_prob_all(x).double(), wide.log_prob_all(x.double())
    assert ((a - a[:, :1]) - (b - b[:, :1])).abs().max() < 1e-2


def test_bfloat16_conditioners_leave_the_flow_stream_alone():
    """Under autocast only the conditioners are narrow: log-odds move by a fraction of what a narrow stream
    would cost.
    """
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


@pytest.mark.parametrize("change", CHANGES)
def test_a_scorer_outlives_no_change_of_its_model(change):
    model = build(layout("tiny"), dtype=torch.float32)
    x = images(model.config, 2, dtype=torch.float32)
    scorer = LabelScorer(model)
    copied, want = copy.deepcopy(scorer), scorer(x)
    make, words = CHANGES[change]
    make(model)
    for call in (scorer, scorer.score):
        with pytest.raises(RuntimeError, match=rf"{words}.* new LabelScorer"):
            call(x)
    with pytest.raises(RuntimeError, match=words):
        scoring.score_slices(scorer, np.zeros((1, 1, 16, 16), np.uint8))
    assert torch.equal(copied(x), want)
    with pytest.raises(RuntimeError, match=words):
        copy.deepcopy(scorer)(x)
    assert LabelScorer(model.eval())(x.to(model.dtype)).isfinite().all()


def test_folded_constants_outlive_no_change_either(uncompiled):
    model = build(layout("batch norm"), dtype=torch.float32)
    x = images(model.config, 2, dtype=torch.float32)
    scorer = LabelScorer(model, engine="compile")
    scorer(x)
    next(value for name, value in model.named_buffers() if name.endswith("running_mean")).add_(1.0)
    with pytest.raises(RuntimeError, match=r"buffer steps.*running_mean is at version .* new LabelScorer"):
        scorer(x)


def test_what_leaves_the_weights_leaves_a_scorer():
    model = build(layout("tiny"), dtype=torch.float32)
    x = images(model.config, 2, dtype=torch.float32)
    scorer = LabelScorer(model)
    want = scorer(x)
    model.temperature, model.metadata = 3.0, {"note": 1}
    model.requires_grad_(False).to("cpu").float().train().eval()
    with torch.inference_mode():
        assert torch.equal(scorer(x), want)
    model.sample(torch.tensor([0, 1]))
    model.log_prob(x, torch.tensor([0, 1]))
    assert torch.equal(scorer(x), want)


def test_slices_and_volumes():
    config = FlowConfig.tiny(3)
    model = build(config, dtype=torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 16, 16), dtype=np.uint8)
    done = []
    got = scoring.score_slices(model, pixels, batch_size=3, progress=done.append)
    assert got.shape == (7, 3) and done == [3, 6, 7]
    assert np.array_equal(got, scoring.score_slices(LabelScorer(model, max_rows=2), pixels))
    with torch.no_grad():
        want = model.log_prob_all(torch.from_numpy(pixels).float() / 127.5 - 1)
    assert np.abs(got - want.numpy()).max() < 1e-2
    volumes = np.array([0, 0, 2, 1, 2, 2, 0])
    joined = scoring.volume_log_probs(got, volumes)
    assert np.allclose(joined, [got[volumes == v].sum(axis=0) for v in range(3)])


def test_from_uint8_covers_the_range():
    assert scoring.from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
