"""`latent_prior`: the density, its gradient, and kernels (on a GPU or in the interpreter) against both."""

from __future__ import annotations

import pytest
import torch
from numerics import BF16, F16, F32, F64, close, rand, run, same_bits, to_float64

from fastflow import kernels
from fastflow.kernels.latent_prior import latent_prior_reference
from fastflow.numerics import acc_dtype


@pytest.mark.parametrize("shape", [(1, 1), (3, 4097), (2, 33856), (0, 5), (5, 0)])
def test_prior_is_the_normal_density(shape):
    z = rand(*shape)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    assert torch.allclose(kernels.latent_prior(z), want, rtol=1e-12)
    assert torch.allclose(kernels.latent_prior(z.float()).double(), want, rtol=2e-6)


def test_a_sample_has_its_bits_whatever_is_beside_it():
    z = rand(8, 33856, dtype=F32)
    together = kernels.latent_prior(z)
    assert same_bits(together.split(1), [kernels.latent_prior(z[i : i + 1]) for i in range(8)])


def test_prior_gradient_and_refusal():
    z = rand(3, 50).requires_grad_()
    assert torch.autograd.gradcheck(kernels.latent_prior, z)
    with pytest.raises(ValueError, match="2-D"):
        kernels.latent_prior(torch.zeros(3))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4097), (2, 6144), (0, 5), (5, 0), (2, 529)], ids=str)
def test_kernels(device, shape, dtype):
    z = rand(*shape, dtype=dtype, device=device)
    (got,), (grad,) = run(kernels.latent_prior, [z])
    (want,), (wanted,) = run(latent_prior_reference, to_float64([z]), [acc_dtype(dtype)])
    close(got, want, acc_dtype(dtype))
    close(grad, wanted, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_kernels_read_views(device, dtype):
    view = rand(2, 64, dtype=dtype, device=device)[:, 1:50]
    close(kernels.latent_prior(view), latent_prior_reference(view.double()), acc_dtype(dtype), 64)


def test_gradcheck(device):
    assert torch.autograd.gradcheck(kernels.latent_prior, rand(2, 3, device=device).requires_grad_())
