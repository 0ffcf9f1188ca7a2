"""The networks that give a coupling its log-scale and shift."""

from fastflow.models.conditioners.classification import ClassificationConditioner
from fastflow.models.conditioners.generation import GenerationConditioner

__all__ = ["ClassificationConditioner", "GenerationConditioner"]
