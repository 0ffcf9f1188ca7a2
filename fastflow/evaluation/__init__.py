"""Evaluation of a model: metrics, the baseline beside them, pictures and the report. Torch-free."""
