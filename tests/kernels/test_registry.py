"""The registry of ops: schemas, fakes, definitions, backends, what is imported when, compile and export."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import build, images, labels
from short_model import short_config
from torch._dynamo.backends.common import aot_autograd

from fastflow import kernels
from fastflow.kernels import registry

OPS = torch.ops.fastflow


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(op):
    return str(op).rpartition(".")[2]


def images_of():
    """An image batch in both layouts."""
    x = rand(2, 3, 4, 6)
    return x, x.contiguous(memory_format=torch.channels_last)


def cases():
    x, raw, shift = (rand(2, 3, 4, 6, seed=i) for i in range(3))
    mask = torch.rand(3, 4, 6) > 0.5
    one = rand(2, 1, 4, 6)
    plane, pair, logdet = mask[:1], torch.tensor([1.5, 0.2]), rand(2)
    weight, bias = rand(3, 3), rand(3)
    last = x.contiguous(memory_format=torch.channels_last)
    large, none = rand(2, 1, 4, 6), torch.empty(0)
    yield OPS.affine_coupling, (x, raw, shift, mask, None, None, 0.5, False, None)
    yield OPS.affine_coupling, (last, raw, shift, mask, ~mask, None, 0.5, True, torch.bfloat16)
    yield OPS.affine_coupling, (one, one, one, plane, ~plane, pair, 0.5, False, torch.float32)
    yield OPS.affine_coupling_backward, (x, logdet, none, x, raw, shift, mask, None, None, 0.5, False)
    yield OPS.affine_coupling_backward, (one, logdet, one, one, one, one, plane, plane, pair, 0.5, True)
    yield OPS.channel_mix, (x, weight, bias, None, False, False, None)
    yield OPS.channel_mix, (last, weight, bias, mask, False, False, torch.bfloat16)
    yield OPS.channel_mix, (large, rand(4, 4), rand(4), None, True, False, None)
    yield OPS.channel_mix, (rand(2, 4, 2, 3), rand(4, 4), rand(4), None, True, True, None)
    small = rand(2, 4, 2, 3)
    yield OPS.channel_mix_backward, (x, none, x, weight, bias, None, False, False)
    yield OPS.channel_mix_backward, (x, x, x, weight, bias, mask, False, False)
    yield OPS.channel_mix_backward, (small, none, large, rand(4, 4), rand(4), None, True, False)
    yield OPS.channel_mix_backward, (large, none, small, rand(4, 4), rand(4), None, True, True)
    tables = rand(2, 4, 3), [rand(5, 4), rand(2, 4)]
    yield OPS.head_tables, (*tables, [rand(5), rand(2)])
    yield OPS.head_tables_backward, (rand(21), *tables)
    yield OPS.squeeze2x2, (large,)
    yield OPS.unsqueeze2x2, (rand(2, 4, 2, 3),)
    heads = rand(2, 8), rand(2, 8), rand(24, 8), rand(24, 8), rand(3, 24), rand(3, 24), torch.tensor([2, 0])
    narrow = [v.bfloat16() if v.is_floating_point() else v for v in heads]
    order, kept = kernels.pixel_order(plane), rand(4, 24).tanh()
    yield OPS.coupling_head, (one, *heads, plane, *order, None, None, 0.5, False, None, False)
    yield OPS.coupling_head, (one, *heads, plane, None, 0, ~plane, pair, 0.5, True, torch.bfloat16, True)
    yield (
        OPS.coupling_head,
        (
            rand(2, 6, 4, 1)[:, ::2].expand(2, 3, 4, 2),
            *narrow,
            mask[:, :, :2],
            None,
            0,
            None,
            None,
            0.5,
            False,
            None,
            True,
        ),
    )
    yield (
        OPS.coupling_head_backward,
        (one, logdet, none, kept, one, *heads, plane, *order, None, None, 0.5, False),
    )
    yield (
        OPS.coupling_head_backward,
        (one, logdet, one, kept, one, *narrow, plane, None, 0, ~plane, pair, 0.5, True),
    )
    yield OPS.latent_prior, (rand(3, 50),)
    yield OPS.latent_prior_backward, (rand(3), rand(3, 50))
    layers = [
        [rand(c, c), rand(c, c), *rand(3, c), torch.arange(c), torch.ones(c).to(torch.int8)] for c in (1, 3)
    ]
    params, pixels = [value for layer in layers for value in layer], [4, 9]
    yield OPS.lu_mixing, (params, pixels, [True, False], False)
    yield OPS.lu_mixing, (params, pixels, [True, False], True)
    yield OPS.lu_mixing_backward, (rand(14), rand(2).double(), params, pixels)
    yield from norm_cases(x, last)
    yield from pool_cases(x, last)
    yield from context_cases(x, last)
    yield from cbam_cases(x, last)


def cbam_cases(x, last):
    down, up, weight = rand(2, 3), rand(3, 2, seed=1), rand(1, 2, 7, 7, seed=2)
    for image, keep in ((x, True), (last, False), (x.bfloat16(), True)):
        yield OPS.cbam, (image, down, up, weight, keep)
    places, first = torch.ones(2, 4, 6, dtype=torch.int32), torch.ones(2, 3, dtype=torch.int32)
    kept = rand(2, 2, 3), first, rand(2, 2, 2), rand(2, 3), rand(2, 2, 4, 6), places, rand(2, 1, 4, 6)
    yield OPS.cbam_backward, (x, last, down, up, weight, *kept)


def norm_cases(x, last):
    gamma, beta, label_index = rand(4, 3), rand(4, 3, seed=1), torch.tensor([3, 0])
    seeds = torch.tensor([5, -7], dtype=torch.int32)
    stats, narrow = rand(2, 3, 2).abs() + 0.1, x.bfloat16()
    tables = gamma, beta, label_index
    yield OPS.norm_film_act, (x, *tables, None, None, 3, 1e-5, 0.0, None)
    yield OPS.norm_film_act, (last, *tables, x, seeds, 1, 1e-5, 0.3, torch.bfloat16)
    yield OPS.norm_film_act, (narrow, *tables, narrow, None, 3, 1e-5, 0.0, None)
    yield OPS.norm_film_act_backward, (x, last, stats, *tables, None, None, 3, 0.0)
    yield OPS.norm_film_act_backward, (last, x, stats[:, :1], *tables, last, seeds, 1, 0.3)
    yield OPS.norm_film_act_backward, (narrow, narrow, stats, *tables, narrow, seeds, 3, 0.3)
    pairs = rand(2, 20)[:, 3:9].unflatten(1, (3, 2))
    yield OPS.norm_modulate_act, (x, pairs, None, None, 3, 1e-5, 0.0, None)
    yield OPS.norm_modulate_act, (last, pairs, x, seeds, 1, 1e-5, 0.3, torch.bfloat16)
    yield OPS.norm_modulate_act_backward, (last, x, stats, pairs, last, seeds, 3, 0.3)
    yield OPS.norm_modulate_act_backward, (narrow, narrow, stats, pairs, None, None, 3, 0.0)


def pool_cases(x, last):
    logits, spatial, first = rand(2, 3), rand(2, 1, 4, 6), torch.ones(2, 3, dtype=torch.int32)
    places, pooled = torch.ones(2, 4, 6, dtype=torch.int32), rand(2, 2, 4, 6)
    yield OPS.pool_pixels, (last, True, True)
    yield OPS.pool_pixels, (x, False, False)
    yield OPS.pool_pixels_backward, (rand(2, 2, 3), first, last, 4, 6, False)
    yield OPS.pool_pixels_backward, (rand(1, 2, 3), None, None, 4, 6, True)
    yield OPS.pool_channels, (last, logits, True)
    yield OPS.pool_channels, (x.bfloat16(), logits, False)
    yield OPS.pool_channels_backward, (pooled, x, logits, places, last)
    yield OPS.pool_channels_backward, (pooled.bfloat16(), last.bfloat16(), logits, places, None)
    for image in (x, last):
        yield OPS.apply_gates, (image, logits, spatial)
        yield OPS.apply_gates_backward, (last, image, logits, spatial)


def context_cases(x, last):
    square, vector = [(3, 3, 3, 3), (3,)], (3,)
    shapes = [(3, 3, 1, 1), vector, *3 * square, (2, 12), (2,), (12, 2), (12,), (3, 12, 1, 1), vector]
    weights, dilations = [rand(*shape, seed=i) for i, shape in enumerate(shapes)], (1, 2, 3)
    small = [rand(2, size) for size in (15, 2, 12)]
    for image in (x, last, last.bfloat16()):
        kept = [image, image, image, rand(2, 3, 12).to(image.dtype), *small]
        yield OPS.atrous_pyramid, (image, weights, dilations)
        yield OPS.atrous_pyramid_backward, (image, image, kept, weights, dilations)
        layers, kept = [rand(2, 3), rand(2), rand(3, 2), rand(3)], [rand(2, 3), rand(2, 2), rand(2, 3)]
        for gated in (False, True):
            chosen = layers[::2] if gated else layers
            yield OPS.global_mlp, (image, chosen, gated)
            yield OPS.global_mlp_backward, (image, image, kept, chosen, gated)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: name_of(case[0]))
@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "triton"])
def test_opcheck(case, kernel, request):
    checks = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    if kernel:
        request.getfixturevalue("device")
        # Graphs hold the entry, whichever form of it runs.
        checks = checks[:2]
    op, arguments = case
    torch.library.opcheck(op, arguments, test_utils=checks)


def test_every_op_is_checked():
    with_kernels = {name for name, op in registry.OPS.items() if op.triton is not None}
    assert with_kernels == {name_of(op) for op, _ in cases()}
    # Nothing else is registered but an op of compiled scoring, which tests/models/test_folded.py checks.
    registered = torch._C._dispatch_get_all_op_names()
    found = {name.removeprefix("fastflow::") for name in registered if name.startswith("fastflow::")}
    assert found - {"convolution"} == with_kernels


def test_ops_without_kernels_are_listed():
    without = {name: op for name, op in registry.OPS.items() if op.triton is None}
    assert {name: op.functions for name, op in without.items()} == {
        "film_act": ("film_act",),
        "head_features": ("head_features",),
    }
    assert without["film_act"].cpu is without["film_act"].definition


BACKWARD = [
    (op, arguments)
    for op, arguments in (*norm_cases(*images_of()), *pool_cases(*images_of()))
    if name_of(op).endswith("_backward")
]


@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: name_of(case[0]))
def test_a_backward_form_is_its_definition(case):
    op, arguments = case
    entry = registry.OPS[name_of(op)]
    assert entry.definition is not entry.cpu
    got, want = entry.cpu(*arguments), entry.definition(*arguments)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = 8 * torch.finfo(a.dtype).eps
        assert torch.allclose(a, b, rtol=tolerance, atol=8 * tolerance)


# -- backends ------------------------------------------------------------------------------------------------


@pytest.fixture
def backend():
    yield kernels.set_backend
    kernels.set_backend("auto")


def test_backend_names(backend):
    backend("reference")
    assert kernels.get_backend() == "reference" and registry.explain("cuda")[0] == "reference"
    with pytest.raises(ValueError, match="auto, triton, reference, got 'cuda'"):
        backend("cuda")


def test_triton_refuses_a_cpu_without_the_interpreter(backend):
    backend("triton")
    with pytest.raises(ValueError, match="no CUDA device"):
        kernels.latent_prior(torch.zeros(1, 2))
    backend("auto")
    assert torch.isfinite(kernels.latent_prior(torch.zeros(1, 2)))


def test_the_reference_has_every_derivative(backend):
    backend("reference")
    values = [rand(1, 2, 2, 2, seed=i, dtype=torch.float64).requires_grad_() for i in range(3)]
    mask = torch.rand(2, 2, 2) > 0.5
    assert torch.autograd.gradgradcheck(lambda *v: kernels.affine_coupling(*v, mask), values)


def test_devices_are_not_mixed():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="shift must be on the device of x, cpu, got meta"):
        kernels.affine_coupling(x, x, x.to("meta"), torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="weight must be on the device"):
        kernels.channel_mix(x, torch.eye(1, device="meta"), torch.zeros(1))
    with pytest.raises(ValueError, match=r"mask must be bool.*got \(1, 2, 2\) torch.float32; convert"):
        kernels.affine_coupling(x, x, x, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="float16, bfloat16, float32 or float64"):
        kernels.latent_prior(torch.zeros(1, 2).to(torch.float8_e4m3fn))


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_triton_is_not_needed_and_imported_at_the_first_launch():
    """In one process, since each takes seconds to import torch; the environment sets what it starts with."""
    without = (
        "import os, sys, torch, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\nfrom fastflow import kernels\n"
        "from fastflow.kernels import registry\nprint(kernels.get_backend())\nkernels.set_backend('auto')\n"
        "x = torch.ones(1, 1, 2, 2, requires_grad=True)\n"
        "kernels.channel_mix(x, torch.eye(4), torch.zeros(4), squeeze=True).sum().backward()\n"
        "print(registry.explain('cuda'), x.grad.sum().item())\n"
    )
    installed = (
        "u.find_spec = find\ndel sys.modules['triton']\nregistry.has_triton.cache_clear()\n"
        "x = torch.zeros(1, 2)\nkernels.latent_prior(x)\nprint('triton' in sys.modules)\n"
        "os.environ['TRITON_INTERPRET'] = '1'\nkernels.latent_prior(x)\nprint('triton' in sys.modules)"
    )
    assert run_python(without + installed, FASTFLOW_BACKEND="reference").splitlines() == [
        "reference",
        "('reference', 'Triton is not installed') 4.0",
        "False",
        "True",
    ]


# -- compile and export --------------------------------------------------------------------------------------


def short(task="classification", dtype=torch.float32):
    model = build(short_config(task), dtype=dtype)
    return model, images(model.config, 4, dtype=dtype), labels(model.config, 4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_compiled_model_scores_the_same(task):
    model, x, y = short(task)
    seen = set()

    def note(graph, _):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model.log_prob, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    with torch.no_grad():
        assert torch.allclose(compiled(x, y), model.log_prob(x, y), rtol=1e-6)
    ops = {"channel_mix", "latent_prior", "affine_coupling" if task == "generation" else "coupling_head"}
    assert {f"fastflow.{op}.default" for op in ops} <= seen


@pytest.mark.slow
def test_compiled_gradients_are_the_same():
    model, x, y = short("generation", torch.float64)
    parameters = list(model.parameters())
    want = torch.autograd.grad(model.log_prob(x, y).sum(), parameters, allow_unused=True)
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, y).sum(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_inductor_scores_the_same():
    model, x, y = short()
    with torch.no_grad():
        want = model.log_prob(x, y)
        got = torch.compile(model.log_prob, fullgraph=True)(x, y)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_exported_graphs_hold_no_op_of_ours(task):
    class LogProb(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return self.model.log_prob(x, y)

    model, x, y = short(task)
    batch = torch.export.Dim("batch", min=3, max=64)
    program = torch.export.export(LogProb(model), (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("fastflow" in target for target in targets)
    more = images(model.config, 7, seed=3, dtype=torch.float32)
    want = model.log_prob(more, labels(model.config, 7))
    assert torch.allclose(program.module()(more, labels(model.config, 7)), want, rtol=1e-6)
