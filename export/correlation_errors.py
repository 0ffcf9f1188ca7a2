"""How far an export's correlations within the latent are from the model's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastflow.errors import ExportError
from fastflow.models.scoring import LabelScorer, score_slices_with_latents
from fastflow.runtime.scorer import OnnxScorer


def correlation_errors(scorer: OnnxScorer, exact: LabelScorer, images: NDArray[np.uint8]) -> dict[str, float]:
    """The largest error of a correlation, where the graph gives them.

    Args:
        scorer: of the export.
        exact: of the model in float64.
        images: (B, C, H, W).

    Returns:
        ``correlation_error``, or nothing.

    Raises:
        ExportError: the graph fails.
    """
    if not scorer.latent_blocks:
        return {}
    try:
        got = scorer.score_with_latents(images)[1]
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    return {"correlation_error": float(np.abs(got - score_slices_with_latents(exact, images)[1]).max())}
