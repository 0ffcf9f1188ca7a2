"""How good a model is: metrics, the baseline beside them, pictures and the report. Torch-free."""
