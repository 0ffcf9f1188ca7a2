"""`squeeze2x2` and its inverse: their index map, and kernels (on a GPU or in the interpreter) against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import BF16, F16, F32, F64, rand

from fastflow import kernels
from fastflow.kernels.squeeze import squeeze2x2_reference, unsqueeze2x2_reference


@given(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
def test_squeeze_by_its_index_and_back(shape):
    batch, channels, height, width = shape
    x = rand(batch, channels, 2 * height, 2 * width)
    y = kernels.squeeze2x2(x)
    for c in range(channels):
        for row in range(2):
            for col in range(2):
                assert torch.equal(y[:, 4 * c + 2 * row + col], x[:, c, row::2, col::2])
    assert torch.equal(kernels.unsqueeze2x2(y), x)


def test_squeeze_refuses():
    with pytest.raises(ValueError, match="even"):
        kernels.squeeze2x2(torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        kernels.unsqueeze2x2(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="floating-point"):
        kernels.squeeze2x2(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
# The last one has two chunks.
@pytest.mark.parametrize(
    "shape", [(2, 2, 6, 10), (1, 1, 2, 2), (0, 2, 4, 4), (1, 2, 46, 46), (1, 1, 66, 64)], ids=str
)
def test_squeeze_moves_every_element(device, shape, dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = rand(*shape, dtype=dtype, device=device).contiguous(memory_format=layout)
        y = kernels.squeeze2x2(x)
        assert torch.equal(y, squeeze2x2_reference(x))
        y = y.contiguous(memory_format=layout)
        assert torch.equal(kernels.unsqueeze2x2(y), unsqueeze2x2_reference(y))
    view = rand(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, device=device)[:, shape[1] :]
    assert torch.equal(kernels.squeeze2x2(view), squeeze2x2_reference(view))


def test_gradcheck(device):
    x = rand(1, 1, 2, 2, device=device).requires_grad_()
    assert torch.autograd.gradcheck(kernels.squeeze2x2, x)
    assert torch.autograd.gradgradcheck(kernels.squeeze2x2, x)
    assert torch.autograd.gradcheck(kernels.unsqueeze2x2, rand(1, 4, 1, 1, device=device).requires_grad_())
