"""Masks: the six patterns, their inversion, and what an application mask may be."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastflow import FlowConfig
from fastflow.models.masks import application_mask, build_mask, build_masks


@pytest.mark.parametrize("step", [0, 1, 2])
def test_patterns_by_their_definition(step):
    shape, n = (3, 5, 7), 2
    rules = {
        "checkerboard": lambda c, r, k: (r + k) % 2 ^ ((step + c) % 2),
        "vertical_stripe": lambda c, r, k: k % 2 ^ ((step + c) % 2),
        "horizontal_stripe": lambda c, r, k: r % 2 ^ ((step + c) % 2),
        "block_checkerboard": lambda c, r, k: (r // n + k // n) % 2 ^ ((step + c) % 2),
        "channel": lambda c, r, k: (c < shape[0] // 2) ^ (step % 2),
    }
    for name, rule in rules.items():
        mask = build_mask(name, step, shape, None, n)
        assert mask.dtype == torch.bool
        want = [
            [[bool(rule(c, r, k)) for k in range(shape[2])] for r in range(shape[1])] for c in range(shape[0])
        ]
        assert mask.tolist() == want, name


def test_one_channel_gives_an_all_or_nothing_channel_mask():
    assert not build_mask("channel", 0, (1, 2, 2), None, 2).any()
    assert build_mask("channel", 1, (1, 2, 2), None, 2).all()


def test_custom_is_broadcast_inverted_at_odd_steps_and_thinned_after_a_squeeze():
    image = np.random.default_rng(0).integers(0, 2, (16, 16))
    config = FlowConfig.tiny(2, masks=("custom",) * 6)
    masks = build_masks(config, image)
    assert np.array_equal(masks[0][0].numpy(), image.astype(bool))
    assert masks[1].shape == (4, 8, 8)
    assert np.array_equal(masks[1][3].numpy(), ~image[::2, ::2].astype(bool))


@pytest.mark.parametrize("kind", [np.uint8, np.float32, bool])
def test_application_mask_kinds(kind):
    image = np.eye(4).astype(kind)
    assert torch.equal(application_mask(image, 4, 4), torch.eye(4).bool())
    assert torch.equal(application_mask(torch.from_numpy(image), 4, 4), torch.eye(4).bool())


def test_application_mask_from_png(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray((np.eye(4) * 255).astype(np.uint8)).save(path)
    assert torch.equal(application_mask(path, 4, 4), torch.eye(4).bool())
    assert torch.equal(application_mask(str(path), 4, 4), torch.eye(4).bool())
    Image.fromarray((np.eye(4) * 128).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match="only 0 and 1"):
        application_mask(path, 4, 4)
    path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"mask\.png"):
        application_mask(path, 4, 4)


@pytest.mark.parametrize("value", [np.eye(4) * 0.5, np.eye(4) * 2, -np.eye(4), np.eye(4) * np.nan])
def test_values_other_than_0_and_1_are_refused(value):
    with pytest.raises(ValueError, match="only 0 and 1"):
        application_mask(value, 4, 4)


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(3, 4\)"):
        application_mask(np.ones((3, 4)), 4, 4)


def test_default_mask_is_the_shipped_anatomy():
    mask = application_mask(None, 184, 184)
    assert 0.15 < mask.float().mean() < 0.6
    assert not mask[0].any() and not mask[:, 0].any()
    assert mask[92, 60] and mask[92, 124]
