"""The generation conditioner: full resolution throughout.

Source: MAGIC-Flow, published research code (widths, module order).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import kernels
from fastflow.kernels.cpu.convolution import convolve_to_few
from fastflow.kernels.cpu.linear import whole_groups
from fastflow.kernels.cpu.pyramid import PyramidWeights
from fastflow.kernels.pyramid import atrous_pyramid
from fastflow.models.conditioners.label_params import (
    CouplingMask,
    Film,
    LabelParams,
    NextInput,
    conditioner_dtype,
)
from fastflow.models.conditioners.leaves import (
    CBAM,
    EMBEDDING,
    BatchNormFiLM,
    ConditionerBase,
    Conv,
    NormFiLM,
    PlaneConv,
    ResidualBlock,
    normed_conv,
    one_hot_linear,
)
from fastflow.models.conditioners.network import encode_full_resolution, norms
from fastflow.models.config import FlowConfig, Shape

DILATIONS = (6, 12, 18)


class GlobalFusion(nn.Module):
    """``x + mlp(mean over pixels)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, 128)
        self.up = nn.Linear(128, channels)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.global_fusion(x, _weight_and_bias(self.down), _weight_and_bias(self.up))


class GlobalContext(nn.Module):
    """``x * (1 + sigmoid(mlp(mean over pixels)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.down = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.global_context(x, self.down.weight, self.up.weight)


class ASPP(nn.Module):
    """Atrous spatial pyramid with squeeze-excite, see `fastflow.kernels.pyramid`."""

    branches: Sequence[nn.Conv2d]

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A ModuleList is declared as the sequence that it is.
        self.branches = nn.ModuleList(  # type: ignore[assignment]
            [
                Conv(channels, channels, 1),
                *(Conv(channels, channels, 3, padding=d, dilation=d) for d in DILATIONS),
            ]
        )
        pyramid_channels = (1 + len(DILATIONS)) * channels
        hidden = max(1, pyramid_channels // 16)
        self.down = nn.Linear(pyramid_channels, hidden)
        self.up = nn.Linear(hidden, pyramid_channels)
        self.output = nn.Conv2d(pyramid_channels, channels, 1)

    def weights(self) -> PyramidWeights:
        """Its weights, as the op takes them."""
        point, *dilated = (_weight_and_bias(branch) for branch in self.branches)
        down, up, output = (_weight_and_bias(layer) for layer in (self.down, self.up, self.output))
        return PyramidWeights(point, tuple(dilated), DILATIONS, down, up, output)

    def forward(self, x: Tensor) -> Tensor:
        return atrous_pyramid(x, self.weights())


def _weight_and_bias(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight, layer.bias


class HeadConv(nn.Conv2d):
    """The last convolution, to as few channels as the stream has."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve_to_few(x, *_weight_and_bias(self))


class GenerationConditioner(ConditionerBase):
    """Three stages at stride 1 with CBAM, global context and an atrous pyramid, then convolutional heads.

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
        self.conv1, self.norm1 = normed_conv(channels, f1, 5, kind=PlaneConv), NormFiLM(f1)
        self.cbam1 = CBAM(f1)
        self.global1, self.aspp1 = GlobalFusion(f1), ASPP(f1)
        self.conv2, self.norm2 = normed_conv(f1, f2, 3, kind=PlaneConv), NormFiLM(f2)
        self.cbam2 = CBAM(f2)
        self.residual2, self.global2, self.aspp2 = ResidualBlock(f2, norm), GlobalContext(f2), ASPP(f2)
        self.conv3, self.norm3 = normed_conv(f2, f3, 3, kind=PlaneConv), NormFiLM(f3)
        self.cbam3 = CBAM(f3)
        self.residual3, self.global3, self.aspp3 = ResidualBlock(f3, norm), GlobalContext(f3), ASPP(f3)
        self.scale = HeadConv(f3, channels, 3, padding=1)
        self.shift = HeadConv(f3, channels, 1)
        # With zero heads a new coupling is the identity, which keeps training stable at first (Glow, section
        # 3.3).
        for head in (self.scale, self.shift):
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def label_params(self, labels: Tensor) -> LabelParams:
        """The parameters that `labels` (R,) give the conditioner."""
        # The published embedding activates twice.
        e = F.gelu(F.gelu(one_hot_linear(self.embedding, whole_groups(labels))))
        params = LabelParams(tuple(norm.fold(e) for norm in norms(self)))
        return params if len(e) == len(labels) else params.first(len(labels))

    @property
    def dropouts(self) -> int:
        """How many dropouts a pass takes seeds for: none."""
        return 0

    def draw_seeds(self, batch: int, device: torch.device) -> Tensor | None:
        """None: nothing is dropped here."""
        return None

    def encode(
        self, a: Tensor, label_params: LabelParams, label_index: Tensor, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(raw log-scale, shift), each (B, C, H, W).

        Args:
            a: masked input (B, C, H, W); it may hold one image for several consecutive labels.
            label_params: of R labels.
            label_index: (B,) the entry of each sample.
            seeds: those of `draw_seeds`.
        """
        v = encode_full_resolution(self, a, [Film(film, label_index) for film in label_params.films])
        return self.scale(v), self.shift(v)

    def forward(self, a: Tensor, label_params: LabelParams, label_index: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`."""
        return self.encode(a, label_params, label_index, None)

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
        if next_input is None:
            return *kernels.affine_coupling(x, *params, mask.passive, bound, inverse), None
        return kernels.coupling_step(
            x,
            *params,
            mask.passive,
            next_input.visible,
            bound,
            inverse,
            affine=next_input.affine,
            dtype=conditioner_dtype(x),
        )
