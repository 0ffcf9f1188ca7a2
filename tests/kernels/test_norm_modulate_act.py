"""The norm with a modulation per sample, against its float64 reference and the norm with tables."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, same_bits, to_float64

from fastflow import kernels
from fastflow.kernels import layouts
from fastflow.kernels.norm_modulate_act import norm_modulate_act_reference
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import norm_parts

FORMATS = {"c": torch.contiguous_format, "l": torch.channels_last}


def split_groups(monkeypatch):
    """Let every group be larger than a block, and every block small."""
    monkeypatch.setattr(norm_parts, "MAX_GROUP_ELEMENTS", 0)
    monkeypatch.setattr(norm_parts, "MAX_PLAIN_GROUP_ELEMENTS", 0)
    monkeypatch.setattr(norm_parts, "SPLIT_ELEMENTS", 64)


def arguments(shape, dtype=F64, pairs=None, layout="c", device="cpu"):
    """(x, modulation, residual)."""
    x, extra = (
        rand(*shape, dtype=dtype, seed=i, device=device).contiguous(memory_format=FORMATS[layout])
        for i in (0, 1)
    )
    return [x, (rand(*shape[:2], 2, seed=2) * 0.5 + 1).to(device, pairs or dtype), extra]


def seeds_of(batch, device):
    return torch.arange(batch, dtype=torch.int32, device=device) * 77 - 5


def check(device, shape, groups, dtype=F64, pairs=None, dropout=0.0, layout="c", out=None):
    values = arguments(shape, dtype, pairs, layout, device)
    seeds = seeds_of(shape[0], device) if dropout else None

    def op(x, modulation, extra):
        return kernels.norm_modulate_act(
            x, groups, modulation, extra, dropout=dropout, seeds=seeds, dtype=out
        )

    def reference(x, modulation, extra):
        return norm_modulate_act_reference(x, groups, modulation, extra, 1e-5, dropout, seeds)

    (y,), grads = run(op, values)
    (want,), want_grads = run(reference, to_float64(values), [y.dtype])
    close(y, want, out or dtype, 4)
    assert layouts.is_channels_last(y) == layouts.is_channels_last(values[0])
    pixels = shape[2] * shape[3]
    # Gradients of x go through the sums of a group; those of the modulation are sums over pixels.
    for grad, wanted, value, length in zip(grads, want_grads, values, (16, pixels, 4), strict=True):
        close(grad, wanted, value.dtype, 4 * length)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layout", ["c", "l"])
def test_shapes(place, monkeypatch, split, layout):
    if split:
        split_groups(monkeypatch)
    check(place, (2, 6, 4, 5), 3, layout=layout)
    check(place, (1, 8, 5, 7), 2, dropout=0.3, layout=layout)
    check(place, (0, 4, 3, 3), 2, layout=layout)


@pytest.mark.parametrize(
    ("dtype", "pairs", "out"), [(F32, F32, BF16), (BF16, F32, None), (F16, F16, F32), (F32, BF16, None)]
)
def test_dtypes(place, dtype, pairs, out):
    check(place, (2, 8, 6, 6), 4, dtype=dtype, pairs=pairs, out=out, dropout=0.25)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_are_those_of_tables_with_a_row_per_sample(place, monkeypatch, split, dtype):
    if split:
        split_groups(monkeypatch)
    x, modulation, extra = arguments((3, 8, 5, 5), dtype, device=place)
    seeds, samples = seeds_of(3, place), torch.arange(3, device=place)

    def by_table(x, gamma, beta, extra):
        return kernels.norm_film_act(x, 4, gamma, beta, samples, extra, dropout=0.3, seeds=seeds)

    def by_sample(x, modulation, extra):
        return kernels.norm_modulate_act(x, 4, modulation, extra, dropout=0.3, seeds=seeds)

    gamma, beta = modulation.unbind(2)
    want, (d_x, d_gamma, d_beta, d_extra) = run(by_table, (x, gamma, beta, extra))
    got, grads = run(by_sample, (x, modulation, extra))
    assert same_bits(got, want)
    assert same_bits(grads, (d_x, torch.stack((d_gamma, d_beta), dim=2), d_extra))
    assert grads[1].is_contiguous()


def test_a_slice_of_columns_is_not_copied(device):
    """Norms of several layers share one matrix, of which each takes some columns."""
    x = rand(3, 8, 5, 5, dtype=F32, device=device).requires_grad_()
    columns = rand(3, 100, dtype=F32, seed=1, device=device).requires_grad_()
    with launching.recording() as launches:
        y = kernels.norm_modulate_act(x, 4, columns[:, 30:46].unflatten(1, (8, 2)))
        torch.autograd.grad(y, (x, columns), torch.ones_like(y))
    assert [launch.kernel for launch in launches] == ["_group_fwd_kernel", "_group_bwd_kernel"]
    for launch in launches:
        assert launch.arguments["sample_stride"] == 100
        assert launch.arguments["gamma_ptr"].data_ptr() == columns[:, 30:].data_ptr()
        assert launch.arguments["beta_ptr"].data_ptr() == columns[:, 31:].data_ptr()


@pytest.mark.parametrize("split", [False, True])
def test_views_have_the_results_of_copies(place, monkeypatch, split):
    if split:
        split_groups(monkeypatch)
    x, columns = rand(3, 8, 5, 5, device=place), rand(3, 40, seed=1, device=place)
    shared, swapped = rand(1, 8, 2, seed=2, device=place), rand(2, 8, 3, seed=3, device=place)
    views = columns[:, 7:23].unflatten(1, (8, 2)), shared.expand(3, -1, -1), swapped.permute(2, 1, 0)
    for view in views:
        got, grads = run(lambda x, v: kernels.norm_modulate_act(x, 2, v), (x, view))
        want, wanted = run(lambda x, v: kernels.norm_modulate_act(x, 2, v), (x, view.contiguous()))
        assert same_bits((*got, *grads), (*want, *wanted))
    leaf = shared.clone().requires_grad_()
    y = kernels.norm_modulate_act(x, 2, leaf.expand(3, -1, -1))
    want = norm_modulate_act_reference(x, 2, leaf.expand(3, -1, -1), None, 1e-5)
    (got,), (wanted,) = (torch.autograd.grad(result.sum(), leaf) for result in (y, want))
    assert torch.allclose(got, wanted, atol=1e-10)


def test_a_sample_has_its_bits_in_every_batch(device):
    values = arguments((3, 8, 6, 6), F32, device=device)
    y = kernels.norm_modulate_act(values[0], 4, *values[1:])
    for i in range(3):
        alone = kernels.norm_modulate_act(values[0][i : i + 1], 4, *(v[i : i + 1] for v in values[1:]))
        assert torch.equal(alone[0], y[i])


@pytest.mark.parametrize("split", [False, True])
def test_gradcheck(place, monkeypatch, split):
    if split:
        split_groups(monkeypatch)
    values = arguments((1, 4, 2, 3), device=place)
    seeds = seeds_of(1, place)

    def op(x, modulation, extra):
        return kernels.norm_modulate_act(x, 2, modulation, extra, dropout=0.4, seeds=seeds)

    # A random direction: every element costs interpreted launches.
    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values], fast_mode=True)


def test_no_launch_sums_over_samples(device):
    cases = (((2, 16, 46, 46), 8, 1, 1), ((1, 128, 23, 23), 8, 1, 3), ((1, 16, 184, 184), 8, 3, 3))
    for shape, groups, forward, backward in cases:
        values = [v.requires_grad_() for v in arguments(shape, F32, device=device)[:2]]
        with launching.recording() as launches:
            y = kernels.norm_modulate_act(values[0], groups, values[1])
            assert len(launches) == forward
            torch.autograd.grad(y, values, torch.ones_like(y))
            assert len(launches) == forward + backward


def test_without_autograd_and_without_seeds(place):
    x, modulation, _ = arguments((2, 8, 6, 6), F32, device=place)
    plain = kernels.norm_modulate_act(x, 4, modulation)
    assert torch.equal(plain, kernels.norm_modulate_act(x.clone().requires_grad_(), 4, modulation))
    torch.manual_seed(1)
    first = kernels.norm_modulate_act(x, 4, modulation, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, kernels.norm_modulate_act(x, 4, modulation, dropout=0.5))
    assert 0.3 < float((first == 0).float().mean()) < 0.7


def test_a_second_derivative_is_an_error_or_right():
    x, modulation, _ = (v.requires_grad_() for v in arguments((1, 4, 2, 2)))
    y = kernels.norm_modulate_act(x, 2, modulation)
    with pytest.raises(RuntimeError, match="norm_modulate_act has one derivative"):
        torch.autograd.grad((y**2).sum(), x, create_graph=True)
    kernels.set_backend("reference")
    try:
        assert torch.autograd.gradgradcheck(
            lambda *v: kernels.norm_modulate_act(v[0], 2, v[1]), (x, modulation)
        )
    finally:
        kernels.set_backend("auto")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 3}, "groups must divide the 4 channels of x, got 3"),
        ({"modulation": torch.ones(2, 4)}, r"modulation must be \(2, 4, 2\), got \(2, 4\)"),
        ({"modulation": torch.ones(3, 4, 2)}, r"modulation must be \(2, 4, 2\), got \(3, 4, 2\)"),
        ({"modulation": torch.ones(2, 4, 2, dtype=torch.int32)}, "modulation must be float16, bfloat16"),
        ({"modulation": torch.ones(2, 4, 2, device="meta")}, "modulation must be on the device of x"),
        ({"residual": torch.zeros(2, 4, 3, 2)}, "residual must have the shape of x"),
        ({"x": torch.zeros(4, 3, 3)}, "x must be"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": 0.5, "seeds": torch.zeros(2)}, r"seeds must be \(2,\) int32"),
        ({"dtype": torch.int8}, "dtype must be float16"),
    ],
)
def test_refuses_before_any_launch(change, words, device):
    good = {"x": torch.zeros(2, 4, 3, 3), "groups": 2, "modulation": torch.ones(2, 4, 2)}
    with launching.recording() as launches, pytest.raises(ValueError, match=words):
        kernels.norm_modulate_act(**{**good, **change})
    assert not launches
