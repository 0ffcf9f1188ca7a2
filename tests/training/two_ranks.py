"""Trainings that two ranks and one must do alike, and one that a rank leaves in its middle.

``python two_ranks.py MODE FOLDER``: the mode is a precision, in which all of its cases are trained, or the
way in which the second rank leaves, ``kill`` or ``error``.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from training_steps import LAYOUT

from fastflow import FlowConfig, MagicFlow
from fastflow.data.slices import SliceSet
from fastflow.training.config import TrainConfig
from fastflow.training.devices import joined
from fastflow.training.trainer import train

# Settings of the model and of its training, and slices to train on: those of the last case give ranks
# unequal shares of their batch.
CASES = {
    "pairwise": ({"reversible": True}, {"objective": "pairwise", "accumulate": 2, "sampler": "balanced"}, 24),
    "likelihood": ({}, {"precision": "32-true", "ema": 0.5}, 24),
    "few": ({}, {"batch_size": 32}, 11),
}


def cases_of(precision):
    return [
        case for case, (_, changes, _) in CASES.items() if changes.get("precision", "64-true") == precision
    ]


def slices(count, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.normal(60 + 40 * labels[:, None, None, None], 20, (count, 1, 16, 16))
    names = tuple(str(i) for i in range(count))
    return SliceSet(
        np.clip(images, 0, 255).astype(np.uint8), labels, np.arange(count), names, names, ("a", "b", "c")
    )


def train_case(case, folder, ranks=None, epochs=2):
    """(weights, history) of a case; dropout is off, since each rank draws its own."""
    flow, changes, count = CASES[case]
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(3, dropout=0.0, dequantize="uniform", **LAYOUT, **flow))
    values = {"precision": "64-true", "batch_size": 8, "warmup_epochs": 0, "epochs": epochs, **changes}
    history = train(model, slices(count, 1), slices(7, 2), TrainConfig(**values), folder / case, ranks=ranks)
    return model.state_dict(), history


def leave(mode, folder):
    with joined(TrainConfig(batch_size=8, devices=2, precision="64-true")) as ranks:
        train_case("few", folder, ranks, epochs=1)
        if ranks.rank == 1 and mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 1:
            raise ValueError("this one is bad")
        train_case("few", folder, ranks, epochs=1)


def main():
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode in ("kill", "error"):
        leave(mode, folder)
    with joined(TrainConfig(batch_size=8, devices=2, precision=mode)) as ranks:
        threads = torch.get_num_threads()
        found = {case: train_case(case, folder, ranks) for case in cases_of(mode)}
        torch.save((found, threads, ranks.world_size), folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main()
