"""Scorers and samplers prepare a model once: an engine, constants for parametrizations, rows of a pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastflow.errors import UninitializedModelError
from fastflow.models.flow import Flow
from fastflow.models.inference.precision import check_choice
from fastflow.models.versions import TensorVersions

# Samples are micro-batched so that one activation of the widest stage stays near this many elements: on CPUs,
# more only stream more memory (measured: no gain from 28 samples of 184x184 on).
MAX_CPU_ELEMENTS = 1 << 22
# Beyond this many samples a GPU gains nothing.
MAX_CUDA_ROWS = 4096
# The share of the memory that is free when a scorer is made which its activations may take.
MEMORY_SHARE = 0.5
# A sample holds about this many activations of its widest stage at a time, and of its stream.
LIVE_ACTIVATIONS, LIVE_STREAMS = 6, 12


def pick_engine(model: Flow, engine: str, engines: Sequence[str], purpose: str) -> str:
    """The engine for a model, "auto" resolved by its device.

    Args:
        model: the flow.
        engine: one of `engines`.
        engines: that there are for the purpose.
        purpose: such as "scored with", for the error of a model in training mode.

    Raises:
        ValueError: another engine, one that the device does not have, or a model in training mode.
        UninitializedModelError: the model has seen no data.
    """
    check_choice("engine", engine, engines)
    if model.training:
        raise ValueError(
            f"model must be in evaluation mode to be {purpose} (its dropout is active); call model.eval()"
        )
    if not model.initialized:
        raise UninitializedModelError
    on_cuda = model.device.type == "cuda"
    if engine == "cuda_graph" and not on_cuda:
        others = " or ".join(repr(name) for name in engines if name not in ("auto", "cuda_graph"))
        raise ValueError(
            f"engine='cuda_graph' needs a model on a CUDA device, it is on {model.device}; use {others}"
        )
    return ("cuda_graph" if on_cuda else "eager") if engine == "auto" else engine


def check_unchanged(model: Flow, versions: TensorVersions, kind: str) -> None:
    """Raise RuntimeError unless a model is what it was when something was made of it.

    Args:
        model: the model.
        versions: of its tensors then.
        kind: what was made of it, such as "LabelScorer".
    """
    if model.training:
        raise RuntimeError(
            f"the model was set to training mode after this {kind} was made; call model.eval(), and make a "
            f"new {kind} if its weights have changed"
        )
    change = versions.change()
    if change is not None:
        raise RuntimeError(
            f"the model has changed since this {kind} was made, which holds results of its earlier weights: "
            f"{change}; make a new {kind}"
        )


def without_parametrizations(model: Flow) -> Flow:
    """A copy that shares the model's tensors and has the weights of normed convolutions computed once."""
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            names = list(cast(nn.ModuleDict, module.parametrizations))
            weights = [getattr(module, name).detach() for name in names]
            # `remove_parametrizations` takes the weight from the class, which the model's own modules share.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in zip(names, weights, strict=True):
                module.register_parameter(name, nn.Parameter(weight))
    return copied


def default_rows(model: Flow) -> int:
    """Rows of one pass: as many as are worth it, and as fit into half of the free memory."""
    config = model.config
    strided = config.task == "classification"
    # Activations of the widest stage: the first of a strided conditioner, any of the other kind.
    stages = (
        (f1 if strided else max(f1, f2, f3)) * (-(-h // 2) * -(-w // 2) if strided else h * w)
        for (f1, f2, f3), (_, h, w) in zip(config.widths, config.step_shapes, strict=True)
    )
    widest, element = max(stages), torch.finfo(model.dtype).bits // 8
    live = LIVE_ACTIVATIONS if strided else 3 * LIVE_ACTIVATIONS
    fit = int(MEMORY_SHARE * free_memory(model.device)) // (
        element * (live * widest + LIVE_STREAMS * config.num_dims)
    )
    worth = MAX_CUDA_ROWS if model.device.type == "cuda" else min(MAX_CUDA_ROWS, MAX_CPU_ELEMENTS // widest)
    return max(1, min(fit, worth))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, about."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        # Other systems than Linux do not tell; any machine that runs this has as much.
        return 4 << 30
