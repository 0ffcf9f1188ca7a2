"""The precisions that models are evaluated in, and the settings of torch that each of them needs.

========== ===================================================================================================
float32    everything in the model's dtype; products of a GPU are not rounded to TF32
tf32       a GPU may round the factors of float32 products and convolutions to TF32, with 10 bits of mantissa;
           sums stay float32. On a CPU it is float32
mixed      conditioners in bfloat16; the stream, log-scales, shifts and all sums in float32
========== ===================================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.nn.utils import parametrize

from fastflow.errors import PrecisionWarning
from fastflow.numerics import float32_products

PRECISIONS = ("float32", "tf32", "mixed")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def pick_conditioner_dtype(precision: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that conditioners of a model compute in.

    Args:
        precision: one of `PRECISIONS`.
        dtype: of the model.
        device: of the model. Without bfloat16 arithmetic, "mixed" keeps `dtype`, with a `PrecisionWarning`.

    Raises:
        ValueError: another precision, or one that needs a float32 model.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "float32" and dtype != torch.float32:
        raise ValueError(
            f"precision={precision!r} needs a float32 model, it is {dtype}; use precision='float32'"
        )
    if precision != "mixed":
        return dtype
    if has_bfloat16(device):
        return torch.bfloat16
    warnings.warn(
        f"precision='mixed': {device.type} has no bfloat16 arithmetic here, so conditioners stay in float32",
        PrecisionWarning,
        stacklevel=3,
    )
    return torch.float32


def warn_if_narrow(dtype: torch.dtype, stacklevel: int) -> None:
    """Give a `PrecisionWarning` where a whole model is float16 or bfloat16, the stream included.

    Args:
        dtype: of the model.
        stacklevel: of `warnings.warn`, as the caller would give it.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return
    digits = 3 if dtype == torch.float16 else 2
    warnings.warn(
        f"the whole model is {dtype} now: its images and latents keep {digits} digits, which moves "
        "log-likelihoods by many nats. Keep the model in float32 and make its conditioners narrow: "
        "torch.autocast around log_prob, LabelScorer(model, precision='mixed'), or "
        "TrainConfig(precision='bf16-mixed')",
        PrecisionWarning,
        stacklevel=stacklevel + 1,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes products in bfloat16, and not only stores it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(known.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off on a type of device, such as ``"cuda"``."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def evaluating(
    precision: str, device: torch.device, narrow: torch.dtype | None = None, cache_weights: bool = True
) -> AbstractContextManager[Any]:
    """Evaluation in a precision, without gradients, nor inference tensors (compiled graphs tell them apart).

    Args:
        precision: one of `PRECISIONS`.
        device: of the model.
        narrow: the dtype of autocast; it is switched off when None.
        cache_weights: whether autocast may keep the weights that it has cast until the end.
    """
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    stack.enter_context(parametrize.cached())
    if device.type == "cuda":
        stack.enter_context(float32_products(tf32=precision == "tf32"))
    stack.enter_context(
        no_autocast(device.type)
        if narrow is None
        else torch.autocast(device.type, narrow, cache_enabled=cache_weights)
    )
    return stack
