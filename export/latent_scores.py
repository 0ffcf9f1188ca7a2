"""The score graph of a model that knows its scanners: it also tells how the neighbours of the latent go."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.models.inference.correlations import lag_correlations
from fastflow.models.inference.planes import Planes

from .graphs import ScoreGraph


class ScoreWithLatentsGraph(ScoreGraph):
    """As `ScoreGraph`, with correlations (B, K, J, 2) of the J latent blocks, float64.

    See `fastflow.models.inference.correlations.lag_correlations`; the blocks are in the order of
    `FlowConfig.latent_shapes`, under each label.
    """

    outputs = ("log_probs", "correlations")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """See the class."""
        shared: list[Tensor] = []
        split: list[Tensor] = []
        log_probs, walk, each = self._score(image, shared, split)
        known = [lag_correlations(block, 1, 2).index_select(0, each) for block in shared]
        final, *own = [lag_correlations(block, 1, 2) for block in (self._final_block(walk.planes), *split)]
        together = torch.stack([final, *known, *own], dim=1).double()
        return log_probs, together.view(-1, self.config.num_classes, *together.shape[1:])

    def _keep(self, i: int, planes: Planes, blocks: list[Tensor]) -> None:
        block = self._split_block(i, planes)
        if block is not None:
            blocks.append(block)
