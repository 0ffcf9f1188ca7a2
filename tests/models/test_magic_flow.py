"""The properties of a flow: exact inverse and log-determinant for random layouts; errors of bad input."""

import copy
import warnings

import pytest
import torch
from helpers import application_mask, build, images, labels
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import PrecisionWarning, UninitializedModelError
from fastflow.models.config import MASKS


@st.composite
def layouts(draw):
    """Any small layout: step count, masks, squeezes, splits, channels, sizes, both tasks, both sharings."""
    steps = draw(st.integers(1, 4))
    squeezes = draw(st.lists(st.integers(0, steps - 1), unique=True, max_size=2).map(sorted))
    factor = 2 ** len(squeezes)
    channels = draw(st.integers(1, 3))
    values = {
        "num_classes": draw(st.integers(1, 4)),
        "input_shape": (channels, factor * draw(st.integers(1, 5)), factor * draw(st.integers(1, 5))),
        "task": draw(st.sampled_from(["classification", "generation"])),
        "masks": tuple(draw(st.lists(st.sampled_from(MASKS), min_size=steps, max_size=steps))),
        "squeeze_before": tuple(squeezes),
        "widths": tuple(draw(st.tuples(*[st.sampled_from([3, 4, 8])] * 3)) for _ in range(steps)),
        "share_halves": draw(st.booleans()),
        "condition_from_step": draw(st.integers(0, steps - 1)),
        "block_size": draw(st.integers(1, 3)),
        "scale_bound": draw(st.sampled_from([0.5, 1.0])),
    }
    splits, current = [], channels
    for step in range(steps):
        current *= 4 if step in squeezes else 1
        if current % 2 == 0 and draw(st.booleans()):
            splits.append(step)
            current //= 2
    return FlowConfig(split_after=tuple(splits), **values)


@settings(max_examples=12)
@given(layouts(), st.integers(1, 5))
def test_inverse_undoes_forward(config, batch):
    model = build(config)
    x, y = images(config, batch, seed=3), labels(config, batch)
    with torch.no_grad():
        z, logdet = model(x, y)
        assert z.shape == (batch, config.num_dims) and logdet.shape == (batch,)
        assert (model.inverse(z, y) - x).abs().max() < 1e-10


@settings(max_examples=8)
@given(layouts().filter(lambda config: config.num_dims <= 64))
def test_logdet_is_that_of_the_jacobian(config):
    model = build(config)
    x, y = images(config, 1, seed=4), labels(config, 1)
    jacobian = torch.autograd.functional.jacobian(lambda value: model(value, y)[0].squeeze(0), x).view(
        config.num_dims, -1
    )
    with torch.no_grad():
        _, logdet = model(x, y)
    # A channel that is constant over the first batch gets a scale of up to 1000, which costs slogdet digits.
    assert abs(float(torch.linalg.slogdet(jacobian).logabsdet - logdet)) < 1e-8 * max(
        1.0, float(torch.linalg.cond(jacobian)) / 1e6
    )


@settings(max_examples=8)
@given(layouts(), st.integers(1, 4))
def test_all_labels_at_once_equal_one_by_one(config, batch):
    model = build(config)
    x = images(config, batch, seed=5)
    with torch.no_grad():
        together = model.log_prob_all(x)
        for label in range(config.num_classes):
            one = model.log_prob(x, torch.full((batch,), label))
            assert (together[:, label] - one).abs().max() < 1e-8 * max(1.0, float(one.abs().max()))


@settings(max_examples=8)
@given(layouts(), st.integers(1, 4))
def test_attribution_sums_to_log_prob(config, batch):
    model = build(config)
    x, y = images(config, batch, seed=6), labels(config, batch)
    with torch.no_grad():
        spread, const = model.attribution(x, y)
        assert spread.shape == x.shape and const.shape == (batch,)
        want = model.log_prob(x, y)
        assert (spread.sum(dim=(1, 2, 3)) + const - want).abs().max() < 1e-8 * max(
            1.0, float(want.abs().max())
        )
        # The constant is the same for every image and label.
        _, other = model.attribution(-x, (y + 1) % config.num_classes)
        assert torch.equal(other, const)


def test_log_prob_is_a_density():
    """On one pixel the density integrates to 1."""
    config = FlowConfig(2, (1, 1, 1), masks=("checkerboard", "channel"), widths=((4, 4, 4),) * 2)
    model = build(config)
    grid = torch.linspace(-60, 60, 6001, dtype=torch.float64)
    with torch.no_grad():
        for label in range(2):
            lp = model.log_prob(grid.view(-1, 1, 1, 1), torch.full((len(grid),), label))
            assert abs(float(torch.trapezoid(lp.exp(), grid)) - 1.0) < 1e-6


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_every_parameter_gets_a_gradient(task):
    # Two channels to a group: where stage 3 is a single pixel, a group of one element would be zero after its
    # norm.
    config = FlowConfig.tiny(3, task=task, dropout=0.0, widths=((16, 16, 16),) * 6)
    model = build(config).train()
    model.log_prob(images(config, 4), labels(config, 4)).sum().backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert without == []
    silent = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    # One-channel convolutions have no triangle; ReLU gates of width one may sleep.
    assert all("conv.lower" in n or "conv.upper" in n or ".down." in n or ".up." in n for n in silent), silent


def test_gradient_of_log_prob_matches_finite_differences():
    config = FlowConfig.tiny(2, input_shape=(1, 4, 4), dropout=0.0)
    model = build(config)
    x, y = images(config, 1).requires_grad_(), labels(config, 1)
    assert torch.autograd.gradcheck(lambda value: model.log_prob(value, y), x, eps=1e-6, atol=1e-4)


def test_initialisation_happens_once_and_never_in_eval(tmp_path):
    config = FlowConfig.tiny(2)
    model = MagicFlow(config, application_mask(16, 16)).eval()
    x, y = images(config, 4, dtype=torch.float32), labels(config, 4)
    for call in (
        lambda: model(x, y),
        lambda: model.log_prob_all(x),
        lambda: model.inverse(torch.zeros(1, 256), y[:1]),
        lambda: model.sample(y),
        lambda: model.attribution(x, y),
        lambda: model.save(tmp_path),
    ):
        with pytest.raises(UninitializedModelError):
            call()
    assert not model.initialized

    model.train()(x, y)
    assert model.initialized
    before = copy.deepcopy([step.actnorm.state_dict() for step in model.steps])
    model.train()(3 * x, y)
    model.initialize(5 * x)
    model.save(tmp_path)
    loaded = MagicFlow.load(tmp_path)
    loaded.train()(7 * x, y)
    for flow in (model, loaded):
        for step, state in zip(flow.steps, before, strict=True):
            assert all(torch.equal(value, state[name]) for name, value in step.actnorm.state_dict().items())


def test_initialize_keeps_the_mode_and_standardises():
    config = FlowConfig.tiny(2, dropout=0.5)
    torch.manual_seed(0)
    model = MagicFlow(config, application_mask(16, 16)).train()
    x = images(config, 32, dtype=torch.float32)
    model.initialize(x)
    assert all(module.training for module in model.modules())
    h = model.steps[0].mix(x)
    assert abs(float(h.mean())) < 1e-4 and abs(float(h.std()) - 1) < 1e-2


def spoil(model, step):
    """Let the activations after a step overflow."""
    with torch.no_grad():
        model.steps[step].coupling.conditioners[0].scale.label_out.bias.fill_(float("nan"))


@pytest.mark.parametrize("way", ["initialize", "first step", "reversible", "attribution"])
@pytest.mark.parametrize("case", ["images", "activations", "empty"])
def test_a_batch_sets_all_layers_or_none(way, case):
    config = FlowConfig.tiny(2, reversible=way == "reversible")
    torch.manual_seed(0)
    model = MagicFlow(config, application_mask(16, 16)).train(way != "initialize")
    calls = {"initialize": model.initialize, "attribution": model.attribution}
    call = calls.get(way, model.log_prob)
    x, y = images(config, 4, dtype=torch.float32), labels(config, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = x.clone()
    if case == "images":
        bad[1, 0, 3, 3] = float("nan")
    elif case == "activations":
        spoil(model, 2)
    else:
        bad, y = bad[:0], y[:0]
    with pytest.raises(ValueError, match="to set ActNorm, got"):
        call(bad, y)
    assert not model.initialized and not any(step.actnorm.ready for step in model.steps)
    for name, value in model.state_dict().items():
        assert ".actnorm." not in name or torch.equal(value, before[name])
    model.load_state_dict(before)
    call(x, labels(config, 4))
    assert model.initialized and model.eval().log_prob_all(x).isfinite().all()


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to(torch.bfloat16),
        lambda model: torch.nn.ModuleList([model]).to(dtype=torch.float16),
    ],
)
def test_a_model_that_is_narrow_as_a_whole_gets_a_warning(convert):
    model = build(FlowConfig.tiny(2), dtype=torch.float32)
    with pytest.warns(
        PrecisionWarning, match=r"whole model is torch.*float16 now.*torch.autocast.*mixed"
    ) as w:
        convert(model)
    assert len(w) == 1


def test_other_conversions_get_none(tmp_path):
    model = build(FlowConfig.tiny(2), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double().float().to("cpu").float()
    with pytest.warns(PrecisionWarning) as found:
        model.half()
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.half().to("cpu")
    model.save(tmp_path)
    with pytest.warns(PrecisionWarning, match="whole model is torch.float16"):
        MagicFlow.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.float()


def test_constant_padding_gives_finite_densities():
    config = FlowConfig.tiny(2)
    model = MagicFlow(config, application_mask(16, 16))
    model.initialize(torch.full((4, 1, 16, 16), -1.0))
    assert torch.isfinite(model.eval().log_prob_all(torch.full((2, 1, 16, 16), -1.0))).all()


def test_same_input_same_bits():
    config = FlowConfig.tiny(3)
    model = build(config, dtype=torch.float32)
    x = images(config, 5, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model.log_prob_all(x), model.log_prob_all(x.clone()))


def test_sample_is_the_inverse_of_the_seeded_latent():
    config = FlowConfig.tiny(3)
    model = build(config)
    y = labels(config, 4)
    draw = lambda: model.sample(y, 0.7, torch.Generator().manual_seed(1))  # noqa: E731
    assert torch.equal(draw(), draw())
    with torch.no_grad():
        z, _ = model(draw(), y)
    want = 0.7 * torch.randn(4, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (z - want).abs().max() < 1e-9
    with pytest.raises(ValueError, match="temperature"):
        model.sample(y, -1.0)


def test_labels_change_the_density_only_from_the_conditioned_step_on():
    config = FlowConfig.tiny(3, condition_from_step=4)
    model = build(config)
    assert model.steps[3].coupling.conditioners[0].embedding.fc1.weight.shape[1] == 1
    assert model.steps[4].coupling.conditioners[0].embedding.fc1.weight.shape[1] == 3
    with torch.no_grad():
        lp = model.log_prob_all(images(config, 2))
    assert (lp[:, 0] != lp[:, 1]).all()


def test_more_classes_than_samples_takes_the_same_values():
    config = FlowConfig.tiny(9)
    model = build(config)
    x, y = images(config, 12), labels(config, 12)
    with torch.no_grad():
        whole = model.log_prob(x, y)
        part = torch.cat([model.log_prob(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)])
    assert (whole - part).abs().max() < 1e-9


def test_posterior_tempers_the_likelihood_and_not_the_prior():
    config = FlowConfig.tiny(3)
    model = build(config)
    x = images(config, 4)
    prior = [0.7, 0.2, 0.1]
    with torch.no_grad():
        lp = model.log_prob_all(x)
        assert torch.allclose(model.posterior(x), torch.softmax(lp, dim=1))
        model.temperature = 1e12
        assert torch.allclose(
            model.posterior(x, prior), torch.tensor(prior, dtype=torch.float64).expand(4, 3), atol=1e-6
        )
        model.temperature = 600.0
        want = torch.softmax(lp / 600 + torch.tensor(prior, dtype=torch.float64).log(), dim=1)
        assert torch.allclose(model.posterior(x, torch.tensor(prior)), want, atol=1e-6)
    for bad in ([0.5, 0.5], [0.9, 0.2, -0.1], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match="prior"):
            model.posterior(x, bad)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(2, 1, 16, 15), torch.zeros(2, dtype=torch.int64), r"\(B, 1, 16, 16\).*\(2, 1, 16, 15\)"),
        (torch.zeros(1, 16, 16), torch.zeros(1, dtype=torch.int64), "x must be"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "floating point"),
        (torch.zeros(2, 1, 16, 16), torch.tensor([0, 3]), "from 0 to 2.*got 3"),
        (torch.zeros(2, 1, 16, 16), torch.tensor([-1, 0]), "got -1"),
        (torch.zeros(2, 1, 16, 16), torch.tensor([0]), r"\(2,\)"),
        (torch.zeros(2, 1, 16, 16), torch.tensor([0.0, 1.0]), "integer"),
    ],
)
def test_bad_arguments_are_named(x, y, words):
    model = build(FlowConfig.tiny(3))
    with pytest.raises(ValueError, match=words):
        model(x, y)


def test_bad_latent_and_bad_mask_are_named():
    model = build(FlowConfig.tiny(3))
    with pytest.raises(ValueError, match=r"z must be \(B, 256\)"):
        model.inverse(torch.zeros(2, 255), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="only 0 and 1"):
        MagicFlow(FlowConfig.tiny(3), torch.full((16, 16), 0.5))
    with pytest.raises(ValueError, match=r"\(16, 16\)"):
        MagicFlow(FlowConfig.tiny(3), torch.zeros(8, 8))


def test_an_empty_batch_is_no_error():
    model = build(FlowConfig.tiny(3))
    x = torch.zeros(0, 1, 16, 16)
    with torch.no_grad():
        assert model(x, torch.zeros(0, dtype=torch.int64))[0].shape == (0, 256)
        assert model.log_prob_all(x).shape == (0, 3)


@pytest.mark.slow
def test_paper_preset_builds_scores_and_samples():
    model = MagicFlow(FlowConfig.paper(num_classes=7))
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == 151.6
    x = torch.rand(2, 1, 184, 184) * 2 - 1
    model.initialize(x)
    model.eval()
    with torch.no_grad():
        assert model.log_prob_all(x[:1]).shape == (1, 7)
        assert model.sample(torch.tensor([3])).shape == (1, 1, 184, 184)
