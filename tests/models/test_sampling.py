"""The sampler: the images of the model, whatever the engine, the split into passes and the temperature."""

import copy

import pytest
import torch
from changes import CHANGES
from helpers import build, labels
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import UninitializedModelError
from fastflow.models.inference.graphs import Captured, GraphPerSize
from fastflow.models.inference.precision import PRECISIONS, pick_conditioner_dtype
from fastflow.models.inference.sampler import SamplerOfWeights
from fastflow.models.sampling import Sampler
from fastflow.numerics import float32_products

LAYOUTS = {
    "classification": {},
    "generation": {"task": "generation"},
    "label-free steps": {"condition_from_step": 2},
    "one channel": {"squeeze_before": (4, 5), "split_after": ()},
    "two conditioners": {"share_halves": False},
}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def small(name="classification", dtype=torch.float32, **changes):
    return build(FlowConfig.tiny(3, **{**LAYOUTS[name], **changes}), dtype=dtype)


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_are_those_of_the_model_bit_for_bit(name):
    model = small(name)
    y = labels(model.config, 5)
    sampler = Sampler(model)
    assert sampler.engine == "eager"
    for temperature in (1.0, 0.7, 0.0, 1):
        assert torch.equal(sampler(y, temperature, seeded()), model.sample(y, temperature, seeded()))
    z = torch.randn(5, model.config.num_dims, generator=seeded())
    with torch.no_grad():
        assert torch.equal(sampler.inverse(z, y), model.inverse(z, y))
        # With fewer images than labels, the model computes the parameters of their labels alone.
        few = sampler.inverse(z[:2], y[:2])
        assert torch.allclose(few, model.inverse(z[:2], y[:2]), atol=1e-5)
    assert not few.requires_grad and sampler(y[:0]).shape == (0, 1, 16, 16)


def test_a_split_into_passes_changes_nothing():
    model = small()
    y = labels(model.config, 7)
    sampler = Sampler(model)
    whole = sampler(y, 0.8, seeded())
    for sampler.max_images in (1, 2, 3, 7, 100):
        assert torch.equal(sampler(y, 0.8, seeded()), whole)


def test_each_block_of_the_latent_has_its_temperature():
    model = small()
    y, sampler = labels(model.config, 4), Sampler(model)
    sizes = [c * h * w for c, h, w in model.config.latent_shapes]
    z = torch.randn(4, sum(sizes), generator=seeded())
    scaled = z * torch.cat([torch.full((size,), t) for size, t in zip(sizes, (0.5, 1.5), strict=True)])
    assert torch.equal(sampler(y, (0.5, 1.5), seeded()), sampler.inverse(scaled, y))
    # The temperatures of a call are none of the next one's.
    assert torch.equal(sampler(y, 1.0, seeded()), sampler.inverse(z, y))


def test_mixed_rounds_conditioners_and_tf32_changes_nothing_on_a_cpu(monkeypatch):
    from fastflow.models.inference import precision

    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    model = small()
    y = labels(model.config, 4)
    exact = Sampler(model)(y, 1.0, seeded())
    mixed = Sampler(model, "mixed")
    assert mixed.conditioner_dtype == torch.bfloat16 and mixed._flow.steps[0].label_params[0].films
    found = mixed(y, 1.0, seeded())
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    assert (found - exact).abs().mean() < 0.1
    assert torch.equal(Sampler(model, "tf32")(y, 1.0, seeded()), exact)


def test_tf32_switches_come_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        with float32_products(tf32=allowed):
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    assert [pick_conditioner_dtype(p, torch.float32, torch.device("meta")) for p in PRECISIONS[:2]] == [
        torch.float32,
        torch.float32,
    ]


# -- captured passes -----------------------------------------------------------------------------------------


class Recorder:
    """Stands for CUDA graphs: a replay runs the pass again on its static inputs, into its static result."""

    def __init__(self):
        self.sizes, self.pools, self.waits = [], [], 0

    def __call__(self, run, inputs, pool):
        self.sizes.append(len(inputs[0]))
        self.pools.append(pool)
        with Waits() as seen:
            result = run(*inputs)
        self.waits += seen.count

        def replay():
            result.copy_(run(*inputs))

        return Captured(result, replay, pool or "pool")


class Waits(TorchDispatchMode):
    """Counts reads of values, for which a host waits."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        )
        return function(*args, **(kwargs or {}))


def captured(model):
    sampler, recorder = Sampler(model), Recorder()
    sampler._graphs = GraphPerSize(recorder)
    return sampler, recorder


@pytest.mark.parametrize("name", ["classification", "generation", "label-free steps"])
def test_a_pass_is_captured_once_per_power_of_two_and_waits_for_nothing(name):
    model = small(name)
    sampler, recorder = captured(model)
    eager = Sampler(model)
    for count, temperature in ((5, 1.0), (3, 0.7), (8, (0.2, 0.9)), (1, 1.0), (4, 0.0), (5, 0.4)):
        y = labels(model.config, count)
        assert torch.equal(sampler(y, temperature, seeded()), eager(y, temperature, seeded()))
    # A size is captured when it comes first; other temperatures need no other capture.
    assert recorder.sizes == [8, 4, 1] and recorder.pools == [None, "pool", "pool"]
    assert recorder.waits == 0


def test_results_of_a_replay_are_the_callers_own():
    sampler, _ = captured(small())
    y = torch.tensor([0, 1])
    first = sampler(y, 1.0, seeded(1))
    kept = first.clone()
    sampler(y, 1.0, seeded(2))
    assert torch.equal(first, kept)


def test_functions_are_told_apart_by_name():
    graphs = GraphPerSize(Recorder())
    x = torch.arange(3.0)
    assert torch.equal(graphs(lambda v: v + 1, (x,), "a"), x + 1)
    assert torch.equal(graphs(lambda v: v * 2, (x,), "b"), x * 2)
    assert torch.equal(graphs(lambda v: v + 1, (2 * x,), "a"), 2 * x + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay_the_eager_engine():
    model = small().cuda()
    sampler, eager = Sampler(model), Sampler(model, engine="eager")
    assert sampler.engine == "cuda_graph"
    for count, temperature in ((5, 1.0), (1, 0.7), (3, (0.2, 0.9)), (5, 0.5)):
        torch.cuda.empty_cache()
        y = labels(model.config, count).cuda()
        got, want = (one(y, temperature, torch.Generator("cuda").manual_seed(1)) for one in (sampler, eager))
        assert torch.allclose(got, want, atol=1e-5)


# -- bad input -----------------------------------------------------------------------------------------------


def test_choices_are_checked():
    model = small()
    for arguments, words in (
        ({"precision": "half"}, "precision must be one of float32, tf32, mixed, got 'half'"),
        ({"engine": "compile"}, "engine must be one of auto, eager, cuda_graph, got 'compile'"),
    ):
        with pytest.raises(ValueError, match=words):
            Sampler(model, **arguments)
    for precision in ("tf32", "mixed"):
        with pytest.raises(ValueError, match=f"precision='{precision}' needs a float32 model"):
            Sampler(small(dtype=torch.float64), precision)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"cuda_graph.* needs a model on a CUDA device, it is on cpu"):
            Sampler(model, engine="cuda_graph")
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        Sampler(copy.deepcopy(model).train())
    with pytest.raises(UninitializedModelError):
        Sampler(MagicFlow(FlowConfig.tiny(2)).eval())


def test_arguments_are_checked():
    sampler = Sampler(small())
    y = torch.tensor([0, 2])
    for temperature in (-1.0, float("nan"), float("inf"), (1.0,), (1.0, 1.0, 1.0), (1.0, -0.1)):
        with pytest.raises(ValueError, match=r"temperature must be .* or 2 of them \(one per latent block\)"):
            sampler(y, temperature)
    with pytest.raises(ValueError, match="y must hold labels from 0 to 2"):
        sampler(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"y must be \(2,\) integer labels"):
        sampler(torch.zeros(2))
    with pytest.raises(ValueError, match=r"z must be \(B, 256\), got \(2, 7\)"):
        sampler.inverse(torch.zeros(2, 7), y)
    with pytest.raises(ValueError, match=r"y must be \(3,\) integer labels"):
        sampler.inverse(torch.zeros(3, 256), y)


@pytest.mark.parametrize("change", CHANGES)
def test_a_sampler_outlives_no_change_of_its_model(change):
    model, y = small(), torch.tensor([0, 1])
    sampler = Sampler(model)
    copied = copy.deepcopy(sampler)
    want = sampler(y, 1.0, seeded())
    make, words = CHANGES[change]
    make(model)
    for call in (lambda: sampler(y), lambda: sampler.inverse(torch.zeros(2, 256), y)):
        with pytest.raises(RuntimeError, match=rf"{words}.* new Sampler"):
            call()
    assert torch.equal(copied(y, 1.0, seeded()), want)
    with pytest.raises(RuntimeError, match=words):
        copy.deepcopy(sampler)(y)


def test_a_sampler_of_weights_follows_their_changes(monkeypatch):
    model, y = small(), torch.tensor([0, 1, 2])
    samplers, engines = SamplerOfWeights(), []
    made = Sampler.__init__

    def note(self, model, precision="float32", engine="auto"):
        engines.append(engine)
        made(self, model, precision, engine)

    monkeypatch.setattr(Sampler, "__init__", note)
    first = samplers.get(model)
    second = samplers.get(model)
    assert samplers.get(model) is second is not first and engines == ["eager", "auto"]
    before = second(y, 0.8, seeded())
    with torch.no_grad():
        model.steps[0].actnorm.bias.add_(1.0)
    changed = samplers.get(model)
    assert changed is not second and engines == ["eager", "auto", "eager"]
    after = changed(y, 0.8, seeded())
    assert torch.equal(after, model.sample(y, 0.8, seeded())) and not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="make a new Sampler"):
        second(y)


def test_copies_of_a_model_take_no_captured_passes_along():
    model = small()
    model._samplers.get(model)
    copied = copy.deepcopy(model)
    assert copied._samplers._sampler is None and model._samplers._sampler is not None
    model.train()
    assert model._samplers._sampler is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_samples_by_its_sampler():
    model = small().cuda()
    y = labels(model.config, 5).cuda()
    images = [model.sample(y, 0.8, seeded()) for _ in range(3)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert model._samplers.get(model).engine == "cuda_graph"
