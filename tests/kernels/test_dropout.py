"""Counter-based dropout: the mask is that of the written hash, and drops elements independently."""

from __future__ import annotations

import pytest
import torch

from fastflow.kernels.dropout import drop_threshold, dropout_mask, dropout_seeds


def test_the_mask_is_that_of_the_written_hash():
    seed, n = -123456789, 5000
    mask = dropout_mask(torch.tensor([seed], dtype=torch.int32), (1, 50, 100), drop_threshold(0.3)).flatten()
    for e in (*range(20), 777, 4999):
        h = ((e * 0x9E3779B9) & 0xFFFFFFFF) ^ (seed & 0xFFFFFFFF)
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        assert bool(mask[e]) == (h >= drop_threshold(0.3))
    assert mask.numel() == n


@pytest.mark.parametrize("dropout", [0.01, 0.3, 0.5, 0.9])
def test_dropout_drops_its_share_independently(dropout):
    torch.manual_seed(0)
    mask = dropout_mask(dropout_seeds(64, torch.device("cpu")), (4, 64, 64), drop_threshold(dropout)).double()
    kept, n = 1 - dropout, mask.numel()
    deviation = (kept * dropout) ** 0.5
    # Within 5 deviations: of the share, of products of neighbours (pixel, row, channel) and of samples.
    assert abs(float(mask.mean()) - kept) < 5 * deviation / n**0.5
    for shifted in (mask.roll(1, 3), mask.roll(1, 2), mask.roll(1, 1), mask.roll(1, 0)):
        correlation = float(((mask - kept) * (shifted - kept)).mean()) / deviation**2
        assert abs(correlation) < 5 / n**0.5
