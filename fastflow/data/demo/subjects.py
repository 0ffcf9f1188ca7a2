"""Subjects that are derived from the real heads, and the ideal images of them.

A subject is a head under a random diffeomorphic deformation. Most subjects are a mixture of two heads, warped
part of the way towards each other. The texture of the real images is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from fastflow.data import anatomy
from fastflow.data.anatomy import GRID, FloatArray
from fastflow.data.demo._filters import apply_matrices, resize

# aomic_0042 comes from the same study as aomic_0017 and shares its field of view, so that a model has seen
# its kind of background: the unseen head then tests anatomy, not padding.
UNSEEN_HEAD = "aomic_0042"
TRAINING_HEADS = tuple(name for name in anatomy.HEADS if name != UNSEEN_HEAD)
# This share of the subjects is a mixture of two heads.
MIXED_SHARE = 0.7
# Deformations are drawn on this grid of 4 mm.
COARSE_GRID = tuple(-(-n // 2) for n in GRID)
# (nodes along each axis, amplitude in 4 mm voxels) of the random fields: 32, 16 and 10 mm structure.
DEFORMATION_SCALES = ((5, 0.55), (9, 0.32), (15, 0.16))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A derived anatomy: one or two heads with weights, each with the displacement that brings it there.

    Attributes:
        heads: names.
        weights: share of each head's signal.
        displacements: (3, 91, 109, 91) each, in 2 mm voxels.
    """

    heads: tuple[str, ...]
    weights: tuple[float, ...]
    displacements: tuple[FloatArray, ...]


def random_velocity(rng: Generator) -> FloatArray:
    """A smooth random velocity field on the 4 mm grid, (3, 46, 55, 46) in its voxels."""
    velocity = np.zeros((3, *COARSE_GRID), dtype=np.float32)
    for nodes, amplitude in DEFORMATION_SCALES:
        field = rng.standard_normal((3, nodes, nodes, nodes), dtype=np.float32) * np.float32(amplitude)
        velocity += np.stack([resize(part, COARSE_GRID) for part in field])
    return velocity


def draw_subject(rng: Generator, heads: Sequence[str]) -> Subject:
    """Draw an anatomy from `heads`: one deformed head, or two met part of the way and deformed together."""
    inner = anatomy.exponentiate(random_velocity(rng))
    if len(heads) == 1 or rng.random() > MIXED_SHARE:
        return Subject((str(rng.choice(heads)),), (1.0,), (_to_fine(inner),))
    first, second = (str(name) for name in rng.choice(heads, 2, replace=False))
    t = float(rng.random())
    paths = [(first, second, t), (second, first, 1.0 - t)]
    outer = [anatomy.exponentiate(np.float32(share) * anatomy.load_velocity(a, b)) for a, b, share in paths]
    # The random deformation of the subject comes first, then the way from the subject back to each head.
    displacements = tuple(_to_fine(inner + anatomy.warp(field, inner)) for field in outer)
    return Subject((first, second), (1.0 - t, t), displacements)


def _to_fine(displacement: FloatArray) -> FloatArray:
    """A displacement (3, 46, 55, 46) in 4 mm voxels on the 2 mm grid, (3, 91, 109, 91) in 2 mm voxels."""
    matrices = []
    for inputs, outputs in zip(COARSE_GRID, GRID, strict=True):
        # Coarse voxel i covers the fine voxels 2i and 2i + 1.
        where = np.clip((np.arange(outputs) - 0.5) / 2.0, 0, inputs - 1)
        low = np.minimum(where.astype(int), inputs - 2)
        matrix = np.zeros((outputs, inputs), dtype=np.float32)
        matrix[np.arange(outputs), low] = 1.0 - (where - low)
        matrix[np.arange(outputs), low + 1] = where - low
        matrices.append(matrix)
    return np.stack([np.float32(2.0) * apply_matrices(matrices, part) for part in displacement])


@functools.cache
def texture(name: str) -> FloatArray:
    """Residual texture of a real head, 1 in air: its image over that of its tissues' means, clipped."""
    head = anatomy.load_head(name)
    weight = head.fractions.sum(axis=(1, 2, 3))
    means = (head.fractions * head.t1).sum(axis=(1, 2, 3)) / weight
    expected = np.tensordot(means.astype(np.float32), head.fractions, axes=1)
    ratio = np.clip((head.t1 + 4.0) / (expected + 4.0), 0.4, 1.7)
    return np.where(expected > 1.0, ratio, np.float32(1.0)).astype(np.float32)


def draw_signal(subject: Subject, signals: FloatArray) -> FloatArray:
    """The ideal image (91, 109, 91) of a subject.

    Args:
        subject: whose heads are brought to where they belong.
        signals: (5,), the signal of each tissue; the heads' textures multiply it.
    """
    image = np.zeros(GRID, dtype=np.float32)
    for name, weight, displacement in zip(subject.heads, subject.weights, subject.displacements, strict=True):
        ideal = np.tensordot(signals, anatomy.load_head(name).fractions, axes=1) * texture(name)
        image += np.float32(weight) * anatomy.warp(ideal, displacement)
    return image
