"""The objectives of training, and the unit in which likelihoods are reported.

``likelihood`` is the published objective. ``pairwise`` adds, for one wrong label drawn per image, the
logistic loss of the log-odds between right and wrong; ``hybrid`` adds the cross-entropy over all labels, or
over the right one and R wrong ones that are drawn by how hard they are. They cost extra passes (one; K - 1;
R) and make the conditioners learn to separate the classes, which likelihood alone does late: a class gap is a
few nats of thousands.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import kernels
from fastflow.data.preprocess import GREY_LEVEL
from fastflow.training.rows import BatchRows

OBJECTIVES = ("likelihood", "pairwise", "hybrid")

Flow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Bits per dimension of 8-bit data, ``-(log p / D + log(2 / 255)) / log 2``, from a density on [-1, 1].

    Args:
        log_prob: any shape, nats.
        dims: D, elements of an image.

    Returns:
        Same shape.
    """
    return -(log_prob / dims + math.log(GREY_LEVEL)) / math.log(2.0)


def dequantize(x: Tensor, generator: torch.Generator | None = None, rows: BatchRows | None = None) -> Tensor:
    """Add centred uniform noise of one grey level.

    The density of 8-bit data, padding included, then has an upper bound. `rows` says which rows of a larger
    batch those of x (B, C, H, W) are: they get the noise that the larger batch would give them.

    Source: Theis et al., 2016, section 3.1.
    """
    rows = BatchRows.all(len(x)) if rows is None else rows
    noise = rows.draw(torch.rand, *x.shape[1:], dtype=x.dtype, device=x.device, generator=generator)
    return x + GREY_LEVEL * (noise - 0.5)


def log_prob(flow: Flow, x: Tensor, y: Tensor) -> Tensor:
    """Log p(x|y) (B,) through the flow's forward call, which a wrapper for several devices intercepts."""
    z, logdet = flow(x, y)
    return kernels.latent_prior(z) + logdet


def likelihood_loss(flow: Flow, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean bits/dim of the right label: (loss, log p(x|y) (B,))."""
    lp = log_prob(flow, x, y)
    return bits_per_dim(lp, x[0].numel()).mean(), lp


def pairwise_loss(
    flow: Flow, x: Tensor, y: Tensor, wrong: Tensor, weight: float | Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits/dim of the right label plus the logistic loss against one wrong label per image.

    Args:
        flow: maps (x, y) to (z, logdet).
        x: (B, C, H, W).
        y: (B,) right labels.
        wrong: (B,) labels, each another than the right one.
        weight: of the logistic term; a tensor of no dimensions where a captured step must see it change.
        temperature: nats of log-odds that count as one logit.

    Returns:
        `(loss, log p(x|y) (B,), logistic losses (B,))`; the last two carry no gradient.
    """
    both = log_prob(flow, torch.cat((x, x)), torch.cat((y, wrong)))
    lp, lp_wrong = both.chunk(2)
    logistic = F.softplus((lp_wrong - lp) / temperature)
    loss = bits_per_dim(lp, x[0].numel()).mean() + weight * logistic.mean()
    return loss, lp.detach(), logistic.detach()


def rivals_loss(
    flow: Flow, x: Tensor, y: Tensor, wrong: Tensor, weight: float | Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits/dim of the right label plus the cross-entropy over it and R wrong labels of each image.

    The cross-entropy over these R + 1 labels is at most the one over all K, and it is that one for R = K - 1.
    What is left out is what the labels that were not drawn would add; those are the easy ones. No correction
    for the draw is made: it would give an easy label that was drawn by chance the weight of all that were
    not, and so the largest share of the gradient's variance.

    Args:
        flow: maps (x, y) to (z, logdet).
        x: (B, C, H, W).
        y: (B,) right labels.
        wrong: (B, R) labels, each another than the right one and than those beside it.
        weight: of the cross-entropy, as in `pairwise_loss`.
        temperature: nats of log-odds that count as one logit.

    Returns:
        `(loss, log p(x|y) (B,), logistic losses (B, R) of the single pairs)`; the last two carry no gradient.

    Source: sampled softmax, Jean et al., 2015, without its correction.
    """
    labels = torch.cat((y[:, None], wrong), dim=1)
    count = labels.shape[1]
    lps = log_prob(flow, x.repeat_interleave(count, dim=0), labels.flatten()).view(-1, count)
    lp, lp_wrong = lps[:, 0], lps[:, 1:]
    cross_entropy = -F.log_softmax(lps / temperature, dim=1)[:, 0].mean()
    loss = bits_per_dim(lp, x[0].numel()).mean() + weight * cross_entropy
    with torch.no_grad():
        logistic = F.softplus((lp_wrong - lp[:, None]) / temperature)
    return loss, lp.detach(), logistic


def hybrid_loss(
    flow: Flow, x: Tensor, y: Tensor, classes: int, weight: float | Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Bits/dim of the right label plus the cross-entropy over all labels.

    Args:
        flow: maps (x, y) to (z, logdet).
        x: (B, C, H, W).
        y: (B,) right labels.
        classes: K.
        weight: of the cross-entropy, as in `pairwise_loss`.
        temperature: nats of log-odds that count as one logit.

    Returns:
        `(loss, log p(x|y) (B,))`.
    """
    labels = torch.arange(classes, device=x.device).repeat(x.shape[0])
    lp_all = log_prob(flow, x.repeat_interleave(classes, dim=0), labels).view(-1, classes)
    lp = lp_all.gather(1, y[:, None]).squeeze(1)
    return bits_per_dim(lp, x[0].numel()).mean() + weight * F.cross_entropy(lp_all / temperature, y), lp


class HardNegatives:
    """Wrong labels to train against, drawn by how hard they are.

    A label is drawn in proportion to the loss of its pair with the right label so far.

    Most pairs of classes are soon easy; drawing them as often as the hard ones would waste most of the
    passes.

    Args:
        classes: K, at least 2.
        memory: share of a pair's running loss that an observation leaves.
        floor: least weight of a pair, as a share of the mean: no pair is forgotten.

    Attributes:
        losses: (K, K) running logistic loss of each pair (right, wrong); 0 on the diagonal.
    """

    def __init__(self, classes: int, memory: float = 0.9, floor: float = 0.1) -> None:
        self.memory, self.floor = memory, floor
        self.losses = 1.0 - torch.eye(classes)

    def draw(self, y: Tensor, generator: torch.Generator | None = None, count: int | None = None) -> Tensor:
        """Wrong labels for samples with right labels y (B,).

        Args:
            y: (B,) right labels.
            generator: of the host.
            count: R, at most K - 1, different labels for each sample, drawn without replacement; None draws
                one.

        Returns:
            (B, R) int64 on the device of y; (B,) where `count` is None.

        Raises:
            ValueError: there are fewer wrong labels than `count`.
        """
        classes = len(self.losses)
        if count is not None and not 1 <= count < classes:
            raise ValueError(f"count must lie between 1 and K - 1 = {classes - 1}, got {count}")
        # Losses that have all become 0 would leave nothing to draw from.
        weights = (self.losses + self.floor * self.losses.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        weights.fill_diagonal_(0.0)
        drawn = torch.multinomial(weights[y.cpu()], count or 1, generator=generator).to(y.device)
        return drawn.squeeze(1) if count is None else drawn

    def update(self, y: Tensor, wrong: Tensor, losses: Tensor) -> None:
        """Take in the logistic losses, (B,) or (B, R) as `wrong` is, of the pairs of y (B,) and wrong."""
        y = y if wrong.ndim == 1 else y[:, None].expand_as(wrong)
        index = (y.flatten().cpu(), wrong.flatten().cpu())
        values = losses.float().cpu().flatten()
        count = torch.zeros_like(self.losses).index_put_(index, torch.ones_like(values), accumulate=True)
        total = torch.zeros_like(self.losses).index_put_(index, values, accumulate=True)
        seen = self.memory * self.losses + (1.0 - self.memory) * total / count.clamp_min(1.0)
        self.losses = torch.where(count > 0, seen, self.losses)


def __getattr__(name: str) -> Any:
    if name == "Rivals":
        message = "fastflow.training.objective.Rivals is now called HardNegatives; the old name goes in 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return HardNegatives
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
