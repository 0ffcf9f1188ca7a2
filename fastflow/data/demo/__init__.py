"""The demo archive: simulated scanners on real anatomy.

Four real heads become hundreds of subjects (`subjects`). Each subject is scanned once, by one of seven
simulated scanners (`scanners`, `acquisition`), and written as a file with a BIDS name (`archive`).
"""

from __future__ import annotations

from fastflow.data.demo.acquisition import acquire, bias_field, g_factor_map, window_matrix
from fastflow.data.demo.archive import SIZES, Scan, build_archive, make_scan, plan_archive
from fastflow.data.demo.scanners import SCANNERS, Scanner, tissue_signals
from fastflow.data.demo.subjects import (
    TRAINING_HEADS,
    UNSEEN_HEAD,
    Subject,
    draw_signal,
    draw_subject,
    random_velocity,
    texture,
)

__all__ = [
    "SCANNERS",
    "SIZES",
    "TRAINING_HEADS",
    "UNSEEN_HEAD",
    "Scan",
    "Scanner",
    "Subject",
    "acquire",
    "bias_field",
    "build_archive",
    "draw_signal",
    "draw_subject",
    "g_factor_map",
    "make_scan",
    "plan_archive",
    "random_velocity",
    "texture",
    "tissue_signals",
    "window_matrix",
]
