"""Examples in docstrings run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastflow
from fastflow import FlowConfig, MagicFlow

MODULES = [
    module.name
    for package in ("kernels", "models", "training")
    for module in pkgutil.walk_packages(importlib.import_module(f"fastflow.{package}").__path__, f"fastflow.{package}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    names = {"torch": torch, "FlowConfig": FlowConfig, "MagicFlow": MagicFlow}
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, extraglobs=names)
    assert failed == 0


def test_public_kernels_have_examples():
    finder = doctest.DocTestFinder()
    with_examples = {
        example.name.split(".")[0]
        for name in fastflow.kernels.__all__
        for example in finder.find(getattr(fastflow.kernels, name), name)
        if example.examples
    }
    assert {"affine_coupling", "channel_mix", "channel_unmix", "latent_prior", "norm_film_act", "squeeze2x2"} <= with_examples
