"""MAGIC-Flow: a class-conditional multiscale normalizing flow that generates images and classifies them by exact likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow import kernels
from fastflow.errors import UninitializedModelError
from fastflow.kernels._library import accumulator
from fastflow.models import reversible
from fastflow.models.attribution import attribution
from fastflow.models.conditioners.blocks import Tables, Then, conditioner_dtype
from fastflow.models.config import FlowConfig
from fastflow.models.layers import ActNorm, FlowStep
from fastflow.models.masks import build_masks


class LabelTables(NamedTuple):
    """Tables of R labels for every step; the label-free steps share one row."""

    steps: list[list[Tables]]
    free_steps: int

    def rows(self, step: int, rows: Tensor) -> Tensor:
        """Which table row each sample uses at `step`."""
        return torch.zeros_like(rows) if step < self.free_steps else rows


class MagicFlow(nn.Module):
    """The flow. `forward` maps an image to its latent, `inverse` back; ``log p(x|y) = log N(z; 0, I) + logdet``.

    A new model must see data before it can evaluate: the first forward in training mode, or `initialize`, sets its ActNorm.

    Args:
        config: the architecture.
        application_mask: (H, W) array of 0/1, or the path of a PNG, for the `custom` masks; None takes the shipped one.

    Raises:
        ValueError: the mask does not fit.

    Attributes:
        temperature: divides log-likelihoods in `posterior`; 1 until it is fitted on validation data.
        metadata: JSON values that `save` keeps with the model (preprocessing, training settings).

    Example:
        >>> config = FlowConfig.tiny(num_classes=3)
        >>> model = MagicFlow(config).eval()
        >>> x = torch.rand(4, 1, 16, 16) * 2 - 1
        >>> model.initialize(x)
        >>> y = torch.tensor([0, 1, 2, 0])
        >>> z, logdet = model(x, y)
        >>> z.shape, logdet.shape, bool((model.inverse(z, y) - x).abs().max() < 1e-3)
        (torch.Size([4, 256]), torch.Size([4]), True)

    Source: Caldera, Bottacini, Cavinato, arXiv 2510.22070.
    """

    steps: Sequence[FlowStep]

    def __init__(self, config: FlowConfig, application_mask: Any = None) -> None:
        super().__init__()
        self.config = config
        self.temperature = 1.0
        self.metadata: dict[str, Any] = {}
        masks = build_masks(config, application_mask)
        steps = (FlowStep(config, i, shape, mask) for i, (shape, mask) in enumerate(zip(config.step_shapes, masks, strict=True)))
        # A ModuleList, declared as the sequence that it is.
        self.steps = nn.ModuleList(steps)  # type: ignore[assignment]

    # -- state ----------------------------------------------------------------------------------------------------------

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

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor | None = None) -> None:
        """Set ActNorm from a batch, layer by layer, without training; layers that are initialised stay as they are.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            y: (B,) labels; they cycle through the classes when None.

        Raises:
            ValueError: a shape or a label does not fit.
        """
        x = self._check_images(x)
        if y is None:
            y = torch.arange(x.shape[0], device=x.device) % self.config.num_classes
        y = self._check_labels(y, x.shape[0])
        was_training = self.training
        try:
            # ActNorm starts in training mode only; dropout must not disturb its statistics.
            self.eval()
            for module in self.modules():
                if isinstance(module, FlowStep):
                    module.training = True
            self._encode(x, y)
        finally:
            self.train(was_training)

    # -- the map --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Image to latent.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            y: (B,) int64 labels in [0, K).

        Returns:
            `(z, logdet)`: z (B, D), the final block first, then the split-off blocks in the order they were split;
            logdet (B,) = log|det dz/dx| in nats, float32 or wider.

        Raises:
            ValueError: a shape or a label does not fit.
            UninitializedModelError: evaluation of a model that has seen no data.
        """
        x = self._check_images(x)
        y = self._check_labels(y, x.shape[0])
        return self._encode(x, y)

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
        y = self._check_labels(y, z.shape[0])
        if not self.initialized:
            raise UninitializedModelError
        tables, rows = self._tables_for(y)
        shapes = self.config.latent_shapes
        blocks = [
            block.unflatten(1, shape)
            for block, shape in zip(torch.split(z.to(self.dtype), [c * h * w for c, h, w in shapes], dim=1), shapes, strict=True)
        ]
        h = blocks.pop(0)
        masked: Tensor | None = None
        for i in reversed(range(self.config.num_steps)):
            step = self.steps[i]
            if step.split:
                h = torch.cat((h, blocks.pop()), dim=1)
            if masked is None:
                # The second half's conditioner goes first; it sees what the first half moves.
                masked = h.masked_fill(step.coupling.mask, 0.0).to(conditioner_dtype(h))
            then = self._before(i)
            h, _, masked = step.coupling(h, masked, tables.steps[i], tables.rows(i, rows), inverse=True, then=then)
            if then is None:
                h = step.unmix(h)
        return h

    def following(self, i: int, last: int) -> Then | None:
        """What the coupling of step i can do of step i + 1, the range ending before `last`."""
        if i + 1 >= last or self.steps[i].split:
            return None
        affine = self.steps[i + 1].folded()
        return None if affine is None else Then(self.steps[i + 1].coupling.mask, affine)

    def _before(self, i: int) -> Then | None:
        """What the inverse coupling of step i can do of its own inverse mix, for the step before it."""
        if i == 0 or self.steps[i - 1].split:
            return None
        affine = self.steps[i].folded(inverse=True)
        return None if affine is None else Then(~self.steps[i - 1].coupling.mask, affine)

    def label_tables(self, labels: Tensor) -> LabelTables:
        """What the conditioners need to know of `labels` (R,), computed once for any number of images."""
        steps = [step.coupling.tables(self.step_labels(i, labels, labels)[0]) for i, step in enumerate(self.steps)]
        return LabelTables(steps, self.config.condition_from_step)

    def step_labels(self, i: int, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (R,) of the tables of step i, and each sample's row (B,): a single row where the step ignores the label."""
        if i < self.config.condition_from_step:
            return torch.zeros(1, dtype=torch.int64, device=labels.device), torch.zeros_like(rows)
        return labels, rows

    def _rows_for(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of the tables and each sample's row: one per class, or per sample where there are fewer samples than classes."""
        if self.config.num_classes <= y.shape[0]:
            return torch.arange(self.config.num_classes, device=y.device), y
        return y, torch.arange(y.shape[0], device=y.device)

    def _tables_for(self, y: Tensor) -> tuple[LabelTables, Tensor]:
        labels, rows = self._rows_for(y)
        return self.label_tables(labels), rows

    def _encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.reversible and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            h, splits, logdets = reversible.encode(self, x, *self._rows_for(y))
        else:
            tables, rows = self._tables_for(y)
            h, splits, logdets = self.run_steps(x, tables, rows, 0, self.config.num_steps)
        z = torch.cat([block.flatten(1) for block in (h, *splits)], dim=1)
        return z, self.total(logdets)

    def run_steps(
        self, h: Tensor, tables: LabelTables, rows: Tensor, first: int, last: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Steps `first` to `last` (exclusive) on h (B, C, H, W): (h, blocks split off, log-determinants (B,) of each step)."""
        splits, logdets = [], []
        masked: Tensor | None = None
        for i in range(first, last):
            step = self.steps[i]
            if masked is None:
                h, masked = step.mix_masked(h)
            h, logdet, masked = step.coupling(h, masked, tables.steps[i], tables.rows(i, rows), then=self.following(i, last))
            logdets.append(logdet.double() + step.mixing_logdet())
            if step.split:
                h, block = h.chunk(2, dim=1)
                splits.append(block)
        return h, splits, logdets

    def total(self, terms: Sequence[Tensor]) -> Tensor:
        """Sum of per-step terms (B,): float64 inside, since 24 roundings at 3e4 nats would cost more than the first 24 terms."""
        return torch.stack([term.double() for term in terms]).sum(dim=0).to(accumulator(self.dtype))

    # -- densities ------------------------------------------------------------------------------------------------------

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-density of images given labels.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            y: (B,) int64 labels in [0, K).

        Returns:
            (B,) log p(x|y) in nats, float32 or wider.

        Raises:
            ValueError: a shape or a label does not fit.
            UninitializedModelError: evaluation of a model that has seen no data.
        """
        z, logdet = self(x, y)
        return kernels.latent_prior(z) + logdet

    def log_prob_all(self, x: Tensor) -> Tensor:
        """Log-density of images given each label, all labels in one batched pass.

        Args:
            x: (B, C, H, W) images in [-1, 1].

        Returns:
            (B, K) log p(x|y) in nats, the same values as K calls of `log_prob`.

        Raises:
            ValueError: the shape does not fit.
            UninitializedModelError: evaluation of a model that has seen no data.
        """
        from fastflow.models.scoring import log_prob_all

        return log_prob_all(self, self._check_images(x))

    def posterior(self, x: Tensor, prior: Tensor | Sequence[float] | None = None) -> Tensor:
        """Class probabilities: softmax over labels of ``log p(x|y) / temperature + log prior(y)``.

        Only the likelihood is tempered; a tempered prior would all but vanish.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            prior: (K,) probabilities that sum to 1; uniform when None.

        Returns:
            (B, K).

        Raises:
            ValueError: a shape does not fit or the prior is not one.
        """
        from fastflow.models.scoring import posterior_from_log_probs

        return posterior_from_log_probs(self.log_prob_all(x), self.temperature, prior)

    @torch.no_grad()
    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images given labels.

        Args:
            y: (B,) int64 labels in [0, K).
            temperature: standard deviation of the latent; below 1 gives smoother, more typical images.
            generator: source of randomness, for repeatable draws.

        Returns:
            (B, C, H, W) images; values are not clamped to [-1, 1].

        Raises:
            ValueError: a label does not fit or the temperature is negative.
            UninitializedModelError: the model has seen no data.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        where = self.device if generator is None else generator.device
        z = torch.randn(y.shape[0], self.config.num_dims, dtype=self.dtype, device=where, generator=generator)
        return self.inverse(temperature * z.to(self.device), y)

    def attribution(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Likelihood attribution: log p(x|y) spread over the image.

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
        x = self._check_images(x)
        y = self._check_labels(y, x.shape[0])
        return attribution(self, x, *self._tables_for(y))

    # -- files ----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str]) -> None:
        """Write configuration and weights into `folder`, atomically: a reader sees the old model or the new one.

        Raises:
            UninitializedModelError: the model has seen no data, so its weights could not be used.
        """
        from fastflow.models.checkpoint import save

        save(self, folder)

    @classmethod
    def load(cls, folder: str | PathLike[str], device: str | torch.device = "cpu") -> MagicFlow:
        """Read a model that `save` wrote; it comes back in evaluation mode with the same bits.

        Raises:
            CheckpointError: the folder is missing, incomplete or corrupt, or the weights do not match their hash.
        """
        from fastflow.models.checkpoint import load

        return load(folder, device)

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Any], config: FlowConfig, application_mask: Any = None) -> MagicFlow:
        """Build a model from a checkpoint of the authors' research code.

        Args:
            state_dict: the published state, or a checkpoint dict that holds it under ``model_state_dict``.
            config: the layout that the weights were trained with.
            application_mask: the separate binary image, when the layout has `custom` masks.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: a weight is missing, left over or of the wrong shape; the message names it.
        """
        from fastflow.models.published import from_published

        return from_published(state_dict, config, application_mask)

    # -- checks ---------------------------------------------------------------------------------------------------------

    def _check_images(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.input_shape:
            expected = ", ".join(str(n) for n in self.config.input_shape)
            raise ValueError(f"x must be (B, {expected}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, scaled to [-1, 1], got {x.dtype}")
        return x.to(self.dtype)

    def _check_labels(self, y: Tensor, batch: int) -> Tensor:
        if tuple(y.shape) != (batch,) or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"y must be ({batch},) integer labels, got {tuple(y.shape)} {y.dtype}")
        if not torch.compiler.is_compiling() and batch and not bool(((y >= 0) & (y < self.config.num_classes)).all()):
            bad = y[(y < 0) | (y >= self.config.num_classes)][0].item()
            raise ValueError(f"y must hold labels from 0 to {self.config.num_classes - 1} (num_classes), got {bad}")
        return y.to(torch.int64)
