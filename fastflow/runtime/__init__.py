"""Scoring with an export by ONNX Runtime: NumPy and nibabel, no PyTorch."""
