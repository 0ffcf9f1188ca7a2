"""FlowConfig: presets, shapes, JSON, and an error for every combination that cannot be built."""

import json

import pytest

from fastflow import FlowConfig
from fastflow.models.config import PRESETS

PAPER_SHAPES = (
    [(1, 184, 184)] * 5 + [(4, 92, 92)] * 3 + [(2, 92, 92)] * 3 + [(8, 46, 46)] * 3 + [(4, 46, 46)] * 3
)
PAPER_SHAPES += [(16, 23, 23)] * 3 + [(8, 23, 23)] * 4


def test_paper_layout_is_the_published_one():
    config = FlowConfig.paper(num_classes=7)
    assert list(config.step_shapes) == PAPER_SHAPES
    assert config.latent_shapes == ((8, 23, 23), (2, 92, 92), (4, 46, 46), (8, 23, 23))
    assert sum(c * h * w for c, h, w in config.latent_shapes) == config.num_dims == 33856
    assert config.masks.count("custom") == 1 and config.masks[-4:] == ("checkerboard",) * 4
    assert config.widths[10] == (16, 64, 64) and config.widths[23] == (128, 256, 256)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_presets_build_and_survive_json(name, task):
    config = FlowConfig.preset(name, 3, task=task, class_names=("a", "b", "c"))
    assert FlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def tiny(**changes):
    return FlowConfig.tiny(3, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 0}, ["num_classes", "0"]),
        ({"num_classes": 2.5}, ["num_classes", "2.5"]),
        ({"input_shape": (1, 18, 16)}, ["squeeze_before", "divisible"]),
        ({"input_shape": (16, 16)}, ["input_shape", "(16, 16)"]),
        ({"input_shape": 16}, ["input_shape", "16"]),
        ({"task": "regression"}, ["task", "regression", "classification"]),
        ({"masks": ("custom", "spiral") * 3}, ["masks[1]", "spiral", "checkerboard"]),
        ({"masks": ()}, ["masks"]),
        ({"squeeze_before": (1, 6)}, ["squeeze_before", "6", "from 0 to 5"]),
        ({"squeeze_before": (4, 1)}, ["squeeze_before", "ascending"]),
        ({"squeeze_before": (-1,)}, ["squeeze_before", "-1"]),
        ({"split_after": (0,)}, ["split_after", "1 channel"]),
        ({"split_after": (9,)}, ["split_after", "9"]),
        ({"widths": ((8, 8, 8),) * 5}, ["widths", "6 in all", "got 5"]),
        ({"widths": ((8, 8),) * 6}, ["widths[0]", "(8, 8)"]),
        ({"widths": ((8, 0, 8),) * 6}, ["widths[0]"]),
        ({"scale_bound": 0.0}, ["scale_bound", "0.0"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"condition_from_step": 6}, ["condition_from_step", "6"]),
        ({"reversible": True, "norm": "batch", "task": "generation"}, ["reversible=True needs norm='group'"]),
        ({"norm": "batch"}, ["norm", "generation"]),
        ({"norm": "layer"}, ["norm", "layer"]),
        ({"block_size": 0}, ["block_size", "0"]),
        ({"class_names": ("a", "b")}, ["class_names", "3"]),
        ({"class_names": ("a", "b", "a")}, ["class_names", "distinct"]),
        ({"dequantize": "gaussian"}, ["dequantize", "gaussian"]),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        FlowConfig(**{**tiny().to_dict(), **changes})
    for word in words:
        assert word in str(error.value)


def test_unknown_and_missing_fields():
    with pytest.raises(ValueError, match="colour"):
        FlowConfig.from_dict({**tiny().to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="widths"):
        FlowConfig.from_dict({k: v for k, v in tiny().to_dict().items() if k != "widths"})
    with pytest.raises(ValueError, match="huge"):
        FlowConfig.preset("huge", 3)
