"""Import of checkpoints written by the authors' research code.

Its names are mapped one to one, with three exceptions: dense 1x1 convolutions become LU factors, a negative
ActNorm scale moves its sign into the convolution that follows, and the heads' last maps are split into their
image and their label columns. The factors and ActNorm's log-scale stay in float64, so that
``from_published(state, config).double()`` computes what the published weights say and not their rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.models.conditioners.classification import HIDDEN
from fastflow.models.config import FlowConfig
from fastflow.models.flow import Flow
from fastflow.models.step import FlowStep

_COMMON = (
    (r"conv([123])\.weight_g", r"conv\1.parametrizations.weight.original0"),
    (r"conv([123])\.weight_v", r"conv\1.parametrizations.weight.original1"),
    (r"conv([123])\.bias", r"conv\1.bias"),
    (r"bn([123])\.(weight|bias)", r"norm\1.\2"),
    (r"film([123])\.(.*)", r"norm\1.film.\2"),
    (r"cbam([123])\.channel_attention\.shared_mlp\.0\.weight", r"cbam\1.down.weight"),
    (r"cbam([123])\.channel_attention\.shared_mlp\.2\.weight", r"cbam\1.up.weight"),
    (r"cbam([123])\.spatial_attention\.conv\.weight", r"cbam\1.spatial.weight"),
    (r"(residual\d)\.film([12])\.(.*)", r"\1.norm\2.film.\3"),
    (r"(residual\d)\.conv([12])\.(weight|bias)", r"\1.conv\2.\3"),
)
_CLASSIFICATION = (
    (r"label_embedding\.(.*)", r"embedding.\1"),
    *_COMMON,
    (r"(residual\d)\.bn([12])\.(weight|bias)", r"\1.norm\2.\3"),
    (r"t_fc1\.(.*)", r"shift.image.\1"),
    (r"t_fc2\.(.*)", r"shift.label.\1"),
    (r"s_fc1\.(.*)", r"scale.image.\1"),
    (r"s_fc2\.(.*)", r"scale.label.\1"),
)
_GENERATION = (
    (r"label_embedding\.0\.(weight|bias)", r"embedding.\1"),
    *_COMMON,
    (
        r"(residual\d)\.bn([12])\.(weight|bias|running_mean|running_var|num_batches_tracked)",
        r"\1.norm\2.norm.\3",
    ),
    (r"global([123])\.mlp\.0\.(weight|bias)", r"global\1.down.\2"),
    (r"global([123])\.mlp\.2\.(weight|bias)", r"global\1.up.\2"),
    (r"(aspp\d)\.atrous_block1\.(weight|bias)", r"\1.branches.0.\2"),
    (r"(aspp\d)\.atrous_block6\.(weight|bias)", r"\1.branches.1.\2"),
    (r"(aspp\d)\.atrous_block12\.(weight|bias)", r"\1.branches.2.\2"),
    (r"(aspp\d)\.atrous_block18\.(weight|bias)", r"\1.branches.3.\2"),
    (r"(aspp\d)\.se\.1\.(weight|bias)", r"\1.down.\2"),
    (r"(aspp\d)\.se\.3\.(weight|bias)", r"\1.up.\2"),
    (r"(aspp\d)\.output\.(weight|bias)", r"\1.output.\2"),
    (r"conv_s\.0\.(weight|bias)", r"scale.\1"),
    (r"conv_t\.(weight|bias)", r"shift.\1"),
)
_BLOCKS = {
    "resblock1": "residual2",
    "resblock2": "residual3",
    "aspp_early": "aspp1",
    "aspp_mid": "aspp2",
    "aspp": "aspp3",
}
_HEADS = {"t_fc3.weight": "shift", "t_fc3.bias": "shift", "s_fc3.weight": "scale", "s_fc3.bias": "scale"}


def tensors_of(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published state as tensors, also out of a checkpoint that holds it under ``model_state_dict``."""
    return {
        name: torch.as_tensor(value) for name, value in state_dict.get("model_state_dict", state_dict).items()
    }


def dtype_of(state: dict[str, Tensor]) -> torch.dtype:
    """The dtype that the conditioners were trained in."""
    bias = state.get("coupling_layers.0.conv1.bias")
    return torch.get_default_dtype() if bias is None else bias.dtype


def load_into(flow: Flow, state: dict[str, Tensor]) -> None:
    """Give a flow the weights of a published state.

    Raises:
        ValueError: a weight is missing, left over or of the wrong shape; the message names it.
    """
    for i, step in enumerate(flow.steps):
        _import_mixing(step, i, state)
        for net in step.coupling.conditioners:
            _import_conditioner(net, f"coupling_layers.{i}.", state, flow.config)
    _refuse_leftovers(state, flow.config)


def _take(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"state_dict has no {name!r}; is config the layout that the weights were trained with?"
        )
    return state[name]


@torch.no_grad()
def _import_mixing(step: FlowStep, index: int, state: dict[str, Tensor]) -> None:
    scale = _take(state, f"actnorms.{index}.scale").double().flatten()
    bias = _take(state, f"actnorms.{index}.bias").double().flatten()
    weight = _take(state, f"inv_convs.{index}.weight").double().flatten(1)
    channels = step.actnorm.bias.numel()
    for name, value, shape in (
        ("scale", scale, (channels,)),
        ("bias", bias, (channels,)),
        ("weight", weight, (channels, channels)),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} of step {index} must have shape {shape} in this layout, got {tuple(value.shape)}"
            )
    if not bool((scale != 0).all()):
        raise ValueError(f"actnorms.{index}.scale must not be zero")
    if not bool(state.get(f"actnorms.{index}.initialized", torch.tensor(True))):
        raise ValueError(
            f"actnorms.{index} is not initialised: the checkpoint is from before the first training batch"
        )
    step.actnorm.log_scale = nn.Parameter(scale.abs().log())
    step.actnorm.bias = nn.Parameter(bias * scale.sign())
    step.actnorm.mark_initialized()
    step.conv.set_weight(weight * scale.sign(), torch.float64)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    first, dot, rest = name.partition(".")
    name = _BLOCKS.get(first, first) + dot + rest
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def _import_conditioner(net: nn.Module, prefix: str, state: dict[str, Tensor], config: FlowConfig) -> None:
    rules = _CLASSIFICATION if config.task == "classification" else _GENERATION
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        short = name.removeprefix(prefix)
        if short in _HEADS and config.task == "classification":
            renamed.update(_split_head(short, value))
            continue
        target = _rename(short, rules)
        if target is None:
            raise ValueError(
                f"state_dict holds {name!r}, which has no place in a {config.task} conditioner with "
                f"norm={config.norm!r}"
            )
        own = net.state_dict().get(target)
        # The published gates are 1x1 convolutions over a single pixel; here they are linear maps.
        renamed[target] = (
            value.reshape(own.shape) if own is not None and own.numel() == value.numel() else value
        )
    try:
        net.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(
            f"state_dict does not fit config at {prefix.rstrip('.')} (norm={config.norm!r}): {error}"
        ) from error


def _split_head(name: str, value: Tensor) -> dict[str, Tensor]:
    head = _HEADS[name]
    if name.endswith("bias"):
        return {f"{head}.label_out.bias": value}
    return {f"{head}.image_out.weight": value[:, :HIDDEN], f"{head}.label_out.weight": value[:, HIDDEN:]}


def _refuse_leftovers(state: dict[str, Tensor], config: FlowConfig) -> None:
    for name in state:
        match = re.match(r"(coupling_layers|inv_convs|actnorms)\.(\d+)\.", name)
        if match is None:
            raise ValueError(f"state_dict holds {name!r}, which is no part of a published flow")
        if int(match[2]) >= config.num_steps:
            raise ValueError(
                f"state_dict holds {name!r}, but config has {config.num_steps} steps (len(masks))"
            )
