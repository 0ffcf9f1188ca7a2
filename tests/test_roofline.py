from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# By its path: only `python -m pytest` in the repository's root has `bench` on the import path.
_SPEC = importlib.util.spec_from_file_location("fastflow_roofline", Path(__file__).parents[1] / "bench" / "roofline.py")
roofline = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = roofline
_SPEC.loader.exec_module(roofline)

F32 = 4
# A mix of several channels is a launch of its own, so the half-step before it passes over memory twice: beside 5 tensors of
# float32 (x, raw scale, shift in; y, next input out) the coupling's result is written and read, 7/5; with half the bytes in
# the conditioner's tensors 5.5/3.5. This misses the target for `needed`, and is what these kernels can reach.
TWO_LAUNCHES = {"float32": 7 / 5, "bfloat16": 5.5 / 3.5}


@pytest.fixture(scope="module")
def rows():
    return roofline.rows(2)


def half_steps(rows):
    return [row for row in rows if row.half_step]


def mixes_apart(row):
    return row.name == "half-step +mix" and not row.shape.startswith("1x")


def counted(work):
    with roofline.Counter() as counter:
        work()
    return counter.bytes, counter.launches


def test_sum_reads_both_inputs_and_writes_one_output():
    a, b = torch.ones(10), torch.ones(10)
    assert counted(lambda: a + b) == (30 * F32, 1)


def test_one_input_given_twice_is_read_once():
    a = torch.ones(10)
    assert counted(lambda: a * a) == (20 * F32, 1)


def test_views_and_allocations_cost_nothing():
    a = torch.ones(4, 6)
    assert counted(lambda: (a.view(24), a.t(), a[1:, ::2], a.expand(3, 4, 6), a.unbind(), a.detach(), a.chunk(2))) == (0, 0)
    assert counted(lambda: (torch.empty(9), torch.empty_like(a), a.new_empty(3), torch.empty(0), a.contiguous())) == (0, 0)
    assert counted(lambda: torch.ops.aten._unsafe_view(a, [24])) == (0, 0)


def test_zero_sized_work_is_no_launch():
    a = torch.ones(0, 3)
    assert counted(lambda: a + a) == (0, 0)


def test_in_place_reads_and_writes():
    a, b = torch.ones(10), torch.ones(10)
    assert counted(lambda: a.add_(b)) == (30 * F32, 1)
    assert counted(lambda: a.mul_(2.0)) == (20 * F32, 1)


def test_overwriting_only_writes():
    a, b = torch.ones(10), torch.ones(10)
    assert counted(lambda: a.copy_(b)) == (20 * F32, 1)
    assert counted(lambda: a.zero_()) == (10 * F32, 1)
    assert counted(lambda: torch.add(a, b, out=a)) == (30 * F32, 1)


def test_expanded_input_counts_what_memory_holds():
    a, row = torch.ones(8, 10), torch.ones(10)
    assert counted(lambda: a + row) == ((80 + 10 + 80) * F32, 1)
    assert counted(lambda: a + row.expand(8, 10)) == ((80 + 10 + 80) * F32, 1)
    assert counted(lambda: row.expand(8, 10).contiguous()) == ((10 + 80) * F32, 1)


def test_slice_counts_its_own_elements():
    a = torch.ones(8, 10)
    assert counted(lambda: a[:, :3] + 1) == (48 * F32, 1)
    assert counted(lambda: a[:4] + a[4:]) == ((40 + 40 + 40) * F32, 1)


def test_overlapping_views_count_no_more_than_their_storage():
    a = torch.ones(10)
    assert roofline.touched_bytes([a[:8], a[2:]]) == 10 * F32
    assert roofline.touched_bytes([a, a.view(2, 5)]) == 10 * F32


def test_dtypes_have_their_size():
    a = torch.ones(10)
    assert counted(lambda: a.bfloat16()) == (10 * (4 + 2), 1)
    assert counted(lambda: a > 0) == (10 * (4 + 1), 1)


def test_backward_is_counted():
    a = torch.ones(10, requires_grad=True)
    y = a.exp()
    assert counted(lambda: torch.autograd.grad(y, a, torch.ones(10))) == (30 * F32 + 10 * F32, 2)  # the ones, and their product


def test_half_step_by_hand(rows):
    row = next(r for r in rows if (r.name, r.shape, r.dtype, r.passes) == ("half-step", "4x92x92", "float32", "forward"))
    n = 4 * 92 * 92
    chunks = -(-n // 2048)
    assert row.needed == 2 * 5 * n * 4 + 2 * n + 2 * 4  # x, r, t, y, next input; two masks; the log-determinant
    assert row.moved == row.needed + 2 * 2 * chunks * 4  # partial sums, written and read
    assert row.launches == 2


def test_counts_of_fake_tensors_are_those_of_real_ones(rows):
    works = [*roofline.op_works((4, 92, 92), 2), *roofline.half_steps((1, 184, 184), 2), *roofline.half_steps((16, 23, 23), 2)]
    table = {(row.name, row.shape, row.passes): row for row in rows if row.dtype == "float32"}
    for work in works:
        for backward in (False, True):
            row = roofline.count(work, backward)
            other = table[row.name, row.shape, row.passes]
            assert row[5:] == other[5:], row


@pytest.mark.parametrize("shape", [(1, 6, 6), (4, 6, 6)])
def test_public_ops_compute_what_the_composites_do(shape):
    torch.manual_seed(0)
    works = roofline.half_steps(shape, 3)
    works += roofline.op_works(shape, 3) if shape[0] == 4 else []
    for work in works:
        outputs, expected = work.public(*work.inputs), work.composite(*work.inputs)
        grads = [torch.randn_like(output) for output in expected]
        torch.testing.assert_close(tuple(outputs), tuple(expected), msg=work.name)
        found, wanted = (torch.autograd.grad(o, work.leaves, grads) for o in (outputs, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=work.name)


def test_every_paper_shape_has_its_rows(rows):
    found = half_steps(rows)
    assert len(found) == 7 * 2 * 2 * 2
    assert {row.shape for row in found} == {"x".join(map(str, shape)) for shape in roofline.PAPER_SHAPES.values()}


def test_moved_is_never_below_needed(rows):
    assert all(row.moved >= row.needed for row in rows)


def test_half_steps_move_at_most_a_third_of_the_composite(rows):
    for row in half_steps(rows):
        assert row.over_composite <= roofline.MAX_OVER_COMPOSITE, row


def test_half_steps_move_little_more_than_needed(rows):
    for row in half_steps(rows):
        if not mixes_apart(row):
            assert row.over_needed <= roofline.MAX_OVER_NEEDED, row


def test_a_mix_of_several_channels_costs_one_more_pass(rows):
    """These rows miss the target; they reach what two launches can."""
    for row in half_steps(rows):
        if mixes_apart(row):
            assert roofline.MAX_OVER_NEEDED < row.over_needed <= 1.01 * TWO_LAUNCHES[row.dtype], row
            assert row.misses()


def test_single_ops_move_little_more_than_needed(rows):
    for row in rows:
        if not row.half_step:
            assert row.over_needed <= roofline.MAX_OVER_NEEDED, row


def test_counting_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    roofline.fused_cost(lambda: None)
    assert "TRITON_INTERPRET" not in os.environ


def test_command_prints_counts_and_writes_csv(monkeypatch, capsys, tmp_path, rows):
    monkeypatch.setattr(roofline, "rows", lambda batch: rows)
    monkeypatch.setattr(sys, "argv", ["roofline", "--batch", "2", "--csv", str(tmp_path / "rows.csv")])
    roofline.main()
    printed = capsys.readouterr().out
    assert "counted at batch 2" in printed and "bound" in printed and "measured" not in printed
    assert "rows meet both; these miss:" in printed
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == len(rows) + 1 and lines[0].startswith("name,steps,shape")
