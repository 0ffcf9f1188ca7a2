"""Volumes, slices and manifests: everything before the model, without torch."""
