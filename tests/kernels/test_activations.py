"""Activations on CPUs: bits of a sample depend on that sample alone."""

from __future__ import annotations

import pytest
import torch

from fastflow.kernels.cpu.activations import gelu_


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 7, 32, 33, 529 * 8, 529 * 32, 32768, 33000, 529 * 64, 70000])
def test_gelu_of_a_sample_does_not_know_its_batch(size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 3, 7):
            x = torch.randn(batch, size, generator=torch.Generator().manual_seed(batch))
            got = gelu_(x.clone())
            assert torch.allclose(got, torch.nn.functional.gelu(x.double()).float(), rtol=1e-5, atol=1e-6)
            for i in range(batch):
                assert torch.equal(gelu_(x[i : i + 1].clone()), got[i : i + 1])
    finally:
        torch.set_num_threads(before)
