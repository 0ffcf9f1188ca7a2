"""Launches on the stub driver, noted where Triton's C launcher gets them, and tensors in many layouts."""

from __future__ import annotations

import threading
from collections import Counter

import torch
import triton

from bench import stub_driver
from fastflow.kernels import planning
from fastflow.kernels.triton import plans

BUILDS: list = []
CALLS: list = []
# Memory that a plan frees would serve again, and two places would have one address.
KEPT: list = []
JIT: Counter = Counter()
STREAM = [0]
# A key is planned when it comes the second time; an op inside a function comes with it.
WARM = 4


def install():
    """The stub, with notes of what the C launcher gets and of every look-up of Triton."""
    BUILDS.append(stub_driver.install())
    driver = triton.runtime.driver.active
    driver.get_current_stream = lambda device: STREAM[0]
    real = driver.utils.launch

    def launch(*values):
        CALLS.append((threading.get_ident(), values))
        return real(*values)

    driver.utils.launch = launch
    run = triton.runtime.jit.JITFunction.run

    def counted(self, *args, **kwargs):
        JIT[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    triton.runtime.jit.JITFunction.run = counted
    keep_values()


def keep_values():
    """Let plans keep what they make until `CALLS` and `KEPT` are cleared."""
    address_of = plans.data_ptr

    def keep(value):
        KEPT.append(value)
        return address_of(value)

    plans.data_ptr = keep


def forget():
    CALLS.clear()
    KEPT.clear()


def launches_of(values, call):
    """(grid, stream, kernel, options, arguments) of a launch; an address as a place in known tensors."""
    *head, annotations, _, arguments = call
    grid, stream, function, options = head[:3], head[3], head[4], head[5:8]
    kernel = BUILDS[0][function - 1]
    types = list(kernel.src.signature.values())
    if len(arguments) == len(types):
        arguments = [a for a, kind in zip(arguments, types, strict=True) if kind != "constexpr"]
    kinds = [kind for kind in types if kind != "constexpr"]
    assert len(annotations) in (len(types), len(kinds)) and len(arguments) == len(kinds)
    assert head[8:] == [None] * 5 or stream_has_hooks(head)
    found = []
    for value, kind in zip(arguments, kinds, strict=True):
        if not kind.startswith("*"):
            found.append(value)
            continue
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        assert isinstance(address, int)
        found.append(place_of(address, values))
    return grid, stream, function, options, found


def stream_has_hooks(head):
    # Triton gives its chains of hooks, which are empty.
    return all(not getattr(hook, "calls", None) for hook in head[9:11])


def place_of(address, values):
    for i, value in enumerate(values):
        start = value.data_ptr()
        size = value.element_size() * (
            1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        )
        if value.numel() and start <= address < start + size:
            return "known", i, address - start
    return "scratch", address


def named(launches):
    """Launches with their scratch memory numbered in the order in which it comes."""
    seen: dict = {}
    for *head, arguments in launches:
        yield (
            *head,
            [
                ("scratch", seen.setdefault(a, len(seen)))
                if isinstance(a, tuple) and a[0] == "scratch"
                else a
                for a in arguments
            ],
        )


def observe(function, inputs, grad):
    """(launches, metadata of the results) of a call, and the number of Triton's look-ups."""
    leaves = [value.detach().requires_grad_(grad and value.is_floating_point()) for value in inputs]
    forget()
    before = sum(JIT.values())
    out = function(*leaves)
    outs = [value for value in (out if isinstance(out, tuple) else (out,)) if value is not None]
    values = [*leaves, *outs]
    if grad:
        gradients = [torch.ones_like(value) for value in outs if value.requires_grad]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        results = torch.autograd.grad([o for o in outs if o.requires_grad], asked, gradients)
        values += [*gradients, *results]
        outs += results
    looked_up = sum(JIT.values()) - before
    launches = list(named([launches_of(values, call) for _, call in CALLS]))
    return (
        launches,
        [(v.shape, v.stride(), v.dtype, v.requires_grad, v.is_inference(), v.storage_offset()) for v in outs],
    ), looked_up


def same_with_plans(function, inputs, grad=False, planned=True):
    """Check that a call from a plan gives the C launcher what the normal path gives it."""
    planning.set_launch_plans(False)
    observe(function, inputs, grad)
    want, count = observe(function, inputs, grad)
    assert count and want[0], "nothing was launched"
    planning.set_launch_plans(True)
    for _ in range(WARM):
        got, looked_up = observe(function, inputs, grad)
        assert got == want, (got, want)
    got, looked_up = observe(function, inputs, grad)
    assert got == want, (got, want)
    assert not planned or looked_up == 0, planning.launch_plan_refusals()


def laid(value, layout):
    """A tensor of the same values in another layout."""
    if layout == "channels_last" and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "strided" and value.ndim >= 2:
        wide = value.new_empty(value.shape[0], 2, *value.shape[1:])
        wide[:, 1] = value
        return wide[:, 1]
    if layout == "transposed" and value.ndim >= 2:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "unaligned":
        room = value.new_empty(value.numel() + 1)[1:].view(value.shape)
        return room.copy_(value)
    return value
