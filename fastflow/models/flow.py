"""The flow, and the flow given labels: the walks over its steps in both directions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.errors import UninitializedModelError
from fastflow.kernels.checks import counted, mark_label_index
from fastflow.kernels.transforms import is_transformed, plain_values
from fastflow.models import reversible
from fastflow.models.attribution import place_on_image
from fastflow.models.config import FlowConfig
from fastflow.models.coupling import Seeds, draw_seeds
from fastflow.models.grouping import FlowLabelParams
from fastflow.models.layers import ActNorm, all_or_none
from fastflow.models.masks import build_masks
from fastflow.models.step import ConditionedStep, FlowStep, RunStep, Walk, condition_steps, walk_forward
from fastflow.numerics import acc_dtype, normal_log_density


class ConditionedFlow:
    """A flow given R labels: everything that parameters and labels decide and no image does, computed once.

    Args:
        steps: of the flow.
        labels: (R,) int64.
        dtype: of the stream.
        inverse: prepare the inverse direction instead of the forward one.

    Attributes:
        steps: conditioned.
    """

    def __init__(
        self, steps: Sequence[FlowStep], labels: Tensor, dtype: torch.dtype, inverse: bool = False
    ) -> None:
        self._params = FlowLabelParams(steps, labels)
        self.steps: list[ConditionedStep] = condition_steps(steps, self._params.of_step, dtype, inverse)

    def label_index_of(self, label_index: Tensor) -> Callable[[int], Tensor]:
        """The entry of each sample at step i: of the only one where the step ignores the label."""
        ignored = mark_label_index(torch.zeros_like(label_index), 1)
        return lambda i: label_index if self.steps[i].step.uses_label else ignored

    def mixing_logdet(self) -> Tensor:
        """Log-determinant of all mixes, a scalar in float64; after the first batch has passed."""
        return torch.stack([step.mixing_logdet() for step in self.steps]).sum()

    def forward(
        self,
        h: Tensor,
        label_index: Tensor,
        masked: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        run: RunStep | None = None,
    ) -> Walk:
        """Image to latent, or some of its steps.

        Args:
            h: (B, C, H, W).
            label_index: (B,) the label of each sample among those that the flow was conditioned on.
            masked: what the first conditioner reads, where h is mixed already.
            first: step to begin with.
            last: step to end before; None for all.
            run: runs a step in place of `ConditionedStep.forward`.
        """
        index_at = self.label_index_of(label_index)
        steps = range(first, len(self.steps) if last is None else last)
        params = self._params.by_sample(label_index, steps) if run is None else None
        seeds: list[Seeds] = []

        def run_step(i: int, h: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            if not seeds:
                couplings = [one.step.coupling for one in self.steps[first:last]]
                seeds.extend(draw_seeds(couplings, h.shape[0], h.device))
            ahead = None if params is None else params[i]
            return self.steps[i].forward(h, masked, index_at(i), seeds[i - first], ahead)

        return walk_forward([one.step for one in self.steps], h, run or run_step, masked, first, last)

    def inverse(self, blocks: Sequence[Tensor], label_index: Tensor) -> Tensor:
        """Latent to image.

        Args:
            blocks: the final block (B, C, H, W), then the split-off ones in the order of the steps.
            label_index: (B,) the label of each sample among those that the flow was conditioned on.
        """
        index_at = self.label_index_of(label_index)
        params = self._params.by_sample(label_index, range(len(self.steps)))
        h, *rest = blocks
        masked: Tensor | None = None
        for i in reversed(range(len(self.steps))):
            if self.steps[i].step.split:
                h = torch.cat((h, rest.pop()), dim=1)
            ahead = None if params is None else params[i]
            h, masked = self.steps[i].inverse(h, masked, index_at(i), ahead)
        return h


class Flow(nn.Module):
    """Flow steps with their layout: the map between image and latent, given labels.

    Args:
        config: the architecture.
        application_mask: (H, W) array of 0/1, or the path of a PNG, for the `custom` masks; None takes the
            shipped one.

    Raises:
        ValueError: the mask does not fit.
    """

    steps: Sequence[FlowStep]

    def __init__(self, config: FlowConfig, application_mask: Any = None) -> None:
        super().__init__()
        self.config = config
        masks = build_masks(config, application_mask)
        shapes_and_masks = enumerate(zip(config.step_shapes, masks, strict=True))
        # A ModuleList is declared as the sequence that it is.
        self.steps = nn.ModuleList(  # type: ignore[assignment]
            FlowStep(config, i, shape, mask) for i, (shape, mask) in shapes_and_masks
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flow stream."""
        return next(self.steps[0].coupling.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def initialized(self) -> bool:
        """Whether every ActNorm layer has seen data."""
        return all(module.ready for module in self.modules() if isinstance(module, ActNorm))

    def condition(self, labels: Tensor, inverse: bool = False) -> ConditionedFlow:
        """The flow given `labels`: everything that no image changes, computed once for any number of images.

        It holds results of the weights as they are now, and takes no notice of later changes.

        Args:
            labels: (R,) int64 labels in [0, K).
            inverse: prepare the inverse direction instead of the forward one.

        Raises:
            UninitializedModelError: the inverse of a model that has seen no data.
        """
        if inverse and not self.initialized:
            raise UninitializedModelError
        return ConditionedFlow(self.steps, labels, self.dtype, inverse)

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor | None = None) -> None:
        """Set ActNorm from a batch, layer by layer, without training; layers that are set stay as they are.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            y: (B,) labels; they cycle through the classes when None.

        Raises:
            ValueError: a shape or a label does not fit, there are no images, or their statistics are not
                finite at some layer; no layer is set then.
        """
        x = self.check_images(x)
        if y is None:
            y = torch.arange(x.shape[0], device=x.device) % self.config.num_classes
        y = self.check_labels(y, x.shape[0])
        was_training = self.training
        try:
            # ActNorm starts in training mode only; dropout must not disturb its statistics.
            self.eval()
            for step in self.steps:
                step.training = True
            self.encode(x, y)
        finally:
            self.train(was_training)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Image to latent.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            y: (B,) int64 labels in [0, K).

        Returns:
            `(z, logdet)`: z (B, D), the final block first, then the split-off blocks in the order they were
            split;
            logdet (B,) = log|det dz/dx| in nats, float32 or wider.

        Raises:
            ValueError: a shape or a label does not fit.
            UninitializedModelError: evaluation of a model that has seen no data.
        """
        x = self.check_images(x)
        return self.encode(x, self.check_labels(y, x.shape[0]))

    def inverse(self, z: Tensor, y: Tensor) -> Tensor:
        """Latent to image, the inverse of `forward`.

        Args:
            z: (B, D) latents.
            y: (B,) int64 labels in [0, K).

        Returns:
            (B, C, H, W) images; values are not clamped.

        Raises:
            ValueError: a shape or a label does not fit.
            UninitializedModelError: the model has seen no data.
        """
        if z.ndim != 2 or z.shape[1] != self.config.num_dims:
            raise ValueError(f"z must be (B, {self.config.num_dims}), got {tuple(z.shape)}")
        labels, label_index = self._labels_and_index(self.check_labels(y, z.shape[0]))
        shapes = self.config.latent_shapes
        parts = torch.split(z.to(self.dtype), [c * h * w for c, h, w in shapes], dim=1)
        blocks = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return self.condition(labels, inverse=True).inverse(blocks, label_index)

    def attribution(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Likelihood attribution: the terms of log p(x|y), each put back on the pixels that it came from.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            y: (B,) int64 labels in [0, K).

        Returns:
            `(H, const)`: H (B, C, H, W) in nats per element, const (B,) the label-free rest;
            ``H.sum((1, 2, 3)) + const == log_prob(x, y)``.

        Raises:
            ValueError: a shape or a label does not fit.
            UninitializedModelError: evaluation of a model that has seen no data.
        """
        x = self.check_images(x)
        labels, label_index = self._labels_and_index(self.check_labels(y, x.shape[0]))
        flow = self.condition(labels)
        index_at = flow.label_index_of(label_index)

        def run(i: int, h: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return *flow.steps[i].forward_with_map(h, index_at(i)), None

        with self._setting_actnorm():
            walk = flow.forward(x, label_index, run=run)
        densities = [normal_log_density(block) for block in walk.blocks]
        terms = place_on_image(self.config, walk.terms, normal_log_density(walk.h), densities)
        const = torch.zeros((), dtype=torch.float64, device=x.device)
        for step in flow.steps:
            const = const + step.mixing_logdet()
        return terms, const.to(acc_dtype(x.dtype)).expand(x.shape[0])

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, for images and labels that are checked: no value is read, so no device is waited for.

        Args:
            x: (B, C, H, W) images in [-1, 1], in the dtype of the flow.
            y: (B,) int64 labels, which must lie in [0, K).
        """
        labels, label_index = self._labels_and_index(y)
        with self._setting_actnorm():
            if self._reverses():
                walk = reversible.encode(self.steps, x, labels, label_index)
                mixing: Tensor | float = 0.0
            else:
                flow = self.condition(labels)
                walk = flow.forward(x, label_index)
                mixing = flow.mixing_logdet()
        z = torch.cat([block.flatten(1) for block in (walk.h, *walk.blocks)], dim=1)
        # The sum is float64, since 24 roundings at 3e4 nats would cost more than the first 24 terms.
        total = torch.stack(walk.terms).sum(dim=0, dtype=torch.float64) + mixing
        return z, total.to(acc_dtype(self.dtype))

    def _setting_actnorm(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the first training batch sets ActNorm."""
        waiting = [step.actnorm for step in self.steps if not step.actnorm.ready]
        return all_or_none(waiting) if waiting else contextlib.nullcontext()

    def _reverses(self) -> bool:
        """Whether a pass keeps no activations; a graph that is compiled and `torch.func` take the others."""
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return self.config.reversible and recorded and not is_transformed()

    def _labels_and_index(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Labels to condition on, and each sample's index: all classes, or the samples' own if fewer."""
        # Autograd saves no tensor that was made under inference mode.
        y = counted(y)
        classes, batch = self.config.num_classes, y.shape[0]
        if classes <= batch:
            return torch.arange(classes, device=y.device), mark_label_index(y, classes)
        return y, mark_label_index(torch.arange(batch, device=y.device), batch)

    def check_images(self, x: Tensor) -> Tensor:
        """x in the dtype of the flow.

        Raises:
            ValueError: it is no floating-point batch of images of the configured shape.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.input_shape:
            expected = ", ".join(str(n) for n in self.config.input_shape)
            raise ValueError(f"x must be (B, {expected}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, scaled to [-1, 1], got {x.dtype}")
        return x.to(self.dtype)

    def check_labels(self, y: Tensor, batch: int) -> Tensor:
        """y as int64.

        Raises:
            ValueError: it is no batch of labels of the model.
        """
        if tuple(y.shape) != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"y must be ({batch},) integer labels, got {tuple(y.shape)} {y.dtype}")
        if not torch.compiler.is_compiling() and batch:
            values = plain_values(y)
            wrong = (values < 0) | (values >= self.config.num_classes)
            if bool(wrong.any()):
                last = self.config.num_classes - 1
                raise ValueError(
                    f"y must hold labels from 0 to {last} (num_classes), got {values[wrong][0].item()}"
                )
        return y.to(torch.int64)
