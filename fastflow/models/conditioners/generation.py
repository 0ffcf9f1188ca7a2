"""The generation conditioner: full resolution throughout. Source: MAGIC-Flow, published research code (widths, module order)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import kernels
from fastflow.models.conditioners.blocks import (
    CBAM,
    EMBEDDING,
    BatchNormFiLM,
    NormFiLM,
    Passive,
    ResidualBlock,
    Tables,
    Then,
    conditioner_dtype,
    convolve,
    first_rows,
    normed_conv,
    on_cpu,
    one_hot_linear,
    spread,
    whole_groups,
)
from fastflow.models.config import FlowConfig, Shape

DILATIONS = (6, 12, 18)


def _for_each(weights: Tensor, shared: Tensor) -> Tensor:
    """``weights[b] @ shared`` for each sample b; on a CPU as products of their own, whose rounding no other sample touches."""
    return torch.bmm(weights, shared.expand(weights.shape[0], -1, -1)) if on_cpu(weights) else torch.matmul(weights, shared)


def _linear(v: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of (B, inputs), on a CPU each sample for itself."""
    if not on_cpu(v):
        return F.linear(v, weight, bias)
    out = _for_each(v[:, None], weight.t()).squeeze(1)
    return out if bias is None else out + bias


class GlobalFusion(nn.Module):
    """``x + mlp(mean over pixels)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, 128)
        self.up = nn.Linear(128, channels)

    def forward(self, x: Tensor) -> Tensor:
        mean, x = kernels.average_pixels(x)
        hidden = F.gelu(_linear(mean, self.down.weight, self.down.bias))
        return x + _linear(hidden, self.up.weight, self.up.bias)[:, :, None, None]


class GlobalContext(nn.Module):
    """``x * (1 + sigmoid(mlp(mean over pixels)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.down = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, x = kernels.average_pixels(x)
        logits = _linear(F.relu(_linear(mean, self.down.weight)), self.up.weight)
        # Whole groups of rows are whole vectors, whose elements the sigmoid rounds alike.
        gate = torch.sigmoid(whole_groups(logits))[: x.shape[0]] if on_cpu(x) else torch.sigmoid(logits)
        return x * (1.0 + gate)[:, :, None, None]


def _seen(size: int, like: Tensor) -> Tensor:
    """(9, size) of 0 and 1: which rows of an image each tap of the dilated kernels reads, three taps for each dilation.

    Tap i of {-1, 0, 1} reads row r + i*d for every row r of the output; what lies outside of the image is padding.
    """
    row = torch.arange(size, device=like.device)
    shifts = [i * d for d in DILATIONS for i in (-1, 0, 1)]
    return torch.stack([(row >= shift) & (row < size + shift) for shift in shifts]).to(like.dtype)


def _matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A convolution's kernels as a matrix (outputs, inputs * taps), and its bias."""
    assert conv.bias is not None
    return conv.weight.flatten(1), conv.bias


class ASPP(nn.Module):
    """Atrous spatial pyramid with squeeze-excite, neither the pyramid nor its gated form ever in memory at once.

    With branches p_i = B_i * x + b_i, gates g_i and the last map's columns W_i, the result is ``sum W_i diag(g_i) p_i + b``:
    a matrix per sample for each branch. The undilated branch is one with x itself.

    A gate needs no more of a branch than its mean, which follows from the sums of x over the windows that the kernel's taps see.
    On a CPU, each sample's last map is therefore put into the kernels of the branches, W_i diag(g_i) B_i, as long as that costs
    less than the matrix products over pixels that it saves: three convolutions of x are left, and no branch is kept for backward.

    Sources: Chen et al., 2017 (ASPP); Hu et al., 2018 (squeeze-excite).
    """

    branches: Sequence[nn.Conv2d]

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A ModuleList, declared as the sequence that it is.
        self.branches = nn.ModuleList(  # type: ignore[assignment]
            [nn.Conv2d(channels, channels, 1), *(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in DILATIONS)]
        )
        wide = (1 + len(DILATIONS)) * channels
        hidden = max(1, wide // 16)
        self.down = nn.Linear(wide, hidden)
        self.up = nn.Linear(hidden, wide)
        self.output = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        # ATen computes a single small image with other code than a batch of them, which rounds differently in channels_last.
        if not on_cpu(x) or channels * pixels <= 20480:
            return self.mix_branches(x)
        # Dilated convolutions of contiguous planes are up to three times slower on CPUs.
        last = x.contiguous(memory_format=torch.channels_last)
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or pixels < 16 * channels or x.shape[0] == 0:
            return self.mix_branches(last)
        return self.mix_kernels(x, last)

    def mix_branches(self, x: Tensor) -> Tensor:
        """The branches, each mapped and added to the result: one product of a sample's matrix with its pixels for each."""
        mean, x = kernels.average_pixels(x)
        means = [_linear(mean, *_matrix(self.branches[0]))]
        branches = []
        for branch in self.branches[1:]:
            mean, p = kernels.average_pixels(convolve(branch, x))
            means.append(mean)
            branches.append(p.flatten(2))
        (first, *weights), bias = self._weights(means)
        out = torch.baddbmm(bias[:, :, None], first, x.flatten(2))
        for weight, p in zip(weights, branches, strict=True):
            out = torch.baddbmm(out, weight, p)
        return out.unflatten(2, x.shape[2:])

    def mix_kernels(self, x: Tensor, last: Tensor) -> Tensor:
        """A sample's three convolutions with the last map in their kernels. `last` is x in the layout for convolutions."""
        with torch.autocast(x.device.type, enabled=False):
            folded, bias = self._kernels(self._means(x.to(self.output.weight.dtype)))
        samples = []
        for b, image in enumerate(last.split(1)):
            first, *rest = (
                F.conv2d(image, kernel[b], None if i else bias[b], padding=d, dilation=d)
                for i, (kernel, d) in enumerate(zip(folded, DILATIONS, strict=True))
            )
            for part in rest:
                first = first.add_(part)
            samples.append(first)
        return samples[0] if len(samples) == 1 else torch.cat(samples)

    def _means(self, x: Tensor) -> list[Tensor]:
        """Mean over pixels of each branch, (B, C)."""
        batch, channels, height, width = x.shape
        rows, columns = (_seen(size, x).expand(batch * channels, -1, -1) for size in (height, width))
        windows = torch.bmm(torch.bmm(rows, x.flatten(0, 1)), columns.mT).unflatten(0, (batch, channels)) / (height * width)
        # A middle tap sees the whole image.
        means = [_linear(windows[:, :, 1, 1], *_matrix(self.branches[0]))]
        for i, branch in enumerate(self.branches[1:]):
            taps = windows[:, :, 3 * i : 3 * i + 3, 3 * i : 3 * i + 3].flatten(1)
            means.append(_linear(taps, *_matrix(branch)))
        return means

    def _kernels(self, means: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Each sample's kernels (B, C, C, 3, 3) of the three dilations, and its constant (B, C)."""
        (first, *weights), bias = self._weights(means)
        folded = []
        for weight, branch in zip(weights, self.branches[1:], strict=True):
            kernel, constant = _matrix(branch)
            folded.append(_for_each(weight, kernel).unflatten(2, branch.weight.shape[1:]))
            bias = bias + (weight * constant).sum(dim=2)
        # A 1x1 convolution is the middle tap of any other.
        folded[0] = folded[0] + F.pad(first[..., None, None], (1, 1, 1, 1))
        return folded, bias

    def _weights(self, means: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Each sample's maps (B, C, C), of x and of the three dilated branches, and its constant (B, C).

        The constant lacks the biases of the dilated branches.
        """
        hidden = F.relu(_linear(torch.cat(means, dim=1), self.down.weight, self.down.bias))
        gate = torch.sigmoid(_linear(hidden, self.up.weight, self.up.bias))
        output, constant = _matrix(self.output)
        first, *rest = (output * gate[:, None, :]).chunk(len(self.branches), dim=2)
        point, point_bias = _matrix(self.branches[0])
        # On a CPU, products with a single column round differently for a single sample.
        offset = (first * point_bias).sum(dim=2) if on_cpu(first) else torch.matmul(first, point_bias[:, None]).squeeze(2)
        return [_for_each(first, point), *rest], constant + offset


def _planes(x: Tensor) -> Tensor:
    """x with contiguous planes on a CPU, whose norms and poolings are several times faster over them."""
    return x.contiguous() if on_cpu(x) else x


def _head(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution, or a 3x3 one to few channels.

    On a CPU, where a convolution computes 16 output channels at least: one product for all taps, then a sum of their shifts.
    """
    size, outputs = conv.kernel_size[0], conv.out_channels
    eager = not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if not on_cpu(x) or not eager or (size > 1 and outputs > 4) or x.shape[0] == 0:
        return convolve(conv, x)
    _, bias = _matrix(conv)
    weight = conv.weight.permute(2, 3, 0, 1).flatten(0, 2)
    # A product for each sample: of a batch of them, threads split a single one otherwise than several.
    taps = torch.stack([torch.mm(weight, image) for image in x.flatten(2)]).unflatten(2, x.shape[2:]).unflatten(1, (-1, outputs))
    out = bias[:, None, None]
    for i, tap in enumerate(taps.unbind(1)):
        down, right = size // 2 - i // size, size // 2 - i % size
        out = out + F.pad(tap, (right, -right, down, -down))
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
        e = F.gelu(F.gelu(one_hot_linear(self.embedding, whole_groups(labels))))
        norms = (self.norm1, self.norm2, self.norm3)
        first, second, third = (norm.fold(e) for norm in norms)
        tables = Tables((first, second, *self.residual2.fold(e), third, *self.residual3.fold(e)))
        return tables if len(e) == len(labels) else first_rows(tables, len(labels))

    def draw_keys(self, batch: int, device: torch.device) -> Tensor | None:
        """None: nothing is dropped here."""
        return None

    def encode(self, a: Tensor, tables: Tables, rows: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masked input (B, C, H, W) -> (raw log-scale, shift), each (B, C, H, W). `a` may hold one sample for several rows."""
        films = tables.films
        v = self.cbam1(self.norm1(spread(_planes(convolve(self.conv1, a)), rows), films[0], rows))
        v = self.aspp1(self.global1(v))
        v = self.cbam2(self.norm2(_planes(convolve(self.conv2, v)), films[1], rows))
        v = self.aspp2(self.global2(self.residual2(v, films[2:4], rows)))
        v = self.cbam3(self.norm3(_planes(convolve(self.conv3, v)), films[4], rows))
        v = self.aspp3(self.global3(self.residual3(v, films[5:7], rows)))
        return _head(v, self.scale), _head(v, self.shift)

    def forward(self, a: Tensor, tables: Tables, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`."""
        return self.encode(a, tables, rows, None)

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
        if then is None:
            return *kernels.affine_coupling(x, *driven, passive.mask, bound, inverse), None
        return kernels.coupling_step(
            x, *driven, passive.mask, then.mask, bound, inverse, affine=then.affine, dtype=conditioner_dtype(x)
        )
