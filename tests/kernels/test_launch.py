"""How kernels are started: grids, addresses beyond 2^31, and what autocast leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from numerics import BF16, F32, far_apart, masks, rand, run, same_bits

from fastflow import kernels
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import parts
from fastflow.kernels.triton.launch import kernel
from fastflow.kernels.triton.parts import elements, locate

if TYPE_CHECKING:
    import triton.language as tl


def test_addresses_beyond_two_to_the_31(device):
    if device == "cuda":
        pytest.skip("reserves memory that only a CPU does not fill")
    # The distance of the two samples passes 2^31 elements.
    x = far_apart((2, 4, 4, 4), 2**31 + 16)
    small = x.contiguous()
    mask = masks("even", (4, 4, 4))
    weight, bias = torch.eye(4) + 0.1, torch.ones(4)
    for op in (
        lambda v: kernels.affine_coupling(v, small, small, mask)[0],
        lambda v: kernels.affine_coupling(small, v, small, mask)[0],
        lambda v: kernels.channel_mix(v, weight, bias),
        lambda v: kernels.channel_mix(v, torch.eye(16), torch.ones(16), squeeze=True),
        kernels.squeeze2x2,
        kernels.unsqueeze2x2,
        lambda v: kernels.latent_prior(
            v.flatten(1) if v is small else v.as_strided((2, 64), (v.stride(0), 1))
        ),
    ):
        assert torch.equal(op(x), op(small))


@kernel
def _probe_kernel(out_ptr, pid, n_chunks, n_v, INT64_OFFSETS: tl.constexpr):
    b, chunk = locate(pid, n_chunks, INT64_OFFSETS)
    tl.store(out_ptr, b * elements(n_v, 8, INT64_OFFSETS) + chunk * 2048)
    tl.store(out_ptr + 1, chunk * 2048)


def test_offsets_within_a_sample_beyond_two_to_the_31(device):
    """The offset that a program computes, for program numbers and sizes that no memory holds."""
    assert launching.needs_int64_offsets(2**31 - 100, 2048)
    assert not launching.needs_int64_offsets(2**31 - 5000, 2048)
    out = torch.zeros(2, dtype=torch.int64, device=device)
    n = 3 * 2**31
    chunks = n // 2048
    pid = 70_000 * chunks + chunks - 1
    launching.launch(_probe_kernel, 1, out, 1, out, pid, chunks, n // 8, INT64_OFFSETS=True)
    assert out.tolist() == [70_000 * n + n - 2048, n - 2048]
    # A size that needs no int64 within a sample does need it with more than 65,535 samples.
    launching.launch(_probe_kernel, 1, out, 1, out, 99_999 * 17 + 16, 17, 33856 // 8, INT64_OFFSETS=False)
    assert out.tolist() == [99_999 * 33856 + 16 * 2048, 16 * 2048]


def test_grids_have_one_axis_and_an_end(device):
    z = torch.empty(1, 8).expand(70_000, 8)
    with launching.recording() as launches:
        kernels.latent_prior(z if device == "cpu" else z.to(device))
    assert launches[0].programs == 70_000
    with pytest.raises(ValueError, match="split the batch"):
        launching.launch(parts._sum_chunks_kernel, 2**31, z, 1)


def test_autocast_never_narrows_the_stream(device):
    x = rand(2, 2, 4, 4, dtype=F32, device=device)
    raw, shift = (rand(2, 2, 4, 4, dtype=BF16, seed=i, device=device) for i in (1, 2))
    mask = masks("even", (2, 4, 4)).to(device)
    weight, bias = rand(2, 2, dtype=F32, device=device), rand(2, dtype=F32, device=device)

    def step(x, raw, shift, weight, bias):
        y, logdet = kernels.affine_coupling(kernels.channel_mix(x, weight, bias), raw, shift, mask)
        return y, logdet, kernels.latent_prior(y.flatten(1))

    values = [x, raw, shift, weight, bias]
    plain = run(step, values)
    with torch.autocast(device, dtype=BF16):
        cast = run(step, values)
    assert [r.dtype for r in cast[0]] == [F32, F32, F32]
    assert same_bits((*plain[0], *plain[1]), (*cast[0], *cast[1]))
