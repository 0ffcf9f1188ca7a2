"""Which epoch of a training becomes the model, decided while it goes on or from its history alike.

``"accuracy"`` is the highest validation accuracy, and of equal ones the lowest bits/dim; ``"loss"`` the
lowest validation bits/dim. ``"both"`` asks for classes that are told apart by a likelihood that is hardly
worse than the best one: likelihood training that goes on lowers bits/dim and may lower the accuracy, and a
discriminative term may raise both.

``"both"`` is this rule over the epochs in their order. An epoch is admitted if its bits/dim exceed the lowest
so far, its own included, by no more than the tolerance. It replaces the kept one if that is no longer
admitted, or if it has the higher balanced accuracy; of equal ones the lower negative log-likelihood of the
labels decides, then the lower bits/dim, then the earlier epoch. So no epoch has to be kept that may be needed
later: where a much better likelihood arrives, the epoch that brings it is kept, and not an earlier one that
was admitted too.

The negative log-likelihood stands before bits/dim, since a validation set of some dozen volumes has few
different accuracies, and it says how far apart the classes are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

RULES = ("accuracy", "loss", "both")
ACCURACY, BALANCED_ACCURACY, NLL, BITS = (
    "val_accuracy",
    "val_balanced_accuracy",
    "val_nll",
    "val_bits_per_dim",
)

Key = tuple[float, ...]


class Selection:
    """The best epochs so far.

    Args:
        tolerance: of ``"both"``, a share of the lowest bits/dim.

    Attributes:
        kept: the number of the best epoch by each of `RULES`; 0 where there is none yet.
    """

    def __init__(self, tolerance: float = 0.01) -> None:
        self._tolerance = tolerance
        self.kept = dict.fromkeys(RULES, 0)
        # Smaller keys are better.
        self._best: dict[str, Key] = dict.fromkeys(RULES, (math.inf,))
        # The lowest bits/dim so far, whatever is kept.
        self._lowest = math.inf

    def forget(self, rule: str) -> None:
        """Keep the next epoch that the rule admits, as where the checkpoint of the kept one is lost."""
        self.kept[rule], self._best[rule] = 0, (math.inf,)

    def take(self, record: Mapping[str, float]) -> list[str]:
        """The rules by which an epoch is the best so far.

        Args:
            record: of the epoch that follows the one that was taken last. One without ``val_bits_per_dim``,
                or whose bits/dim are not a number, is the best by no rule, and one without accuracies by
                ``"loss"`` at most.
        """
        bits = record.get(BITS, math.nan)
        if math.isnan(bits):
            return []
        self._lowest = min(self._lowest, bits)
        keys: dict[str, Key] = {"loss": (bits,)}
        if ACCURACY in record:
            keys["accuracy"] = (-(record[ACCURACY] - 1e-6 * bits),)
        limit = self._lowest + self._tolerance * abs(self._lowest)
        if BALANCED_ACCURACY in record and bits <= limit:
            nll = record.get(NLL, math.nan)
            keys["both"] = (-record[BALANCED_ACCURACY], math.inf if math.isnan(nll) else nll, bits)
        # Bits/dim are the last entry of this key.
        if self._best["both"][-1] > limit:
            self._best["both"] = (math.inf,)
        found = [rule for rule, key in keys.items() if key < self._best[rule]]
        for rule in found:
            self.kept[rule], self._best[rule] = int(record["epoch"]), keys[rule]
        return found


def best_epochs(history: Iterable[Mapping[str, float]], tolerance: float = 0.01) -> dict[str, int]:
    """The best epoch by each of `RULES` of a finished training, 0 where there is none.

    Args:
        history: its records, in order.
        tolerance: see `Selection`.
    """
    selection = Selection(tolerance)
    for record in history:
        selection.take(record)
    return selection.kept
