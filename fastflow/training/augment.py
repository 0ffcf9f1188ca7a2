"""Augmentation of training slices.

Source: the published recipe (rotation, shift, noise, and their probabilities).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.training.rows import BatchRows


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random small movements and noise; the defaults are the published ones.

    Attributes:
        move_probability: chance that an image is moved.
        degrees: largest rotation to either side; 0 shifts by whole pixels, which keeps an image's texture.
        pixels: largest shift along each axis.
        noise_probability: chance that an image gets noise.
        noise: standard deviation of Gaussian noise, in units of the [-1, 1] range.
    """

    move_probability: float = 0.8
    degrees: float = 3.0
    pixels: int = 2
    noise_probability: float = 0.6
    noise: float = 0.01

    def __call__(self, x: Tensor, generator: torch.Generator | None, rows: BatchRows | None = None) -> Tensor:
        """Augment x (B, C, H, W) in [-1, 1]; uncovered pixels become -1, values are clamped to [-1, 1].

        Numbers are drawn from `generator`; where it is None, from the default one of the device of x, which
        nothing waits for. `rows` says which rows of a larger batch those of x are: they get the numbers that
        the larger batch would give them.
        """
        rows = BatchRows.all(len(x)) if rows is None else rows
        if self.move_probability > 0:
            moves = self._draw_moves(x, generator, rows)
            moved = _move(x, moves, "bilinear" if self.degrees else "nearest")
            x = torch.where(self._chosen(x, self.move_probability, generator, rows), moved, x)
        if self.noise_probability > 0 and self.noise > 0:
            drawn = rows.draw(torch.randn, *x.shape[1:], generator=generator, device=_source(x, generator))
            noise = self.noise * drawn.to(x)
            x = torch.where(
                self._chosen(x, self.noise_probability, generator, rows), (x + noise).clamp(-1.0, 1.0), x
            )
        return x

    def _chosen(
        self, x: Tensor, probability: float, generator: torch.Generator | None, rows: BatchRows
    ) -> Tensor:
        drawn = rows.draw(torch.rand, 1, 1, 1, generator=generator, device=_source(x, generator))
        return (drawn < probability).to(x.device)

    def _draw_moves(self, x: Tensor, generator: torch.Generator | None, rows: BatchRows) -> Tensor:
        source = _source(x, generator)
        drawn = rows.draw(torch.rand, generator=generator, device=source)
        angle = torch.deg2rad(self.degrees * (2.0 * drawn - 1.0))
        pixels = functools.partial(torch.randint, -self.pixels, self.pixels + 1)
        shift = rows.draw(pixels, 2, generator=generator, device=source)
        return torch.cat((angle[:, None], shift), dim=1)


def _source(x: Tensor, generator: torch.Generator | None) -> torch.device:
    """The device that numbers for x are drawn on."""
    return x.device if generator is None else generator.device


def _move(x: Tensor, moves: Tensor, mode: str) -> Tensor:
    """Rotate each image of x (B, C, H, W) about its centre, then shift it.

    Args:
        x: in [-1, 1].
        moves: (B, 3): radians, pixels along x, pixels along y.
        mode: how `grid_sample` reads between pixels.
    """
    height, width = x.shape[2:]
    angle, shift = moves[:, 0], moves[:, 1:]
    cos, sin = angle.cos(), angle.sin()
    # Grid coordinates run from -1 to 1 along both axes, so a rotation of pixels carries the aspect ratio.
    affine = torch.stack(
        (
            torch.stack((cos, -sin * height / width, 2.0 * shift[:, 0] / width), dim=1),
            torch.stack((sin * width / height, cos, 2.0 * shift[:, 1] / height), dim=1),
        ),
        dim=1,
    )
    grid = F.affine_grid(affine.to(x), list(x.shape), align_corners=False)
    # Padding with zeros is padding with -1 once the range starts at 0.
    return F.grid_sample(x + 1.0, grid, mode=mode, padding_mode="zeros", align_corners=False) - 1.0


PAPER = Augment()
SHIFT = Augment(degrees=0.0, noise_probability=0.0)
AUGMENTS = {"paper": PAPER, "shift": SHIFT, "none": None}
