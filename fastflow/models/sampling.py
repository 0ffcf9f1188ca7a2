"""Drawing many images: `Sampler` computes once what no image changes, and captures its passes on a GPU."""

from __future__ import annotations

from fastflow.models.inference.sampler import SAMPLER_ENGINES, Sampler

__all__ = ["SAMPLER_ENGINES", "Sampler"]
