"""The model keeps how the scanners of its training look, so that others are told from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fastflow.data.grain import grain_numbers
from fastflow.data.slices import SliceSet
from fastflow.models.inference.correlations import lag_correlations
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8, score_slices_with_latents, volume_log_probs
from fastflow.novelty import KEY, HeldOutVolumes, KnownScanners, volume_features

# So many training volumes of a class are looked at, evenly spaced: more would hardly move a mean.
MAX_VOLUMES_PER_CLASS = 200
BATCH_SIZE = 64

Array = NDArray[np.float64]


def describe_scanners(model: MagicFlow, sets: Mapping[str, SliceSet]) -> None:
    """Keep in the model's metadata how the scanners of ``train`` and ``val`` look; see `KnownScanners`.

    Nothing is kept without a ``val``, or where it has too few volumes. Training volumes cost a pass under
    their own label, validation volumes one under every label.

    Args:
        model: trained, in evaluation mode.
        sets: labelled slices by split.
    """
    model.metadata.pop(KEY, None)
    if "train" not in sets or "val" not in sets:
        return
    features, labels = labelled_features(model, some_of_each_class(sets["train"]))
    held_out = held_out_volumes(model, sets["val"])
    slices = model.metadata.get("preprocess", {}).get("slices")
    known = KnownScanners.fit(features, labels, held_out, slices)
    if known is not None:
        model.metadata[KEY] = known.to_dict()


def some_of_each_class(data: SliceSet, most: int = MAX_VOLUMES_PER_CLASS) -> SliceSet:
    """At most so many volumes of each class, evenly spaced."""
    chosen: list[int] = []
    for label in np.unique(data.volume_labels):
        members = np.flatnonzero(data.volume_labels == label)
        count = min(most, len(members))
        chosen += members[np.arange(count) * len(members) // count].tolist()
    return data if len(chosen) == len(data.paths) else data.subset(chosen)


@torch.inference_mode()
def labelled_features(model: MagicFlow, data: SliceSet) -> tuple[Array, NDArray[np.int64]]:
    """`(features (V, F), labels (V,))` of volumes under their own labels."""
    shapes = model.config.latent_shapes
    correlations = np.empty((len(data), len(shapes), 2))
    for start in range(0, len(data), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        x = from_uint8(torch.from_numpy(np.ascontiguousarray(data.images[part]))).to(model.device)
        z, _ = model(x, torch.from_numpy(data.labels[part]).to(model.device))
        sizes = [int(np.prod(shape)) for shape in shapes]
        blocks = [block.view(-1, *shape) for block, shape in zip(z.split(sizes, dim=1), shapes, strict=True)]
        found = torch.stack([lag_correlations(block) for block in blocks], dim=1)
        correlations[part] = found.double().cpu().numpy()
    return _of_volumes(correlations, data), data.volume_labels


def held_out_volumes(model: MagicFlow, data: SliceSet) -> HeldOutVolumes:
    """The features of volumes under every label, and the label that each of them has and gets.

    Volumes without a finite likelihood are left out.
    """
    log_probs, correlations = score_slices_with_latents(model, data.images, BATCH_SIZE)
    of_volumes = volume_log_probs(log_probs, data.volumes)
    features = _of_volumes(correlations, data)
    finite = np.asarray(np.isfinite(of_volumes).all(axis=1) & np.isfinite(features).all(axis=(1, 2)))
    return HeldOutVolumes(
        features[finite],
        data.volume_labels[finite],
        of_volumes[finite].argmax(axis=1),
        [subject for subject, good in zip(data.subjects, finite, strict=True) if good],
    )


def _of_volumes(correlations: Array, data: SliceSet) -> Array:
    """The features of each volume: (V, F), or (V, K, F) where the correlations are those of K labels."""
    grain = grain_numbers(data.images[:, 0])
    members = [np.flatnonzero(data.volumes == volume) for volume in range(len(data.paths))]
    return np.stack([volume_features(correlations[chosen], grain[chosen]) for chosen in members])
