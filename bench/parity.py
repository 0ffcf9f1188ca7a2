"""Parity of exports of random weights. ``python -m bench.parity OUT [PRESET [TASK [SLICES]]]``.

Trained weights are compared by `fastflow export`; here a preset (`paper`) of a task (`classification`) gets random weights, is
exported to OUT/export with all graphs and compared on slices (16) of the heads that ship with the package. Printed is what
`fastflow export` prints. Of generation conditioners at 184x184 pixels take 2 slices, or hours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from fastflow.export.onnx import export_onnx
from fastflow.export.verify import SLICES, anatomy_slices

from bench.gpu import CLASSES, randomize
from fastflow import FlowConfig, MagicFlow
from fastflow.cli.export import describe
from fastflow.data.preprocess import to_unit_range


def save_random(folder: Path, preset: str, task: str) -> None:
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.preset(preset, CLASSES, task=task))
    randomize(model)
    x = torch.from_numpy(to_unit_range(anatomy_slices(model.config.input_shape, 8)))
    # The grain of noise, so that no channel is constant.
    model.initialize(x + 0.01 * torch.randn_like(x))
    model.eval().save(folder)


def main(arguments: Sequence[str]) -> None:
    out = Path(arguments[0])
    preset, task, slices = (*arguments[1:], *("paper", "classification", str(SLICES))[len(arguments) - 1 :])
    save_random(out / "model", preset, task)
    shape = MagicFlow.load(out / "model").config.input_shape
    done = export_onnx(out / "model", out / "export", images=anatomy_slices(shape, int(slices)), overwrite=True)
    for name, size in done.sizes.items():
        print(f"{name}\t{size / 2**20:.2f} MiB")
    print(f"{sum(done.sizes.values()) / 2**20:.1f} MiB in all, the checkpoint has {done.checkpoint_bytes / 2**20:.1f} MiB")
    assert done.parity is not None
    print(describe(done.parity))


if __name__ == "__main__":
    main(sys.argv[1:])
