"""Memory layouts of images: which one a tensor has, and tensors made or copied in a given one."""

from __future__ import annotations

import torch
from torch import Tensor


def _strides_fit(x: Tensor, order: tuple[int, ...]) -> bool:
    expected = 1
    for dim in order:
        if x.shape[dim] != 1 and x.stride(dim) != expected:
            return False
        expected *= x.shape[dim]
    return True


def is_channels_last(x: Tensor) -> bool:
    """Whether each sample of x (B, C, H, W) lies with its channels together, and not as a plain array too."""
    return not _strides_fit(x, (3, 2, 1)) and _strides_fit(x, (1, 3, 2))


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch's name of a layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(
    shape: tuple[int, ...], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised (B, C, H, W) tensor on the device of `like`."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last)
    )


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """`x` with each sample dense in the layout, copied only if one is not. The batch may have any stride."""
    if _strides_fit(x, (1, 3, 2) if channels_last else (3, 2, 1)):
        return x
    return x.contiguous(memory_format=memory_format(channels_last))


def mask_bytes(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask for samples of `shape` (B, C, H, W) as contiguous (C, H, W) bytes; None for None."""
    return None if mask is None else mask.expand(shape[1:]).contiguous().view(torch.uint8)
