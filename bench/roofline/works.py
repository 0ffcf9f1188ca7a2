"""The flow's ops, and half-steps outside of their conditioner, in plain ATen and by the package's ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.roofline.machine import BOUND, Shape
from fastflow import kernels
from fastflow.kernels.affine_coupling import affine_coupling_reference, finish_step_reference
from fastflow.kernels.channel_mix import channel_mix_reference, channel_unmix_reference
from fastflow.kernels.latent_prior import latent_prior_reference
from fastflow.kernels.squeeze import squeeze2x2_reference, unsqueeze2x2_reference

Tensors = tuple[Tensor, ...]

OP_SHAPES: tuple[Shape, ...] = ((4, 92, 92), (8, 46, 46))


class Work(NamedTuple):
    """An op or a half-step on given tensors.

    Attributes:
        name: of the op, with its options.
        shape: (C, H, W) of the stream.
        dtype: of the conditioner's tensors.
        inputs: the arguments of `composite` and of `public`.
        saved: the inputs that no backward pass can do without.
        composite: the definition in plain ATen; gives a tuple of outputs.
        public: the same outputs by the package's ops.
        handed_on: how many of the last outputs are inputs that the op hands on: nobody writes them, but they
        have gradients.
    """

    name: str
    shape: Shape
    dtype: str
    inputs: Tensors
    saved: Tensors
    composite: Callable[..., Tensors]
    public: Callable[..., Tensors]
    handed_on: int = 0

    @property
    def leaves(self) -> Tensors:
        """The inputs that get gradients."""
        return tuple(tensor for tensor in self.inputs if tensor.requires_grad)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


class Data(NamedTuple):
    """The tensors that works take; `stream` tensors are float32, those of the conditioner `dtype`."""

    shape: Shape
    x: Tensor
    raw: Tensor
    shift: Tensor
    mask: Tensor
    next_mask: Tensor
    weight: Tensor
    bias: Tensor
    dtype: torch.dtype

    @property
    def about(self) -> tuple[Shape, str]:
        """The shape, and the name of the conditioner's dtype."""
        return self.shape, dtype_name(self.dtype)


def make_data(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Data:
    """Random tensors; under `FakeTensorMode`, their sizes alone."""
    channels = shape[0]
    x, raw, shift = (torch.randn(batch, *shape, device=device) for _ in range(3))
    mask = torch.rand(shape, device=device) < 0.5
    weight = torch.eye(channels, device=device) + 0.1 * torch.randn(channels, channels, device=device)
    bias = torch.randn(channels, device=device)
    x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
    raw, shift = (tensor.to(dtype).requires_grad_() for tensor in (raw, shift))
    return Data(shape, x, raw, shift, mask, ~mask, weight, bias, dtype)


# -- couplings -----------------------------------------------------------------------------------------------


def _coupling(data: Data) -> Work:
    return Work(
        "affine_coupling", *data.about,
        inputs=(data.x, data.raw, data.shift, data.mask),
        saved=(data.x, data.raw, data.mask),
        composite=lambda x, raw, shift, mask: affine_coupling_reference(x, raw, shift, mask, BOUND, False),
        public=lambda x, raw, shift, mask: kernels.affine_coupling(x, raw, shift, mask, BOUND),
    )  # fmt: skip


def _coupling_step(data: Data, name: str = "coupling_step") -> Work:
    def composite(x: Tensor, raw: Tensor, shift: Tensor, mask: Tensor, next_mask: Tensor) -> Tensors:
        y, logdet = affine_coupling_reference(x, raw, shift, mask, BOUND, False)
        y, masked = finish_step_reference(y, next_mask, None, False, data.dtype)
        return y, logdet, masked

    return Work(
        name, *data.about,
        inputs=(data.x, data.raw, data.shift, data.mask, data.next_mask),
        saved=(data.x, data.raw, data.mask, data.next_mask),
        composite=composite,
        public=lambda *inputs: kernels.coupling_step(*inputs, BOUND, dtype=data.dtype),
    )  # fmt: skip


def _step_end(data: Data, name: str) -> Work:
    """The half-step before a mix: one channel's is done by the coupling, that of more is another launch."""
    one_channel = data.shape[0] == 1
    # A model joins the factor and the constant once for all its images, so the join is no part of the
    # half-step.
    affine = torch.cat((data.weight.flatten(), data.bias)) if one_channel else None

    def composite(
        x: Tensor, raw: Tensor, shift: Tensor, mask: Tensor, next_mask: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensors:
        y, logdet = affine_coupling_reference(x, raw, shift, mask, BOUND, False)
        y = channel_mix_reference(y, weight, bias, False)
        return y, logdet, y.masked_fill(~next_mask, 0.0).to(data.dtype)

    def public(
        x: Tensor, raw: Tensor, shift: Tensor, mask: Tensor, next_mask: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensors:
        if affine is not None:
            return kernels.coupling_step(
                x, raw, shift, mask, next_mask, BOUND, affine=affine, dtype=data.dtype
            )
        y, logdet = kernels.affine_coupling(x, raw, shift, mask, BOUND)
        y, masked = kernels.channel_mix_masked(y, weight, bias, next_mask, dtype=data.dtype)
        return y, logdet, masked

    inputs = (data.x, data.raw, data.shift, data.mask, data.next_mask, data.weight, data.bias)
    # The weight's gradient takes the coupling's result, which takes the shift.
    return Work(name, *data.about, inputs, inputs[:-1], composite, public)


# -- mixes and ops without parameters ------------------------------------------------------------------------


def _mix(data: Data, squeeze: bool) -> Work:
    (c, h, w), x = data.shape, data.x
    if squeeze:
        x = x.detach().new_empty(x.shape[0], c // 4, 2 * h, 2 * w).normal_().requires_grad_()
    return Work(
        "channel_mix" + squeeze * " +squeeze", *data.about,
        inputs=(x, data.weight, data.bias),
        saved=(x, data.weight),
        composite=lambda *inputs: (channel_mix_reference(*inputs, squeeze),),
        public=lambda *inputs: (kernels.channel_mix(*inputs, squeeze),),
    )  # fmt: skip


def _mix_masked(data: Data) -> Work:
    def composite(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensors:
        y = channel_mix_reference(x, weight, bias, False)
        return y, y.masked_fill(~mask, 0.0).to(data.dtype)

    return Work(
        "channel_mix_masked", *data.about,
        inputs=(data.x, data.weight, data.bias, data.next_mask),
        saved=(data.x, data.weight, data.next_mask),
        composite=composite,
        public=lambda *inputs: kernels.channel_mix_masked(*inputs, dtype=data.dtype),
    )  # fmt: skip


def _unmix(data: Data) -> Work:
    # The weight stands for its own inverse, which a caller has from the weight's factors.
    inputs = (data.x, data.weight, data.bias)
    return Work(
        "channel_unmix", *data.about,
        inputs=inputs,
        saved=inputs,
        composite=lambda *inputs: (channel_unmix_reference(*inputs, False),),
        public=lambda y, inverse, bias: (kernels.channel_unmix(y, inverse, bias, inverse_weight=inverse),),
    )  # fmt: skip


def _others(data: Data) -> list[Work]:
    x = data.x
    z = x.detach().flatten(1).requires_grad_()
    return [
        Work(
            "squeeze2x2", *data.about, (x,), (),
            composite=lambda x: (squeeze2x2_reference(x),), public=lambda x: (kernels.squeeze2x2(x),),
        ),
        Work(
            "unsqueeze2x2", *data.about, (x,), (),
            composite=lambda y: (unsqueeze2x2_reference(y),), public=lambda y: (kernels.unsqueeze2x2(y),),
        ),
        Work(
            "latent_prior", *data.about, (z,), (z,),
            composite=lambda z: (latent_prior_reference(z),), public=lambda z: (kernels.latent_prior(z),),
        ),
    ]  # fmt: skip


# -- lists ---------------------------------------------------------------------------------------------------


def op_works(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Work]:
    """The ops at one shape (C, H, W), C a multiple of 4, sides even; in bfloat16, those of conditioners."""
    data = make_data(shape, batch, dtype, device)
    works = [_coupling(data), _coupling_step(data), _mix_masked(data)]
    if dtype == torch.float32:
        works += [_mix(data, False), _mix(data, True), _unmix(data), *_others(data)]
    return works


def half_steps(
    shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Work]:
    """Half-steps outside of their conditioner: one inside a flow step, one at its end before a mix."""
    data = make_data(shape, batch, dtype, device)
    return [_coupling_step(data, "half-step"), _step_end(data, "half-step +mix")]
