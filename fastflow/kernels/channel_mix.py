r"""One affine map of the channels at every pixel: ActNorm and the invertible 1x1 convolution in one, with the squeeze before it.

.. math:: y_{:,p} = A x_{:,p} + c

`x` (B, C, H, W), `weight` A (C', C'), `bias` c (C',) with C' = 4C when the squeeze is fused in, else C. The log-determinant,
H*W*log|det A|, belongs to the caller, who knows A's factors. Products are summed in float32 or wider.
Source: Glow (Kingma & Dhariwal, 2018), sections 3.1-3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels._library import accumulator, check_image
from fastflow.kernels.squeeze import squeeze2x2_reference, unsqueeze2x2_reference


def _mix(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = accumulator(x.dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    if x.shape[1] == 1:
        # A convolution over one channel is a multiply-add; the library's convolution takes tens of times longer for it.
        return torch.addcmul(bias, x.to(wide), weight.reshape(1)).to(x.dtype)
    # The flow stream is never rounded: autocast, which is meant for the conditioners, would narrow this product.
    with torch.autocast(x.device.type, enabled=False):
        y = torch.matmul(weight, x.to(wide).flatten(2)) + bias[:, None]
    return y.unflatten(2, x.shape[2:]).to(x.dtype)


def channel_mix_reference(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool) -> Tensor:
    """The definition, in plain ATen."""
    return _mix(squeeze2x2_reference(x) if squeeze else x, weight, bias)


def channel_unmix_reference(y: Tensor, inverse_weight: Tensor, bias: Tensor, squeeze: bool) -> Tensor:
    """The definition, in plain ATen. The bias is taken off first, as it was added last: the large terms cancel exactly."""
    wide = accumulator(y.dtype)
    centred = y.to(wide) - bias.to(wide)[:, None, None]
    x = _mix(centred, inverse_weight, torch.zeros_like(bias)).to(y.dtype)
    return unsqueeze2x2_reference(x) if squeeze else x


def _check(x: Tensor, weight: Tensor, bias: Tensor, channels: int) -> None:
    if tuple(weight.shape) != (channels, channels):
        raise ValueError(f"weight must be ({channels}, {channels}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be ({channels},) for x {tuple(x.shape)}, got {tuple(bias.shape)}")


def channel_mix(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool = False) -> Tensor:
    """Apply `weight @ pixel + bias` at every pixel.

    Args:
        x: (B, C, H, W).
        weight: (C', C').
        bias: (C',).
        squeeze: squeeze `x` first (C' = 4C), else C' = C.

    Returns:
        (B, C', H', W').

    Raises:
        ValueError: a shape does not fit, or an odd image is to be squeezed.

    Example:
        >>> channel_mix(torch.ones(1, 1, 1, 1), torch.tensor([[2.0]]), torch.tensor([1.0])).item()
        3.0
    """
    check_image("x", x)
    if squeeze and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"x must have even height and width to be squeezed, got {tuple(x.shape)}")
    _check(x, weight, bias, x.shape[1] * (4 if squeeze else 1))
    return channel_mix_reference(x, weight, bias, squeeze)


def channel_unmix(y: Tensor, weight: Tensor, bias: Tensor, squeeze: bool = False, inverse_weight: Tensor | None = None) -> Tensor:
    """Undo `channel_mix`: ``weight^-1 @ (pixel - bias)`` at every pixel, then unsqueeze when `squeeze`.

    Args:
        y: (B, C', H', W'), an output of `channel_mix`.
        weight: (C', C'), the weight given to `channel_mix`.
        bias: (C',), the same bias.
        squeeze: whether `channel_mix` squeezed.
        inverse_weight: (C', C'), the weight's inverse where the caller has it (from its LU factors, say); computed in float64
            when None.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> channel_unmix(torch.full((1, 1, 1, 1), 3.0), torch.tensor([[2.0]]), torch.tensor([1.0])).item()
        1.0
    """
    check_image("y", y)
    if squeeze and y.shape[1] % 4:
        raise ValueError(f"y must have a multiple of 4 channels to be unsqueezed, got {tuple(y.shape)}")
    _check(y, weight, bias, y.shape[1])
    if inverse_weight is None:
        inverse_weight = torch.linalg.inv(weight.double())
    elif inverse_weight.shape != weight.shape:
        raise ValueError(f"inverse_weight must be {tuple(weight.shape)} like weight, got {tuple(inverse_weight.shape)}")
    return channel_unmix_reference(y, inverse_weight, bias, squeeze)
