"""Launches of `head_tables` for `bench.aot`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bench.aot_parts import F32, F64, Case, launcher


def table_cases() -> Iterator[Case]:
    """Both dtypes, the models' number of features and another, weights that 16 divides and others."""
    for dtype, features, offset in itertools.product((F32, F64), (64, 24), (0, 1)):
        memory = torch.empty(32 * features + offset, dtype=dtype)
        weights = [memory[offset:].view(32, features)] * 48
        biases = [torch.empty(32, dtype=dtype)] * 48
        columns, grad = torch.empty(48, features, 7, dtype=dtype), torch.empty(48 * 32 * 7, dtype=dtype)
        arguments = columns, weights, biases, grad
        yield lambda arguments=arguments: launcher("head_tables")(*arguments[:3])
        yield lambda arguments=arguments: launcher("head_tables_backward")(
            arguments[3], arguments[0], arguments[1]
        )
