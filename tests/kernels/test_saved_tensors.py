"""What backward passes read again, they take from autograd: checkpoints and hooks of saved tensors work."""

from __future__ import annotations

import pytest
import torch
from public_calls import outputs, public_calls
from torch.utils.checkpoint import checkpoint

from fastflow.kernels import registry

NAMES = sorted(public_calls())


def gradients(run, values):
    """The gradients of all inputs, with gradients of the results that are no constants."""
    leaves = [value.clone().requires_grad_() for value in values]
    outs = [out for out in run(leaves) if out.requires_grad]
    weights = [torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device) for out in outs]
    grads = [weight.view(out.shape) for out, weight in zip(outs, weights, strict=True)]
    # Checkpoints that reenter autograd know `backward` alone.
    torch.autograd.backward(outs, grads)
    return [leaf.grad for leaf in leaves]


def on_cpu(function, leaves):
    with torch.autograd.graph.save_on_cpu():
        return outputs(function, leaves)


def checkpointed(function, leaves):
    return checkpoint(lambda *v: outputs(function, v), *leaves, use_reentrant=False)


def reentering(function, leaves):
    return checkpoint(lambda *v: tuple(outputs(function, v)), *leaves, use_reentrant=True)


def check(function, values, ways):
    want = gradients(lambda leaves: outputs(function, leaves), values)
    assert all(bool(grad.isfinite().all()) for grad in want) and any(bool(grad.any()) for grad in want)
    for way in ways:
        got = gradients(lambda leaves, way=way: way(function, leaves), values)
        assert all(map(torch.equal, got, want)), way


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_gradients_of_the_kernels(name, device):
    # A checkpoint refuses to hand saved tensors out twice; the other ways do not.
    check(*public_calls(device=device)[name], [checkpointed])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_whoever_keeps_saved_tensors(name):
    check(*public_calls()[name], [checkpointed, reentering, on_cpu])


def test_every_public_function_is_called():
    assert set(NAMES) == {name for op in registry.OPS.values() for name in op.functions}
