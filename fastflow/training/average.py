"""The exponential average of the weights, over fixed lists of tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch.autograd.graph import increment_version

from fastflow.models.magic_flow import MagicFlow


class WeightAverage:
    """An exponential average of the weights of a model: ``average += (1 - decay) * (weights - average)``.

    The first update copies the weights. The numbers are those of `torch.optim.swa_utils.AveragedModel` with
    `get_ema_multi_avg_fn`. That class copies every buffer at every step; here buffers are copied when the
    average is asked for, as only the last copy counts.

    Args:
        model: whose weights are averaged; its ActNorm must be set.
        decay: share of the average that an update leaves, in [0, 1).
    """

    def __init__(self, model: MagicFlow, decay: float) -> None:
        self._source, self._average = model, copy.deepcopy(model)
        self._weight, self._started = 1.0 - decay, False
        self._lists = [
            (
                [average.detach() for average, _ in pairs],
                [weights.detach() for _, weights in pairs],
            )
            for pairs in _by_dtype(self._average, model)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the model as they are now."""
        for averages, weights in self._lists:
            if self._started:
                torch._foreach_lerp_(averages, weights, self._weight)
            else:
                torch._foreach_copy_(averages, weights)
        self._started = True

    def restart(self) -> None:
        """Begin anew with the weights of the model as they are now.

        They are copied here and not in the next update, which may be a replay of one that was captured.
        """
        self._started = False
        self.update()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged parameters by name, and whether there was an update."""
        return {**dict(self._average.named_parameters()), "started": torch.tensor(self._started)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, parameter in self._average.named_parameters():
            parameter.copy_(state[name])
        self._started = bool(state["started"])

    @torch.no_grad()
    def model(self) -> MagicFlow:
        """The averaged model, with the buffers that the model has now."""
        for copied, buffer in zip(self._average.buffers(), self._source.buffers(), strict=True):
            copied.copy_(buffer)
        # A captured step writes to the average without counting it.
        increment_version(self._average.parameters())
        return self._average


def _by_dtype(average: MagicFlow, model: MagicFlow) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pairs of parameters, those of a dtype together, as grouped operations ask for it."""
    found: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in zip(average.parameters(), model.parameters(), strict=True):
        found.setdefault(pair[0].dtype, []).append(pair)
    return list(found.values())
