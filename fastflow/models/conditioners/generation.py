"""The generation conditioner: full resolution throughout. Source: MAGIC-Flow, published research code (widths, module order)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import kernels
from fastflow.models.conditioners.blocks import (
    CBAM,
    EMBEDDING,
    BatchNormFiLM,
    NormFiLM,
    ResidualBlock,
    Tables,
    Then,
    conditioner_dtype,
    normed_conv,
    one_hot_linear,
)
from fastflow.models.config import FlowConfig, Shape

DILATIONS = (6, 12, 18)


class GlobalFusion(nn.Module):
    """``x + mlp(mean over pixels)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, 128)
        self.up = nn.Linear(128, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x.mean(dim=(2, 3)))))[:, :, None, None]


class GlobalContext(nn.Module):
    """``x * (1 + sigmoid(mlp(mean over pixels)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.down = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))
        return x * (1.0 + gate)[:, :, None, None]


class ASPP(nn.Module):
    """Atrous spatial pyramid with squeeze-excite. Sources: Chen et al., 2017 (ASPP); Hu et al., 2018 (squeeze-excite)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Conv2d(channels, channels, 1), *(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in DILATIONS)]
        )
        wide = (1 + len(DILATIONS)) * channels
        hidden = max(1, wide // 16)
        self.down = nn.Linear(wide, hidden)
        self.up = nn.Linear(hidden, wide)
        self.output = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pyramid = torch.cat([branch(x) for branch in self.branches], dim=1)
        gate = torch.sigmoid(self.up(F.relu(self.down(pyramid.mean(dim=(2, 3))))))
        out: Tensor = self.output(pyramid * gate[:, :, None, None])
        return out


class GenerationConditioner(nn.Module):
    """Three stages at stride 1, each with CBAM, global context and an atrous pyramid, then convolutional heads.

    Args:
        config: the model; ``config.norm`` chooses the norm of its residual blocks.
        step: index of its step.
        shape: (C, H, W) of its input and of log-scale and shift.
    """

    def __init__(self, config: FlowConfig, step: int, shape: Shape) -> None:
        super().__init__()
        channels = shape[0]
        f1, f2, f3 = config.widths[step]
        norm = BatchNormFiLM if config.norm == "batch" else NormFiLM
        self.embedding = nn.Linear(config.num_classes if step >= config.condition_from_step else 1, EMBEDDING)
        self.conv1, self.norm1, self.cbam1 = normed_conv(channels, f1, 5), NormFiLM(f1), CBAM(f1)
        self.global1, self.aspp1 = GlobalFusion(f1), ASPP(f1)
        self.conv2, self.norm2, self.cbam2 = normed_conv(f1, f2, 3), NormFiLM(f2), CBAM(f2)
        self.residual2, self.global2, self.aspp2 = ResidualBlock(f2, norm), GlobalContext(f2), ASPP(f2)
        self.conv3, self.norm3, self.cbam3 = normed_conv(f2, f3, 3), NormFiLM(f3), CBAM(f3)
        self.residual3, self.global3, self.aspp3 = ResidualBlock(f3, norm), GlobalContext(f3), ASPP(f3)
        self.scale = nn.Conv2d(f3, channels, 3, padding=1)
        self.shift = nn.Conv2d(f3, channels, 1)
        # With zero heads a new coupling is the identity, which keeps the first steps of training stable (Glow, section 3.3).
        for head in (self.scale, self.shift):
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def tables(self, labels: Tensor) -> Tables:
        """Tables with one row per entry of `labels` (R,)."""
        # The published embedding activates twice.
        e = F.gelu(F.gelu(one_hot_linear(self.embedding, labels)))
        norms = (self.norm1, self.norm2, self.norm3)
        first, second, third = (norm.fold(e) for norm in norms)
        return Tables((first, second, *self.residual2.fold(e), third, *self.residual3.fold(e)))

    def forward(self, a: Tensor, tables: Tables, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Masked input (B, C, H, W) -> (raw log-scale, shift), each (B, C, H, W)."""
        films = tables.films
        v = self.cbam1(self.norm1(self.conv1(a), films[0], rows))
        v = self.aspp1(self.global1(v))
        v = self.cbam2(self.norm2(self.conv2(v), films[1], rows))
        v = self.aspp2(self.global2(self.residual2(v, films[2:4], rows)))
        v = self.cbam3(self.norm3(self.conv3(v), films[4], rows))
        v = self.aspp3(self.global3(self.residual3(v, films[5:7], rows)))
        return self.scale(v), self.shift(v)

    def couple(
        self, x: Tensor, a: Tensor, tables: Tables, rows: Tensor, mask: Tensor, bound: float, inverse: bool, then: Then | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Couple x by what the masked input `a` says: (y, logdet (B,), the input of the conditioner that `then` names)."""
        raw_scale, shift = self(a, tables, rows)
        if then is None:
            return *kernels.affine_coupling(x, raw_scale, shift, mask, bound, inverse), None
        return kernels.coupling_step(
            x, raw_scale, shift, mask, then.mask, bound, inverse, affine=then.affine, dtype=conditioner_dtype(x)
        )
