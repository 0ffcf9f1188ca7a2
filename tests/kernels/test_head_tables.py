"""`head_tables`: its equation, and kernels against the float64 definition, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from numerics import F32, F64, close, rand, run, same_bits

from fastflow import kernels
from fastflow.kernels.head_tables import head_tables_backward_reference, head_tables_reference


def layers(rows, features, dtype=F64, device="cpu"):
    weights = [rand(n, features, seed=i, dtype=dtype, device=device) for i, n in enumerate(rows)]
    biases = [rand(n, seed=50 + i, dtype=dtype, device=device) for i, n in enumerate(rows)]
    return weights, biases


def apply(rows):
    def function(features, *parameters):
        return kernels.head_tables(features, parameters[: len(rows)], parameters[len(rows) :])

    return function


def test_tables_are_linear_maps_one_after_the_other():
    weights, biases = layers((3, 5), 4)
    features = rand(2, 4, 2, seed=9)
    parts = kernels.head_tables(features, weights, biases).split([6, 10])
    for part, f, weight, bias in zip(parts, features, weights, biases, strict=True):
        torch.testing.assert_close(part.view(2, -1), f.t() @ weight.t() + bias)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients(backend):
    weights, biases = layers((3, 5), 4)
    values = [rand(2, 4, 2, seed=9), *weights, *biases]
    kernels.set_backend(backend)
    try:
        leaves = [value.requires_grad_() for value in values]
        assert torch.autograd.gradcheck(apply((3, 5)), leaves)
    finally:
        kernels.set_backend("auto")


def test_written_gradients_are_those_of_autograd():
    weights, biases = layers((3, 5), 4)
    features = rand(2, 4, 2, seed=9)
    leaves = [value.requires_grad_() for value in (features, *weights, *biases)]
    out = head_tables_reference(features, weights, biases)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, leaves, grad)
    d_features, d_weights, d_biases = head_tables_backward_reference(grad, features.detach(), weights)
    torch.testing.assert_close(d_features, want[0])
    torch.testing.assert_close(d_weights, torch.cat([part.flatten() for part in want[1:3]]))
    torch.testing.assert_close(d_biases, torch.cat(want[3:]))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("rows", "features", "labels"),
    [((40, 17, 66), 64, 3), ((5,), 8, 1), ((20, 30), 24, 19)],
    ids=["three heads", "one small head", "more labels than a block"],
)
def test_kernels(device, rows, features, labels, dtype):
    weights, biases = layers(rows, features, dtype, device)
    values = [rand(len(rows), features, labels, seed=9, dtype=dtype, device=device), *weights, *biases]
    results, grads = run(apply(rows), values)
    wide = [value.double() for value in values]
    want, want_grads = run(
        lambda f, *p: head_tables_reference(f, p[: len(rows)], p[len(rows) :]), wide, [dtype]
    )
    for got, right in zip(results, want, strict=True):
        close(got, right, dtype, features)
    for got, right in zip(grads, want_grads, strict=True):
        close(got, right, dtype, max(*rows, labels))
    again, grads_again = run(apply(rows), values)
    assert same_bits(results, again)
    assert same_bits(grads, grads_again)


def test_parameters_may_lie_anywhere(device):
    whole = rand(11 * 8 + 1, dtype=F32, device=device)
    weight, bias = whole[1:].view(11, 8), rand(11, seed=1, dtype=F32, device=device)
    features = rand(1, 8, 2, seed=2, dtype=F32, device=device)
    got = kernels.head_tables(features, [weight], [bias])
    close(got, head_tables_reference(features.double(), [weight.double()], [bias.double()]), F32, 8)


def test_no_label_makes_no_table(device):
    weights, biases = layers((3, 5), 4, F32, device)
    features = torch.zeros(2, 4, 0, device=device, requires_grad=True)
    out = kernels.head_tables(features, weights, biases)
    assert out.shape == (0,)
    out.sum().backward()
    assert features.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, w, b: (f[0], w, b), r"features must be \(G, F, R\) float32 or float64, got \(4, 2\)"),
        (lambda f, w, b: (f.half(), w, b), "got .* torch.float16"),
        (lambda f, w, b: (f, w[:1], b), "one tensor for each of the 2 groups of features, got 1 and 2"),
        (lambda f, w, b: (f, [w[0], w[1][:, :3]], b), r"weights must be \(N, F\) = \(5, 4\)"),
        (lambda f, w, b: (f, w, [b[0], b[1].float()]), r"biases must be \(N,\) = \(5,\) torch.float64"),
    ],
)
def test_refuses(change, message):
    weights, biases = layers((3, 5), 4)
    with pytest.raises(ValueError, match=message):
        kernels.head_tables(*change(rand(2, 4, 2, seed=9), weights, biases))
