"""A model folded for scoring: everything that no image changes, computed once, and couplings as plain functions of it.

Folded are: weight norm; ActNorm into the matrix of the 1x1 convolution; GroupNorm's affine part and FiLM into (K, C) tables; the
label half of the dense heads into (K, A) tables; every log-determinant that depends on neither image nor label into one constant.

The stream is held in *planes*: for the classification conditioner the four phases of each channel, (R, H/2, W/2, 4C), for the
generation conditioner the channels themselves, (R, H, W, C). The strided 5x5 convolution that opens a classification conditioner
is a 3x3 convolution over planes. A mask with structure (checkerboard, channel, stripes) makes each plane passive or active as a
whole; a step then holds its stream as two tensors, the passive planes and the active ones: the first convolution reads the one,
half of its inputs being known zeros otherwise, the heads compute the values that move the other, and nothing is gathered or
scattered. The halves of a step exchange the roles. Other masks keep all planes in one tensor. What lies between two couplings
(split, squeeze, ActNorm, 1x1 convolution, the next step's order of planes) is one matrix over the planes of a pixel.

The functions are plain ATen over NamedTuples of tensors, the same code for every step, so that one compiled graph serves all
steps of one shape. Convolutions of few channels are fastest on CPUs with channels last, and norms sum whole vectors there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fastflow.kernels._library import accumulator, sum_per_sample
from fastflow.models.conditioners.blocks import CBAM, BatchNormFiLM, Modulation, NormFiLM, ResidualBlock, Tables, num_groups
from fastflow.models.conditioners.classification import ClassificationConditioner
from fastflow.models.conditioners.generation import ASPP, DILATIONS, GenerationConditioner

if TYPE_CHECKING:
    from fastflow.models.layers import FlowStep
    from fastflow.models.magic_flow import LabelTables, MagicFlow

GATE_TILE = 4
EPS = 1e-5
LOG_2PI = math.log(2.0 * math.pi)


class Conv(NamedTuple):
    """A convolution's weight (O, I, k, k), its channels last, and bias (O,)."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """A norm: `average` (C, C) takes a sample's sums over pixels to its groups' means, for every channel.

    Without `average`, a BatchNorm whose statistics are folded into its film. `identity` (C, C) is there for the compiler: a
    product with it changes no bit, but makes the compiler store the (R, C) numbers before it instead of computing them for every
    pixel.
    """

    average: Tensor | None
    identity: Tensor


class Gates(NamedTuple):
    """CBAM: the shared MLP's maps (h, C) and (C, h), and the spatial convolution over tiles of pixels, see `spatial_tile`."""

    down: Tensor
    up: Tensor
    spatial: Tensor
    identity: Tensor


class Residual(NamedTuple):
    """A residual block."""

    conv1: Conv
    norm1: Norm
    conv2: Conv
    norm2: Norm


class Stage(NamedTuple):
    """Convolution, norm, gates and residual block of a classification conditioner."""

    conv: Conv
    norm: Norm
    gates: Gates
    residual: Residual


class DenseHeads(NamedTuple):
    """Dense heads: (F, 128) and (128,) for the features of both; (64, A) each for log-scale and shift of what moves; their table.

    The table (K, 2A) holds the label half of log-scales, then of shifts.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    table: Tensor


class ClassificationNet(NamedTuple):
    """A classification conditioner."""

    conv1: Conv
    norm1: Norm
    stage2: Stage
    stage3: Stage
    heads: DenseHeads


class Mlp(NamedTuple):
    """Two linear maps, (h, C) and (C, h), with biases or without."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None


class Pyramid(NamedTuple):
    """ASPP: the point and dilated convolutions, the squeeze-excite MLP, and the last map (C, 4C) with its bias."""

    branches: tuple[Conv, ...]
    gate: Mlp
    output: Tensor
    bias: Tensor


class GenerationStage(NamedTuple):
    """A stage of a generation conditioner; the first has no residual block, and fuses where the others gate."""

    conv: Conv
    norm: Norm
    gates: Gates
    residual: Residual | None
    context: Mlp
    pyramid: Pyramid


class GenerationNet(NamedTuple):
    """A generation conditioner."""

    stages: tuple[GenerationStage, ...]
    scale: Conv
    shift: Conv


class Half(NamedTuple):
    """One half of a coupling: its conditioner, and which elements it moves where planes are not passive or active as a whole.

    `films` (K, sum of 2C) holds FiLM folded with the affine part of each norm in order of use, scale then shift, which take
    `sizes` columns each. `passive` and `active` (H', W', P) are masks of the one tensor of planes; `rank` (H', W', P) says where
    each element of it stands among those that dense heads compute (anywhere for others).
    """

    net: ClassificationNet | GenerationNet
    films: Tensor
    sizes: tuple[int, ...]
    passive: Tensor | None = None
    active: Tensor | None = None
    rank: Tensor | None = None


class Mix(NamedTuple):
    """What lies between two couplings: for each tensor of the next step's planes a matrix (from, to) and a constant (to,).

    `sources` names, where a step of one channel only exchanges roles, the tensor that each one comes from.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    sources: tuple[int, ...] | None


class Step(NamedTuple):
    """One flow step.

    Attributes:
        squeeze: 2x2 blocks of pixels become channels before the mix.
        mix: from the planes of the step before to those of this one.
        columns: for each tensor of planes, which of all planes it holds.
        valid: for each tensor, (H', W', P) of 0 and 1, where an odd size leaves phases without a pixel; None where all have one.
        halves: the two halves; in the second the passive and the active tensor exchange their roles.
        split: which of the tensors' planes, joined, leave as latent after this step; None where none does, and for the last step.
    """

    squeeze: bool
    mix: Mix
    columns: tuple[Tensor, ...]
    valid: tuple[Tensor, ...] | None
    halves: tuple[Half, Half]
    split: Tensor | None


Planes = tuple[Tensor, ...]


class Folded(NamedTuple):
    """A folded model.

    Attributes:
        steps: its steps.
        phases: 2 where planes are the phases of channels, else 1.
        constant: what neither image nor label changes in log p(x|y): log-determinants and the prior's normalisation, in nats.
        bound: of the log-scale.
    """

    steps: tuple[Step, ...]
    phases: int
    constant: float
    bound: float


# -- folding: conditioners ------------------------------------------------------------------------------------------------


def _conv(conv: nn.Conv2d, dtype: torch.dtype, weight: Tensor | None = None) -> Conv:
    weight = conv.weight if weight is None else weight
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return Conv(weight.to(dtype).contiguous(memory_format=torch.channels_last), bias)


def _table(table: Tensor) -> Tensor:
    """A table of at least two rows: graphs are compiled for any number of rows above one."""
    return table if table.shape[0] > 1 else table.repeat(2, 1)


def _norm(norm: NormFiLM | BatchNormFiLM, pixels: int) -> Norm:
    weight = norm.norm.weight if isinstance(norm, BatchNormFiLM) else norm.weight
    channels = len(weight)
    identity = torch.eye(channels, dtype=weight.dtype, device=weight.device)
    if isinstance(norm, BatchNormFiLM):
        return Norm(None, identity)
    size = channels // num_groups(channels)
    block = torch.full((size, size), 1.0 / (size * pixels), dtype=weight.dtype, device=weight.device)
    return Norm(torch.block_diag(*[block] * num_groups(channels)), identity)


def _films(net: ClassificationConditioner | GenerationConditioner, tables: Tables) -> tuple[Tensor, tuple[int, ...]]:
    """`films` and `sizes` of `Half`."""
    norms = net.norm1, net.norm2, net.residual2.norm1, net.residual2.norm2, net.norm3, net.residual3.norm1, net.residual3.norm2
    films = [part for norm, film in zip(norms, tables.films, strict=True) for part in _film(norm, film)]
    return _table(torch.cat(films, dim=1)), tuple(2 * film.gamma.shape[1] for film in tables.films)


def _film(norm: NormFiLM | BatchNormFiLM, film: Modulation) -> Modulation:
    """A film, with the statistics of a BatchNorm."""
    if not isinstance(norm, BatchNormFiLM):
        return film
    mean, variance = norm.norm.running_mean, norm.norm.running_var
    assert mean is not None and variance is not None
    gamma = film.gamma * torch.rsqrt(variance + norm.norm.eps)
    return Modulation(gamma, film.beta - mean * gamma)


def _gates(block: CBAM) -> Gates:
    down, up = block.down.weight, block.up.weight
    if len(down) == 1:
        # The compiler treats products over a single number apart, by how many rows there are.
        down, up = F.pad(down, (0, 0, 0, 1)), F.pad(up, (0, 1))
    identity = torch.eye(up.shape[0], dtype=up.dtype, device=up.device)
    return Gates(down, up, spatial_tile(block.spatial.weight), identity)


def _residual(block: ResidualBlock, pixels: int, dtype: torch.dtype) -> Residual:
    norms = _norm(block.norm1, pixels), _norm(block.norm2, pixels)
    return Residual(_conv(block.conv1, dtype), norms[0], _conv(block.conv2, dtype), norms[1])


def spatial_tile(weight: Tensor) -> Tensor:
    """A convolution (1, I, 7, 7) as one over tiles of 4x4 pixels, (16, 16 I, 3, 3).

    One output channel leaves most of a vector idle, sixteen fill it.
    """
    tile, inputs, size = GATE_TILE, weight.shape[1], weight.shape[2]
    out = weight.new_zeros(tile, tile, inputs, tile, tile, 3, 3)
    where = [(p, q, b, tile * (b - 1) + q - p + size // 2) for p in range(tile) for q in range(tile) for b in range(3)]
    taps = [tap for tap in where if 0 <= tap[3] < size]
    for py, qy, by, ty in taps:
        for px, qx, bx, tx in taps:
            out[py, px, :, qy, qx, by, bx] = weight[0, :, ty, tx]
    return out.view(tile * tile, inputs * tile * tile, 3, 3).contiguous(memory_format=torch.channels_last)


def over_phases(weight: Tensor) -> Tensor:
    """A convolution (O, C, 5, 5) of stride 2 and padding 2 as one of stride 1 and padding 1 over phases, (O, 4C, 3, 3)."""
    wide = F.pad(weight, (0, 1, 0, 1))
    taps = [wide[:, :, y::2, x::2] for y in range(2) for x in range(2)]
    return torch.stack(taps, dim=2).flatten(1, 2)


def _classification(
    net: ClassificationConditioner, tables: Tables, shape: tuple[int, ...], columns: Tensor, moved: Tensor, dtype: torch.dtype
) -> ClassificationNet:
    """`columns` are the planes that the first convolution reads; `moved` the elements that move, -1 where there is no pixel."""
    sizes = [-(-shape[1] // k) * -(-shape[2] // k) for k in (2, 4, 8)]
    return ClassificationNet(
        _first_conv(net, columns, dtype),
        _norm(net.norm1, sizes[0]),
        _strided_stage(net, 2, sizes[1], dtype),
        _strided_stage(net, 3, sizes[2], dtype),
        _dense_heads(net, tables, moved),
    )


def _first_conv(net: ClassificationConditioner, columns: Tensor, dtype: torch.dtype) -> Conv:
    return _conv(net.conv1, dtype, over_phases(net.conv1.weight)[:, columns])


def _strided_stage(net: ClassificationConditioner, index: int, pixels: int, dtype: torch.dtype) -> Stage:
    conv, norm, cbam, block = (getattr(net, f"{name}{index}") for name in ("conv", "norm", "cbam", "residual"))
    return Stage(_conv(conv, dtype), _norm(norm, pixels), _gates(cbam), _residual(block, pixels, dtype))


def _dense_heads(net: ClassificationConditioner, tables: Tables, moved: Tensor) -> DenseHeads:
    heads = net.scale, net.shift
    # The encoder's output is read with its channels last.
    image = torch.cat([head.image.weight.unflatten(1, (net.conv3.out_channels, -1)).mT.flatten(1) for head in heads])
    bias = torch.cat([head.image.bias for head in heads])
    return DenseHeads(image, bias, *_moved_heads(net, tables, moved))


def _moved_heads(net: ClassificationConditioner, tables: Tables, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last maps (64, A) of the elements that move, of log-scale and of shift, and their table (K, 2A)."""
    index, there = moved.flatten().clamp_min(0), moved.flatten() >= 0
    scale, shift = (head.image_out.weight[index].t().contiguous().mul_(there) for head in (net.scale, net.shift))
    return scale, shift, _table(torch.cat([table[:, index].mul_(there) for table in tables.heads], dim=1))


def _generation(net: GenerationConditioner, shape: tuple[int, ...], dtype: torch.dtype) -> GenerationNet:
    pixels = shape[1] * shape[2]

    def stage(index: int) -> GenerationStage:
        conv, norm, cbam, context, aspp = (getattr(net, f"{name}{index}") for name in ("conv", "norm", "cbam", "global", "aspp"))
        block = getattr(net, f"residual{index}", None)
        return GenerationStage(
            _conv(conv, dtype),
            _norm(norm, pixels),
            _gates(cbam),
            None if block is None else _residual(block, pixels, dtype),
            Mlp(context.down.weight, context.down.bias, context.up.weight, context.up.bias),
            _pyramid(aspp, dtype),
        )

    # Heads are never narrow: their rounding would be most of the error of a log-odds.
    heads = (_conv(head, head.weight.dtype) for head in (net.scale, net.shift))
    return GenerationNet((stage(1), stage(2), stage(3)), *heads)


def _pyramid(block: ASPP, dtype: torch.dtype) -> Pyramid:
    gate = Mlp(block.down.weight, block.down.bias, block.up.weight, block.up.bias)
    assert block.output.bias is not None
    return Pyramid(
        tuple(_conv(branch, dtype) for branch in block.branches), gate, block.output.weight.flatten(1), block.output.bias
    )


# -- folding: steps -------------------------------------------------------------------------------------------------------


def _planes(values: Tensor, phases: int, fill: float) -> Tensor:
    """(C, H, W) -> (H', W', P): phases of channels as planes, `fill` where an odd size leaves none."""
    _, height, width = values.shape
    padded = F.pad(values, (0, -width % phases, 0, -height % phases), value=fill)
    return F.pixel_unshuffle(padded, phases).permute(1, 2, 0) if phases > 1 else padded.permute(1, 2, 0)


def _halves(
    step: FlowStep, tables: list[Tables], phases: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[Half, Half]]:
    """(columns, valid, halves) of `Step`."""
    mask = step.coupling.mask
    # Places as float64, which pads on every device; -1 is no pixel.
    index = torch.arange(mask.numel(), device=mask.device, dtype=torch.float64).view(mask.shape)
    elements = _planes(index, phases, -1).long()
    there = elements >= 0
    passive = _planes(mask.double(), phases, 0).bool()
    active = there & ~passive
    every = torch.arange(elements.shape[2], device=mask.device)
    is_passive, is_active = (part.flatten(0, 1).any(dim=0) for part in (passive, active))
    columns: tuple[Tensor, ...]
    if phases > 1 and not bool((is_passive & is_active).any()) and bool(is_passive.any()) and bool(is_active.any()):
        columns = every[is_passive], every[is_active]
        halves = _conditioned(step, tables, columns, (elements[:, :, columns[1]], elements[:, :, columns[0]]), dtype)
    else:
        columns = (every,)
        first, second = _conditioned(step, tables, (every, every), (_some(elements[active]), _some(elements[passive])), dtype)
        ranks = (_rank(active), _rank(passive)) if phases > 1 else (None, None)
        first = first._replace(passive=passive, active=active, rank=ranks[0])
        halves = first, second._replace(passive=active, active=passive, rank=ranks[1])
    numbers = there.to(step.coupling.conditioners[0].conv1.weight.dtype)
    return columns, None if bool(there.all()) else tuple(numbers[:, :, c] for c in columns), halves


def _some(elements: Tensor) -> Tensor:
    """The elements that dense heads compute: of a half that moves nothing one that is no pixel."""
    return elements if len(elements) else elements.new_full((1,), -1)


def _rank(active: Tensor) -> Tensor:
    return (active.flatten().cumsum(0) - 1).clamp_min(0).view(active.shape)


def _conditioned(
    step: FlowStep,
    tables: list[Tables],
    reads: tuple[Tensor, ...],
    moves: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> tuple[Half, Half]:
    """The conditioners of the two halves; what they share is kept once."""
    one, other, shape = step.coupling.conditioners[0], step.coupling.conditioners[-1], step.coupling.mask.shape
    if isinstance(one, GenerationConditioner):
        first = Half(_generation(one, shape, dtype), *_films(one, tables[0]))
    else:
        first = Half(_classification(one, tables[0], shape, reads[0], moves[0], dtype), *_films(one, tables[0]))
    if isinstance(other, GenerationConditioner):
        return first, first if other is one else Half(_generation(other, shape, dtype), *_films(other, tables[-1]))
    if other is not one:
        return first, Half(_classification(other, tables[-1], shape, reads[1], moves[1], dtype), *_films(other, tables[-1]))
    net = first.net
    assert isinstance(net, ClassificationNet)
    heads = DenseHeads(net.heads.weight, net.heads.bias, *_moved_heads(other, tables[-1], moves[1]))
    return first, first._replace(net=net._replace(conv1=_first_conv(other, reads[1], dtype), heads=heads))


def _mix(
    step: FlowStep, before: Tensor, columns: tuple[Tensor, ...], sources: tuple[int, ...] | None, phases: int, dtype: torch.dtype
) -> Mix:
    """From planes in the order of `before`, those that left by a split included, to tensors that hold `columns`."""
    matrix, constant = step.map(torch.float64)
    if sources is not None:
        return Mix((matrix[0, 0].to(dtype),) * len(columns), (constant[0].to(dtype),) * len(columns), sources)
    if phases > 1 and not step.squeeze:
        # The matrix of channels, for each phase.
        matrix = torch.kron(matrix, torch.eye(phases * phases, dtype=matrix.dtype, device=matrix.device))
        constant = constant.repeat_interleave(phases * phases)
    size = len(matrix)
    matrix = torch.where((before < size)[:, None], matrix.t()[before.clamp_max(size - 1)], 0.0)
    if phases > 1 and step.squeeze:
        # Of what is mixed, phases are taken next.
        columns = (torch.arange(size, device=matrix.device),)
    return Mix(tuple(matrix[:, c].to(dtype).contiguous() for c in columns), tuple(constant[c].to(dtype) for c in columns), None)


def _sources(parts: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """Which of the tensors that hold `parts` holds each of `columns`; None where one is spread over several."""
    found = [[k for k, part in enumerate(parts) if torch.equal(part, wanted)] for wanted in columns]
    return tuple(k[0] for k in found) if all(found) else None


@torch.no_grad()
def fold(model: MagicFlow, tables: LabelTables, dtype: torch.dtype | None = None) -> Folded:
    """Fold a model that is initialised.

    Args:
        model: the flow.
        tables: of all labels, `MagicFlow.label_tables`.
        dtype: of the conditioners' convolutions but for the heads; that of the model when None.
    """
    phases = 2 if model.config.task == "classification" else 1
    channels, wide = model.config.input_shape[0], model.dtype
    # The image comes in the natural order of its planes.
    parts: tuple[Tensor, ...] = (torch.arange(channels * phases * phases, device=model.device),)
    split, folded = False, []
    for i, step in enumerate(model.steps):
        columns, valid, halves = _halves(step, tables.steps[i], phases, dtype or wide)
        before = torch.cat(parts)
        if step.squeeze and phases == 1:
            # Channels that a split left are squeezed, before the matrix.
            before = torch.arange(step.conv.log_s.numel(), device=model.device)
        one_channel = step.conv.log_s.numel() == 1 and not step.squeeze and not split
        sources = _sources(parts, columns) if one_channel else None
        mix = _mix(step, before, columns, sources, phases, wide)
        parts, split = columns, step.split
        joined = torch.cat(columns)
        # What the last step splits off stays: nothing follows that it would be left out of.
        leaves = torch.nonzero(joined >= len(joined) // 2).flatten() if split and i + 1 < len(model.steps) else None
        folded.append(Step(step.squeeze, mix, columns, valid, halves, leaves))
    constant = sum(float(step.mixing_logdet()) for step in model.steps) - 0.5 * LOG_2PI * model.config.num_dims
    steps: tuple[Step, ...] = tree_map_only(Tensor, Tensor.detach, tuple(folded))
    return Folded(steps, phases, constant, model.config.scale_bound)


# -- functions of the constants: conditioners -----------------------------------------------------------------------------

# erf on (-4, 4) as x P(x^2) / Q(x^2), highest power first: the minimax approximation in single precision that numerical
# libraries share (its error is below 3e-7). It is several times cheaper than the exponential that ATen's takes.
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
          -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def gelu(x: Tensor) -> Tensor:
    """Exact GELU; in a graph compiled for a CPU in float32 with `erf` to single precision, by a rational function."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return F.gelu(x)
    z = (x * math.sqrt(0.5)).clamp(-4.0, 4.0)
    square = z * z
    return 0.5 * x * (1.0 + z * _horner(_ERF_P, square) / _horner(_ERF_Q, square))


# ATen chooses the code of a convolution by the number of samples, and a graph compiled around that choice is compiled again below
# 16 of them. As an op of its own the convolution is always that of oneDNN, and one graph serves any number.
_library = torch.library.Library("fastflow", "FRAGMENT")
_library.define("convolution(Tensor x, Tensor weight, Tensor? bias, int stride, int dilation) -> Tensor")


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int) -> Tensor:
    padding = weight.shape[2] // 2 * dilation
    if x.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        out = F.conv2d(x, weight, bias, stride, padding, dilation)
    else:
        pairs = ([n, n] for n in (padding, stride, dilation))
        out = torch.ops.aten.mkldnn_convolution(x, weight, bias, *pairs, 1)
    return out.contiguous(memory_format=torch.channels_last)


def _convolution_fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int) -> Tensor:
    size = (-(-n // stride) for n in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_library.impl("convolution", _convolution, "CPU")
torch.library.register_fake("fastflow::convolution", _convolution_fake, lib=_library)


def conv2d(v: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, dilation: int = 1) -> Tensor:
    """A convolution of odd size, padded so that a stride of 1 keeps the size of the image."""
    if v.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.ops.fastflow.convolution(v, weight, bias, stride, dilation)
    return F.conv2d(v, weight, bias, stride, weight.shape[2] // 2 * dilation, dilation)


def _conv2d(v: Tensor, conv: Conv, stride: int = 1) -> Tensor:
    """In the dtype of the weight; the result in that of v: rounding what is only kept would cost as much as all of the rest."""
    return conv2d(v.to(conv.weight.dtype), conv.weight, conv.bias, stride).to(v.dtype)


def _pixels(v: Tensor) -> Tensor:
    """(R, C) -> (R, C, 1, 1)."""
    return v.reshape(-1, v.shape[1], 1, 1)


def norm_gelu(v: Tensor, norm: Norm, film: Tensor, residual: Tensor | None = None, image: Tensor | None = None) -> Tensor:
    """GELU(FiLM(norm(v)) [+ residual]) of v (R, C, H, W); with `image` (R,), of the samples that it names.

    `film` (R, 2C) holds a scale and a shift for each channel.
    """
    scale, shift = film.chunk(2, dim=1)
    if norm.average is None:
        v = v if image is None else v.index_select(0, image)
    elif torch.compiler.is_exporting():
        # Runtimes take a GroupNorm apart, but have code for an InstanceNorm of groups. What a label changes comes after.
        _, channels, height, width = v.shape
        groups = num_groups(channels)
        v = v.reshape(-1, groups, channels // groups * height * width)
        # Not that of `functional`, which refuses groups of one element.
        v = torch.instance_norm(v, None, None, None, None, True, 0.0, EPS, False)
        v = v.reshape(-1, channels, height, width)
        v = v if image is None else v.index_select(0, image)
    else:
        mean = v.sum(dim=(2, 3)) @ norm.average
        centred = v - _pixels(mean)
        inverse = torch.rsqrt((centred * centred).sum(dim=(2, 3)) @ norm.average + EPS)
        if image is not None:
            mean, inverse, v = (part.index_select(0, image) for part in (mean, inverse, v))
        scale = (inverse * scale) @ norm.identity
        shift = torch.addmm(shift, -mean * scale, norm.identity)
    v = v * _pixels(scale) + _pixels(shift)
    return gelu(v if residual is None else v + residual)


def _spatial_logits(pooled: Tensor, weight: Tensor) -> Tensor:
    """The 7x7 convolution of `spatial_tile`'s weight: (R, I, H, W) -> (R, 1, H, W)."""
    _, inputs, height, width = pooled.shape
    padded = F.pad(pooled, (0, -width % GATE_TILE, 0, -height % GATE_TILE))
    rows, columns = padded.shape[2] // GATE_TILE, padded.shape[3] // GATE_TILE
    tiles = padded.view(-1, inputs, rows, GATE_TILE, columns, GATE_TILE).permute(0, 1, 3, 5, 2, 4)
    tiles = tiles.reshape(-1, inputs * GATE_TILE**2, rows, columns)
    out = F.pixel_shuffle(conv2d(tiles.contiguous(memory_format=torch.channels_last), weight), GATE_TILE)
    return out[:, :, :height, :width]


def gate(v: Tensor, gates: Gates) -> Tensor:
    """CBAM on v (R, C, H, W)."""
    mean, peak = v.mean(dim=(2, 3)), v.amax(dim=(2, 3))
    # The shared MLP's last layer is linear, so the sum over both poolings comes before it.
    hidden = F.relu(mean @ gates.down.t()) + F.relu(peak @ gates.down.t())
    v = v * _pixels(torch.sigmoid(hidden @ gates.up.t()) @ gates.identity)
    pooled = torch.cat((v.mean(dim=1, keepdim=True), v.amax(dim=1, keepdim=True)), dim=1)
    return v * torch.sigmoid(_spatial_logits(pooled, gates.spatial))


def _residual_block(v: Tensor, block: Residual, films: Iterator[Tensor]) -> Tensor:
    first = norm_gelu(_conv2d(v, block.conv1), block.norm1, next(films))
    return norm_gelu(_conv2d(first, block.conv2), block.norm2, next(films), residual=v)


def _stage(v: Tensor, stage: Stage, films: Iterator[Tensor]) -> Tensor:
    v = gate(norm_gelu(_conv2d(v, stage.conv, 2), stage.norm, next(films)), stage.gates)
    return _residual_block(v, stage.residual, films)


def _classify(
    a: Tensor, net: ClassificationNet, rows: Tensor, films: Iterator[Tensor], image: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Passive planes (R, P, H', W') -> (raw log-scale, shift), each (R, A)."""
    v = norm_gelu(_conv2d(a.to(accumulator(a.dtype)), net.conv1), net.norm1, next(films), image=image)
    v = _stage(_stage(v, net.stage2, films), net.stage3, films)
    heads = net.heads
    features = gelu(F.linear(v.permute(0, 2, 3, 1).flatten(1), heads.weight, heads.bias))
    first, second = features.chunk(2, dim=1)
    scale, shift = heads.table.index_select(0, rows).chunk(2, dim=1)
    return first @ heads.scale + scale, second @ heads.shift + shift


def _mlp(v: Tensor, mlp: Mlp, act: str) -> Tensor:
    hidden = F.linear(v, mlp.down, mlp.down_bias)
    return F.linear(F.gelu(hidden) if act == "gelu" else F.relu(hidden), mlp.up, mlp.up_bias)


def _pyramid_block(v: Tensor, block: Pyramid) -> Tensor:
    """ASPP: the last map, gated per sample, as one product for each branch."""
    narrow, dtype = v.to(block.branches[0].weight.dtype), v.dtype
    convs = zip(block.branches, (1, *DILATIONS), strict=True)
    branches = [conv2d(narrow, conv.weight, conv.bias, dilation=dilation) for conv, dilation in convs]
    means = torch.cat([p.to(dtype).mean(dim=(2, 3)) for p in branches], dim=1)
    weights = block.output * torch.sigmoid(_mlp(means, block.gate, "relu"))[:, None, :]
    out = block.bias
    for p, weight in zip(branches, weights.chunk(len(branches), dim=2), strict=True):
        rows = p.permute(0, 2, 3, 1).flatten(1, 2)
        product, there = weight.to(p.dtype).mT, p.dtype == dtype
        out = torch.baddbmm(out, rows, product) if there else out + torch.bmm(rows, product).to(dtype)
    return out.mT.unflatten(2, v.shape[2:])


def _generate(a: Tensor, net: GenerationNet, films: Iterator[Tensor], image: Tensor | None) -> tuple[Tensor, Tensor]:
    """Passive planes (R, C, H, W) -> (raw log-scale, shift), each (R, C, H, W) in the dtype of a."""
    v = a.to(accumulator(a.dtype))
    for i, stage in enumerate(net.stages):
        v = norm_gelu(_conv2d(v, stage.conv), stage.norm, next(films), image=image if i == 0 else None)
        v = gate(v, stage.gates)
        if stage.residual is not None:
            v = _residual_block(v, stage.residual, films)
        mean = v.mean(dim=(2, 3))
        if stage.residual is None:
            v = v + _pixels(_mlp(mean, stage.context, "gelu"))
        else:
            v = v * _pixels(1.0 + torch.sigmoid(_mlp(mean, stage.context, "relu")))
        v = _pyramid_block(v, stage.pyramid)
    return _conv2d(v, net.scale).to(a.dtype), _conv2d(v, net.shift).to(a.dtype)


# -- functions of the constants: the flow ---------------------------------------------------------------------------------


def log_scale_and_shift(
    passive: Tensor, rows: Tensor, half: Half, bound: float, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a half does to the planes that it moves.

    Args:
        passive: (R, H', W', P) planes that the conditioner sees.
        rows: (R,) rows of the tables.
        half: its constants.
        bound: of the log-scale.
        image: (R,) names the sample of `passive` that each row starts from; what no label changes is then computed once per
            sample.

    Returns:
        `(log-scale, shift)`: (R, H', W', P) of generation conditioners, (R, A) of the elements that move for others; `placed`
        makes planes of them.
    """
    a = passive if half.passive is None else torch.where(half.passive, passive, 0.0)
    a = a.permute(0, 3, 1, 2)
    films = iter(half.films.index_select(0, rows).split(half.sizes, dim=1))
    if isinstance(half.net, ClassificationNet):
        raw, shift = _classify(a, half.net, rows, films, image)
        return bound * torch.tanh(raw), shift
    assert half.active is not None
    raw, shift = _generate(a, half.net, films, image)
    return torch.where(half.active, bound * torch.tanh(raw.permute(0, 2, 3, 1)), 0.0), shift.permute(0, 2, 3, 1)


def placed(values: Tensor, half: Half, shape: Sequence[int]) -> Tensor:
    """What `log_scale_and_shift` returned, or a function of it, as planes of `shape`; anything where a half moves nothing."""
    if values.ndim == 4:
        return values
    return (
        values.view(-1, *shape[1:])
        if half.rank is None
        else values.index_select(1, half.rank.flatten()).view(-1, *half.rank.shape)
    )


def run_half(
    passive: Tensor, moved: Tensor, rows: Tensor, half: Half, bound: float, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One half of a coupling.

    Args:
        passive: see `log_scale_and_shift`.
        moved: planes that it moves; the same tensor where planes are passive and active at once.
        rows: see `log_scale_and_shift`.
        half: see `log_scale_and_shift`.
        bound: see `log_scale_and_shift`.
        image: names the sample of `passive` and `moved` that each row starts from.

    Returns:
        `(moved, logdet)`: the planes after the half, and (R,) in nats, float32 or wider.
    """
    return move(moved, *log_scale_and_shift(passive, rows, half, bound, image), half, image)


def move(moved: Tensor, s: Tensor, shift: Tensor, half: Half, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`run_half` of the log-scale and shift that are known already."""
    if image is not None:
        moved = moved.index_select(0, image)
    changed = moved * placed(s.exp(), half, moved.shape) + placed(shift, half, moved.shape)
    return (changed if half.active is None else torch.where(half.active, changed, moved)), _sum(s)


def move_back(moved: Tensor, s: Tensor, shift: Tensor, half: Half) -> Tensor:
    """The planes that `move` moved, from where it moved them to."""
    before = (moved - placed(shift, half, moved.shape)) * placed((-s).exp(), half, moved.shape)
    return before if half.active is None else torch.where(half.active, before, moved)


def _sum(s: Tensor) -> Tensor:
    """Sum of log-scales per sample: over pixels first, then over channels. Runtimes sum naively, hence in float64."""
    if torch.compiler.is_exporting():
        return s.double().flatten(1).sum(dim=1)
    return s.sum(dim=(1, 2)).sum(dim=1) if s.ndim == 4 else s.sum(dim=1)


Run = Callable[[Tensor, Tensor, Tensor, Half, Tensor | None], tuple[Tensor, Tensor]]


def run_coupling(
    planes: Planes, rows: Tensor, step: Step, run: Run, image: Tensor | None = None
) -> tuple[Planes, tuple[Tensor, Tensor]]:
    """Both halves of a coupling, each by `run`, which takes the arguments of `run_half` but the bound.

    Returns (planes, what `run` says of the two halves beside the planes).
    """
    said = []
    for k, half in enumerate(step.halves):
        passive, moved = planes[k % len(planes)], planes[(k + 1) % len(planes)]
        spread = image if k == 0 else None
        moved, more = run(passive, moved, rows, half, spread)
        if len(planes) > 1:
            passive = passive if spread is None else passive.index_select(0, spread)
            planes = (passive, moved) if k == 0 else (moved, passive)
        else:
            planes = (moved,)
        said.append(more)
    return planes, (said[0], said[1])


def run_steps(
    planes: Planes, rows: Tensor, image: Tensor | None, steps: Sequence[Step], phases: int, run: Run
) -> tuple[Planes, list[Tensor]]:
    """Consecutive steps: (planes, parts (R,) of log p(x|y) in float64).

    With `image`, planes come once per image and mixed, and leave once per row.
    """
    terms = []
    for i, step in enumerate(steps):
        spread = image if i == 0 else None
        if spread is None:
            planes = run_mix(planes, step, phases)
        planes, logdets = run_coupling(planes, rows, step, run, spread)
        terms += [logdet.double() for logdet in logdets]
        if step.split is not None:
            terms.append(square_sum(planes, step.split).double())
    return planes, terms


def to_planes(x: Tensor, phases: int) -> Tensor:
    """(R, H, W, C) -> (R, H', W', C phases^2), the phases of each channel side by side, 0 where an odd size leaves none."""
    if phases == 1:
        return x
    _, height, width, channels = x.shape
    if height % phases or width % phases:
        x = F.pad(x, (0, 0, 0, -width % phases, 0, -height % phases))
    rows, columns = x.shape[1] // phases, x.shape[2] // phases
    blocks = x.reshape(-1, rows, phases, columns, phases, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(-1, rows, columns, channels * phases * phases)


def run_mix(planes: Planes, step: Step, phases: int) -> Planes:
    """The planes that a step's coupling starts from, of those that the step before left."""
    mix = step.mix
    if mix.sources is not None:
        mixed = tuple(torch.addcmul(b, planes[k], w) for k, w, b in zip(mix.sources, mix.weights, mix.biases, strict=True))
    else:
        joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
        if step.squeeze and phases == 1:
            joined = to_planes(joined[..., : len(mix.weights[0]) // 4], 2)
        flat = joined.flatten(0, 2)
        parts = [torch.addmm(b, flat, w) for w, b in zip(mix.weights, mix.biases, strict=True)]
        mixed = tuple(part.view(-1, *joined.shape[1:3], part.shape[1]) for part in parts)
        if step.squeeze and phases > 1:
            joined = to_planes(mixed[0], phases)
            mixed = (joined,) if len(step.columns) == 1 else tuple(joined.index_select(3, c) for c in step.columns)
    if step.valid is not None:
        mixed = tuple(part * valid for part, valid in zip(mixed, step.valid, strict=True))
    return mixed


def square_sum(planes: Planes, split: Tensor | None = None) -> Tensor:
    """-1/2 of the sum of squares (R,), of the planes that `split` names in the joined tensors or of all."""
    joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
    flat = (joined if split is None else joined.index_select(3, split)).flatten(1)
    if torch.compiler.is_exporting():
        return -0.5 * flat.double().square().sum(dim=1)
    return -0.5 * sum_per_sample(flat * flat)
