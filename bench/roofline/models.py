"""Whole half-steps, conditioner and coupling, as models train on a GPU and in plain ATen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bench.roofline.counting import Cost, HalfStepCounter, kernels_chosen, two_passes
from bench.roofline.features import EPS, average_pixels
from bench.roofline.machine import (
    BOUND,
    CLASSES,
    MAX_BYTES_OVER_PLAIN,
    MAX_LAUNCHES_OVER_PLAIN,
    PASSES,
    STEPS,
)
from bench.roofline.works import Tensors, dtype_name
from fastflow import FlowConfig, kernels
from fastflow.kernels import global_mlp, pyramid
from fastflow.kernels.cpu import execution, linear
from fastflow.kernels.cpu import pyramid as cpu_pyramid
from fastflow.kernels.norm_film_act import norm_film_act_reference
from fastflow.models.conditioners import ClassificationConditioner, GenerationConditioner, generation
from fastflow.models.conditioners.label_params import CouplingMask, Film, LabelParams, NextInput
from fastflow.models.conditioners.leaves import NormFiLM

TASKS = ("classification", "generation")
DTYPES = (torch.float32, torch.bfloat16)


# -- plain forms ---------------------------------------------------------------------------------------------


def _plain_norm(
    norm: NormFiLM,
    x: Tensor,
    film: Film,
    residual: Tensor | None = None,
) -> Tensor:
    y = norm_film_act_reference(x, norm.groups, *film.modulation, film.label_index, residual, EPS)
    return y if film.dropout is None else torch.native_dropout(y, film.dropout.p, True)[0]


def _plain_fusion(block: generation.GlobalFusion, x: Tensor) -> Tensor:
    added: Tensor = block.up(F.gelu(block.down(average_pixels(x))))
    return x + added[:, :, None, None]


def _plain_context(block: generation.GlobalContext, x: Tensor) -> Tensor:
    gate = torch.sigmoid(block.up(F.relu(block.down(average_pixels(x)))))
    return x * (1.0 + gate)[:, :, None, None]


def _plain_aspp(block: generation.ASPP, x: Tensor) -> Tensor:
    pyramid = torch.cat([branch(x) for branch in block.branches], dim=1)
    gate = torch.sigmoid(block.up(F.relu(block.down(average_pixels(pyramid)))))
    out: Tensor = block.output(pyramid * gate[:, :, None, None])
    return out


# The fake tensors are on a CPU, for which the models choose other forms than for a GPU.
ON_GPU: tuple[tuple[Any, str, Callable[..., Any]], ...] = tuple(
    (module, "on_cpu", lambda x: False) for module in (execution, linear, cpu_pyramid, pyramid, global_mlp)
)
PLAIN: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    *ON_GPU,
    (generation.ASPP, "forward", _plain_aspp),
    (generation.GlobalFusion, "forward", _plain_fusion),
    (generation.GlobalContext, "forward", _plain_context),
    (NormFiLM, "forward", _plain_norm),
)


@contextlib.contextmanager
def _replaced(forms: Iterable[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, form in forms:
            stack.enter_context(mock.patch.object(owner, name, form))
        yield


@contextlib.contextmanager
def fused_form() -> Iterator[None]:
    """The models run as on a GPU."""
    with _replaced(ON_GPU):
        yield


@contextlib.contextmanager
def plain_form() -> Iterator[None]:
    """The models run in plain ATen ops."""
    before = kernels.get_backend()
    kernels.set_backend("reference")
    try:
        with _replaced(PLAIN):
            yield
    finally:
        kernels.set_backend(before)


# -- half-steps ----------------------------------------------------------------------------------------------


class HalfStep(NamedTuple):
    """A half of a step in training; `masked` (B, C, H, W) is the conditioner's input."""

    net: ClassificationConditioner | GenerationConditioner
    x: Tensor
    masked: Tensor
    label_params: LabelParams
    label_index: Tensor
    mask: CouplingMask
    next_input: NextInput

    @property
    def leaves(self) -> Tensors:
        """The tensors that get gradients."""
        return (self.x, self.masked, *self.label_params.tensors(), *self.net.parameters())

    def run(self) -> Tensors:
        """(y, logdet, the next masked input)."""
        seeds = self.net.draw_seeds(len(self.x), self.x.device)
        params = self.net.encode(self.masked, self.label_params, self.label_index, seeds)
        y, logdet, masked = self.net.transform(
            self.x, params, self.label_params, self.label_index, self.mask, BOUND, False, self.next_input
        )
        assert masked is not None
        return y, logdet, masked

    def run_plain(self) -> Tensors:
        """`run` in plain ATen ops: dropout draws for itself."""

        def placeholders(batch: int, device: torch.device) -> Tensor | None:
            return torch.empty(3, batch) if self.net.training else None

        with plain_form(), mock.patch.object(self.net, "draw_seeds", placeholders):
            return self.run()


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def half_step(config: FlowConfig, step: int, batch: int, dtype: torch.dtype = torch.float32) -> HalfStep:
    """The first half of a step of a model, with random inputs; in training mode."""
    shape = config.step_shapes[step]
    kind = ClassificationConditioner if config.task == "classification" else GenerationConditioner
    net = kind(config, step, shape).train()
    x, masked = torch.randn(batch, *shape), torch.randn(batch, *shape, dtype=dtype)
    with torch.no_grad(), _autocast(dtype):
        label_params = net.label_params(torch.arange(config.num_classes))
    for table in label_params.tensors():
        table.requires_grad_()
    n = masked[0].numel()
    pixels = torch.arange(n, dtype=torch.int32)
    mask = pixels.view(shape) % 2 == 0
    order = kernels.PixelOrder(torch.cat((pixels[1::2], pixels[::2])), n // 2)
    label_index = torch.arange(batch) % config.num_classes
    x, masked = x.requires_grad_(), masked.requires_grad_()
    return HalfStep(net, x, masked, label_params, label_index, CouplingMask(mask, order), NextInput(~mask))


# -- counts --------------------------------------------------------------------------------------------------


class StepRow(NamedTuple):
    """One pass of one whole half-step: counts without convolutions and products, and the bytes of those."""

    task: str
    step: int
    shape: str
    dtype: str
    passes: str
    fused: Cost
    plain: Cost
    fused_products: int
    plain_products: int

    @property
    def over_launches(self) -> float:
        """Fused over plain launches."""
        return self.fused.launches / self.plain.launches

    @property
    def over_bytes(self) -> float:
        """Fused over plain bytes, without those of convolutions and products."""
        return self.fused.bytes / self.plain.bytes

    @property
    def over_all(self) -> float:
        """Fused over plain bytes, with those of convolutions and products."""
        return (self.fused.bytes + self.fused_products) / (self.plain.bytes + self.plain_products)

    def misses(self) -> list[str]:
        """The targets that this row does not meet."""
        over = []
        if self.over_launches > MAX_LAUNCHES_OVER_PLAIN:
            over.append(f"{self.over_launches:.2f} of the launches")
        if self.over_bytes > MAX_BYTES_OVER_PLAIN:
            over.append(f"{self.over_bytes:.2f} of the bytes")
        return over


def both_passes(case: HalfStep, run: Callable[[], Tensors], dtype: torch.dtype) -> list[tuple[Cost, int]]:
    """(cost, bytes of products) of a forward pass, and of a forward and a backward pass."""

    def under_autocast() -> Tensors:
        with _autocast(dtype):
            return run()

    counter = HalfStepCounter()
    return [(cost, counter.products) for cost, _ in two_passes(counter, under_autocast, case.leaves)]


def count_half_step(task: Any, step: int, batch: int, dtype: torch.dtype) -> list[StepRow]:
    """The rows of one half-step of the paper's model, one for each of `PASSES`; under `FakeTensorMode`."""
    config = FlowConfig.paper(CLASSES, task)
    case = half_step(config, step, batch, dtype)
    with kernels_chosen(), fused_form():
        fused = both_passes(case, case.run, dtype)
    plain = both_passes(case, case.run_plain, dtype)
    about = (task, step, "x".join(map(str, config.step_shapes[step])), dtype_name(dtype))
    return [
        StepRow(*about, passes, ours, theirs, our_products, their_products)
        for passes, (ours, our_products), (theirs, their_products) in zip(PASSES, fused, plain, strict=True)
    ]


def step_rows(
    batch: int, steps: Iterable[int] = STEPS, dtypes: Iterable[torch.dtype] = DTYPES
) -> list[StepRow]:
    """Whole half-steps of both conditioners at steps of the paper's model, one of each shape by default."""
    with FakeTensorMode():
        return [
            row
            for dtype in dtypes
            for task in TASKS
            for step in steps
            for row in count_half_step(task, step, batch, dtype)
        ]
