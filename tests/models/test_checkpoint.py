"""Model folders: the same bits back, atomic, and an error for every way in which one can be broken."""

import json

import pytest
import torch
from helpers import build, images

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import CheckpointError


@pytest.fixture
def model():
    return build(FlowConfig.tiny(3, class_names=("a", "b", "c")), dtype=torch.float32)


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_gives_the_same_bits(tmp_path, task, dtype):
    config = FlowConfig.tiny(
        3, task=task, norm="batch" if task == "generation" else "group", share_halves=False
    )
    model = build(config, dtype=dtype)
    model.temperature, model.metadata = 12.5, {"note": [1, "two"]}
    model.save(tmp_path / "new" / "folder")
    loaded = MagicFlow.load(tmp_path / "new" / "folder")
    assert loaded.config == config and loaded.temperature == 12.5 and loaded.metadata == {"note": [1, "two"]}
    assert not loaded.training and loaded.initialized
    got = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype
    x = images(config, 3, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded.log_prob_all(x), model.log_prob_all(x))


def test_masks_come_from_the_file(tmp_path, model):
    model.save(tmp_path)
    assert torch.equal(MagicFlow.load(tmp_path).steps[0].coupling.mask, model.steps[0].coupling.mask)
    assert model.steps[0].coupling.mask.any()


def test_saving_again_leaves_one_file_of_weights(tmp_path, model):
    model.save(tmp_path)
    with torch.no_grad():
        model.steps[0].actnorm.bias.add_(1)
    model.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert torch.equal(MagicFlow.load(tmp_path).steps[0].actnorm.bias, model.steps[0].actnorm.bias)


def test_a_save_that_fails_leaves_the_old_model(tmp_path, model, monkeypatch):
    model.save(tmp_path)
    before = model.state_dict()["steps.0.actnorm.bias"].clone()
    with torch.no_grad():
        model.steps[0].actnorm.bias.add_(1)
    model.metadata = {"not": {"json"}}
    with pytest.raises(TypeError):
        model.save(tmp_path)
    assert torch.equal(MagicFlow.load(tmp_path).steps[0].actnorm.bias, before)


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "format"),
        (lambda f: edit(f, format=99), "format 1, got 99"),
        (lambda f: weights_of(f).unlink(), "cannot be read"),
        (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:-1] + b"x"), "sha256"),
        (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:100]), "sha256"),
        (lambda f: edit(f, sha256="0" * 64), "sha256"),
        (lambda f: edit(f, weights="../elsewhere.safetensors"), "own folder"),
        (lambda f: edit(f, config={"num_classes": 3}), "missing"),
        (
            lambda f: edit(
                f, config={**json.loads((f / "config.json").read_text())["config"], "num_classes": 4}
            ),
            "one model",
        ),
        (lambda f: edit(f, temperature=None), "one model"),
    ],
)
def test_a_broken_folder_is_named(tmp_path, model, damage, words):
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words) as error:
        MagicFlow.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        MagicFlow.load(tmp_path / "nowhere")
