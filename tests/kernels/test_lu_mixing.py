"""`lu_mixing`: its definition, the hand-written gradient, and kernels against the float64 definition.

Kernels run on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from numerics import F32, F64, close, rand, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import FlowConfig, MagicFlow, kernels
from fastflow.kernels.lu_mixing import LuMixing, lu_mixing_reference
from fastflow.kernels.triton.launch import recording
from fastflow.kernels.triton.lu_mixing import map_places, param_places

SIZES = (1, 4, 1, 3, 16)
AFFINE = [False, False, True, False, False]


def layer(c, seed=0, dtype=F64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    square = [0.3 * rand(c, c, seed=seed + i) for i in range(2)]
    lines = [0.3 * rand(c, seed=seed + 2 + i) for i in range(3)]
    permutation = torch.randperm(c, generator=generator)
    sign = torch.randint(0, 2, (c,), generator=generator).mul(2).sub(1).to(torch.int8)
    floats = [value.to(device, dtype) for value in (*square, *lines)]
    return kernels.MixingLayer(*floats, permutation.to(device), sign.to(device), 7 * c)


def layers_of(sizes=SIZES, dtype=F64, device="cpu"):
    return [layer(c, 10 * i, dtype, device) for i, c in enumerate(sizes)]


def with_leaves(layers, dtype=None):
    """Layers whose five parameters are leaves, and these."""
    found = [
        kernels.MixingLayer(
            *(v.detach().to(dtype or v.dtype, copy=True).requires_grad_() for v in one[:5]), *one[5:]
        )
        for one in layers
    ]
    return found, [leaf for one in found for leaf in one[:5]]


def flat(maps, logdets):
    return [value for one in maps for value in one if value is not None] + [logdets]


# -- definition ----------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_dense_matrix():
    for one in layers_of():
        c = len(one.bias)
        (found,), logdets = kernels.lu_mixing([one], inverse=True)
        lower = one.lower.tril(-1) + torch.eye(c)
        upper = one.upper.triu(1) + torch.diag(one.sign * one.log_s.exp())
        weight = (lower @ upper)[one.permutation]
        assert torch.allclose(found.weight, weight * one.log_scale.exp(), atol=1e-12)
        assert torch.allclose(found.bias, weight @ one.bias, atol=1e-12)
        assert torch.allclose(found.inverse @ found.weight, torch.eye(c, dtype=F64), atol=1e-9)
        want = one.pixels * torch.linalg.slogdet(found.weight).logabsdet
        assert torch.allclose(logdets[0], want, atol=1e-9)


def test_a_map_of_one_channel_is_a_factor_and_a_constant():
    one = layer(1)
    (pair,), _ = kernels.lu_mixing([one], [True])
    (found,), _ = kernels.lu_mixing([one], inverse=True)
    (back,), _ = kernels.lu_mixing([one], [True], inverse=True)
    assert pair.weight is pair.bias is pair.inverse is None
    assert torch.equal(pair.affine, torch.cat([found.weight.view(1), found.bias]))
    assert torch.equal(back.affine, torch.cat([found.inverse.view(1), found.bias]))


def test_both_directions_have_gradients():
    layers, leaves = with_leaves(layers_of((1, 3)))

    def maps(inverse, *values):
        made = [kernels.MixingLayer(*values[5 * i : 5 * i + 5], *layers[i][5:]) for i in range(2)]
        return tuple(flat(*kernels.lu_mixing(made, [True, False], inverse)))

    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda *v, inverse=inverse: maps(inverse, *v), leaves)


def test_the_gradient_written_by_hand_is_that_of_the_definition():
    layers, leaves = with_leaves(layers_of((1, 1, 4)))

    def by_hand(*values):
        params = [[*values[5 * i : 5 * i + 5], *layers[i][5:7]] for i in range(3)]
        return LuMixing.apply([3, 5, 7], [True, False, False], *(v for one in params for v in one))

    assert torch.autograd.gradcheck(by_hand, leaves)
    with pytest.raises(RuntimeError, match="lu_mixing has one derivative"):
        torch.autograd.grad(by_hand(*leaves)[0].sum(), leaves[2], create_graph=True)


def test_layers_are_checked():
    one = layer(2)
    for arguments, words in (
        (([],), "layers must hold at least one layer"),
        (([one], [True, True]), "affine must have an entry per layer, 1 in all, got 2"),
        (([one], [True]), r"affine\[0\] must be False for a layer of 2 channels"),
        (([one._replace(bias=torch.zeros(3))],), r"layers\[0\].lower must be \(2, 2\) torch.float32"),
        (([one._replace(upper=torch.zeros(3, 3, dtype=F64))],), r"layers\[0\].upper must be \(2, 2\)"),
        (([one._replace(sign=torch.ones(2))],), r"layers\[0\].sign must be \(2,\) torch.int8 on cpu, got"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.lu_mixing(*arguments)


def test_places_do_not_overlap_and_are_aligned():
    for inverse in (False, True):
        places, size = map_places(SIZES, tuple(AFFINE), inverse)
        used = []
        for c, pair, (weight, bias, matrix) in zip(SIZES, AFFINE, places, strict=True):
            starts = [bias - 1] if pair else [weight, bias, *([matrix] if inverse else [])]
            lengths = [2] if pair else [c * c, c, c * c]
            used += list(zip(starts, lengths, strict=False))
        assert all(start % 4 == 0 for start, _ in used)
        assert all(a + n <= b for (a, n), (b, _) in zip(sorted(used), sorted(used)[1:], strict=False))
        assert max(a + n for a, n in used) <= size
    places, size = param_places(SIZES)
    assert all(start % 4 == 0 for place in places for start in place)
    assert places[-1].bias + SIZES[-1] <= size


# -- kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sizes", [SIZES, (1,), (37, 2)])
def test_kernels_are_the_definition(sizes, dtype, device):
    affine = AFFINE if sizes == SIZES else [False] * len(sizes)
    layers = layers_of(sizes, dtype, device)
    wide = [kernels.MixingLayer(*(v.double() for v in one[:5]), *one[5:]) for one in layers]
    for inverse in (False, True):
        got = flat(*kernels.lu_mixing(layers, affine, inverse))
        want = flat(*lu_mixing_reference(wide, affine, inverse))
        for a, b in zip(got[:-1], want[:-1], strict=True):
            close(a, b, dtype)
        close(got[-1], want[-1], F64)
    made, leaves = with_leaves(layers)
    exact, wide_leaves = with_leaves(layers, F64)
    got, want = flat(*kernels.lu_mixing(made, affine)), flat(*lu_mixing_reference(exact, affine, False))
    grads = [rand(*v.shape, dtype=v.dtype, seed=5 + i, device=device) for i, v in enumerate(got)]
    found = torch.autograd.grad(got, leaves, grads)
    expected = torch.autograd.grad(want, wide_leaves, [g.double() for g in grads])
    for a, b in zip(found, expected, strict=True):
        close(a, b, dtype)
        assert a.is_contiguous()


def test_results_depend_on_no_other_layer(device):
    layers = layers_of((1, 4, 3), F32, device)
    together, logdets = kernels.lu_mixing(layers)
    for one, found, logdet in zip(layers, together, logdets, strict=True):
        (alone,), single = kernels.lu_mixing([one])
        assert same_bits([alone.weight, alone.bias, single[0]], [found.weight, found.bias, logdet])


def test_what_nothing_asked_for_has_no_gradient_to_add(device):
    made, leaves = with_leaves(layers_of((1, 4), F32, device))
    exact, wide = with_leaves(layers_of((1, 4), F32, device), F64)
    for layers, parameters in ((made, leaves), (exact, wide)):
        maps, _ = (
            kernels.lu_mixing(layers) if layers is made else lu_mixing_reference(layers, [False] * 2, False)
        )
        maps[1].bias.sum().backward()
        assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in parameters)
    for a, b in zip(leaves, wide, strict=True):
        close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad, F32)


def test_many_channels_take_the_definition(device):
    layers = [layer(65, dtype=F32, device=device)]
    assert not kernels.runs_lu_mixing(layers)
    got, want = kernels.lu_mixing(layers), lu_mixing_reference(layers, [False], False)
    assert same_bits(flat(*got), flat(*want))


class Ops(TorchDispatchMode):
    """Notes the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_gradients_are_views_of_one_buffer_that_nothing_copies(device):
    made, leaves = with_leaves(layers_of(dtype=F32, device=device))
    maps, logdets = kernels.lu_mixing(made, AFFINE)
    loss = sum(value.sum() for value in flat(maps, logdets.sum()))
    with Ops() as ops:
        loss.backward()
    copies = [name for name in ops.names if "copy" in name or "clone" in name or "add" in name]
    # One copy makes the gradient of the log-determinants' sum contiguous.
    assert len(copies) <= 1 and ops.names.count("fastflow.lu_mixing_backward.default") == 1
    assert len({leaf.grad.untyped_storage().data_ptr() for leaf in leaves}) == 1


def test_a_flow_makes_one_launch_for_all_steps(device):
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(2, squeeze_before=(2, 4))).to(device)
    for step in model.steps:
        step.actnorm.mark_initialized()
    every = torch.arange(2, device=device)
    with recording() as launches:
        flow = model.condition(every)
    assert [launch.kernel for launch in launches].count("_lu_fwd_kernel") == 1
    with torch.no_grad(), recording() as launches:
        back = model.condition(every, inverse=True)
    assert [launch.kernel for launch in launches].count("_lu_fwd_kernel") == 1
    # The coupling before step 1, of one channel, applies its mix.
    assert flow.steps[1].mixing is None and flow.steps[0].next_input is not None
    assert back.steps[1].mixing is None and back.steps[1].previous_input is not None
    with recording() as launches:
        model.condition(every, inverse=True)
    # The inverse takes the definition where autograd records.
    assert "_lu_fwd_kernel" not in [launch.kernel for launch in launches]


def test_one_step_by_itself_is_that_step_among_all(device):
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(2, squeeze_before=(2, 4))).double().to(device)
    for step in model.steps:
        step.actnorm.mark_initialized()
    with torch.no_grad():
        flow = model.condition(torch.arange(2, device=device))
    for one, step in zip(flow.steps, model.steps, strict=True):
        logdet = step.mixing_logdet()
        assert torch.equal(logdet, one.mixing_logdet()) and logdet.shape == ()
        grads = torch.autograd.grad(logdet, [step.actnorm.log_scale, step.conv.log_s])
        assert all((grad == step.pixels).all() for grad in grads)
        if one.mixing is not None:
            assert same_bits(step.mixing(torch.float64), one.mixing)
    # Another dtype than that of the parameters takes the definition.
    narrow = model.steps[2].mixing(torch.float32)
    assert torch.allclose(narrow.weight.double(), flow.steps[2].mixing.weight, atol=1e-6)
