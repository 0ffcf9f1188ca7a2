"""The ops of the flow, one file each: a public function in front of its reference implementation in plain ATen.

The reference is the definition of an op: differentiable, right in float64, and the path that CPUs and exported graphs take.
"""

from __future__ import annotations

from fastflow.kernels.affine_coupling import affine_coupling
from fastflow.kernels.attention_pool import apply_gates, pool_channels, pool_pixels
from fastflow.kernels.channel_mix import channel_mix, channel_unmix
from fastflow.kernels.coupling_head import coupling_head
from fastflow.kernels.latent_prior import latent_prior
from fastflow.kernels.norm_film_act import film_act, norm_film_act
from fastflow.kernels.squeeze import squeeze2x2, unsqueeze2x2

__all__ = [
    "affine_coupling",
    "apply_gates",
    "channel_mix",
    "channel_unmix",
    "coupling_head",
    "film_act",
    "latent_prior",
    "norm_film_act",
    "pool_channels",
    "pool_pixels",
    "squeeze2x2",
    "unsqueeze2x2",
]
