"""Numbers that are given: bandwidths of devices, shapes of the paper's model, the targets of the counts."""

from __future__ import annotations

Shape = tuple[int, int, int]

# Bytes per second of the SXM cards, from their data sheets; the A100 is the one with 80 GB.
BANDWIDTH = {"A100": 2039e9, "H100": 3350e9, "H200": 4800e9}

# The (C, H, W) of the paper's steps, by the steps that have it.
PAPER_SHAPES: dict[str, Shape] = {
    "0-4": (1, 184, 184),
    "5-7": (4, 92, 92),
    "8-10": (2, 92, 92),
    "11-13": (8, 46, 46),
    "14-16": (4, 46, 46),
    "17-19": (16, 23, 23),
    "20-23": (8, 23, 23),
}
# One step of each of those shapes.
STEPS = (0, 5, 8, 11, 14, 17, 20)
CLASSES = 7
BOUND = 0.5

PASSES = ("forward", "forward+backward")

# The targets: moved over needed bytes and over the composite's of a half-step outside of its conditioner, and
# launches and bytes of a whole half-step over those of plain ATen.
MAX_OVER_NEEDED = 1.1
MAX_OVER_COMPOSITE = 1 / 3
MAX_LAUNCHES_OVER_PLAIN = 0.5
MAX_BYTES_OVER_PLAIN = 0.4
