"""MAGIC-Flow and its parts."""
