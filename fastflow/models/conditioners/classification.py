"""The classification conditioner: a strided encoder with dense heads. Source: MAGIC-Flow, published research code (widths)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels._library import full_precision
from fastflow.kernels.coupling_head import head_reference
from fastflow.kernels.norm_film_act import dropout_keys
from fastflow.models.conditioners.blocks import (
    CBAM,
    EMBEDDING,
    ROW_GROUP,
    Drop,
    NormFiLM,
    Passive,
    ResidualBlock,
    Tables,
    Then,
    conditioner_dtype,
    convolve,
    eager_on_cpu,
    first_rows,
    linear,
    normed_conv,
    one_hot_linear,
    spread,
    whole_groups,
)
from fastflow.models.config import FlowConfig, Shape

HIDDEN = 64


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
        # With zero heads a new coupling is the identity, which keeps the first steps of training stable (Glow, section 3.3).
        for parameter in (self.image_out.weight, self.label_out.weight, self.label_out.bias):
            nn.init.zeros_(parameter)

    def table(self, embedding: Tensor) -> Tensor:
        """(R, N) for embeddings (R, 128)."""
        h, last = F.gelu(self.label(embedding)), self.label_out
        if not eager_on_cpu(h) or len(h) == 0 or len(h) % ROW_GROUP:
            out: Tensor = last(h)
            return out
        # Few rows and a large matrix: faster with the matrix on the left, and alike for four rows and for eight.
        products = torch.cat([torch.mm(last.weight, part.t()) for part in h.split(2 * ROW_GROUP)], dim=1)
        return products.t().contiguous() + last.bias

    def features(self, v: Tensor) -> Tensor:
        """(B, 64) for the encoder's flattened output; in evaluation never narrower than the weights.

        Under autocast, narrow features would round the weights of the last map too, and log-odds with them.
        """
        if self.training:
            return F.gelu(linear(v, self.image))
        with full_precision(v):
            return F.gelu(linear(v.to(self.image.weight.dtype), self.image))


class ClassificationConditioner(nn.Module):
    """Three stages (the first strided 5x5, the others strided 3x3 with CBAM and a residual block), then dense heads.

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

    def tables(self, labels: Tensor) -> Tables:
        """Tables with one row per entry of `labels` (R,)."""
        e = self.embedding(whole_groups(labels))
        films = (
            self.norm1.fold(e),
            self.norm2.fold(e),
            *self.residual2.fold(e),
            self.norm3.fold(e),
            *self.residual3.fold(e),
        )
        tables = Tables(films, (self.scale.table(e), self.shift.table(e)))
        return tables if len(e) == len(labels) else first_rows(tables, len(labels))

    def draw_keys(self, batch: int, device: torch.device) -> Tensor | None:
        """Keys (3, B) of its three dropouts from the default generator; None where nothing is dropped."""
        if not self.training or self.dropout == 0:
            return None
        return dropout_keys(3 * batch, device).view(3, batch)

    def encode(self, a: Tensor, tables: Tables, rows: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masked input (B, C, H, W) -> the features of the scale head and of the shift head, each (B, 64).

        `keys` are those of `draw_keys`: the same keys drop the same elements. `a` may hold one sample for several rows.
        """
        films = tables.films
        drops = [None] * 3 if keys is None else [Drop(self.dropout, key) for key in keys]
        v = self.norm1(spread(convolve(self.conv1, a), rows), films[0], rows, drop=drops[0])
        v = self.cbam2(self.norm2(convolve(self.conv2, v), films[1], rows))
        v = self.residual2(v, films[2:4], rows, drop=drops[1])
        v = self.cbam3(self.norm3(convolve(self.conv3, v), films[4], rows))
        v = self.residual3(v, films[5:7], rows, drop=drops[2]).flatten(1)
        return self.scale.features(v), self.shift.features(v)

    def forward(self, a: Tensor, tables: Tables, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Masked input (B, C, H, W) -> (raw log-scale, shift), each (B, C, H, W)."""
        scale, shift = self.encode(a, tables, rows, self.draw_keys(a.shape[0], a.device))
        return (
            head_reference(a, scale, self.scale.image_out.weight, tables.heads[0], rows),
            head_reference(a, shift, self.shift.image_out.weight, tables.heads[1], rows),
        )

    def couple(
        self,
        x: Tensor,
        driven: tuple[Tensor, Tensor],
        tables: Tables,
        rows: Tensor,
        passive: Passive,
        bound: float,
        inverse: bool,
        then: Then | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Couple x by what `encode` gave: (y, logdet (B,), the input of the conditioner that `then` names)."""
        weights = (self.scale.image_out.weight, self.shift.image_out.weight)
        arguments = x, driven, weights, (tables.heads[0], tables.heads[1]), rows, passive.mask
        if then is None:
            return *kernels.coupling_head(*arguments, bound, inverse, passive.order), None
        return kernels.coupling_head_step(
            *arguments, then.mask, bound, inverse, affine=then.affine, dtype=conditioner_dtype(x), order=passive.order
        )
