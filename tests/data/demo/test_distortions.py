from __future__ import annotations

import numpy as np
import pytest

from fastflow.data.anatomy import GRID, load_head
from fastflow.data.demo.distortions import DISTORTIONS, Distortion

BY_NAME = {one.name: one.apply for one in DISTORTIONS}


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.abs(load_head("colin27").t1.astype(np.float64) + rng.normal(0, 5, GRID))


@pytest.mark.parametrize("distortion", DISTORTIONS, ids=lambda one: one.name)
def test_a_distortion_keeps_the_grid_and_changes_the_scan(head: np.ndarray, distortion: Distortion) -> None:
    before = head.copy()
    found = distortion.apply(head)
    np.testing.assert_array_equal(head, before)
    assert found.shape == GRID and np.isfinite(found).all()
    assert np.abs(found - head).max() > 0.1 * head.max()
    np.testing.assert_array_equal(distortion.apply(head), found)


def test_what_distortions_do(head: np.ndarray) -> None:
    assert BY_NAME["z_score"](head).mean() == pytest.approx(0, abs=1e-9)
    assert BY_NAME["z_score"](head).std() == pytest.approx(1)
    np.testing.assert_allclose(BY_NAME["offset"](head) - head, 1000)
    np.testing.assert_allclose(BY_NAME["inverted"](head) + head, head.max())
    assert set(np.unique(BY_NAME["mask"](head))) == {0.0, 1.0}
    assert BY_NAME["blurred"](head).var() < head.var()
    assert (BY_NAME["half_left"](head)[:45] == 0).all()
    np.testing.assert_array_equal(BY_NAME["half_bottom"](head)[:, :, 45:], head[:, :, 45:])
    np.testing.assert_array_equal(BY_NAME["upside_down"](head)[:, :, 0], head[:, :, -1])
    coarse = BY_NAME["downsampled"](head)
    assert coarse[0, 0, 0] == coarse[1, 1, 1] == pytest.approx(head[:2, :2, :2].mean())
    # The middle of the head stays; three more turns bring all of it back.
    turned = head
    for _ in range(4):
        turned = BY_NAME["rotated_coronal"](turned)
    np.testing.assert_array_equal(turned, head)
    brain = BY_NAME["brain_only"](head)
    assert 0.1 < (brain > 0).mean() < 0.5 and brain[45, 54, 45] == head[45, 54, 45]
