"""Tables of addresses."""

from __future__ import annotations

import pytest
import torch

from fastflow.kernels.triton import pointers
from fastflow.kernels.triton.launch import recording
from fastflow.kernels.triton.pointers import pointer_table


def test_a_table_holds_addresses_and_is_kept() -> None:
    tensors = [torch.zeros(3), torch.zeros(2, 2)]
    table = pointer_table(tensors)
    assert table.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert pointer_table(tensors) is table
    tensors[0] = torch.zeros(3)
    assert pointer_table(tensors).tolist() == [tensor.data_ptr() for tensor in tensors]


def test_the_number_of_tables_is_bounded() -> None:
    kept = [torch.zeros(1) for _ in range(pointers.MAX_TABLES + 10)]
    for tensor in kept:
        pointer_table([tensor])
    assert len(pointers._tables) <= pointers.MAX_TABLES


def test_recording_looks_at_no_address() -> None:
    with recording():
        assert pointer_table([torch.empty(2, device="meta")]).shape == (1,)


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensors must be contiguous and on cpu, got strides \(1, 2\)"):
        pointer_table([torch.zeros(3, 2).t()])
