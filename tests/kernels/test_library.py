"""Registered ops: schema and fake implementations, the choice of a backend, what is imported when, compile and export."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import build, images, labels
from torch._dynamo.backends.common import aot_autograd

from fastflow import FlowConfig, kernels
from fastflow.kernels import _library

OPS = torch.ops.fastflow


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    yield OPS.affine_coupling_backward, (x, logdet, none, x, raw, shift, mask, None, None, 0.5, False, True)
    yield OPS.affine_coupling_backward, (one, logdet, one, one, one, one, plane, plane, pair, 0.5, True, False)
    yield OPS.channel_mix, (x, weight, bias, None, False, False, None)
    yield OPS.channel_mix, (last, weight, bias, mask, False, False, torch.bfloat16)
    yield OPS.channel_mix, (large, rand(4, 4), rand(4), None, True, False, None)
    yield OPS.channel_mix, (rand(2, 4, 2, 3), rand(4, 4), rand(4), None, True, True, None)
    yield OPS.channel_mix_backward, (x, none, x, weight, weight, bias, None, False, False, False)
    yield OPS.channel_mix_backward, (x, x, x, weight, weight, bias, mask, False, False, True)
    yield OPS.channel_mix_backward, (rand(2, 4, 2, 3), none, large, rand(4, 4), rand(4, 4), rand(4), None, True, False, False)
    yield OPS.channel_mix_backward, (large, none, rand(2, 4, 2, 3), rand(4, 4), rand(4, 4), rand(4), None, True, True, False)
    yield OPS.squeeze2x2, (large,)
    yield OPS.unsqueeze2x2, (rand(2, 4, 2, 3),)
    heads = rand(2, 8), rand(2, 8), rand(24, 8), rand(24, 8), rand(3, 24), rand(3, 24), torch.tensor([2, 0])
    narrow = [v.bfloat16() if v.is_floating_point() else v for v in heads]
    order, kept = kernels.pixel_order(plane), rand(4, 24).tanh()
    yield OPS.coupling_head, (one, *heads, plane, *order, None, None, 0.5, False, None, False)
    yield OPS.coupling_head, (one, *heads, plane, None, 0, ~plane, pair, 0.5, True, torch.bfloat16, True)
    yield (
        OPS.coupling_head,
        (rand(2, 6, 4, 1)[:, ::2].expand(2, 3, 4, 2), *narrow, mask[:, :, :2], None, 0, None, None, 0.5, False, None, True),
    )
    yield OPS.coupling_head_backward, (one, logdet, none, kept, one, *heads, plane, *order, None, None, 0.5, False)
    yield OPS.coupling_head_backward, (one, logdet, one, kept, one, *narrow, plane, None, 0, ~plane, pair, 0.5, True)
    yield OPS.latent_prior, (rand(3, 50),)
    yield OPS.latent_prior_backward, (rand(3), rand(3, 50))
    yield from norm_cases(x, last)
    yield from pool_cases(x, last)


def norm_cases(x, last):
    gamma, beta, rows, keys = rand(4, 3), rand(4, 3, seed=1), torch.tensor([3, 0]), torch.tensor([5, -7], dtype=torch.int32)
    stats = rand(2, 3, 2).abs() + 0.1
    for image in (x, last):
        yield OPS.norm_film_act, (image, gamma, beta, rows, None, None, 3, 1e-5, 0.0, None)
        yield OPS.norm_film_act, (image, gamma, beta, rows, x, keys, 1, 1e-5, 0.3, torch.bfloat16)
        yield OPS.norm_film_act_backward, (x, image, stats, gamma, beta, rows, None, None, 3, 0.0)
        yield OPS.norm_film_act_backward, (last, image, stats[:, :1], gamma, beta, rows, image, keys, 1, 0.3)
    narrow = x.bfloat16()
    yield OPS.norm_film_act, (narrow, gamma, beta, rows, narrow, None, 3, 1e-5, 0.0, None)
    yield OPS.norm_film_act_backward, (narrow, narrow, stats, gamma, beta, rows, narrow, keys, 3, 0.3)


def pool_cases(x, last):
    logits, spatial, first = rand(2, 3), rand(2, 1, 4, 6), torch.ones(2, 3, dtype=torch.int32)
    places, pooled = torch.ones(2, 4, 6, dtype=torch.int32), rand(2, 2, 4, 6)
    for image in (x, last):
        yield OPS.pool_pixels, (image, True, True)
        yield OPS.pool_channels, (image, logits, True)
        yield OPS.pool_channels_backward, (pooled, image, logits, places, x)
        yield OPS.apply_gates, (image, logits, spatial)
        yield OPS.apply_gates_backward, (last, image, logits, spatial)
    yield OPS.pool_pixels, (x, False, False)
    yield OPS.pool_pixels_backward, (rand(2, 2, 3), first, last, 4, 6, False)
    yield OPS.pool_pixels_backward, (rand(1, 2, 3), None, None, 4, 6, True)
    yield OPS.pool_channels, (x.bfloat16(), logits, False)
    yield OPS.pool_channels_backward, (pooled.bfloat16(), last.bfloat16(), logits, places, None)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: str(case[0]).rpartition(".")[2])
@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "triton"])
def test_opcheck(case, kernel, request):
    if kernel:
        request.getfixturevalue("device")
    op, arguments = case
    torch.library.opcheck(op, arguments)


def test_every_op_is_checked():
    registered = {
        name.removeprefix("fastflow::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastflow::")
    }
    # An op of compiled scoring, which tests/models/test_folded.py checks.
    registered -= {"convolution"}
    assert registered == {str(op).rpartition(".")[2] for op, _ in cases()}


# -- backends -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend():
    yield kernels.set_backend
    kernels.set_backend("auto")


def test_backend_names(backend):
    backend("reference")
    assert kernels.get_backend() == "reference" and _library.explain("cuda")[0] == "reference"
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
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_triton_is_imported_at_the_first_launch():
    code = (
        "import sys, torch\nfrom fastflow import kernels\nx = torch.zeros(1, 2)\nkernels.latent_prior(x)\n"
        "print('triton' in sys.modules)\nimport os\nos.environ['TRITON_INTERPRET'] = '1'\nkernels.latent_prior(x)\n"
        "print('triton' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "True"]


def test_works_without_triton():
    code = (
        "import sys, torch, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\nsys.modules['triton'] = None\n"
        "from fastflow import kernels\nfrom fastflow.kernels import _library\nx = torch.ones(1, 1, 2, 2, requires_grad=True)\n"
        "kernels.channel_mix(x, torch.eye(4), torch.zeros(4), squeeze=True).sum().backward()\n"
        "print(_library.explain('cuda'), x.grad.sum().item())"
    )
    assert run_python(code) == "('reference', 'Triton is not installed') 4.0"


def test_the_environment_sets_the_backend():
    code = "from fastflow import kernels\nprint(kernels.get_backend())"
    assert run_python(code, FASTFLOW_BACKEND="reference") == "reference"


# -- compile and export ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_compiled_model_scores_the_same(task):
    model = build(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    x, y = images(model.config, 4, dtype=torch.float32), labels(model.config, 4)
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
    model = build(FlowConfig.tiny(3, task="generation"))
    x, y = images(model.config, 4), labels(model.config, 4)
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
    model = build(FlowConfig.tiny(3), dtype=torch.float32)
    x, y = images(model.config, 4, dtype=torch.float32), labels(model.config, 4)
    with torch.no_grad():
        want = model.log_prob(x, y)
        got = torch.compile(model.log_prob, fullgraph=True)(x, y)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 7, 32, 33, 529 * 8, 529 * 32, 32768, 33000, 529 * 64, 70000])
def test_gelu_of_a_sample_does_not_know_its_batch(size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 3, 7):
            x = rand(batch, size, seed=batch)
            got = _library.gelu_(x.clone())
            assert torch.allclose(got, torch.nn.functional.gelu(x.double()).float(), rtol=1e-5, atol=1e-6)
            for i in range(batch):
                assert torch.equal(_library.gelu_(x[i : i + 1].clone()), got[i : i + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_exported_graphs_hold_no_op_of_ours(task):
    class LogProb(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return self.model.log_prob(x, y)

    model = build(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    x, y = images(model.config, 4, dtype=torch.float32), labels(model.config, 4)
    batch = torch.export.Dim("batch", min=3, max=64)
    program = torch.export.export(LogProb(model), (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    assert all("fastflow" not in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    more = images(model.config, 7, seed=3, dtype=torch.float32)
    want = model.log_prob(more, labels(model.config, 7))
    assert torch.allclose(program.module()(more, labels(model.config, 7)), want, rtol=1e-6)
