"""Shipped anatomy: what it is, that its deformations do not fold, and the mask made from it."""

import itertools
from importlib import resources

import nibabel as nib
import numpy as np
import pytest

from fastflow.data import anatomy

ASSETS = resources.files("fastflow.data") / "assets"


@pytest.mark.parametrize("name", anatomy.HEADS)
def test_heads_are_on_the_grid_and_look_like_heads(name):
    head = anatomy.load_head(name)
    assert head.t1.shape == anatomy.GRID and head.fractions.shape == (5, *anatomy.GRID)
    assert head.fractions.min() >= 0 and head.fractions.sum(axis=0).max() <= 1.13
    volumes = head.fractions.sum(axis=(1, 2, 3)) * 8e-3
    brain = dict(zip(anatomy.TISSUES, volumes, strict=True))
    # Millilitres: adult brains.
    assert 600 < brain["grey_matter"] < 1100 and 400 < brain["white_matter"] < 800
    white = head.t1[head.fractions[1] == 1].mean()
    assert (
        150 < white < 200
        and white > head.t1[head.fractions[0] == 1].mean() > head.t1[head.fractions[2] == 1].mean()
    )
    affine = nib.load(str(ASSETS / f"{name}_T1w.nii.gz")).affine
    assert np.array_equal(affine, anatomy.AFFINE)


def test_every_head_has_its_licence():
    table = (ASSETS / "LICENCES.md").read_text(encoding="utf-8")
    # The BSD licences ask for their own words, once for each of the two copyright holders.
    for words in (
        "must retain the above copyright notice",
        "must reproduce the above copyright notice",
        "IMPLIED WARRANTIES",
    ):
        assert table.count(words) >= 2
    for word in (
        *(name for name in anatomy.HEADS if "aomic" not in name),
        "aomic_0017, aomic_0042",
        "BSD-3",
        "BSD-2",
        "CC0",
    ):
        assert word in table


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(anatomy.HEADS, 2)))
def test_deformations_between_heads_do_not_fold_and_fit(source, target):
    displacement = anatomy.exponentiate(anatomy.load_velocity(source, target))
    assert anatomy.jacobian_determinant(displacement).min() > 0.05
    images = [anatomy._coarsen(anatomy.load_head(name).fractions[1], 2) for name in (source, target)]
    moved = anatomy.warp(images[0], displacement)
    before, after = (np.corrcoef(image.ravel(), images[1].ravel())[0, 1] for image in (images[0], moved))
    assert after > before + 0.02


def test_the_way_back_is_the_inverse():
    there = anatomy.exponentiate(anatomy.load_velocity("colin27", "pycortex_S1"))
    back = anatomy.exponentiate(anatomy.load_velocity("pycortex_S1", "colin27"))
    both = there + anatomy.warp(back, there)
    assert np.abs(both[:, 5:-5, 5:-5, 5:-5]).mean() < 0.05


def test_a_head_is_derived_by_averaging_blocks(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, (10, 8, 12)).astype(np.uint8)
    t1 = rng.integers(0, 256, labels.shape).astype(np.uint8)
    paths = tmp_path / "t1.nii.gz", tmp_path / "labels.nii.gz"
    for path, voxels in zip(paths, (t1, labels), strict=True):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    small, shares = anatomy.derive_head(*paths)
    assert small.shape == (5, 4, 6) and shares.shape == (5, 4, 6, 5)
    assert abs(float(small[2, 1, 3]) - t1[4:6, 2:4, 6:8].mean()) <= 0.5
    # Eighths are exact: eight 1 mm voxels make one of 2 mm, and what no tissue fills is air.
    assert shares[2, 1, 3].tolist() == [(labels[4:6, 2:4, 6:8] == k).sum() for k in range(1, 6)]


def test_registration_finds_a_shift():
    ball = np.sum(np.square(np.indices((32, 32, 32)) - 15.5), axis=0) < 80
    fractions = np.zeros((5, 32, 32, 32), dtype=np.float32)
    fractions[1] = ball
    moved = np.roll(fractions, 3, axis=1)
    source, target = (anatomy.Head("ball", part[1], part) for part in (fractions, moved))
    displacement = anatomy.exponentiate(anatomy.register(source, target))
    images = [anatomy._coarsen(head.fractions[1], 2) for head in (source, target)]
    before, after = (
        np.abs(image - images[1]).sum() for image in (images[0], anatomy.warp(images[0], displacement))
    )
    assert after < 0.35 * before and anatomy.jacobian_determinant(displacement).min() > 0


def test_unknown_heads_are_named():
    with pytest.raises(ValueError, match="colin28"):
        anatomy.load_head("colin28")
    with pytest.raises(ValueError, match="colin27"):
        anatomy.load_velocity("colin27", "colin27")


@pytest.mark.parametrize(
    "shape", [(184, 184), (182, 182), (96, 96), (48, 48), (16, 16), (1, 1), (200, 96), (23, 64)]
)
def test_mask_is_binary_in_every_shape(shape):
    mask = anatomy.coronal_mask(shape)
    assert mask.shape == shape and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    if min(shape) >= 16:
        assert 0.2 < mask.mean() < 0.75


def test_mask_holds_the_brain_and_leaves_the_skull_out():
    mask = anatomy.coronal_mask((96, 96)).astype(bool)
    brain, bone = [], []
    for name in anatomy.HEADS:
        plane = anatomy.load_head(name).fractions[:, :, 54, ::-1].transpose(0, 2, 1)
        padded = np.pad(plane, ((0, 0), (2, 3), (2, 3)))
        brain.append(padded[:3].sum(axis=0) > 0.9)
        bone.append(padded[3] > 0.9)
    everywhere = np.logical_and.reduce(brain)
    assert mask[everywhere].mean() > 0.97
    upper = np.s_[:55]
    assert mask[upper][np.mean(bone, axis=0)[upper] >= 0.75].mean() < 0.25
    assert not mask[:5].any()
    with pytest.raises(ValueError, match="positive"):
        anatomy.coronal_mask((0, 4))
