"""A volume as an export classifies it."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A volume as an export classifies it.

    Attributes:
        path: the file.
        label: the likeliest label, by the read-out that was asked for, as posterior and margin are.
        posterior: (K,) probabilities.
        log_probs: (K,) nats, summed over the volume's slices.
        margin: posterior log-odds between the best and the second label, nats.
        typicality: p-value of the likelihood among validation data; None where there is nothing to compare
            with.
        flags: (code, message) of what is doubtful, as in the rows of `fastflow.archive.classify`.
        argmax: the label of the largest log-likelihood and prior, whatever the read-out.
        scanner_p: p-value of a scanner of training; None where there is nothing to compare with.
    """

    path: str
    label: str
    posterior: NDArray[np.float64]
    log_probs: NDArray[np.float64]
    margin: float
    typicality: float | None
    flags: tuple[tuple[str, str], ...]
    argmax: str = ""
    scanner_p: float | None = None
