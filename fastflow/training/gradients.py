"""Gradients of a batch that is computed in parts: in micro-batches one by one, and on several ranks.

Losses are means over samples, so that a part counts by its share of the samples of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.training.devices import Ranks
from fastflow.training.rows import BatchRows, merged

# It gives the mean loss of a part of the batch, log p(x|y) of its samples, and their logistic losses or None.
PartLoss = Callable[[slice], tuple[Tensor, Tensor, Tensor | None]]


def differentiate(
    loss_of: PartLoss, samples: int, micro_batches: int, whole: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add the gradients of the samples of this process to those of the parameters.

    Args:
        loss_of: a part of the samples; it makes a graph of its own.
        samples: n, how many this process computes.
        micro_batches: parts that they are computed in, fewer where there are fewer samples.
        whole: B, samples of the batch over all processes.

    Returns:
        `(loss, log p(x|y) (n,), logistic losses (n,) or None)`, without gradient; the loss is these samples'
        share of the mean over the whole batch.
    """
    size = -(-samples // micro_batches)
    losses, log_probs, logistics = [], [], []
    for start in range(0, samples, size):
        part = slice(start, min(start + size, samples))
        loss, log_prob, logistic = loss_of(part)
        count = part.stop - part.start
        if count < whole:
            loss = loss * (count / whole)
        loss.backward()
        losses.append(loss.detach())
        log_probs.append(log_prob.detach())
        if logistic is not None:
            logistics.append(logistic.detach())
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return total, _joined(log_probs), _joined(logistics) if logistics else None


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class GradientSum:
    """Adds up what ranks found in a step, in one collective over a buffer.

    Gradients become those of the whole batch, to the same bits on all ranks, so that clipping and a step that
    is skipped are decided alike everywhere. Sums are float32, or float64 where a parameter is.

    Args:
        ranks: that share a batch.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @torch.no_grad()
    def __call__(
        self, parameters: list[Tensor], rows: BatchRows, loss: Tensor, bits: Tensor, logistic: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put the sums of all ranks into the gradients; all ranks call it together.

        Args:
            parameters: with gradients, or None for those that this rank has none of.
            rows: of this rank.
            loss: a scalar, the share of these rows in the loss of the whole batch.
            bits: a scalar, the sum of bits/dim over these rows.
            logistic: (n, ...) numbers of each of the rows, or None.

        Returns:
            `(loss, bits, logistic (B, ...))` of the whole batch, in the dtypes that were given.
        """
        figures = [loss, bits] if logistic is None else [loss, bits, merged(logistic, rows)]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        values = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters] + figures
        buffer = torch.cat([value.to(dtype).flatten() for value in values])
        parts = self.ranks.sum(buffer).split([value.numel() for value in values])
        sums = [part.view_as(value).to(value.dtype) for part, value in zip(parts, values, strict=True)]
        for parameter, part in zip(parameters, sums, strict=False):
            parameter.grad = part
        total, total_bits, *logistics = sums[len(parameters) :]
        return total, total_bits, logistics[0] if logistics else None
