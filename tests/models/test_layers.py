"""ActNorm, the 1x1 convolution and the coupling on their own, and the convolutions of conditioners."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow import FlowConfig
from fastflow.kernels.cpu.convolution import convolve
from fastflow.models import layers
from fastflow.models.coupling import AffineCoupling
from fastflow.models.layers import STD_FLOOR, ActNorm, InvertibleConv1x1, combine, moments
from fastflow.models.masks import build_mask


def test_actnorm_standardises_the_first_batch_and_only_that():
    layer = ActNorm(3).double()
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) * torch.tensor([0.5, 2.0, 40.0])[:, None, None] + 7.0
    layer.initialize(x)
    y = x * layer.log_scale.exp()[:, None, None] + layer.bias[:, None, None]
    assert y.mean(dim=(0, 2, 3)).abs().max() < 1e-9
    assert (y.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    before = layer.log_scale.clone()
    layer.initialize(x * 100)
    assert torch.equal(layer.log_scale, before)


def test_actnorm_on_a_constant_channel_is_finite_and_bounded():
    layer = ActNorm(2)
    x = torch.full((3, 2, 4, 4), -1.0)
    x[:, 1].normal_()
    layer.initialize(x)
    assert torch.isfinite(layer.log_scale).all() and torch.isfinite(layer.bias).all()
    assert layer.log_scale.exp().max() <= 1 / STD_FLOOR


def test_actnorm_variance_survives_a_large_mean():
    layer = ActNorm(1)
    layer.initialize(torch.randn(2, 1, 64, 64) + 1000.0)
    assert abs(float(layer.log_scale.detach().exp()) - 1.0) < 0.05


REFUSED = {
    "NaN": (torch.full((2, 2, 3, 3), float("nan")), "finite statistics to set ActNorm, got mean nan"),
    "infinity": (torch.tensor([1.0, float("-inf")]).view(1, 2, 1, 1), r"-inf and .* in channel 1 of \(1, 2,"),
    "no images": (torch.zeros(0, 2, 3, 3), r"an image at least to set ActNorm, got an empty batch \(0, 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_actnorm_refuses_a_batch_before_it_stores_anything(case):
    layer = ActNorm(2)
    x, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        layer.initialize(x)
    assert not layer.ready and not layer.initialized
    assert not layer.log_scale.any() and not layer.bias.any()
    layer.initialize(torch.ones(1, 2, 1, 1))
    assert layer.ready and torch.isfinite(layer.bias).all()


def test_actnorm_refuses_statistics_that_its_dtype_does_not_hold():
    layer = ActNorm(1).half()
    with pytest.raises(ValueError, match=r"got mean 2000.0 and deviation 0.001 in channel 0"):
        layer.initialize(torch.full((1, 1, 2, 2), 2000.0, dtype=torch.float16))
    assert not layer.ready and not layer.bias.any()


def test_actnorm_loaded_as_initialised_stays_so():
    source, target = ActNorm(2), ActNorm(2)
    source.initialize(torch.randn(2, 2, 4, 4) * 3)
    target.load_state_dict(source.state_dict())
    assert target.ready
    target.initialize(torch.randn(2, 2, 4, 4))
    assert torch.equal(target.log_scale, source.log_scale)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 17, 64])
def test_conv_factors_logdet_and_inverse(channels):
    torch.manual_seed(channels)
    layer = InvertibleConv1x1(channels).double()
    dense = torch.randn(channels, channels, dtype=torch.float64) + torch.eye(channels)
    layer.set_weight(dense, torch.float64)
    assert (layer.weight() - dense).abs().max() < 1e-12
    assert abs(float(layer.log_s.sum() - torch.linalg.slogdet(dense).logabsdet)) < 1e-10
    assert (layer.inverse_weight() @ dense - torch.eye(channels)).abs().max() < 1e-8


def test_conv_starts_as_a_rotation():
    weight = InvertibleConv1x1(8).double().weight()
    assert (weight @ weight.T - torch.eye(8)).abs().max() < 1e-6
    assert float(InvertibleConv1x1(1).weight()) == 1.0


def test_conv_gradient_reaches_every_factor_through_both_directions():
    layer = InvertibleConv1x1(4).double()
    for matrix in (layer.weight, layer.inverse_weight):
        layer.zero_grad()
        (matrix() * torch.randn(4, 4)).sum().backward()
        for name in ("lower", "upper", "log_s"):
            assert getattr(layer, name).grad.abs().sum() > 0


def test_conv_refuses_a_singular_matrix():
    with pytest.raises(ValueError, match="singular"):
        InvertibleConv1x1(2).set_weight(torch.ones(2, 2), torch.float32)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    level=st.sampled_from([0.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_moments_of_parts_are_those_of_the_whole(sizes, level, seed):
    """Whatever the sizes of the parts are; the last channel is constant."""
    torch.manual_seed(seed)
    x = torch.randn(sum(sizes), 3, 4, 4, dtype=torch.float64) + level
    x[:, 2] = level
    whole, parts = moments(x), combine([moments(part) for part in x.split(sizes)])
    assert float(parts.pixels) == float(whole.pixels) == 16 * sum(sizes)
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-13, atol=1e-12)
    assert torch.allclose(parts.squares, whole.squares, rtol=1e-9, atol=1e-12)
    assert parts.squares[2] == 0


def test_actnorm_starts_from_the_images_of_all_ranks(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64) * 3 + 1
    alone, shared = ActNorm(3).double(), [ActNorm(3).double() for _ in range(2)]
    alone.initialize(x)
    every = [moments(x[:2]), moments(x[2:])]
    monkeypatch.setattr(layers, "_of_all_ranks", lambda own: every)
    for layer, part in zip(shared, (x[:2], x[2:]), strict=True):
        layer.initialize(part)
        assert torch.allclose(layer.log_scale, alone.log_scale, atol=1e-13)
        assert torch.allclose(layer.bias, alone.bias, atol=1e-13)
    assert torch.equal(shared[0].log_scale, shared[1].log_scale)


def _rank(rank, world, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    x = torch.arange(48, dtype=torch.float64).view(4, 3, 2, 2) ** 1.5
    layer = ActNorm(3).double()
    spoilt = x.clone()
    spoilt[0, 1, 0, 0] = float("nan")
    refused = False
    try:
        layer.initialize(spoilt[rank * 2 : rank * 2 + 2])
    except ValueError:
        refused = not layer.ready
    layer.initialize(x[rank * 2 : rank * 2 + 2])
    torch.save((layer.log_scale, refused), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_actnorm_takes_its_statistics_from_all_ranks(tmp_path):
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path), str(tmp_path)), nprocs=2)
    alone = ActNorm(3).double()
    alone.initialize(torch.arange(48, dtype=torch.float64).view(4, 3, 2, 2) ** 1.5)
    for rank in range(2):
        log_scale, refused = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(log_scale, alone.log_scale, atol=1e-12)
        assert refused, "one rank's batch is refused by all"


@pytest.mark.parametrize("step", [0, 1, 6])
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_a_coupling_in_float32_gives_a_sample_the_same_bits_in_every_batch(task, step):
    torch.manual_seed(step)
    config = FlowConfig.demo(7, task=task)
    shape = config.step_shapes[step]
    coupling = AffineCoupling(config, step, shape, build_mask("checkerboard", step, shape, None, 2)).eval()
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.add_(
                torch.randn_like(parameter)
                * (0.05 if parameter.ndim == 1 else 0.3 / parameter[0].numel() ** 0.5)
            )
        x, labels = torch.randn(9, *shape), torch.arange(9) % 7
        masked, tables = x.masked_fill(~coupling.mask, 0.0), coupling.label_params(torch.arange(7))
        y, logdet, _ = coupling(x, masked, tables, labels)
        assert not torch.equal(y, x)
        for count in (1, 2, 3, 5):
            # As many tables as samples, too: as the model has them for few.
            few = coupling.label_params(labels[:count])
            for table, rows in ((tables, labels[:count]), (few, torch.arange(count))):
                got = coupling(x[:count], masked[:count], table, rows)
                assert torch.equal(got[0], y[:count]) and torch.equal(got[1], logdet[:count]), count


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "size", "batch"),
    [
        (1, 16, 5, 2, 24, 2),
        (4, 8, 5, 1, 11, 3),
        (2, 1, 7, 1, 12, 1),
        (2, 1, 7, 1, 12, 2),
        (3, 16, 5, 2, 9, 1),
        (16, 16, 3, 1, 8, 1),
    ],
)
def test_convolve_is_the_convolution_and_so_are_its_gradients(inputs, outputs, kernel, stride, size, batch):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=outputs > 1)
    x = torch.randn(batch, inputs, size, size, requires_grad=True)
    y = convolve(x, conv.weight, conv.bias, conv.stride, conv.padding)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, *conv.parameters()), grad)
    wide = x.detach().double().requires_grad_()
    conv.double()
    expected = conv(wide)
    for a, b in zip(
        (y, *got),
        (expected, *torch.autograd.grad(expected, (wide, *conv.parameters()), grad.double())),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
