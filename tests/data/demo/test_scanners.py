"""The simulated scanners: contrasts of T1-weighted scans."""

import numpy as np
import pytest

from fastflow.data import demo


@pytest.mark.parametrize("scanner", demo.SCANNERS, ids=lambda scanner: scanner.name)
def test_contrast_is_that_of_a_t1_weighted_scan(scanner):
    for seed in range(20):
        grey, white, csf, bone, soft = demo.tissue_signals(scanner, np.random.default_rng(seed))
        assert white == 1.0 and csf < grey < white and bone < grey and 0.3 < soft < 1.6
