"""Versions of the tensors of a module: every kind of change is found and named, and nothing else is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastflow.models.versions import TensorVersions


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def fit(module, optimizer):
    module(torch.ones(4, 3)).sum().backward()
    optimizer(module.parameters()).step()


def write(tensor, value=1.0):
    with torch.no_grad():
        tensor.add_(value)


def replace(module):
    module[2].weight = nn.Parameter(torch.zeros(1, 2))


def swap(module):
    module[2].weight.data = torch.zeros(1, 2)


def in_inference_mode(module):
    with torch.inference_mode():
        module[0].weight.add_(1.0)


CHANGES = {
    "in place": (lambda m: write(m[0].weight), "parameter 0.weight is at version 2, expected 1"),
    "in inference mode": (in_inference_mode, "parameter 0.weight is at version 2, expected 1"),
    "one element": (lambda m: write(m[2].bias[0]), "parameter 2.bias is at version 2, expected 1"),
    "a buffer": (lambda m: write(m[1].running_mean), "buffer 1.running_mean is at version 2, expected 1"),
    "a forward pass in training": (
        lambda m: m(torch.ones(4, 3)),
        "buffer 1.num_batches_tracked is at version 2, expected 1",
    ),
    "an optimizer": (lambda m: fit(m.eval(), torch.optim.Adam), "parameter 0.weight is at version"),
    "a fused optimizer": (
        lambda m: fit(m.eval(), lambda p: torch.optim.Adam(p, fused=True)),
        "parameter 0.weight is at version 2, expected 1",
    ),
    "loaded": (lambda m: m.load_state_dict(network().state_dict()), "0.weight is at version 2, expected 1"),
    "replaced": (replace, "parameter 2.weight was moved or replaced"),
    "swapped": (swap, "parameter 2.weight was moved or replaced"),
    "another dtype": (lambda m: m.double(), "parameter 0.weight was moved or replaced"),
    "removed": (
        lambda m: m[1].register_buffer("running_var", None),
        "buffer 1.running_var was moved or replaced",
    ),
    "a module": (lambda m: m.__setitem__(1, nn.BatchNorm1d(2)), "module 1 was moved or replaced"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(change):
    module = network()
    versions = TensorVersions(module)
    make, words = CHANGES[change]
    make(module)
    assert words in str(versions.change())
    assert (versions.moved() is not None) == ("moved or replaced" in words)
    assert TensorVersions(module).change() is None


def test_whatever_leaves_the_values_is_no_change():
    module = network()
    versions = TensorVersions(module)
    module.eval().requires_grad_(False).float().to("cpu")
    module(torch.ones(4, 3))
    module.requires_grad_(True)(torch.ones(4, 3)).sum().backward()
    module.zero_grad()
    copy.deepcopy(module).double()
    assert versions.change() is None and versions.moved() is None


def test_an_optimizer_that_has_no_gradients_changes_nothing():
    module = network()
    versions = TensorVersions(module)
    torch.optim.Adam(module.parameters(), fused=True).step()
    assert versions.change() is None


def test_tensors_without_counters_are_compared():
    with torch.inference_mode():
        module = network().eval()
    versions = TensorVersions(module)
    assert versions.change() is None
    with torch.inference_mode():
        module[2].bias.add_(1.0)
    assert str(versions.change()) == "parameter 2.bias has other values"


def test_writes_that_nobody_counts_can_be_declared():
    versions = TensorVersions(network())
    versions.count_writes()
    assert str(versions.change()) == "parameter 0.weight is at version 2, expected 1"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_stands_for_the_copied_module(copied):
    module = network()
    write(module[0].weight)
    versions = TensorVersions(module)
    other, of_other = copied((module, versions))
    assert of_other.change() is None
    write(other[0].bias)
    assert "0.bias" in str(of_other.change()) and versions.change() is None
    assert "0.bias" in str(copied(of_other).change())
