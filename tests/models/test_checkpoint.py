"""Model folders: the same bits back, atomic, and an error for every way in which one can be broken."""

import json

import pytest
import torch
from helpers import build, images

from fastflow import FlowConfig, MagicFlow
from fastflow.errors import CheckpointError
from fastflow.models import checkpoint


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
    with pytest.raises(CheckpointError, match=r"metadata\['not'\] must be a JSON value"):
        model.save(tmp_path)
    assert torch.equal(MagicFlow.load(tmp_path).steps[0].actnorm.bias, before)


class Circle(dict):
    """Metadata that hold themselves."""

    def __init__(self):
        super().__init__(again=self)


def spoil(name, value=float("nan")):
    def change(model):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value

    return change


def with_attributes(**values):
    return lambda model: [setattr(model, name, value) for name, value in values.items()]


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "NaN in a weight": (spoil("steps.1.actnorm.bias"), r"1 of its \d+ tensors .*\(steps.1.actnorm.bias\)"),
    "infinity in a weight": (spoil("steps.0.conv.log_s", -INF), r"NaN or infinity \(steps.0.conv.log_s\)"),
    "NaN everywhere": (
        lambda model: [spoil(name)(model) for name, _ in model.named_parameters()],
        r"\(steps.0.actnorm.log_scale, steps.0.actnorm.bias, steps.0.conv.lower, \.\.\.\)",
    ),
    "no temperature": (with_attributes(temperature=0.0), "temperature must be positive, got 0.0"),
    "a temperature of NaN": (with_attributes(temperature=NAN), "temperature must be positive, got nan"),
    "an infinite temperature": (with_attributes(temperature=INF), "temperature must be finite, got inf"),
    "None as temperature": (with_attributes(temperature=None), "temperature|NoneType"),
    "NaN in metadata": (
        with_attributes(metadata={"a": 1, "training": {"losses": [0.5, NAN]}}),
        r"metadata\['training'\]\['losses'\]\[1\] must be finite, got nan",
    ),
    "a tensor in metadata": (
        with_attributes(metadata={"mean": torch.ones(1)}),
        r"metadata\['mean'\] must be a JSON value .* got tensor\(",
    ),
    "a key of metadata": (
        with_attributes(metadata={(1, 2): 3}),
        r"key of metadata must be a string, got \(1, 2",
    ),
    "metadata in themselves": (
        lambda model: setattr(model, "metadata", Circle()),
        "nested in more than|itself",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_used_is_not_saved(tmp_path, model, case):
    model.save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change, words = REFUSED[case]
    with torch.no_grad():
        model.steps[0].actnorm.bias.add_(1)
    change(model)
    with pytest.raises(CheckpointError, match=words) as error:
        model.save(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    with pytest.raises(CheckpointError):
        model.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_weights_that_are_not_finite_is_refused(tmp_path, model, monkeypatch):
    spoil("steps.1.actnorm.bias")(model)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_check_finite", lambda *_: None)
        model.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be used: 1 of its .*steps.1.actnorm.bias") as error:
        MagicFlow.load(tmp_path)
    assert str(tmp_path) in str(error.value)


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
        (lambda f: edit(f, temperature=float("nan")), "temperature must be positive, got nan"),
        (lambda f: edit(f, temperature=float("inf")), "temperature must be finite, got inf"),
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
