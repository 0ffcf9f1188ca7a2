"""Examples in docstrings run, and give the results that they show."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import fastflow
from fastflow import FlowConfig, MagicFlow

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "fastflow").rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    names = {"torch": torch, "FlowConfig": FlowConfig, "MagicFlow": MagicFlow}
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert failed == 0 and tried > 0


def test_public_kernels_have_examples():
    finder = doctest.DocTestFinder()
    with_examples = {
        example.name.split(".")[0]
        for name in fastflow.kernels.__all__
        for example in finder.find(getattr(fastflow.kernels, name), name)
        if example.examples
    }
    assert {
        "affine_coupling",
        "channel_mix",
        "channel_unmix",
        "latent_prior",
        "norm_film_act",
        "squeeze2x2",
    } <= with_examples
