"""The ops of the flow, one file each: public functions in front of registered ops.

The definition of an op is plain ATen: differentiable, right in float64, and the path that exported graphs
take. A CPU runs it too, or a faster form in `cpu` with a backward pass of its own. On a CUDA device the ops
run the kernels in `triton`; Triton is imported at the first launch. `set_backend` chooses. `registry` says
where everything about an op is.
"""

from __future__ import annotations

from fastflow.kernels.affine_coupling import affine_coupling, coupling_step
from fastflow.kernels.apply_gates import apply_gates
from fastflow.kernels.cbam import cbam
from fastflow.kernels.channel_mix import channel_mix, channel_mix_masked, channel_unmix
from fastflow.kernels.coupling_head import PixelOrder, coupling_head, coupling_head_step, pixel_order
from fastflow.kernels.dropout import dropout_seeds
from fastflow.kernels.global_mlp import global_context, global_fusion
from fastflow.kernels.head_features import head_features
from fastflow.kernels.head_tables import head_tables
from fastflow.kernels.latent_prior import latent_prior
from fastflow.kernels.lu_mixing import ChannelMap, MixingLayer, lu_mixing, runs_lu_mixing
from fastflow.kernels.norm_film_act import film_act, norm_film_act
from fastflow.kernels.norm_modulate_act import norm_modulate_act
from fastflow.kernels.planning import set_launch_plans
from fastflow.kernels.pool_channels import pool_channels
from fastflow.kernels.pool_pixels import average_pixels, pool_pixels
from fastflow.kernels.pyramid import atrous_pyramid
from fastflow.kernels.registry import get_backend, set_backend
from fastflow.kernels.squeeze import squeeze2x2, unsqueeze2x2

__all__ = [
    "ChannelMap",
    "MixingLayer",
    "PixelOrder",
    "affine_coupling",
    "apply_gates",
    "atrous_pyramid",
    "average_pixels",
    "cbam",
    "channel_mix",
    "channel_mix_masked",
    "channel_unmix",
    "coupling_head",
    "coupling_head_step",
    "coupling_step",
    "dropout_seeds",
    "film_act",
    "get_backend",
    "global_context",
    "global_fusion",
    "head_features",
    "head_tables",
    "latent_prior",
    "lu_mixing",
    "norm_film_act",
    "norm_modulate_act",
    "pixel_order",
    "pool_channels",
    "pool_pixels",
    "runs_lu_mixing",
    "set_backend",
    "set_launch_plans",
    "squeeze2x2",
    "unsqueeze2x2",
]
