"""The Gaussian read-out: a volume's label from the pattern of its K log-likelihoods, not from the largest.

The gaps of a volume are its log-likelihoods a slice minus their mean over the labels. Anatomy moves all gaps
together along a few directions; a covariance within the classes knows these directions and discounts them,
which neither a temperature nor a bias of each label can do. NumPy only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.errors import ReadoutError

READOUTS = ARGMAX, GAUSSIAN = "argmax", "gaussian"
FORMAT = 1
# Two halves of a symmetric matrix may differ by rounding, relative to its largest entry.
ASYMMETRY = 1e-9

Array = NDArray[np.float64]


def contrasts(classes: int) -> Array:
    """An orthonormal basis of the differences between labels, (K-1, K): Helmert's contrasts.

    Its rows sum to 0, so that what all labels share vanishes.
    """
    basis = np.zeros((classes - 1, classes))
    for i in range(1, classes):
        basis[i - 1, :i], basis[i - 1, i] = 1.0, -i
        basis[i - 1] /= math.sqrt(i * (i + 1.0))
    return basis


def gaps(log_probs: NDArray[Any]) -> Array:
    """Log-likelihoods minus their mean over the labels, in the basis of `contrasts`.

    Args:
        log_probs: (..., K) nats a slice.

    Returns:
        (..., K-1) nats a slice.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    # Log-likelihoods are tens of thousands of nats, their gaps tens: the common part goes first.
    centred = values - values.mean(axis=-1, keepdims=True)
    return np.asarray(centred @ contrasts(values.shape[-1]).T)


# Arrays have no equality that is true or false, so read-outs are compared by their documents.
@dataclasses.dataclass(frozen=True, eq=False)
class GaussianReadout:
    """Gaussian densities of the gaps of each class, with one covariance: linear discriminant analysis.

    Source: Fisher, 1936; Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, section 4.3.

    Attributes:
        class_names: K names, at least 2.
        means: (K, K-1) mean `gaps` of each class, nats a slice.
        covariance: (K-1, K-1) of the gaps within a class, shrinkage included.
        temperature: divides the log-densities; positive, fitted on volumes that the read-out had not seen.
        slices: the choice of slices that it was fitted for, see `Preprocess`; None where unknown.
        slice_counts: least and most slices of a volume of the fit.
        shrinkage: of the covariance, 0 to 1; for information.
        volumes: (K,) number of volumes of each class in the fit; for information.

    Raises:
        ValueError: a shape does not fit, a number is not finite, the covariance is not symmetric and positive
            definite, or the temperature is not positive; the message names the field.
    """

    class_names: tuple[str, ...]
    means: Array
    covariance: Array
    temperature: float = 1.0
    slices: str | None = None
    slice_counts: tuple[int, int] = (1, 1)
    shrinkage: float = 0.0
    volumes: tuple[int, ...] = ()
    _weights: Array = dataclasses.field(init=False, repr=False)
    _center: Array = dataclasses.field(init=False, repr=False)
    _bias: Array = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        k = len(self.class_names)
        if k < 2:
            raise ValueError(f"class_names must be at least 2, got {list(self.class_names)}")
        means = _checked("means", self.means, (k, k - 1))
        covariance = _checked("covariance", self.covariance, (k - 1, k - 1))
        largest = float(np.abs(covariance).max())
        if float(np.abs(covariance - covariance.T).max()) > ASYMMETRY * largest:
            raise ValueError("covariance must be symmetric")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        least, most = self.slice_counts
        if not 1 <= least <= most:
            raise ValueError(f"slice_counts must be two growing counts from 1, got {self.slice_counts}")
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            raise ValueError("covariance must be positive definite") from None
        center = means.mean(axis=0)
        whitened = np.linalg.solve(factor, (means - center).T)
        for name, value in (
            ("means", means),
            ("covariance", covariance),
            ("_weights", np.linalg.solve(factor.T, whitened).T),
            ("_center", center),
            ("_bias", -0.5 * (whitened**2).sum(axis=0)),
        ):
            object.__setattr__(self, name, value)

    def discriminants(self, log_probs: NDArray[Any]) -> Array:
        """Logarithms of the classes' densities, up to a number that the classes share; not yet tempered.

        `fastflow.decision.posterior` of them, the read-out's temperature and a prior are the probabilities.

        Args:
            log_probs: (..., K) means over a volume's slices, nats a slice.

        Returns:
            (..., K) nats a volume.

        Raises:
            ValueError: they are of another number of labels.
        """
        values = np.asarray(log_probs, dtype=np.float64)
        if values.shape[-1:] != (len(self.class_names),):
            raise ValueError(
                f"log_probs must be of the read-out's {len(self.class_names)} classes, got {values.shape}"
            )
        # The linear form has no squares of distances, which lose the log-odds of far volumes to rounding.
        return np.asarray((gaps(values) - self._center) @ self._weights.T + self._bias)

    @property
    def gain(self) -> float:
        """Largest change of a log-odds of the read-out per nat of change of the log-odds that it reads."""
        rows = self._weights @ contrasts(len(self.class_names)) / self.temperature
        # Changes between -1/2 and 1/2 nat have differences of at most one nat.
        return 0.5 * float(np.abs(rows[:, None] - rows[None, :]).sum(axis=2).max())

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_dict` is its exact inverse."""
        return {
            "format": FORMAT,
            "kind": GAUSSIAN,
            "class_names": list(self.class_names),
            "means": self.means.tolist(),
            "covariance": self.covariance.tolist(),
            "temperature": self.temperature,
            "slices": self.slices,
            "slice_counts": list(self.slice_counts),
            "shrinkage": self.shrinkage,
            "volumes": list(self.volumes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GaussianReadout:
        """Build from `to_dict`'s form.

        Raises:
            ReadoutError: it is of another format, or is damaged.
        """
        try:
            if values["format"] != FORMAT or values["kind"] != GAUSSIAN:
                raise ReadoutError(
                    f"the read-out has format {values['format']!r} and kind {values['kind']!r}, this version "
                    f"of fastflow reads format {FORMAT} and kind {GAUSSIAN!r}: update fastflow"
                )
            least, most = values["slice_counts"]
            slices = values["slices"]
            return cls(
                tuple(map(str, values["class_names"])),
                np.asarray(values["means"], dtype=np.float64),
                np.asarray(values["covariance"], dtype=np.float64),
                float(values["temperature"]),
                None if slices is None else str(slices),
                (int(least), int(most)),
                float(values["shrinkage"]),
                tuple(map(int, values["volumes"])),
            )
        except ReadoutError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReadoutError(f"the read-out is damaged: {error!r}; fit it again") from error


def readout_of(metadata: Mapping[str, Any], class_names: Sequence[str]) -> GaussianReadout | None:
    """The read-out in a model's metadata or an export's document; None where there is none.

    Raises:
        ReadoutError: it is of another format, is damaged, or belongs to other classes.
    """
    values = metadata.get("readout")
    if values is None:
        return None
    readout = GaussianReadout.from_dict(values)
    if readout.class_names != tuple(class_names):
        raise ReadoutError(
            f"the read-out belongs to the classes {', '.join(readout.class_names)}, but the model has "
            f"{', '.join(class_names)}: fit it again"
        )
    return readout


def chosen_readout(
    name: str, metadata: Mapping[str, Any], class_names: Sequence[str], slices: str | None
) -> GaussianReadout | None:
    """The read-out that a run decides by; None for argmax.

    Args:
        name: one of `READOUTS`.
        metadata: of a model, or an export's document.
        class_names: K names.
        slices: the run's choice of slices; None where a single slice is decided on, and flagged.

    Raises:
        ReadoutError: there is none, it is damaged, or was fitted to another choice of slices.
        ValueError: the name is none of `READOUTS`.
    """
    if check_readout(name) == ARGMAX:
        return None
    readout = readout_of(metadata, class_names)
    if readout is None:
        reason = (metadata.get("calibration") or {}).get("no_readout")
        raise ReadoutError(
            f"readout {name!r}: the model has no read-out{f' ({reason})' if reason else ''}; fit one with "
            "`fastflow calibrate MODEL MANIFEST --overwrite` (and export again), or decide by argmax"
        )
    if slices is not None and readout.slices != slices:
        raise ReadoutError(
            f"readout {name!r}: it was fitted to slices {readout.slices!r}, not to {slices!r}; take those "
            "slices, calibrate a copy of the model with `fastflow calibrate --slices`, or decide by argmax"
        )
    return readout


def check_readout(name: str) -> str:
    """The name of a read-out.

    Raises:
        ValueError: it is none of `READOUTS`.
    """
    if name not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {name!r}")
    return name


def _checked(name: str, values: Array, shape: tuple[int, ...]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array
