"""The published form of MAGIC-Flow, op for op in plain ATen, which benchmarks compare the package with.

It takes its weights from a `fastflow.MagicFlow` and computes the same numbers, up to rounding, the way the
authors' research code is described to: the label embedding and FiLM's two linear maps for every image at
every half-step, weight norm at every call, GroupNorm with its affine part, FiLM, GELU and dropout one after
the other, attention in single ops, dense heads over the concatenated features of image and label, masks by
multiplication, ActNorm apart from a dense 1x1 convolution with its `slogdet`, and one pass for each label.
Two costs of that code are left out, in the baseline's favour: its dense normal prior (a covariance of 4.6 GB;
here an elementwise sum) and masks that are built anew at every forward.

What published checkpoints hold in another form than the package (`heads`, `Weights`) is joined once, outside
of what is timed. Source: Caldera, Bottacini, Cavinato, arXiv 2510.22070, and the facts stated in the
project's notes on it; nothing here is copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import MagicFlow
from fastflow.numerics import LOG_2PI

Heads = tuple[Tensor, Tensor]


class StepWeights(NamedTuple):
    """A step as published: ActNorm's scale (1, C, 1, 1), dense 1x1 convolution, mask, each half's heads."""

    scale: Tensor
    mixing: Tensor
    mask: Tensor
    heads: tuple[Heads | None, ...]


# -- weights in their published form -------------------------------------------------------------------------


def is_generation(net: nn.Module) -> bool:
    """Whether a conditioner is that of generation, which alone has atrous pyramids."""
    return hasattr(net, "aspp1")


def joined_heads(net: nn.Module) -> Heads | None:
    """The last maps of the (log-scale, shift) heads as (N, 128) matrices; None if heads are convolutions."""
    if is_generation(net):
        return None
    scale, shift = (
        torch.cat((head.image_out.weight, head.label_out.weight), dim=1) for head in (net.scale, net.shift)
    )
    return scale, shift


def weights_of(model: MagicFlow) -> list[StepWeights]:
    """A model's weights as published; gradients reach the model through them."""
    return [
        StepWeights(
            step.actnorm.log_scale.exp().to(model.dtype).view(1, -1, 1, 1),
            step.conv.weight().to(model.dtype),
            step.coupling.mask.to(model.dtype),
            tuple(joined_heads(net) for net in step.coupling.conditioners),
        )
        for step in model.steps
    ]


# -- parts of a conditioner ----------------------------------------------------------------------------------


def one_hot(layer: nn.Linear, y: Tensor) -> Tensor:
    """(B, K) for the K inputs of a layer; a label-free step has one input and sees label 0."""
    labels = y if layer.in_features > 1 else torch.zeros_like(y)
    return F.one_hot(labels, layer.in_features).to(layer.weight.dtype)


def normed_conv(conv: nn.Conv2d, v: Tensor) -> Tensor:
    """A convolution whose weight is g v / |v|, computed for this call."""
    parts = conv.parametrizations.weight
    weight = torch._weight_norm(parts.original1, parts.original0, 0)
    return F.conv2d(v, weight, conv.bias, conv.stride, conv.padding)


def conv2d(conv: nn.Conv2d, v: Tensor) -> Tensor:
    """A convolution by ATen's own code, whatever form the package takes on a CPU."""
    return F.conv2d(v, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def film(layer: nn.Module, v: Tensor, e: Tensor) -> Tensor:
    gamma, beta = layer.gamma(e)[:, :, None, None], layer.beta(e)[:, :, None, None]
    return gamma * v + beta


def norm_film(layer: nn.Module, v: Tensor, e: Tensor) -> Tensor:
    if hasattr(layer, "norm"):
        # A norm of batches.
        return film(layer.film, layer.norm(v), e)
    return film(layer.film, F.group_norm(v, layer.groups, layer.weight, layer.bias), e)


def residual_block(block: nn.Module, x: Tensor, e: Tensor) -> Tensor:
    v = F.gelu(norm_film(block.norm1, conv2d(block.conv1, x), e))
    v = norm_film(block.norm2, conv2d(block.conv2, v), e)
    return F.gelu(v + x)


def pointwise(layer: nn.Linear, v: Tensor) -> Tensor:
    """A linear map as the 1x1 convolution that it is in a published checkpoint."""
    return F.conv2d(v, layer.weight[:, :, None, None], layer.bias)


def cbam(block: nn.Module, v: Tensor) -> Tensor:
    mean = pointwise(block.up, F.relu(pointwise(block.down, F.adaptive_avg_pool2d(v, 1))))
    peak = pointwise(block.up, F.relu(pointwise(block.down, F.adaptive_max_pool2d(v, 1))))
    v = v * torch.sigmoid(mean + peak)
    pooled = torch.cat((v.mean(dim=1, keepdim=True), v.max(dim=1, keepdim=True).values), dim=1)
    return v * torch.sigmoid(conv2d(block.spatial, pooled))


def global_fusion(block: nn.Module, v: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(v, 1).flatten(1)
    return v + block.up(F.gelu(block.down(pooled)))[:, :, None, None]


def global_context(block: nn.Module, v: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(v, 1).flatten(1)
    gate = torch.sigmoid(block.up(F.relu(block.down(pooled))))[:, :, None, None]
    return v + v * gate


def aspp(block: nn.Module, v: Tensor) -> Tensor:
    pyramid = torch.cat([conv2d(branch, v) for branch in block.branches], dim=1)
    gate = pointwise(block.up, F.relu(pointwise(block.down, F.adaptive_avg_pool2d(pyramid, 1))))
    return conv2d(block.output, pyramid * torch.sigmoid(gate))


def dense_head(head: nn.Module, v: Tensor, e: Tensor, weight: Tensor) -> Tensor:
    features = torch.cat((F.gelu(head.image(v)), F.gelu(head.label(e))), dim=1)
    return F.linear(features, weight, head.label_out.bias)


# -- conditioners --------------------------------------------------------------------------------------------


def classification(net: nn.Module, a: Tensor, y: Tensor, heads: Heads | None = None) -> tuple[Tensor, Tensor]:
    """Masked input (B, C, H, W) and labels (B,) -> (raw log-scale, shift), each (B, C, H, W)."""
    scale, shift = joined_heads(net) if heads is None else heads
    label = net.embedding
    h = F.gelu(label.fc1(one_hot(label.fc1, y)))
    h = F.gelu(label.fc2(h) + label.proj1(h))
    h = F.gelu(label.fc3(h) + label.proj2(h))
    e = F.gelu(label.fc4(h))
    v = F.gelu(norm_film(net.norm1, normed_conv(net.conv1, a), e))
    v = F.dropout(v, net.dropout, net.training)
    v = cbam(net.cbam2, F.gelu(norm_film(net.norm2, normed_conv(net.conv2, v), e)))
    v = F.dropout(residual_block(net.residual2, v, e), net.dropout, net.training)
    v = cbam(net.cbam3, F.gelu(norm_film(net.norm3, normed_conv(net.conv3, v), e)))
    v = F.dropout(residual_block(net.residual3, v, e), net.dropout, net.training).flatten(1)
    return dense_head(net.scale, v, e, scale).view_as(a), dense_head(net.shift, v, e, shift).view_as(a)


def generation(net: nn.Module, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Masked input (B, C, H, W) and labels (B,) -> (raw log-scale, shift), each (B, C, H, W)."""
    e = F.gelu(F.gelu(net.embedding(one_hot(net.embedding, y))))
    v = cbam(net.cbam1, F.gelu(norm_film(net.norm1, normed_conv(net.conv1, a), e)))
    v = aspp(net.aspp1, global_fusion(net.global1, v))
    v = cbam(net.cbam2, F.gelu(norm_film(net.norm2, normed_conv(net.conv2, v), e)))
    v = aspp(net.aspp2, global_context(net.global2, residual_block(net.residual2, v, e)))
    v = cbam(net.cbam3, F.gelu(norm_film(net.norm3, normed_conv(net.conv3, v), e)))
    v = aspp(net.aspp3, global_context(net.global3, residual_block(net.residual3, v, e)))
    return conv2d(net.scale, v), conv2d(net.shift, v)


def conditioner(net: nn.Module, a: Tensor, y: Tensor, heads: Heads | None = None) -> tuple[Tensor, Tensor]:
    """The conditioner of either task; `heads` are those of `joined_heads`, joined here when None."""
    if is_generation(net):
        return generation(net, a, y)
    return classification(net, a, y, heads)


# -- the flow ------------------------------------------------------------------------------------------------


def half_step(
    net: nn.Module, h: Tensor, y: Tensor, mask: Tensor, bound: float, heads: Heads | None = None
) -> tuple[Tensor, Tensor]:
    """Half of a coupling: h (B, C, H, W) is kept where the 0/1 `mask` is 1. Gives (result, logdet (B,))."""
    a = mask * h
    raw_scale, shift = conditioner(net, a, y, heads)
    s = bound * torch.tanh(raw_scale)
    u = a + (1.0 - mask) * (h * torch.exp(s) + shift)
    return u, ((1.0 - mask) * s).sum(dim=(1, 2, 3))


def squeeze(h: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H/2, W/2), new channel 4c + 2(row % 2) + (col % 2)."""
    b, c, height, width = h.shape
    h = h.view(b, c, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return h.reshape(b, 4 * c, height // 2, width // 2)


def encode(
    model: MagicFlow, x: Tensor, y: Tensor, weights: list[StepWeights] | None = None
) -> tuple[Tensor, Tensor]:
    """Images and labels -> (latent (B, D), logdet (B,)), for an initialised model."""
    h, latents, logdet = x, [], x.new_zeros(x.shape[0])
    for step, (scale, mixing, mask, heads) in zip(model.steps, weights or weights_of(model), strict=True):
        if step.squeeze:
            h = squeeze(h)
        h = scale * h + step.actnorm.bias.view(1, -1, 1, 1)
        logdet = logdet + step.pixels * torch.log(torch.abs(scale)).sum()
        h = F.conv2d(h, mixing[:, :, None, None])
        logdet = logdet + step.pixels * torch.linalg.slogdet(mixing).logabsdet
        for passive, index in ((mask, 0), (1.0 - mask, -1)):
            h, more = half_step(
                step.coupling.conditioners[index], h, y, passive, step.coupling.bound, heads[index]
            )
            logdet = logdet + more
        if step.split:
            h, block = h.chunk(2, dim=1)
            latents.append(block.flatten(1))
    return torch.cat((h.flatten(1), *latents), dim=1), logdet


def log_prob(model: MagicFlow, x: Tensor, y: Tensor, weights: list[StepWeights] | None = None) -> Tensor:
    """(B,) log p(x|y) in nats; `weights` are those of `weights_of`, taken here when None."""
    z, logdet = encode(model, x, y, weights)
    return (-0.5 * (z * z + LOG_2PI)).sum(dim=1) + logdet


def log_prob_all(model: MagicFlow, x: Tensor, weights: list[StepWeights] | None = None) -> Tensor:
    """(B, K) log p(x|y) in nats: one pass for each label."""
    weights = weights or weights_of(model)
    labels = (torch.full((x.shape[0],), k, device=x.device) for k in range(model.config.num_classes))
    return torch.stack([log_prob(model, x, y, weights) for y in labels], dim=1)
