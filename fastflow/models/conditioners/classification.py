"""The classification conditioner: a strided encoder with dense heads.

Source: MAGIC-Flow, published research code (widths).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels.coupling_head import head_reference
from fastflow.kernels.cpu.linear import grouped_linear, whole_groups, wide_linear
from fastflow.kernels.registry import runs_triton
from fastflow.models.conditioners.label_params import (
    CouplingMask,
    Dropout,
    Film,
    LabelParams,
    NextInput,
    conditioner_dtype,
)
from fastflow.models.conditioners.leaves import (
    CBAM,
    EMBEDDING,
    ConditionerBase,
    NormFiLM,
    ResidualBlock,
    normed_conv,
    one_hot_linear,
)
from fastflow.models.conditioners.network import encode_strided, norms
from fastflow.models.config import FlowConfig, Shape
from fastflow.numerics import full_precision

HIDDEN = 64
# Dropouts follow these norms, counted in the order of use.
DROPOUT_NORMS = (0, 3, 6)


class LabelEmbedding(nn.Module):
    """Label -> (128,) through four layers with projected shortcuts."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_classes, 16)
        self.fc2 = nn.Linear(16, 32)
        self.fc3 = nn.Linear(32, 64)
        self.fc4 = nn.Linear(64, EMBEDDING)
        self.proj1 = nn.Linear(16, 32)
        self.proj2 = nn.Linear(32, 64)

    def forward(self, labels: Tensor) -> Tensor:
        h = F.gelu(one_hot_linear(self.fc1, labels))
        h = F.gelu(self.fc2(h) + self.proj1(h))
        h = F.gelu(self.fc3(h) + self.proj2(h))
        return F.gelu(self.fc4(h))


class DenseHead(nn.Module):
    """``out([gelu(image v), gelu(label e)])`` with the last map split into its image half and its label half.

    Split, the label half is a (R, N) table that every image shares.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.image = nn.Linear(features, HIDDEN)
        self.label = nn.Linear(EMBEDDING, HIDDEN)
        self.image_out = nn.Linear(HIDDEN, size, bias=False)
        self.label_out = nn.Linear(HIDDEN, size)
        # With zero heads a new coupling is the identity, which keeps training stable at first (Glow, section
        # 3.3).
        for parameter in (self.image_out.weight, self.label_out.weight, self.label_out.bias):
            nn.init.zeros_(parameter)

    def table(self, embedding: Tensor) -> Tensor:
        """(R, N) for embeddings (R, 128)."""
        hidden = F.gelu(self.label(embedding))
        return wide_linear(hidden, self.label_out.weight, self.label_out.bias)

    def features(self, v: Tensor) -> Tensor:
        """(B, 64) for the encoder's flattened output; in evaluation never narrower than the weights.

        Under autocast, narrow features would round the weights of the last map too, and log-odds with them.
        """
        weight, bias = self.image.weight, self.image.bias
        if self.training:
            return F.gelu(grouped_linear(v, weight, bias))
        with full_precision(v):
            return F.gelu(grouped_linear(v.to(weight.dtype), weight, bias))


class ClassificationConditioner(ConditionerBase):
    """A strided 5x5 stage, two strided 3x3 stages with CBAM and a residual block, then dense heads.

    Args:
        config: the model.
        step: index of its step.
        shape: (C, H, W) of its input and of log-scale and shift.
    """

    def __init__(self, config: FlowConfig, step: int, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        f1, f2, f3 = config.widths[step]
        self.dropout = config.dropout
        self.embedding = LabelEmbedding(config.num_classes if step >= config.condition_from_step else 1)
        self.conv1, self.norm1 = normed_conv(channels, f1, 5, 2), NormFiLM(f1)
        self.conv2, self.norm2 = normed_conv(f1, f2, 3, 2), NormFiLM(f2)
        self.cbam2, self.residual2 = CBAM(f2), ResidualBlock(f2, NormFiLM)
        self.conv3, self.norm3 = normed_conv(f2, f3, 3, 2), NormFiLM(f3)
        self.cbam3, self.residual3 = CBAM(f3), ResidualBlock(f3, NormFiLM)
        features = f3 * -(-height // 8) * -(-width // 8)
        self.scale = DenseHead(features, channels * height * width)
        self.shift = DenseHead(features, channels * height * width)

    def label_modules(self) -> tuple[nn.Module, ...]:
        """See `ConditionerBase.label_modules`."""
        layers = (layer for head in self.heads() for layer in (head.label, head.label_out))
        return (*super().label_modules(), *layers)

    def heads(self) -> tuple[DenseHead, DenseHead]:
        """The heads of the log-scale and of the shift."""
        return self.scale, self.shift

    def label_params(self, labels: Tensor) -> LabelParams:
        """The parameters that `labels` (R,) give the conditioner."""
        e = self.embedding(whole_groups(labels))
        films = tuple(norm.fold(e) for norm in norms(self))
        params = LabelParams(films, (self.scale.table(e), self.shift.table(e)))
        return params if len(e) == len(labels) else params.first(len(labels))

    @property
    def dropouts(self) -> int:
        """How many dropouts a pass takes seeds for."""
        return len(DROPOUT_NORMS) if self.training and self.dropout else 0

    def draw_seeds(self, batch: int, device: torch.device) -> Tensor | None:
        """Seeds (3, B) of its three dropouts from the default generator; None where nothing is dropped."""
        if not self.dropouts:
            return None
        return kernels.dropout_seeds(self.dropouts * batch, device).view(self.dropouts, batch)

    def encode(
        self, a: Tensor, label_params: LabelParams, label_index: Tensor, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The features (B, 64) of the scale head and of the shift head.

        Args:
            a: masked input (B, C, H, W); it may hold one image for several consecutive labels.
            label_params: of R labels.
            label_index: (B,) the entry of each sample.
            seeds: those of `draw_seeds`; the same seeds drop the same elements.
        """
        films = [Film(film, label_index) for film in label_params.films]
        if seeds is not None:
            for norm, seed in zip(DROPOUT_NORMS, seeds, strict=True):
                films[norm] = films[norm]._replace(dropout=Dropout(self.dropout, seed))
        v = encode_strided(self, a, films).flatten(1)
        if not runs_triton(v):
            return self.scale.features(v), self.shift.features(v)
        layers = self.scale.image, self.shift.image
        # In evaluation features are never narrower than the weights, see `DenseHead.features`.
        dtype = conditioner_dtype(v) if self.training else layers[0].weight.dtype
        weights = layers[0].weight.to(dtype), layers[1].weight.to(dtype)
        return kernels.head_features(
            v.to(dtype), weights, (layers[0].bias.to(dtype), layers[1].bias.to(dtype))
        )

    def forward(self, a: Tensor, label_params: LabelParams, label_index: Tensor) -> tuple[Tensor, Tensor]:
        """Masked input (B, C, H, W) -> (raw log-scale, shift), each (B, C, H, W)."""
        seeds = self.draw_seeds(a.shape[0], a.device)
        scale, shift = self.encode(a, label_params, label_index, seeds)
        return (
            head_reference(a, scale, self.scale.image_out.weight, label_params.heads[0], label_index),
            head_reference(a, shift, self.shift.image_out.weight, label_params.heads[1], label_index),
        )

    def transform(
        self,
        x: Tensor,
        params: tuple[Tensor, Tensor],
        label_params: LabelParams,
        label_index: Tensor,
        mask: CouplingMask,
        bound: float,
        inverse: bool,
        next_input: NextInput | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Couple x by what `encode` gave: (y, logdet (B,), the conditioner input that `next_input` names)."""
        weights = (self.scale.image_out.weight, self.shift.image_out.weight)
        arguments = (
            x,
            params,
            weights,
            (label_params.heads[0], label_params.heads[1]),
            label_index,
            mask.passive,
        )
        if next_input is None:
            return *kernels.coupling_head(*arguments, bound, inverse, mask.order), None
        return kernels.coupling_head_step(
            *arguments,
            next_input.visible,
            bound,
            inverse,
            affine=next_input.affine,
            dtype=conditioner_dtype(x),
            order=mask.order,
        )
