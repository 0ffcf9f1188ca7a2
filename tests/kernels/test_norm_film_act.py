"""Kernels of GroupNorm, FiLM, GELU and dropout against float64 references; on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, to_float64
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels import layouts
from fastflow.kernels.dropout import drop_threshold, dropout_mask, keep_scale
from fastflow.kernels.norm_film_act import norm_film_act_reference
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import norm_parts

FORMATS = {"c": torch.contiguous_format, "l": torch.channels_last}


def split_groups(monkeypatch):
    """Let every group be larger than a block."""
    monkeypatch.setattr(norm_parts, "MAX_GROUP_ELEMENTS", 0)
    monkeypatch.setattr(norm_parts, "MAX_PLAIN_GROUP_ELEMENTS", 0)


def arguments(shape, classes=3, dtype=F64, table=None, residual=False, layout="c", device="cpu"):
    x, extra = (
        rand(*shape, dtype=dtype, seed=i, device=device).contiguous(memory_format=FORMATS[layout])
        for i in (0, 1)
    )
    tables = [(rand(classes, shape[1], seed=i) * 0.5 + 1).to(device, table or dtype) for i in (2, 3)]
    label_index = torch.arange(shape[0], device=device) * 2 % classes
    return [x, *tables, *([extra] if residual else [])], label_index


def check(
    device, shape, groups, dtype=F64, table=None, residual=False, dropout=0.0, layout="c", out=None, shift=0.0
):
    values, label_index = arguments(
        shape, dtype=dtype, table=table, residual=residual, layout=layout, device=device
    )
    values[0] = values[0] + shift
    seeds = torch.arange(shape[0], dtype=torch.int32, device=device) * 77 - 5 if dropout else None

    def op(x, gamma, beta, extra=None):
        return kernels.norm_film_act(
            x, groups, gamma, beta, label_index, extra, dropout=dropout, seeds=seeds, dtype=out
        )

    def reference(x, gamma, beta, extra=None):
        return norm_film_act_reference(x, groups, gamma, beta, label_index, extra, 1e-5, dropout, seeds)

    (y,), grads = run(op, values)
    (want,), want_grads = run(reference, to_float64(values), [y.dtype])
    close(y, want, out or dtype, 4)
    assert layouts.is_channels_last(y) == layouts.is_channels_last(values[0])
    samples = shape[0] * shape[2] * shape[3]
    # Gradients of x go through the sums of a group; those of the tables are sums over samples and pixels.
    # A group of one element leaves rounding alone, times 1 / sqrt(eps).
    alone = shape[1] // groups * shape[2] * shape[3] == 1
    for grad, wanted, value, length in zip(
        grads, want_grads, values, (16e5 if alone else 16, samples, samples, 4), strict=False
    ):
        close(grad, wanted, value.dtype, 4 * length)


SHAPES = [
    ((1, 1, 1, 1), 1),
    ((0, 4, 3, 3), 2),
    ((2, 6, 5, 7), 2),
    ((2, 12, 5, 7), 3),
    ((2, 8, 1, 1), 8),
    ((1, 256, 3, 3), 8),
    ((2, 16, 23, 23), 8),
    ((1, 4, 46, 46), 2),
    ((1, 1, 92, 184), 1),
    ((1, 64, 23, 23), 1),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_shapes(device, shape, groups):
    check(device, shape, groups)
    check(device, shape, groups, residual=True, layout="l")
    check(device, shape, groups, dtype=F32, residual=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_small_groups_and_split_groups_agree(device, monkeypatch, split, layout, groups):
    if split:
        split_groups(monkeypatch)
        monkeypatch.setattr(norm_parts, "SPLIT_ELEMENTS", 32)
    monkeypatch.setattr(norm_parts, "PACKED_ELEMENTS", 256)
    # Float64 takes half of a tile's elements; the last of two chunks is not full.
    for residual in (groups != 3,) if split else (False, True):
        check(device, (2, 6, 4, 5), groups, residual=residual, dropout=0.3, layout=layout)


def test_more_chunks_than_a_join_takes_at_once(device, monkeypatch):
    split_groups(monkeypatch)
    monkeypatch.setattr(norm_parts, "SPLIT_ELEMENTS", 32)
    check(device, (1, 2, 17, 19), 1, residual=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("dtype", "table", "out"),
    [(F32, F32, BF16), (BF16, F32, None), (BF16, BF16, F32), (F16, F32, None), (F64, F64, F32)],
)
def test_dtypes(device, monkeypatch, split, dtype, table, out):
    if split:
        split_groups(monkeypatch)
    check(device, (2, 8, 12, 12), 4, dtype=dtype, table=table, out=out, residual=True, dropout=0.25)


def test_a_view_of_a_larger_batch(device):
    whole = rand(2, 12, 6, 6, device=device)
    (_, gamma, beta), label_index = arguments((2, 6, 6, 6), device=device)
    got = kernels.norm_film_act(whole[:, 6:], 3, gamma, beta, label_index, whole[:, :6])
    want = norm_film_act_reference(whole[:, 6:], 3, gamma, beta, label_index, whole[:, :6], 1e-5)
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("groups", [8, 1])
@pytest.mark.parametrize("layout", ["c", "l"])
def test_variance_survives_a_large_mean(place, monkeypatch, groups, layout):
    """Squares of 1000 have no digits left for a deviation of 1 in float32."""
    for split in (False, True):
        if split:
            split_groups(monkeypatch)
        (x, gamma, beta), label_index = arguments((2, 8, 16, 16), dtype=F32, layout=layout, device=place)
        x = x + 1000
        got = kernels.norm_film_act(x, groups, gamma, beta, label_index)
        want = norm_film_act_reference(
            x.double(), groups, gamma.double(), beta.double(), label_index, None, 1e-5
        )
        assert float((got - want).abs().max()) < 2e-3


def test_one_element_groups_normalise_to_zero(place):
    x = rand(1, 3, 1, 1, device=place)
    gamma, beta = (torch.full((1, 3), value, dtype=F64, device=place) for value in (1.0, 2.0))
    got = kernels.norm_film_act(x, 3, gamma, beta, torch.tensor([0], device=place))
    assert torch.allclose(got, F.gelu(torch.full_like(x, 2.0)))


@pytest.mark.parametrize(("split", "dropout"), [(False, 0.0), (False, 0.4), (True, 0.4)])
def test_gradcheck(device, monkeypatch, split, dropout):
    if split:
        split_groups(monkeypatch)
        monkeypatch.setattr(norm_parts, "SPLIT_ELEMENTS", 16)
    values, label_index = arguments((1, 4, 2, 3), classes=2, residual=True, device=device)
    seeds = torch.tensor([3], dtype=torch.int32, device=device)

    def op(x, gamma, beta, extra):
        return kernels.norm_film_act(x, 2, gamma, beta, label_index, extra, dropout=dropout, seeds=seeds)

    # A random direction: every element costs four interpreted launches.
    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values], fast_mode=True)


def test_results_repeat_and_do_not_depend_on_the_batch(device, monkeypatch):
    for shape, groups in (((3, 8, 12, 12), 4), ((3, 2, 23, 23), 1)):
        if groups == 1:
            split_groups(monkeypatch)
            monkeypatch.setattr(norm_parts, "SPLIT_ELEMENTS", 256)
        values, label_index = arguments(shape, dtype=F32, residual=True, device=device)
        seeds = torch.arange(3, dtype=torch.int32, device=device)

        def op(x, gamma, beta, extra, label_index=label_index, seeds=seeds, groups=groups):
            return kernels.norm_film_act(x, groups, gamma, beta, label_index, extra, dropout=0.3, seeds=seeds)

        (y,), grads = run(op, values)
        (again,), grads_again = run(op, values)
        assert torch.equal(y, again) and all(
            torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True)
        )
        for i in range(3):
            one = slice(i, i + 1)
            alone = op(
                values[0][one], *values[1:3], values[3][one], label_index=label_index[one], seeds=seeds[one]
            )
            assert torch.equal(alone[0], y[i])


def test_unused_rows_of_the_tables_get_no_gradient(device):
    values, _ = arguments((2, 4, 3, 3), classes=5, device=device)
    label_index = torch.tensor([3, 3], device=device)
    _, grads = run(lambda x, g, b: kernels.norm_film_act(x, 2, g, b, label_index), values)
    for grad in grads[1:]:
        assert (grad[[0, 1, 2, 4]] == 0).all() and (grad[3] != 0).all()


# -- dropout -------------------------------------------------------------------------------------------------


def test_dropout_is_replayed_by_its_seeds_and_drawn_afresh_without(device):
    (x, gamma, beta), label_index = arguments((2, 8, 12, 12), dtype=F32, device=device)
    seeds = torch.tensor([1, 2], dtype=torch.int32, device=device)

    def op(seeds):
        return kernels.norm_film_act(x, 4, gamma, beta, label_index, dropout=0.5, seeds=seeds)

    assert torch.equal(op(seeds), op(seeds)) and not torch.equal(op(None), op(None))
    torch.manual_seed(1)
    first = op(None)
    torch.manual_seed(1)
    assert torch.equal(first, op(None))
    plain = kernels.norm_film_act(x, 4, gamma, beta, label_index)
    kept = dropout_mask(seeds, x.shape[1:], drop_threshold(0.5))
    assert torch.allclose(
        op(seeds), torch.where(kept, plain * keep_scale(drop_threshold(0.5)), 0.0), atol=1e-6
    )
    assert torch.equal(kernels.norm_film_act(x, 4, gamma, beta, label_index, dropout=0.0, seeds=seeds), plain)


# -- what is launched, what is refused -----------------------------------------------------------------------


def test_a_small_group_is_one_launch_and_a_large_one_three(device):
    cases = (((2, 16, 46, 46), 8, 1, 2), ((1, 128, 23, 23), 8, 1, 4), ((1, 16, 184, 184), 8, 3, 4))
    for shape, groups, forward, backward in cases:
        values, label_index = arguments(shape, dtype=F32, device=device)
        values = [v.requires_grad_() for v in values]
        with launching.recording() as launches:
            y = kernels.norm_film_act(values[0], groups, *values[1:], label_index)
            assert len(launches) == forward
            torch.autograd.grad(y, values, torch.ones_like(y))
            assert len(launches) == forward + backward


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 3}, "groups must divide the 4 channels of x, got 3"),
        ({"groups": 0}, "groups must divide"),
        ({"gamma": torch.ones(2, 5)}, r"gamma and beta must be \(K, 4\), got \(2, 5\)"),
        ({"beta": torch.ones(3, 4)}, r"gamma and beta must be \(K, 4\)"),
        (
            {"gamma": torch.ones(2, 4, dtype=torch.int32)},
            "gamma must be float16, bfloat16, float32 or float64, got torch.int32",
        ),
        ({"beta": torch.ones(2, 4, device="meta")}, "beta must be on the device of x"),
        ({"label_index": torch.zeros(3, dtype=torch.int64)}, r"label_index must be \(2,\) int64, got \(3,\)"),
        ({"label_index": torch.zeros(2)}, r"label_index must be \(2,\) int64, got \(2,\) torch.float32"),
        ({"label_index": torch.tensor([0, 2])}, "label_index must lie from 0 to 1, .* tables, got 2"),
        ({"label_index": torch.tensor([-1, 0])}, "label_index must lie from 0 to 1, .* tables, got -1"),
        ({"residual": torch.zeros(2, 4, 3, 2)}, "residual must have the shape of x"),
        ({"x": torch.zeros(4, 3, 3)}, "x must be"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": 0.5, "seeds": torch.zeros(2)}, r"seeds must be \(2,\) int32"),
        ({"dtype": torch.int8}, "dtype must be float16"),
    ],
)
def test_refuses_before_any_launch(change, words, device):
    good = {"x": torch.zeros(2, 4, 3, 3), "groups": 2, "gamma": torch.ones(2, 4), "beta": torch.ones(2, 4)}
    with launching.recording() as launches, pytest.raises(ValueError, match=words):
        kernels.norm_film_act(**{**good, "label_index": torch.zeros(2, dtype=torch.int64), **change})
    assert not launches


def test_rows_that_are_changed_in_place_are_looked_at_again():
    x, tables, label_index = torch.zeros(2, 4, 3, 3), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    kernels.norm_film_act(x, 2, tables, tables, label_index)
    label_index += 2
    with pytest.raises(ValueError, match="got 2"):
        kernels.norm_film_act(x, 2, tables, tables, label_index)


def test_rows_and_keys_are_old_names_of_label_index_and_seeds():
    (x, gamma, beta), label_index = arguments((2, 4, 3, 3))
    seeds = torch.tensor([1, 2], dtype=torch.int32)
    want = kernels.norm_film_act(x, 2, gamma, beta, label_index=label_index, dropout=0.5, seeds=seeds)
    with pytest.warns(DeprecationWarning, match="is now called") as warned:
        got = kernels.norm_film_act(x, 2, gamma, beta, rows=label_index, dropout=0.5, keys=seeds)
    assert torch.equal(got, want) and len(warned) == 2
    with pytest.warns(DeprecationWarning, match="film_act: rows is now called label_index"):
        got = kernels.film_act(x, gamma, beta, rows=label_index)
    assert torch.equal(got, kernels.film_act(x, gamma, beta, label_index))


# -- form for CPUs, film_act


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_cpu_form_is_groupnorm_film_gelu(layout, residual):
    """With GroupNorm's own weight and bias folded into the tables, as models do."""
    for shape, groups in (((1, 8, 5, 7), 4), ((3, 8, 3, 5), 8), ((3, 6, 4, 4), 1), ((3, 8, 1, 1), 4)):
        values, label_index = arguments(shape, residual=residual, layout=layout)
        weight, bias = rand(shape[1], seed=8), rand(shape[1], seed=9)

        def op(x, gamma, beta, extra=None, label_index=label_index, weight=weight, bias=bias, groups=groups):
            return kernels.norm_film_act(x, groups, gamma * weight, gamma * bias + beta, label_index, extra)

        def modules(
            x, gamma, beta, extra=None, label_index=label_index, weight=weight, bias=bias, groups=groups
        ):
            z = F.group_norm(x, groups, weight, bias)
            z = gamma[label_index][:, :, None, None] * z + beta[label_index][:, :, None, None]
            return F.gelu(z if extra is None else z + extra)

        (got,), grads = run(op, values)
        (want,), wanted = run(modules, values)
        for a, b in zip((got, *grads), (want, *wanted), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    for batch in (1, 3):
        for dtype in (F32, BF16):
            check(
                "cpu",
                (batch, 6, 5, 7),
                3,
                dtype=dtype,
                table=F32,
                residual=residual,
                dropout=0.3,
                layout=layout,
            )


@pytest.mark.parametrize("op", ["norm_film_act", "film_act"])
def test_gradcheck_on_a_cpu(op):
    values, label_index = arguments((3, 4, 3, 3), classes=2, residual=True)
    sizes = (2,) if op == "norm_film_act" else ()

    def function(x, gamma, beta, extra):
        return getattr(kernels, op)(x, *sizes, gamma, beta, label_index, extra)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in values])
