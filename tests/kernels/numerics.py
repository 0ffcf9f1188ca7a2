"""Random tensors, and how close a kernel's numbers must be to their float64 reference.

An element is right to a few roundings of the narrowest dtype that it passes through, which the interpreter
cuts off where it is bfloat16. A sum over n terms of size about 1 is right to a few float32 roundings times
sqrt(n), and to 1e-11 in float64.
"""

from __future__ import annotations

import numpy as np
import torch

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def rand(*shape, dtype=F64, seed=0, device="cpu"):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def masks(kind, shape):
    full = torch.ones(shape, dtype=torch.bool)
    checkers = torch.arange(full.numel()).view(shape) % 2 == 0
    return {"all": full, "none": ~full, "even": checkers, "odd": ~checkers, "plane": checkers[:1]}[kind]


def random_mask(*shape, seed=0, share=0.5):
    """True for about `share` of the elements."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def close(got, want, dtype, length=1):
    """Elements to 8 roundings of their dtype, sums of `length` terms to that times the root of `length`."""
    assert got.dtype == dtype and got.shape == want.shape
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    bound = (
        8 * torch.finfo(dtype).eps * length**0.5 * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    )
    if dtype == F64:
        bound = max(bound, 1e-11)
    assert torch.isfinite(got).all()
    assert want.numel() == 0 or float((got - want).abs().max()) <= bound, (
        float((got - want).abs().max()) / bound
    )


def same_bits(got, want):
    """Whether two sequences of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def run(function, values, dtypes=()):
    """(results, gradients of the leaves) for fixed random output gradients, which `dtypes` round first."""
    leaves = [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in values]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    dtypes = dtypes or [r.dtype for r in results]
    grads = [
        rand(*r.shape, dtype=d, seed=7 + i, device=r.device).to(r.dtype)
        for i, (r, d) in enumerate(zip(results, dtypes, strict=True))
    ]
    return results, torch.autograd.grad(results, leaves, grads)


def to_float64(values):
    return [v.detach().double() for v in values]


def far_apart(shape, distance, dtype=torch.float16):
    """A batch whose samples lie `distance` elements apart, in memory of which few pages are touched."""
    size = (shape[0] - 1) * distance + int(np.prod(shape[1:]))
    memory = torch.from_numpy(np.zeros(size, dtype=np.float16)).to(dtype)
    x = memory.as_strided(shape, (distance, shape[2] * shape[3], shape[3], 1))
    x.copy_(rand(*shape, dtype=dtype))
    return x
