"""Triton kernels and their launchers, each with the name of its op. The first launch imports Triton."""
