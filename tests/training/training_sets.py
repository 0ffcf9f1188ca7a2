"""A set of slices of two classes, settings and a model, which several tests train."""

import numpy as np
import torch

from fastflow import FlowConfig, MagicFlow
from fastflow.data.slices import SliceSet
from fastflow.training.trainer import TrainConfig

NAMES = ("dark", "bright")
# Two squeezes and a split in half as many steps as the preset has.
LAYOUT = {
    "masks": ("custom", "checkerboard", "channel"),
    "squeeze_before": (0, 1),
    "split_after": (1,),
    "widths": ((8, 8, 8),) * 3,
}


def make_set(volumes=12, slices=2, seed=0, names=NAMES):
    """Two classes that differ in brightness and in the direction of their stripes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(volumes) % len(names)
    images = rng.normal(90, 12, (volumes, slices, 1, 16, 16)) + 50 * labels[:, None, None, None, None]
    stripes = 25 * np.sin(np.arange(16))
    images += np.where(labels[:, None, None, None, None] == 0, stripes[:, None], stripes)
    return SliceSet(
        np.clip(images, 0, 255).astype(np.uint8).reshape(-1, 1, 16, 16),
        np.repeat(labels, slices).astype(np.int64),
        np.repeat(np.arange(volumes), slices).astype(np.int64),
        tuple(f"{i}.nii.gz" for i in range(volumes)),
        tuple(f"sub-{i}" for i in range(volumes)),
        names,
    )


def config(**changes):
    values = {"epochs": 3, "batch_size": 8, "warmup_epochs": 0.5, "learning_rate": 3e-3, "augment": "none"}
    return TrainConfig(**{**values, **changes})


def new_model(**changes):
    torch.manual_seed(0)
    return MagicFlow(FlowConfig.tiny(2, dequantize="uniform", class_names=NAMES, **LAYOUT, **changes))
