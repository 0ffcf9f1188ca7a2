"""Kernels of GroupNorm, FiLM, GELU and dropout against float64 references; on a GPU or in the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, wide
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels import _launch, _library
from fastflow.kernels.norm_film_act import drop_threshold, dropout_mask, keep_scale, norm_film_act_reference

module = importlib.import_module("fastflow.kernels.norm_film_act")
FORMATS = {"c": torch.contiguous_format, "l": torch.channels_last}


def split_groups(monkeypatch):
    """Let every group be larger than a block."""
    monkeypatch.setattr(module, "GROUP_ELEMENTS", 0)
    monkeypatch.setattr(module, "PLAIN_GROUP_ELEMENTS", 0)


def arguments(shape, classes=3, dtype=F64, table=None, residual=False, layout="c", device="cpu"):
    x, extra = (rand(*shape, dtype=dtype, seed=i, device=device).contiguous(memory_format=FORMATS[layout]) for i in (0, 1))
    tables = [(rand(classes, shape[1], seed=i) * 0.5 + 1).to(device, table or dtype) for i in (2, 3)]
    rows = torch.arange(shape[0], device=device) * 2 % classes
    return [x, *tables, *([extra] if residual else [])], rows


def check(device, shape, groups, dtype=F64, table=None, residual=False, dropout=0.0, layout="c", out=None, shift=0.0):
    values, rows = arguments(shape, dtype=dtype, table=table, residual=residual, layout=layout, device=device)
    values[0] = values[0] + shift
    keys = torch.arange(shape[0], dtype=torch.int32, device=device) * 77 - 5 if dropout else None

    def op(x, gamma, beta, extra=None):
        return kernels.norm_film_act(x, groups, gamma, beta, rows, extra, dropout=dropout, keys=keys, dtype=out)

    def reference(x, gamma, beta, extra=None):
        return norm_film_act_reference(x, groups, gamma, beta, rows, extra, 1e-5, dropout, keys)

    (y,), grads = run(op, values)
    (want,), want_grads = run(reference, wide(values), [y.dtype])
    close(y, want, out or dtype, 4)
    assert _library.is_channels_last(y) == _library.is_channels_last(values[0])
    samples = shape[0] * shape[2] * shape[3]
    # Gradients of x go through the sums of a group; those of the tables are sums over samples and pixels.
    # What is left of a group of one element is rounding, times 1 / sqrt(eps).
    alone = shape[1] // groups * shape[2] * shape[3] == 1
    for grad, wanted, value, length in zip(grads, want_grads, values, (16e5 if alone else 16, samples, samples, 4), strict=False):
        close(grad, wanted, value.dtype, 4 * length)


SHAPES = [
    ((1, 1, 1, 1), 1),
    ((0, 4, 3, 3), 2),
    ((2, 6, 5, 7), 2),
    ((2, 12, 5, 7), 3),
    ((2, 8, 1, 1), 8),
    ((1, 256, 3, 3), 8),
    ((2, 16, 23, 23), 8),
    ((1, 16, 46, 46), 8),
    ((1, 2, 92, 92), 1),
    ((1, 3, 184, 184), 3),
    ((1, 64, 23, 23), 1),
]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_shapes(device, shape, groups, residual):
    for layout in "cl":
        check(device, shape, groups, residual=residual, layout=layout)
    check(device, shape, groups, dtype=F32, residual=residual)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_small_groups_and_split_groups_agree(device, monkeypatch, split, layout, groups):
    if split:
        split_groups(monkeypatch)
        monkeypatch.setattr(module, "SPLIT_ELEMENTS", 32)
    monkeypatch.setattr(module, "PACKED_ELEMENTS", 256)
    for residual in (False, True):
        check(device, (2, 6, 5, 7), groups, residual=residual, dropout=0.3, layout=layout)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("dtype", "table", "out"), [(F32, F32, BF16), (BF16, F32, None), (BF16, BF16, F32), (F16, F32, None), (F64, F64, F32)]
)
def test_dtypes(device, monkeypatch, split, dtype, table, out):
    if split:
        split_groups(monkeypatch)
    check(device, (2, 8, 12, 12), 4, dtype=dtype, table=table, out=out, residual=True, dropout=0.25)


def test_a_view_of_a_larger_batch(device):
    whole = rand(2, 12, 6, 6, device=device)
    (_, gamma, beta), rows = arguments((2, 6, 6, 6), device=device)
    got = kernels.norm_film_act(whole[:, 6:], 3, gamma, beta, rows, whole[:, :6])
    want = norm_film_act_reference(whole[:, 6:], 3, gamma, beta, rows, whole[:, :6], 1e-5)
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("groups", [8, 1])
@pytest.mark.parametrize("layout", ["c", "l"])
def test_variance_survives_a_large_mean(device, monkeypatch, groups, layout):
    """Squares of 1000 have no digits left for a deviation of 1 in float32."""
    for split in (False, True):
        if split:
            split_groups(monkeypatch)
        (x, gamma, beta), rows = arguments((2, 8, 16, 16), dtype=F32, layout=layout, device=device)
        x = x + 1000
        got = kernels.norm_film_act(x, groups, gamma, beta, rows)
        want = norm_film_act_reference(x.double(), groups, gamma.double(), beta.double(), rows, None, 1e-5)
        assert float((got - want).abs().max()) < 2e-3


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(device, monkeypatch, split, dropout):
    if split:
        split_groups(monkeypatch)
        monkeypatch.setattr(module, "SPLIT_ELEMENTS", 16)
    values, rows = arguments((1, 4, 2, 3), classes=2, residual=True, device=device)
    keys = torch.tensor([3], dtype=torch.int32, device=device)

    def op(x, gamma, beta, extra):
        return kernels.norm_film_act(x, 2, gamma, beta, rows, extra, dropout=dropout, keys=keys)

    # A random direction: every element costs four interpreted launches.
    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in values], fast_mode=True)


def test_results_repeat_and_do_not_depend_on_the_batch(device):
    for shape, groups in (((3, 8, 12, 12), 4), ((3, 2, 92, 92), 1)):
        values, rows = arguments(shape, dtype=F32, residual=True, device=device)
        keys = torch.arange(3, dtype=torch.int32, device=device)

        def op(x, gamma, beta, extra, rows=rows, keys=keys, groups=groups):
            return kernels.norm_film_act(x, groups, gamma, beta, rows, extra, dropout=0.3, keys=keys)

        (y,), grads = run(op, values)
        (again,), grads_again = run(op, values)
        assert torch.equal(y, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
        for i in range(3):
            one = slice(i, i + 1)
            alone = op(values[0][one], *values[1:3], values[3][one], rows=rows[one], keys=keys[one])
            assert torch.equal(alone[0], y[i])


def test_unused_rows_of_the_tables_get_no_gradient(device):
    values, _ = arguments((2, 4, 3, 3), classes=5, device=device)
    rows = torch.tensor([3, 3], device=device)
    _, grads = run(lambda x, g, b: kernels.norm_film_act(x, 2, g, b, rows), values)
    for grad in grads[1:]:
        assert (grad[[0, 1, 2, 4]] == 0).all() and (grad[3] != 0).all()


# -- dropout --------------------------------------------------------------------------------------------------------------


def test_the_mask_is_that_of_the_written_hash():
    key, n = -123456789, 5000
    mask = dropout_mask(torch.tensor([key], dtype=torch.int32), (1, 50, 100), drop_threshold(0.3)).flatten()
    for e in (*range(20), 777, 4999):
        h = ((e * 0x9E3779B9) & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF)
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        assert bool(mask[e]) == (h >= drop_threshold(0.3))
    assert mask.numel() == n


@pytest.mark.parametrize("dropout", [0.01, 0.3, 0.5, 0.9])
def test_dropout_drops_its_share_independently(dropout):
    torch.manual_seed(0)
    mask = dropout_mask(module.dropout_keys(64, torch.device("cpu")), (4, 64, 64), drop_threshold(dropout)).double()
    kept, n = 1 - dropout, mask.numel()
    deviation = (kept * dropout) ** 0.5
    # Within 5 deviations: of the share, of products of neighbours (pixel, row, channel) and of samples.
    assert abs(float(mask.mean()) - kept) < 5 * deviation / n**0.5
    for shifted in (mask.roll(1, 3), mask.roll(1, 2), mask.roll(1, 1), mask.roll(1, 0)):
        correlation = float(((mask - kept) * (shifted - kept)).mean()) / deviation**2
        assert abs(correlation) < 5 / n**0.5


def test_dropout_is_replayed_by_its_keys_and_drawn_afresh_without(device):
    (x, gamma, beta), rows = arguments((2, 8, 12, 12), dtype=F32, device=device)
    keys = torch.tensor([1, 2], dtype=torch.int32, device=device)

    def op(keys):
        return kernels.norm_film_act(x, 4, gamma, beta, rows, dropout=0.5, keys=keys)

    assert torch.equal(op(keys), op(keys)) and not torch.equal(op(None), op(None))
    torch.manual_seed(1)
    first = op(None)
    torch.manual_seed(1)
    assert torch.equal(first, op(None))
    plain = kernels.norm_film_act(x, 4, gamma, beta, rows)
    kept = dropout_mask(keys, x.shape[1:], drop_threshold(0.5))
    assert torch.allclose(op(keys), torch.where(kept, plain * keep_scale(drop_threshold(0.5)), 0.0), atol=1e-6)
    assert torch.equal(kernels.norm_film_act(x, 4, gamma, beta, rows, dropout=0.0, keys=keys), plain)


# -- what is launched, what is refused ------------------------------------------------------------------------------------


def test_a_small_group_is_one_launch_and_a_large_one_three(device):
    cases = (((2, 16, 46, 46), 8, 1, 2), ((1, 128, 23, 23), 8, 1, 4), ((1, 16, 184, 184), 8, 3, 4))
    for shape, groups, forward, backward in cases:
        values, rows = arguments(shape, dtype=F32, device=device)
        values = [v.requires_grad_() for v in values]
        with _launch.recording() as launches:
            y = kernels.norm_film_act(values[0], groups, *values[1:], rows)
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
        ({"gamma": torch.ones(2, 4, dtype=torch.int32)}, "gamma must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({"beta": torch.ones(2, 4, device="meta")}, "beta must be on the device of x"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows must be \(2,\) int64, got \(3,\)"),
        ({"rows": torch.zeros(2)}, r"rows must be \(2,\) int64, got \(2,\) torch.float32"),
        ({"rows": torch.tensor([0, 2])}, "rows must lie from 0 to 1, the rows of the tables, got 2"),
        ({"rows": torch.tensor([-1, 0])}, "rows must lie from 0 to 1, the rows of the tables, got -1"),
        ({"residual": torch.zeros(2, 4, 3, 2)}, "residual must have the shape of x"),
        ({"x": torch.zeros(4, 3, 3)}, "x must be"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": 0.5, "keys": torch.zeros(2)}, r"keys must be \(2,\) int32"),
        ({"dtype": torch.int8}, "dtype must be float16"),
    ],
)
def test_refuses_before_any_launch(change, words, device):
    good = {"x": torch.zeros(2, 4, 3, 3), "groups": 2, "gamma": torch.ones(2, 4), "beta": torch.ones(2, 4)}
    with _launch.recording() as launches, pytest.raises(ValueError, match=words):
        kernels.norm_film_act(**{**good, "rows": torch.zeros(2, dtype=torch.int64), **change})
    assert not launches


def test_rows_that_are_changed_in_place_are_looked_at_again():
    x, tables, rows = torch.zeros(2, 4, 3, 3), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    kernels.norm_film_act(x, 2, tables, tables, rows)
    rows += 2
    with pytest.raises(ValueError, match="got 2"):
        kernels.norm_film_act(x, 2, tables, tables, rows)


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_cpu_form_is_groupnorm_film_gelu(layout, batch, residual):
    values, rows = arguments((batch, 8, 5, 7), residual=residual, layout=layout)

    def modules(x, gamma, beta, extra=None):
        z = gamma[rows][:, :, None, None] * F.group_norm(x, 4) + beta[rows][:, :, None, None]
        return F.gelu(z if extra is None else z + extra)

    (got,), grads = run(lambda x, g, b, r=None: kernels.norm_film_act(x, 4, g, b, rows, r), values)
    (want,), wanted = run(modules, values)
    for a, b in zip((got, *grads), (want, *wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    check("cpu", (batch, 6, 5, 7), 3, dtype=F32, residual=residual, dropout=0.3, layout=layout)
    check("cpu", (batch, 6, 5, 7), 3, dtype=BF16, table=F32, residual=residual, dropout=0.3, layout=layout)
