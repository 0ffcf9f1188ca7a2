"""Augmentation: what moves, what stays, and that a seed repeats it."""

import torch

from fastflow.training.augment import PAPER, SHIFT, Augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(batch=8, size=21):
    return torch.rand(batch, 1, size, size, generator=generator(9)) * 2 - 1


def test_same_seed_same_images_in_range():
    x = picture()
    a, b = PAPER(x, generator()), PAPER(x, generator())
    assert torch.equal(a, b) and not torch.equal(a, x)
    assert a.min() >= -1 - 1e-6 and a.max() <= 1 + 1e-6


def test_nothing_happens_at_probability_zero():
    x = picture()
    assert torch.equal(Augment(move_probability=0.0, noise_probability=0.0)(x, generator()), x)


def test_shifts_are_by_whole_pixels_filled_with_the_background():
    x = picture(32)
    y = SHIFT(x, generator())
    found = set()
    for before, after in zip(x[:, 0], y[:, 0], strict=True):
        fits = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                want = torch.full_like(before, -1.0)
                rows, cols = slice(max(dy, 0), 21 + min(dy, 0)), slice(max(dx, 0), 21 + min(dx, 0))
                want[rows, cols] = before[max(-dy, 0) : 21 + min(-dy, 0), max(-dx, 0) : 21 + min(-dx, 0)]
                if torch.allclose(after, want, atol=1e-6):
                    fits.append((dy, dx))
        assert fits, "an image was not shifted by whole pixels"
        found.add(fits[0])
    assert len(found) > 8


def test_rotation_turns_about_the_centre_without_stretching():
    x = torch.full((1, 1, 41, 61), -1.0)
    x[..., 20, 50] = 1.0
    always = Augment(move_probability=1.0, degrees=90.0, pixels=0, noise_probability=0.0)
    for seed in range(20):
        y = always(x, generator(seed))[0, 0] + 1
        if y.sum() < 0.3:
            continue
        row, col = (y * torch.arange(41)[:, None]).sum() / y.sum(), (y * torch.arange(61)).sum() / y.sum()
        assert abs(float(((row - 20) ** 2 + (col - 30) ** 2).sqrt()) - 20.0) < 0.8
        return
    raise AssertionError("no rotation kept the dot inside the image")


def test_noise_has_its_size():
    x = torch.zeros(64, 1, 16, 16)
    y = Augment(move_probability=0.0, noise_probability=0.5)(x, generator())
    noisy = y.flatten(1).std(dim=1)
    assert 15 < int((noisy > 0).sum()) < 49
    assert abs(float(noisy[noisy > 0].mean()) - 0.01) < 1e-3
