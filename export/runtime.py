"""Scoring with an export, without PyTorch: the public face of `fastflow.runtime`.

    python -m fastflow.export.runtime FOLDER FILES...

prints one line per file: path, status, predicted, posterior, margin, typicality, error.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from fastflow.decision import NOT_FINITE, posterior
from fastflow.runtime import sessions
from fastflow.runtime.command import (
    COLUMNS,
    FAILED,
    FINISHED_WITH_ERRORS,
    INTERRUPTED,
    OK,
    USAGE,
    json_line,
    main,
    text_line,
)
from fastflow.runtime.export_folder import DOCUMENT, Export, check_metadata, read_export
from fastflow.runtime.scorer import BUCKETS, SCORE, OnnxScorer, Prediction, spans
from fastflow.runtime.sessions import import_onnxruntime, is_memory_error, open_session

__all__ = [
    "BUCKETS",
    "COLUMNS",
    "DOCUMENT",
    "FAILED",
    "FINISHED_WITH_ERRORS",
    "INTERRUPTED",
    "NOT_FINITE",
    "OK",
    "SCORE",
    "USAGE",
    "Export",
    "OnnxScorer",
    "Prediction",
    "check_metadata",
    "import_onnxruntime",
    "is_memory_error",
    "json_line",
    "main",
    "open_session",
    "posterior",
    "read_export",
    "spans",
    "text_line",
]

# Old names of `fastflow.runtime.sessions`, which could be imported from here.
_RENAMED = {
    "Bound": "BoundRunner",
    "CHOICES": "PROVIDER_CHOICES",
    "CUDA": "CUDA_PROVIDER",
    "Plain": "PlainRunner",
    "Run": "Runner",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        message = (
            f"{__name__}.{name} is now fastflow.runtime.sessions.{_RENAMED[name]}; the old name goes in 0.3"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sessions, _RENAMED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
