"""Trainings that two ranks and one must do alike, and one that a rank leaves in its middle.

``python two_ranks.py MODE FOLDER``: the mode is a precision, in which all of its cases are trained, or the
way in which the second rank leaves, ``kill`` or ``error``. ``stop`` leaves a training by a signal, and
``resume`` goes on with it, after another one that nothing stops.
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
from fastflow.training.control import RunControl
from fastflow.training.devices import joined
from fastflow.training.phases import Phase
from fastflow.training.trainer import train

# Settings of the model and of its training, and slices to train on: those of the last case give ranks
# unequal shares of their batch.
CASES = {
    "pairwise": ({"reversible": True}, {"objective": "pairwise", "accumulate": 2, "sampler": "balanced"}, 24),
    "likelihood": ({}, {"precision": "32-true", "ema": 0.5}, 24),
    "few": ({}, {"batch_size": 32}, 11),
    "scheduled": (
        {},
        {
            "schedule": (Phase("likelihood", 0.4), Phase("hybrid", 0.6, rivals=1, ramp=0.5)),
            "contrast_weight": 0.1,
            "accumulate": 2,
            "ema": 0.5,
        },
        75,
    ),
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


def train_case(case, folder, ranks=None, epochs=2, dropout=0.0, **control):
    """(weights, history) of a case; dropout draws other numbers on each rank."""
    flow, changes, count = CASES[case]
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(3, dropout=dropout, dequantize="uniform", **LAYOUT, **flow))
    values = {"precision": "64-true", "batch_size": 8, "warmup_epochs": 0, "epochs": epochs, **changes}
    config, control = TrainConfig(**values), RunControl(**control)
    sets = slices(count, 1), slices(7, 2)
    history = train(model, *sets, config, folder / case, control=control, ranks=ranks)
    return model.state_dict(), history


def leave(mode, folder):
    with joined(TrainConfig(batch_size=8, devices=2, precision="64-true")) as ranks:
        train_case("few", folder, ranks, epochs=1)
        if ranks.rank == 1 and mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 1:
            raise ValueError("this one is bad")
        train_case("few", folder, ranks, epochs=1)


def stop(folder):
    def interrupt(report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with joined(TrainConfig(batch_size=8, devices=2, precision="64-true")) as ranks:
        train_case("scheduled", folder, ranks, dropout=0.2, on_step=interrupt)


def resume(folder):
    with joined(TrainConfig(batch_size=8, devices=2, precision="64-true")) as ranks:
        whole = train_case("scheduled", folder / "whole", ranks, dropout=0.2)
        resumed = train_case("scheduled", folder, ranks, dropout=0.2, resume=True)
        torch.save((whole, resumed), folder / f"{ranks.rank}.pt")


def main():
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode in ("kill", "error"):
        return leave(mode, folder)
    if mode in ("stop", "resume"):
        return {"stop": stop, "resume": resume}[mode](folder)
    with joined(TrainConfig(batch_size=8, devices=2, precision=mode)) as ranks:
        threads = torch.get_num_threads()
        found = {case: train_case(case, folder, ranks) for case in cases_of(mode)}
        torch.save((found, threads, ranks.world_size), folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main()
