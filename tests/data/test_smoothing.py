import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow.data.grain import GRAIN_NUMBERS, grain_numbers
from fastflow.data.smoothing import smoothed


@pytest.mark.parametrize("shape", [(3, 24, 17), (2, 3, 5), (1, 1, 7), (1, 1, 1), (0, 4, 4)])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.3])
def test_smoothing_is_that_of_scipy(shape: tuple[int, int, int], sigma: float) -> None:
    images = np.random.default_rng(0).uniform(0.0, 1.0, shape)
    wanted = [gaussian_filter(image, sigma) for image in images]
    np.testing.assert_allclose(smoothed(images, sigma), np.reshape(wanted, shape), rtol=0, atol=1e-12)


def test_an_image_does_not_depend_on_the_others() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 20), dtype=np.uint8)
    one = np.concatenate([grain_numbers(pixels[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(grain_numbers(pixels), one)
    assert grain_numbers(pixels[:0]).shape == (0, len(GRAIN_NUMBERS))
