"""Counter-based dropout: which elements a seed drops, without a state to save.

Element e (its index in C, H, W order) of a sample is kept where a hash of e and the sample's 32-bit seed is
at least p 2^32; kept elements are multiplied by 1/(1 - p). Whoever has the seeds has the mask again. The hash
is the multiply and xor-shift mixer of C. Wellons ("hash-prospector", lowbias32) without its last shift, which
the comparison does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels.checks import check_device

COUNTER_FACTOR, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def drop_threshold(dropout: float) -> int:
    """The 32-bit number below which a hash drops its element."""
    return round(dropout * 2**32)


def keep_scale(threshold: int) -> float:
    """The factor 1/(1 - p) of kept elements, from the threshold of p."""
    return 2**32 / (2**32 - threshold)


def signed_int32(value: int) -> int:
    """The signed number with the 32 bits of an unsigned one."""
    return value - 2**32 if value >= 2**31 else value


def dropout_mask(seeds: Tensor, shape: tuple[int, ...], threshold: int) -> Tensor:
    """Which elements are kept.

    Args:
        seeds: (B,) int32.
        shape: (C, H, W).
        threshold: of `drop_threshold`.

    Returns:
        (B, C, H, W) bool.
    """
    n = shape[0] * shape[1] * shape[2]
    # int32 products wrap as the kernel's uint32 ones do; what is shifted in from the sign is masked off.
    counter = torch.arange(n, dtype=torch.int32, device=seeds.device) * signed_int32(COUNTER_FACTOR)
    h = seeds[:, None] ^ counter
    h ^= (h >> 16) & 0xFFFF
    h *= FIRST_FACTOR
    h ^= (h >> 15) & 0x1FFFF
    h *= signed_int32(SECOND_FACTOR)
    # Flipping the sign bit lets signed numbers compare in unsigned order.
    return ((h ^ -(2**31)) >= threshold - 2**31).view(-1, *shape)


def dropout_seeds(batch: int, device: torch.device) -> Tensor:
    """A fresh seed per sample, (B,) int32, from torch's default generator of the device."""
    return torch.randint(-(2**31), 2**31, (batch,), dtype=torch.int32, device=device)


def checked_seeds(x: Tensor, dropout: float, seeds: Tensor | None) -> Tensor | None:
    """The seeds that an op on `x` drops by: fresh ones where none came, None where nothing is dropped.

    Raises:
        ValueError: `dropout` is not in [0, 1), or `seeds` are not (B,) int32 on the device of `x`.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if drop_threshold(dropout) == 0:
        return None
    if seeds is None:
        return dropout_seeds(x.shape[0], x.device)
    if tuple(seeds.shape) != (x.shape[0],) or seeds.dtype != torch.int32:
        raise ValueError(f"seeds must be ({x.shape[0]},) int32, got {tuple(seeds.shape)} {seeds.dtype}")
    check_device("seeds", seeds, x)
    return seeds
