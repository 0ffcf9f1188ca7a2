"""Named errors of the package. Torch-free, so that the data layer can raise them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike


class FastflowError(Exception):
    """Base class of every error that fastflow raises on purpose."""


class UninitializedModelError(FastflowError, RuntimeError):
    """A model whose ActNorm layers have not seen data was asked to evaluate, invert or sample."""

    def __init__(
        self,
        message: str = (
            "the model's ActNorm layers are not initialised: train it, call initialize(x) or load one"
        ),
    ) -> None:
        super().__init__(message)


class CheckpointError(FastflowError, ValueError):
    """A model folder is missing, incomplete, corrupt or does not match its recorded hash."""


class ExportError(FastflowError, ValueError):
    """A folder of exported graphs is missing, incomplete, tampered with or does not fit together."""


class ManifestError(FastflowError, ValueError):
    """A manifest or an image folder cannot be read as one."""


class OutputFolderError(FastflowError, ValueError):
    """An output folder belongs to something else: other files, another run, other settings."""


class JournalError(FastflowError, RuntimeError):
    """A journal of a run is damaged where it was safely written before."""


class ResumeError(FastflowError, ValueError):
    """A training cannot be gone on with: there is none, its state is damaged, or data or settings differ."""


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped a training. It is no `Exception`, as its parent is none.

    Attributes:
        signum: the number of the signal.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class RunStoppedError(FastflowError, RuntimeError):
    """A run gave up by its own rules: an error row too many. Its results stay, and it can be resumed."""


class ReadoutError(FastflowError, ValueError):
    """A read-out is missing, damaged, belongs to something else, or cannot be fitted to so few volumes."""


class OtherProcessError(RunStoppedError):
    """Another process of a training on several devices stopped; the message is its own.

    Attributes:
        is_first: whether this process is the first, which tells the user.
    """

    def __init__(self, message: str, is_first: bool) -> None:
        self.is_first = is_first
        super().__init__(message)


class VolumeError(FastflowError, ValueError):
    """A volume cannot be used.

    Attributes:
        path: the file.
        code: a short stable identifier of the reason, such as ``"crc"``; `fastflow.data.volume.ERROR_CODES`
            lists all.
    """

    def __init__(self, path: str | PathLike[str], code: str, message: str) -> None:
        self.path = str(path)
        self.code = code
        self.message = message
        super().__init__(f"{self.path}: {message} [{code}]")

    def __reduce__(self) -> tuple[type[VolumeError], tuple[str, str, str]]:
        # The default would rebuild the error from its one formatted string and fail in a worker pool.
        return type(self), (self.path, self.code, self.message)


class InvalidImageWarning(UserWarning):
    """Images hold NaN or infinity; everything that is computed from them is NaN."""


class PrecisionWarning(UserWarning):
    """A device cannot compute in the precision that was asked for and a wider one is used, or a model is too
    narrow for its likelihoods.
    """


class LowSpaceWarning(UserWarning):
    """A folder will be written in which little space is free."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question, ``", did you mean 'epochs'?"``; empty where none is near.

    Args:
        name: that is not known; compared without regard to case, ``-`` and ``_``.
        known: all names that are accepted.
    """
    plain = {other.lower().replace("-", "_"): other for other in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1, cutoff=0.5)
    return f", did you mean {plain[near[0]]!r}?" if near else ""


class CacheWarning(UserWarning):
    """A cache is damaged or cannot be written, and the work goes on without what it would have held."""
