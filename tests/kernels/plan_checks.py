"""Checks of launch plans on the stub driver, which `test_plans.py` runs in a process of its own.

`python tests/kernels/plan_checks.py [NAME ...]` prints one line of JSON per check: its name, and what failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback

import torch
import triton
from stub_launches import (
    CALLS,
    JIT,
    STREAM,
    WARM,
    forget,
    install,
    laid,
    launches_of,
    named,
    observe,
    same_with_plans,
)
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bench import stub_driver
from bench.host import op_cases
from fastflow import kernels
from fastflow.kernels import planning
from fastflow.kernels.triton import launch as launching

LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "unaligned")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_launches_of(name):
    function, inputs = op_cases()[name]
    for dtype in DTYPES:
        for layout in LAYOUTS:
            values = [laid(value.to(dtype), layout) for value in inputs]
            for grad in (False, True):
                same_with_plans(function, values, grad)


def norm_case():
    function, inputs = op_cases()["norm_film_act"]
    return function, list(inputs)


def check_alignment_makes_another_plan():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    odd = [laid(value, "unaligned") for value in inputs]
    for _ in range(WARM):
        kernel = observe(function, inputs, False)[0][0][0][2]
    for _ in range(2):
        observe(function, odd, False)
    got, looked_up = observe(function, odd, False)
    assert looked_up == 0 and got[0][0][2] != kernel
    got, looked_up = observe(function, inputs, False)
    assert looked_up == 0 and got[0][0][2] == kernel
    planning.set_launch_plans(False)
    for values in (inputs, odd):
        want = observe(function, values, False)
        planning.set_launch_plans(True)
        for _ in range(WARM):
            assert observe(function, values, False)[0] == want[0]
        planning.set_launch_plans(False)


def check_views_of_one_storage():
    x = torch.randn(3, 16, 1, 16, 16)
    mask = torch.rand(1, 16, 16) > 0.5
    same_with_plans(lambda *v: kernels.affine_coupling(*v, mask), list(x.unbind(0)))
    # Afterwards the three lie in memories of their own, by the same plan.
    apart = [value.clone() for value in x]
    forget()
    before = sum(JIT.values())
    kernels.affine_coupling(*apart, mask)
    assert sum(JIT.values()) == before
    *_, arguments = launches_of(apart, CALLS[0][1])
    assert [a for a in arguments if isinstance(a, tuple)][:3] == [("known", i, 0) for i in range(3)]


def check_a_tensor_that_is_given_twice():
    x = torch.randn(16, 1, 16, 16)
    mask = torch.rand(1, 16, 16) > 0.5
    same_with_plans(lambda v: kernels.affine_coupling(v, v, v, mask), [x], planned=False)


def check_labels_are_looked_at():
    x, gamma, beta = torch.randn(4, 8, 4, 4), torch.randn(3, 8), torch.randn(3, 8)

    def call(labels):
        return kernels.norm_film_act(x, 4, gamma, beta, labels)

    planning.set_launch_plans(True)
    good = torch.tensor([0, 1, 2, 0])
    for _ in range(WARM):
        call(good)
    before = sum(JIT.values())
    fresh = torch.tensor([2, 2, 2, 2])
    call(fresh)
    assert hasattr(fresh, "_fastflow_checked") and sum(JIT.values()) == before
    for bad in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 0, 0])):
        with raises(ValueError, "label_index must lie from 0 to 2"):
            call(bad)
    fresh[0] = 5
    with raises(ValueError, "got 5"):
        call(fresh)
    x.requires_grad_()
    for _ in range(WARM):
        call(good)
    with raises(ValueError, "got 5"):
        call(fresh)


@contextlib.contextmanager
def raises(kind, text):
    came = ""
    try:
        yield
    except kind as error:
        came = str(error)
    assert text in came, came


def check_other_shapes_are_checked():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    for _ in range(WARM):
        function(*inputs)
    with raises(ValueError, "gamma and beta must be"):
        function(inputs[0], inputs[1][:, :4], *inputs[2:])
    with raises(ValueError, "groups must divide"):
        kernels.norm_film_act(inputs[0], 5, *inputs[1:3], torch.arange(16) % 7)


def check_dropout_draws_every_time():
    x, gamma, beta, labels = (
        torch.randn(4, 8, 4, 4),
        torch.randn(3, 8),
        torch.randn(3, 8),
        torch.arange(4) % 3,
    )

    def call():
        return kernels.norm_film_act(x, 4, gamma, beta, labels, dropout=0.5)

    states = []
    for enabled in (False, True):
        planning.set_launch_plans(enabled)
        call()
        torch.manual_seed(3)
        for _ in range(WARM):
            call()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    before = sum(JIT.values())
    call()
    assert sum(JIT.values()) == before


def check_what_reads_the_host_has_no_plan():
    x, mask, labels = torch.randn(4, 1, 4, 4), torch.rand(1, 4, 4) > 0.5, torch.arange(4) % 3
    pairs = [(torch.randn(n, m), torch.randn(n, m)) for n, m in ((4, 8), (16, 8), (3, 16))]
    function = lambda v: kernels.coupling_head(v, *pairs, labels, mask)  # noqa: E731
    same_with_plans(function, [x], planned=False)
    assert "host" in planning.launch_plan_refusals()["coupling_head"], planning.launch_plan_refusals()


def check_streams_are_asked_for():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    for _ in range(WARM):
        observe(function, inputs, False)
    STREAM[0] = 77
    try:
        got, looked_up = observe(function, inputs, False)
    finally:
        STREAM[0] = 0
    assert looked_up == 0 and [launch[1] for launch in got[0]] == [77]


def check_devices_are_switched():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    for _ in range(WARM):
        function(*inputs)
    plan = next(
        candidate.repeat._aligned
        for table in planning._tables
        for layout in table.values()
        for candidates in layout.entries.values()
        for candidate in candidates
    )
    current, entered = [0], []

    @contextlib.contextmanager
    def device(index):
        entered.append((current[0], index))
        current[0], before = index, current[0]
        yield
        current[0] = before

    torch._C._cuda_getDevice = lambda: current[0]
    torch.cuda.device, real = device, torch.cuda.device
    try:
        for index in (1, 0):
            plan._device_index = index
            forget()
            function(*inputs)
            assert len(CALLS) == 1
    finally:
        torch.cuda.device = real
        del torch._C._cuda_getDevice
    assert entered == [(0, 1)]


def check_threads():
    function, inputs = norm_case()
    planning.set_launch_plans(False)
    want = observe(function, inputs, False)[0]
    planning.set_launch_plans(True)
    problems, own, together = [], {}, threading.Barrier(6)

    def work():
        together.wait()
        values = [value.clone() for value in inputs]
        kept = []
        for _ in range(40):
            kept.append(function(*values))
        own[threading.get_ident()] = values, kept

    threads = [threading.Thread(target=work) for _ in range(6)]
    forget()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for identity, (values, kept) in own.items():
        calls = [call for who, call in list(CALLS) if who == identity]
        assert len(calls) == 40
        for out, call in zip(kept, calls, strict=True):
            got = list(named([launches_of([*values, out], call)]))
            if got != want[0]:
                problems.append((got, want[0]))
    assert not problems, problems[0]


def check_the_bound():
    planning.set_launch_plans(True)
    real, planning.MAX_PLANS = planning.MAX_PLANS, 12
    try:
        for size in range(1, 20):
            for _ in range(WARM):
                kernels.squeeze2x2(torch.randn(1, 1, 2 * size, 2))
                assert planning.count_launch_plans() <= 12
    finally:
        planning.MAX_PLANS = real
    planning.clear_launch_plans()
    assert planning.count_launch_plans() == 0


def check_many_kinds_of_one_shape():
    x, weight, bias = torch.randn(2, 4, 4, 4), torch.randn(4, 4), torch.randn(4)
    planning.set_launch_plans(True)
    for step in range(1, 2 * planning.MAX_CANDIDATES):
        for _ in range(WARM):
            kernels.channel_mix(x, weight, bias.new_empty(4, step)[:, 0])
    sizes = [
        len(candidates)
        for table in planning._tables
        for layout in table.values()
        for candidates in layout.entries.values()
    ]
    assert max(sizes) == planning.MAX_CANDIDATES


def check_forks():
    planning.set_launch_plans(True)
    function, inputs = norm_case()
    for _ in range(WARM):
        function(*inputs)
    with planning._lock:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                assert planning.count_launch_plans() == 0
                for _ in range(WARM):
                    function(*inputs)
                before = sum(JIT.values())
                function(*inputs)
                assert sum(JIT.values()) == before and planning.count_launch_plans() > 0
                os._exit(0)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def check_the_setting():
    function, inputs = norm_case()
    planning.set_launch_plans(False)
    assert not planning.uses_launch_plans()
    for _ in range(WARM):
        assert observe(function, inputs, False)[1] == 1
    assert planning.count_launch_plans() == 0
    planning.set_launch_plans(True)
    kernels.set_backend("reference")
    try:
        for _ in range(WARM):
            assert observe(function, inputs, False)[1] == 0 and not CALLS
    finally:
        kernels.set_backend("auto")


def check_recording_and_hooks_see_launches():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    for _ in range(WARM):
        function(*inputs)
    forget()
    with launching.recording() as launches:
        function(*inputs)
    assert [launch.kernel for launch in launches] == ["_group_fwd_kernel"] and not CALLS
    seen = []
    hook = lambda metadata: seen.append(metadata)  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        function(*inputs)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1
    before = sum(JIT.values())
    function(*inputs)
    assert sum(JIT.values()) == before


def check_autotuning_has_no_plans():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    os.environ["FASTFLOW_AUTOTUNE"] = "1"
    try:
        tuned, launching._tune = launching._tune, lambda compiled, module, name: compiled
        for _ in range(WARM):
            with contextlib.suppress(KeyError):
                function(*inputs)
    finally:
        launching._tune = tuned
        del os.environ["FASTFLOW_AUTOTUNE"]
    kept = [c for t in planning._tables for lay in t.values() for cs in lay.entries.values() for c in cs]
    assert not kept


class Names(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def check_modes_and_graphs_see_the_op():
    x, weight, bias = torch.randn(2, 4, 4, 4), torch.randn(4, 4), torch.randn(4)
    planning.set_launch_plans(True)
    for _ in range(WARM):
        kernels.channel_mix(x, weight, bias)
    with Names() as mode:
        kernels.channel_mix(x, weight, bias)
    assert "fastflow.channel_mix.default" in mode.names
    graph = make_fx(lambda *v: kernels.channel_mix(*v), tracing_mode="fake")(x, weight, bias)
    assert "fastflow.channel_mix.default" in [str(node.target) for node in graph.graph.nodes]
    with FakeTensorMode() as fake:
        out = kernels.channel_mix(*(fake.from_tensor(value) for value in (x, weight, bias)))
    assert type(out) is not torch.Tensor
    targets = []

    def note(module, _):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    backend = aot_autograd(fw_compiler=note)
    torch.compile(kernels.channel_mix, fullgraph=True, backend=backend)(x, weight, bias)
    assert "fastflow.channel_mix.default" in targets, targets


def check_entries_of_torch_library_have_plans():
    x, weight, bias = torch.randn(2, 4, 4, 4), torch.randn(4, 4), torch.randn(4)
    entry = torch.ops.fastflow.channel_mix.default
    same_with_plans(lambda *v: entry(*v, None, False, False, None)[0], [x, weight, bias])


def check_inference_mode():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    for _ in range(WARM):
        out = function(*inputs)
    assert not out.is_inference()
    with torch.inference_mode():
        for _ in range(WARM):
            assert function(*inputs).is_inference()
    with torch.no_grad():
        leaf = inputs[0].clone().requires_grad_()
        for _ in range(WARM):
            assert not function(leaf, *inputs[1:]).requires_grad
    for _ in range(WARM):
        assert function(leaf, *inputs[1:]).requires_grad
    with torch.no_grad():
        assert not function(leaf, *inputs[1:]).requires_grad


def check_launches_are_counted_by_the_driver():
    function, inputs = norm_case()
    planning.set_launch_plans(True)
    for _ in range(WARM):
        function(*inputs)
    before = stub_driver.launches()
    for _ in range(5):
        function(*inputs)
    assert stub_driver.launches() == before + 5


def checks():
    """All checks by name."""
    found = {f"launches_of_{name}": lambda name=name: check_launches_of(name) for name in op_cases()}
    return found | {
        name.removeprefix("check_"): value
        for name, value in globals().items()
        if name.startswith("check_") and name != "check_launches_of"
    }


def main(names):
    install()
    torch.manual_seed(0)
    for name, check in checks().items():
        if names and name not in names:
            continue
        try:
            planning.clear_launch_plans()
            check()
            problem = ""
        except BaseException:
            problem = traceback.format_exc()
        print(json.dumps([name, problem]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
