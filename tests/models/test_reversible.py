"""Reversible training: the same gradients from a rebuilt stream, and what it keeps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import build, images, labels
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fastflow import FlowConfig, kernels
from fastflow.models.reversible import invert_half, run_step, scales

TASKS = ["classification", "generation"]


def both(config, dtype=torch.float64, train=True):
    """The same model in normal and in reversible mode."""
    model = build(config, dtype=dtype).train(train)
    other = build(dataclasses.replace(config, reversible=True), dtype=dtype).train(train)
    other.load_state_dict(model.state_dict())
    return model, other


def gradients(model, x, y, seed=1, autocast=False):
    """(log-likelihoods, gradients of x and of every parameter) with the dropout of a seed."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        log_prob = model.log_prob(x, y)
    return log_prob, torch.autograd.grad(log_prob.sum(), [x, *model.parameters()], allow_unused=True)


def largest_error(got, want):
    """Largest error of a gradient relative to its largest element, or to a millionth of the largest of all.

    Some gradients are zero but for rounding: a bias before a norm.
    """
    top = max(float(g.abs().max()) for g in want if g is not None)
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            errors.append(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6 * top))
    return max(errors)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "changes", [{}, {"share_halves": False}, {"condition_from_step": 2}, {"split_after": ()}], ids=str
)
def test_gradients_are_those_of_the_normal_mode(task, changes):
    normal, reversible = both(FlowConfig.tiny(3, task=task, **changes))
    x, y = images(normal.config, 5), labels(normal.config, 5)
    want, want_grads = gradients(normal, x, y)
    got, grads = gradients(reversible, x, y)
    assert torch.allclose(got, want, rtol=1e-13)
    assert largest_error(grads, want_grads) < 1e-8


@pytest.mark.parametrize("task", TASKS)
def test_float32_gradients(task):
    normal, reversible = both(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    x, y = images(normal.config, 5, dtype=torch.float32), labels(normal.config, 5)
    want, want_grads = gradients(normal, x, y)
    got, grads = gradients(reversible, x, y)
    assert torch.allclose(got, want, rtol=1e-6)
    norm, difference = (
        sum(float((a.double() ** 2).sum()) for a in values if a is not None) ** 0.5
        for values in (
            want_grads,
            [None if a is None else a - b for a, b in zip(grads, want_grads, strict=True)],
        )
    )
    assert difference < 1e-4 * norm


def test_the_first_training_batch_sets_actnorm():
    torch.manual_seed(0)
    from fastflow import MagicFlow

    config = FlowConfig.tiny(3, reversible=True)
    model = MagicFlow(config).double().train()
    log_prob = model.log_prob(images(config, 4), labels(config, 4))
    log_prob.sum().backward()
    assert model.initialized and torch.isfinite(log_prob).all()


def test_evaluation_and_sampling_do_not_change():
    normal, reversible = both(FlowConfig.tiny(3), train=False)
    x, y = images(normal.config, 4), labels(normal.config, 4)
    with torch.no_grad():
        for call in (
            lambda m: m.log_prob(x, y),
            lambda m: m.log_prob_all(x),
            lambda m: m.inverse(m(x, y)[0], y),
        ):
            assert torch.equal(call(normal), call(reversible))


def test_dropout_is_replayed_and_differs_between_seeds():
    _, reversible = both(FlowConfig.tiny(3, dropout=0.5))
    x, y = images(reversible.config, 4), labels(reversible.config, 4)
    first, again, other = (gradients(reversible, x, y, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert all(a is None or torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_log_scales_and_shifts_recompute_identically(task):
    """The conditioner reads the passive part, which a half returns bit for bit."""
    model = build(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    x, y = images(model.config, 4, dtype=torch.float32), labels(model.config, 4)
    seen = []
    coupling = model.steps[0].coupling
    with torch.no_grad():
        params = coupling.label_params(torch.arange(3))
        h = model.steps[0].mix(x)
        for half in coupling.halves():
            of_half = params[half.net_index]
            masked = h.masked_fill(~half.mask.passive, 0.0)
            forward = half.net.encode(masked, of_half, y, None)
            after, _, _ = half.net.transform(h, forward, of_half, y, half.mask, coupling.bound, False, None)
            assert torch.equal(after.masked_fill(~half.mask.passive, 0.0), masked)
            encode = half.net.encode
            half.net.encode = lambda *args, encode=encode: seen.append(encode(*args)) or seen[-1]
            try:
                ones = torch.ones_like(after)
                back, _ = invert_half(coupling, half, after, ones, ones[:, 0, 0, 0], of_half, y, None, {})
            finally:
                del half.net.encode
            assert len(seen) == 1, "the conditioner runs once for both the rebuild and its gradient"
            assert all(torch.equal(a, b) for a, b in zip(seen.pop(), forward, strict=True))
            assert float((back - h).abs().max()) < 4e-6
            h = after


@pytest.mark.parametrize("task", TASKS)
def test_drift_over_many_steps_is_bounded(task):
    """24 steps back in float32: a few hundred roundings of values of size 1 at most, from a forward pass that
    was exact.
    """
    steps = 24
    config = FlowConfig.tiny(
        2,
        task=task,
        masks=("checkerboard",) * steps,
        widths=((8, 8, 8),) * steps,
        squeeze_before=(0,),
        split_after=(),
    )
    model = build(config, dtype=torch.float32)
    x, y = images(config, 4, dtype=torch.float32), labels(config, 4)
    classes = torch.arange(2)
    out, masked = x, None
    for i in range(steps):
        out, _, masked = run_step(model.steps, i, out, masked, classes, y, (None, None))
    for step in reversed(model.steps):
        with torch.no_grad():
            params = step.coupling.label_params(classes)
        for half in reversed(step.coupling.halves()):
            ones = torch.ones_like(out)
            of_half = params[half.net_index]
            out, _ = invert_half(step.coupling, half, out, ones, ones[:, 0, 0, 0], of_half, y, None, {})
        out = step.unmix(out).detach()
    assert float((out - x).abs().max()) < 300 * torch.finfo(torch.float32).eps * float(x.abs().max())


class Kept:
    """Bytes that autograd holds, parameters left out, each memory once: now and at most."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        self.held, self.bytes, self.peak = {}, 0, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameters:
            return tensor
        return Held(self, tensor, storage.data_ptr(), storage.nbytes())


class Held:
    def __init__(self, kept, tensor, place, size):
        self.kept, self.tensor, self.place, self.size = kept, tensor, place, size
        kept.held[place] = kept.held.get(place, 0) + 1
        if kept.held[place] == 1:
            kept.bytes += size
            kept.peak = max(kept.peak, kept.bytes)

    def __del__(self):
        self.kept.held[self.place] -= 1
        if not self.kept.held[self.place]:
            self.kept.bytes -= self.size


def peak_bytes(steps, reversible, task):
    config = FlowConfig.tiny(
        2,
        task=task,
        masks=("checkerboard",) * steps,
        widths=((8, 8, 8),) * steps,
        squeeze_before=(0,),
        split_after=(),
        reversible=reversible,
    )
    model = build(config, dtype=torch.float32).train()
    x, y = images(config, 8, dtype=torch.float32), labels(config, 8)
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(
        kept.pack, lambda v: v.tensor if isinstance(v, Held) else v
    ):
        model.log_prob(x, y).sum().backward()
    return kept.peak


@pytest.mark.parametrize("task", TASKS)
def test_memory_does_not_grow_with_the_steps(task):
    few, many, normal = peak_bytes(8, True, task), peak_bytes(24, True, task), peak_bytes(24, False, task)
    assert many < 1.2 * few
    assert many < normal / 5


def test_scales_end_at_splits():
    assert scales([False] * 3 + [True] + [False] * 2) == [(0, 4), (4, 6)]
    assert scales([False] * 3) == [(0, 3)]
    assert scales([True, False, True]) == [(0, 1), (1, 3)]


@pytest.mark.parametrize("task", TASKS)
def test_autocast_is_replayed_in_the_backward_pass(task):
    normal, reversible = both(FlowConfig.tiny(3, task=task), dtype=torch.float32)
    x, y = images(normal.config, 4, dtype=torch.float32), labels(normal.config, 4)
    want, want_grads = gradients(normal, x, y, autocast=True)
    got, grads = gradients(reversible, x, y, autocast=True)
    assert torch.allclose(got, want, rtol=1e-5)
    norm = sum(float((g**2).sum()) for g in want_grads if g is not None) ** 0.5
    error = (
        sum(float(((a - b) ** 2).sum()) for a, b in zip(grads, want_grads, strict=True) if a is not None)
        ** 0.5
    )
    assert error < 0.05 * norm


def test_refuses():
    with pytest.raises(ValueError, match="reversible=True needs norm='group'"):
        FlowConfig.tiny(3, task="generation", norm="batch", reversible=True)
    _, reversible = both(FlowConfig.tiny(3))
    x = images(reversible.config, 3).requires_grad_()
    _, logdet = reversible(x, labels(reversible.config, 3))
    with pytest.raises(RuntimeError, match="a reversible model has one derivative"):
        torch.autograd.grad(logdet.sum(), x, create_graph=True)


def test_a_frozen_model_gives_the_gradient_of_its_input():
    normal, reversible = both(FlowConfig.tiny(3), train=False)
    x, y = images(normal.config, 3), labels(normal.config, 3)
    grads = []
    for model in (normal, reversible):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(model.requires_grad_(False).log_prob(leaf, y).sum(), leaf)
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)


def test_the_reference_backend_is_reversible_too():
    normal, reversible = both(FlowConfig.tiny(3))
    x, y = images(normal.config, 4), labels(normal.config, 4)
    kernels.set_backend("reference")
    try:
        want, got = gradients(normal, x, y)[1], gradients(reversible, x, y)[1]
    finally:
        kernels.set_backend("auto")
    assert largest_error(got, want) < 1e-8


# -- what changes between the passes -------------------------------------------------------------------------


def optimize(optimizer):
    def change(model, y):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters()).step()

    return change


def swap(model, y):
    bias = model.steps[3].coupling.conditioners[0].conv2.bias
    bias.data = bias.data + 1.0


def replace(model, y):
    model.steps[2].conv = copy.deepcopy(model.steps[2].conv)


def scale_one(model, y):
    with torch.no_grad():
        model.steps[3].actnorm.bias[0].mul_(2.0)


CHANGES = {
    "an optimizer": (
        optimize(torch.optim.SGD),
        r"step \d's parameter .* is at version \d+, expected \d+ since",
    ),
    "a fused optimizer": (
        optimize(lambda p: torch.optim.Adam(p, fused=True)),
        r"is at version \d+, expected",
    ),
    "one weight": (scale_one, r"step 3's parameter actnorm.bias is at version (\d+), expected"),
    "loaded weights": (lambda model, y: model.load_state_dict(model.state_dict()), "is at version"),
    "swapped data": (swap, r"step 3's parameter coupling.conditioners.0.conv2.bias was moved or replaced"),
    "a layer": (replace, "step 2's module conv was moved or replaced"),
    "a mask": (lambda model, y: model.steps[1].coupling.mask.logical_not_(), "step 1's buffer coupling.mask"),
    "labels": (lambda model, y: y.zero_(), "modified by an inplace operation"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_the_passes_is_named(change):
    model = build(FlowConfig.tiny(3, reversible=True)).train()
    x, y = images(model.config, 4), labels(model.config, 4)
    loss = model.log_prob(x, y).sum()
    make, words = CHANGES[change]
    make(model, y)
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


def test_weights_that_a_call_put_in_are_not_there_in_the_backward_pass():
    model = build(FlowConfig.tiny(3, reversible=True))
    other = {name: 1.1 * value.detach() for name, value in model.named_parameters()}
    x, y = images(model.config, 3), labels(model.config, 3)
    _, logdet = functional_call(model, {k: v.requires_grad_() for k, v in other.items()}, (x, y))
    with pytest.raises(RuntimeError, match="moved or replaced since the forward pass"):
        logdet.sum().backward()


def test_what_changes_no_weight_changes_no_gradient():
    normal, reversible = both(FlowConfig.tiny(3, dropout=0.5), dtype=torch.float32)
    x, y = images(normal.config, 4, dtype=torch.float32), labels(normal.config, 4)
    found = []
    for model in (normal, reversible):
        losses = []
        torch.manual_seed(2)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model.log_prob(x, y).sum())
        # Evaluation and a frozen step come before both backward passes, which add up.
        model.eval()
        model.steps[0].requires_grad_(False)
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
        model.requires_grad_(True)
        assert not any(part.training for part in model.modules())
        found.append([p.grad for p in model.parameters()])
    want, got = found
    norm = sum(float((g**2).sum()) for g in want if g is not None) ** 0.5
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(got, want, strict=True) if a is not None) ** 0.5
    assert error < 0.02 * norm
    assert all(grad is None for grad in got[: len(list(reversible.steps[0].parameters()))])


def test_training_mode_is_replayed_in_the_backward_pass():
    """Under autocast, evaluation keeps features wide that training rounds."""
    model = build(FlowConfig.tiny(3, dropout=0.5, reversible=True), dtype=torch.float32)
    x, y = images(model.config, 4, dtype=torch.float32), labels(model.config, 4)
    found = []
    for mode in (True, False):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train().log_prob(x, y).sum()
        model.train(mode).zero_grad()
        loss.backward()
        assert model.steps[0].coupling.training == mode
        found.append([p.grad for p in model.parameters()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_the_whole_model(task, reversible):
    model = build(FlowConfig.tiny(3, task=task, reversible=reversible)).train()
    x, y = images(model.config, 4), labels(model.config, 4)

    def check(log_prob):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        torch.manual_seed(3)
        log_prob(leaf).sum().backward()
        return [leaf.grad, *(p.grad for p in model.parameters())]

    def on_the_host(leaf):
        with torch.autograd.graph.save_on_cpu():
            return model.log_prob(leaf, y)

    want = check(lambda leaf: model.log_prob(leaf, y))
    for way in (
        lambda leaf: checkpoint(model.log_prob, leaf, y, use_reentrant=False),
        lambda leaf: checkpoint(model.log_prob, leaf, y, use_reentrant=True),
        on_the_host,
    ):
        got = check(way)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_labels_made_under_inference_mode_train():
    model = build(FlowConfig.tiny(3, reversible=True)).train()
    with torch.inference_mode():
        few = torch.tensor([2, 0])
    model.log_prob(images(model.config, 2), few).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
