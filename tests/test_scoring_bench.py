"""The benchmarks of scoring compute the right numbers from their measurements."""

import numpy as np
import pytest
import torch

from bench import measuring, mixed_precision, scoring_cost


def test_cases_vary_one_thing_at_a_time():
    cases = scoring_cost.cases()
    assert ("labels", scoring_cost.REFERENCE | {"labels": 50}) in cases
    for axis, case in cases:
        assert all(case[name] == value for name, value in scoring_cost.REFERENCE.items() if name != axis)


def test_plot_draws_every_axis(tmp_path):
    rows = [
        {"axis": axis, **case, "cost_per_image": case["labels"] / 7} for axis, case in scoring_cost.cases()
    ]
    scoring_cost.plot(rows, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_log_odds_are_compared_with_the_best_label():
    want = np.array([[0.0, -2.0], [-5.0, -1.0]])
    # The same shift for all labels of an image is no error of a log-odds.
    shifted = np.add(want, [[100.0], [-3.0]])
    assert mixed_precision.compare(shifted, want) == {"max": 0.0, "rms": 0.0, "agreement": 1.0}
    found = mixed_precision.compare(np.add(want, [[0.0, 0.5], [0.0, -4.5]]), want)
    assert found["max"] == pytest.approx(4.5) and found["agreement"] == 0.5
    assert found["rms"] == pytest.approx(((0.5**2 + 4.5**2) / 4) ** 0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="allocations on a CPU")
def test_peak_counts_what_is_held_at_a_time():
    def work():
        for _ in range(3):
            torch.ones(1 << 20)

    assert 3.9 < measuring.peak_mib(work) < 8.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="ops on a CPU")
def test_share_is_that_of_the_named_ops():
    a = torch.randn(300, 300)
    assert measuring.share_of("mm", lambda: a @ a) > 0.5
    assert measuring.share_of("convolution", lambda: a @ a) == 0.0
