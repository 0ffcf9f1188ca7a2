"""MAGIC-Flow: a class-conditional normalizing flow that generates images and classifies by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow import kernels
from fastflow.errors import UninitializedModelError
from fastflow.models import checkpoint, published
from fastflow.models.checkpoint import Checkpoint
from fastflow.models.config import FlowConfig
from fastflow.models.flow import Flow
from fastflow.models.inference.precision import warn_if_narrow
from fastflow.models.inference.sampler import SamplerOfWeights
from fastflow.models.scoring import log_prob_all, posterior_from_log_probs


class MagicFlow(Flow):
    """The flow: `forward` maps an image to its latent; ``log p(x|y) = log N(z; 0, I) + logdet``.

    A new model must see data before it can evaluate: the first forward in training mode, or `initialize`,
    sets its ActNorm.

    Args:
        config: the architecture.
        application_mask: (H, W) array of 0/1, or the path of a PNG, for the `custom` masks; None takes the
            shipped one.

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

    def __init__(self, config: FlowConfig, application_mask: Any = None) -> None:
        super().__init__(config, application_mask)
        self.temperature = 1.0
        self.metadata: dict[str, Any] = {}
        self._samplers = SamplerOfWeights()

    def train(self, mode: bool = True) -> MagicFlow:
        """As `torch.nn.Module.train`; training mode drops what sampling has captured."""
        if mode:
            self._samplers = SamplerOfWeights()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MagicFlow:
        # Conversions of all kinds end here: `half`, `to`, and those of a module around the model.
        before = self.dtype
        super()._apply(fn, recurse)
        if self.dtype != before:
            warn_if_narrow(self.dtype, stacklevel=3)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model take no captured passes along.
        return {**self.__dict__, "_samplers": SamplerOfWeights()}

    # -- densities -------------------------------------------------------------------------------------------

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
        return log_prob_all(self, self.check_images(x))

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
        return posterior_from_log_probs(self.log_prob_all(x), self.temperature, prior)

    @torch.no_grad()
    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images given labels.

        On a GPU, in evaluation mode and without autocast, a `fastflow.models.sampling.Sampler` of the weights
        draws them, in float32 without TF32: the second call captures CUDA graphs, which `train()` drops.
        Elsewhere each call computes label parameters and inverse matrices anew.

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
        if self.device.type == "cuda" and not self.training and not torch.is_autocast_enabled("cuda"):
            return self._samplers.get(self)(y, temperature, generator)
        where = self.device if generator is None else generator.device
        z = torch.randn(y.shape[0], self.config.num_dims, dtype=self.dtype, device=where, generator=generator)
        return self.inverse(temperature * z.to(self.device), y)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the model into `folder`, atomically: a reader sees the old model or the new one.

        Raises:
            UninitializedModelError: the model has seen no data, so its weights could not be used.
            CheckpointError: weights or the temperature are not finite, the temperature is not positive, or
                the metadata are no JSON. An earlier model in the folder stays.
        """
        if not self.initialized:
            raise UninitializedModelError(
                "a model that has seen no data cannot be saved: train it or call initialize(x) first"
            )
        checkpoint.write(folder, Checkpoint(self.config, self.state_dict(), self.temperature, self.metadata))

    @classmethod
    def load(cls, folder: str | PathLike[str], device: str | torch.device = "cpu") -> MagicFlow:
        """Read a model that `save` wrote; it comes back in evaluation mode with the same bits.

        Raises:
            CheckpointError: the folder is missing, incomplete or corrupt, the weights do not match their
                hash, or they or the temperature are not finite.
        """
        stored = checkpoint.read(folder)
        with checkpoint.described_by(folder):
            # The skeleton's masks and dtypes are placeholders: the stored tensors take their place as they
            # are.
            model = cls(stored.config, np.zeros(stored.config.input_shape[1:]))
            model.load_state_dict(stored.state, assign=True)
        model.temperature, model.metadata = stored.temperature, stored.metadata
        warn_if_narrow(model.dtype, stacklevel=2)
        return model.to(device).eval()

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Any], config: FlowConfig, application_mask: Any = None
    ) -> MagicFlow:
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
        state = published.tensors_of(state_dict)
        model = cls(config, application_mask).to(published.dtype_of(state))
        published.load_into(model, state)
        return model.eval()
