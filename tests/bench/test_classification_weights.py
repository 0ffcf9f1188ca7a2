"""Files of weights into the networks of timm, and timm beside a CPU build of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.baselines import _torchvision
from bench.baselines.classification.networks import NETWORKS, build
from bench.baselines.classification.weights import COUNTER, load_weights, read_state

try:
    timm = _torchvision.import_timm()
except ImportError as error:
    timm = None
    reason = f"the environment of `make baselines` has timm, this one does not: {error}"
needs_timm = pytest.mark.skipif(timm is None, reason="" if timm else reason)
SIZE = (96, 96)


def numbered(name: str) -> dict[str, Tensor]:
    """A random state dict with the keys of RadImageNet's files: RGB, children by number, no classifier."""
    model = timm.create_model(name, pretrained=False, num_classes=0, **NETWORKS[name].options)
    children = list(dict(model.named_children()))
    return {
        f"backbone.{children.index(key.split('.')[0])}.{key.partition('.')[2]}": torch.rand_like(value)
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }


@needs_timm
@pytest.mark.parametrize(
    "name", ["resnet50", "densenet121", pytest.param("inception_v3", marks=pytest.mark.slow)]
)
def test_radimagenet_files_fill_the_trunk_by_order(name: str, tmp_path: Path) -> None:
    state = numbered(name)
    torch.save(state, tmp_path / "weights.pt")
    model = build(name, 7, SIZE)
    loaded = load_weights(model, tmp_path / "weights.pt", name)
    own = {key: value for key, value in model.state_dict().items() if not key.endswith(COUNTER)}
    head = model.default_cfg["classifier"]
    trunk = [value for key, value in own.items() if not key.startswith(f"{head}.")]
    assert loaded.entries == len(trunk) == len(state) and not loaded.unexpected
    assert loaded.missing == (f"{head}.weight", f"{head}.bias")
    first, *values = state.values()
    torch.testing.assert_close(trunk[0], first.sum(dim=1, keepdim=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(trunk[1:], values, strict=True))
    torch.save(dict(list(state.items())[:-1]), tmp_path / "short.pt")
    with pytest.raises(ValueError, match="numbered entries"):
        load_weights(model, tmp_path / "short.pt", name)


@needs_timm
def test_plain_and_wrapped_files_give_the_same_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, *copies = (build("resnet18", 7, SIZE) for _ in range(4))
    state = source.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "wrapped.pt"
    )
    torch.save(
        {
            "model": {f"module.backbone.{k}": v for k, v in state.items()}
            | {"module.head.weight": torch.ones(3)}
        },
        tmp_path / "more.pt",
    )
    x = torch.rand(2, 1, *SIZE)
    for model, name in zip(copies, ("plain", "wrapped", "more"), strict=True):
        loaded = load_weights(model, tmp_path / f"{name}.pt", "resnet18")
        assert loaded.unexpected == (("head.weight",) if name == "more" else ()) and not loaded.missing
        torch.testing.assert_close(model.eval()(x), source.eval()(x))


@needs_timm
def test_a_classifier_of_other_classes_stays_random_and_a_gap_is_refused(tmp_path: Path) -> None:
    state = build("resnet18", 1000, SIZE).state_dict()
    torch.save(state, tmp_path / "thousand.pt")
    loaded = load_weights(build("resnet18", 7, SIZE), tmp_path / "thousand.pt", "resnet18")
    assert loaded.missing == ("fc.weight", "fc.bias") and "fc.weight" in loaded.line()
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "gap.pt")
    with pytest.raises(ValueError, match=r"1 entries of resnet18 are missing: layer1\.0\.conv1\.weight"):
        load_weights(build("resnet18", 7, SIZE), tmp_path / "gap.pt", "resnet18")
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    torch.save(state, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match="64x64x5x5 for 64x64x3x3"):
        load_weights(build("resnet18", 7, SIZE), tmp_path / "shape.pt", "resnet18")


@needs_timm
def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path) -> None:
    torch.save(build("vit_tiny_patch16_224", 7, (224, 224)).state_dict(), tmp_path / "large.pt")
    model = build("vit_tiny_patch16_224", 7, SIZE)
    loaded = load_weights(model, tmp_path / "large.pt", "vit_tiny_patch16_224")
    assert not loaded.missing and not loaded.unexpected
    assert torch.isfinite(model.eval()(torch.rand(1, 1, *SIZE))).all()


@needs_timm
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("resnet18", "vit_tiny_patch16_224") else pytest.param(name, marks=pytest.mark.slow)
        for name in NETWORKS
    ],
)
def test_networks_take_grey_images(name: str) -> None:
    model = build(name, 7, SIZE).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 1, *SIZE)).shape == (2, 7)


def test_unknown_networks_and_small_images_are_told() -> None:
    with pytest.raises(ValueError, match=r"must be one of resnet50, .*got 'resnet19'"):
        build("resnet19", 7, SIZE)
    with pytest.raises(ValueError, match="at least 75 pixels"):
        build("inception_v3", 7, (64, 64))


def test_a_file_without_tensors_is_told(tmp_path: Path) -> None:
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none\.pt: must hold a state dict"):
        read_state(tmp_path / "none.pt")


def test_operators_are_declared_where_they_are_missing() -> None:
    # A new process has not imported torchvision.
    code = (
        "import torch; from bench.baselines._torchvision import declare_operators as declare; "
        "missing = declare(); assert set(missing) <= {'nms', 'qnms'} and declare() == (); "
        "assert torch.ops.torchvision.nms.default and torch.ops.torchvision.qnms.default"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
