"""The ops of the flow, one file each: a public function in front of a registered op with its Triton kernels and its reference.

The reference is the definition of an op in plain ATen: differentiable, right in float64, and the path that exported graphs take.
A CPU runs it too, or a faster ATen form with a backward pass of its own. On a CUDA device the ops run Triton kernels; Triton is
imported at the first launch. `set_backend` chooses.
"""

from __future__ import annotations

from fastflow.kernels._library import get_backend, set_backend
from fastflow.kernels.affine_coupling import affine_coupling, coupling_step
from fastflow.kernels.attention_pool import apply_gates, average_pixels, pool_channels, pool_pixels
from fastflow.kernels.channel_mix import channel_mix, channel_mix_masked, channel_unmix
from fastflow.kernels.coupling_head import PixelOrder, coupling_head, coupling_head_step, pixel_order
from fastflow.kernels.latent_prior import latent_prior
from fastflow.kernels.norm_film_act import film_act, norm_film_act
from fastflow.kernels.squeeze import squeeze2x2, unsqueeze2x2

__all__ = [
    "PixelOrder",
    "affine_coupling",
    "apply_gates",
    "average_pixels",
    "channel_mix",
    "channel_mix_masked",
    "channel_unmix",
    "coupling_head",
    "coupling_head_step",
    "coupling_step",
    "film_act",
    "get_backend",
    "latent_prior",
    "norm_film_act",
    "pixel_order",
    "pool_channels",
    "pool_pixels",
    "set_backend",
    "squeeze2x2",
    "unsqueeze2x2",
]
