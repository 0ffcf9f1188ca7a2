from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastflow.data import grids
from fastflow.data.grids import Grid, group_grids, majority_grid, read_grid, read_grids
from fastflow.data.preprocess import Preprocess
from fastflow.errors import ManifestError

SHAPE = (14, 9, 15)


def write(path: Path, shape: tuple[int, ...] = SHAPE, spacing: float = 2.0) -> str:
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    nib.save(nib.Nifti1Image(data, np.diag([spacing, spacing, spacing, 1.0])), path)
    return str(path)


SPACINGS = st.sampled_from([1.0, 1.005, 1.01, 1.02, 1.1, 2.0])
GRIDS = st.builds(
    lambda n, x, z: Grid((n, 9, 15), (x, 1.0, z)), st.sampled_from([13, 14]), SPACINGS, SPACINGS
)


@given(st.lists(GRIDS, min_size=1, max_size=25), st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order(found, random) -> None:
    members = [(f"{i:02d}.nii", grid) for i, grid in enumerate(found)]
    groups = group_grids(members)
    random.shuffle(members)
    assert group_grids(members) == groups
    assert [group.volumes for group in groups] == sorted((g.volumes for g in groups), reverse=True)
    assert sum(group.volumes for group in groups) <= len(found)


def grid_of(spacing: float) -> Grid:
    return Grid(SHAPE, (spacing, 1.0, 1.0))


@given(st.lists(GRIDS, min_size=1, max_size=25))
# Seven volumes agree with 1.009 by four spacings, and five with 1.018 by five.
@example([*[grid_of(1.0)] * 4, *map(grid_of, (1.009, 1.018, 1.0185, 1.026, 1.027))])
def test_the_first_group_is_what_its_grid_accepts(found) -> None:
    """The volumes that vote for a grid are those that preprocessing lets through afterwards."""
    first = group_grids((f"{i:02d}.nii", grid) for i, grid in enumerate(found))[0]

    def accepted(grid: Grid) -> int:
        preprocess = Preprocess((15, 14), "center", grid.spacing, grid.shape)
        count = 0
        for other in found:
            try:
                preprocess.locate("x.nii", other.shape, other.spacing)
            except ValueError:
                continue
            count += 1
        return count

    assert first.volumes == accepted(first.grid) == max(map(accepted, found))


def test_many_spacings_of_one_shape_are_no_burden() -> None:
    rng = np.random.default_rng(0)
    spacings = 1.0 + 1e-6 * rng.random((3000, 3))
    found = [(f"{i:04d}.nii", Grid(SHAPE, tuple(map(float, spacing)))) for i, spacing in enumerate(spacings)]
    (group,) = group_grids(found)
    assert (group.volumes, group.example) == (3000, "0000.nii")


def test_grid_of_most_volumes_wins_wherever_the_odd_one_stands(tmp_path: Path) -> None:
    most = [write(tmp_path / f"{i}.nii.gz") for i in range(3)]
    near = write(tmp_path / "near.nii.gz", spacing=2.01)
    odd = write(tmp_path / "odd.nii.gz", (14, 8, 15))
    for paths in ([odd, *most, near], [near, *most, odd]):
        assert majority_grid(paths) == Grid(SHAPE, (2.0, 2.0, 2.0))


def test_pictures_and_files_without_a_header_do_not_vote(tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8bnot a scan")
    paths = [str(tmp_path / name) for name in ("a.png", "b.PNG", "c.png", "missing.nii", "broken.nii.gz")]
    assert majority_grid(paths) is None
    assert majority_grid([*paths, write(tmp_path / "one.nii.gz")]) == Grid(SHAPE, (2.0, 2.0, 2.0))


def test_only_the_header_is_read(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "whole.nii.gz", (14, 64, 64)))
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(whole.read_bytes()[:-5000])
    assert read_grid(str(cut)) == Grid((14, 64, 64), (2.0, 2.0, 2.0))


def test_without_a_majority_the_grids_are_listed(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"a{i}.nii", SHAPE) for i in range(2)]
    paths += [write(tmp_path / f"b{i}.nii", (14, 8, 15), 1.5) for i in range(2)]
    with pytest.raises(ManifestError) as error:
        majority_grid(paths[::-1])
    assert str(error.value).splitlines() == [
        "the 4 training volumes lie on several grids, and none holds more than half of them:",
        f"  2 on 14 x 8 x 15 voxels of 1.5 x 1.5 x 1.5 mm, such as {paths[2]}",
        f"  2 on 14 x 9 x 15 voxels of 2 x 2 x 2 mm, such as {paths[0]}",
        "resample them to one grid, or train on those of one grid",
    ]
    # The most frequent grid is not enough where it holds less than half.
    paths.append(write(tmp_path / "c.nii", (13, 9, 15)))
    with pytest.raises(ManifestError, match="none holds more than half"):
        majority_grid([*paths, write(tmp_path / "a3.nii")])


def test_a_long_list_of_grids_is_cut(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n:02d}.nii", (14, n, 15)) for n in range(5, 17)]
    with pytest.raises(ManifestError, match="\n  4 on other grids\n"):
        majority_grid(paths)


def test_processes_read_the_same_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{n}.nii", (14, n, 15)) for n in range(5, 9)] + [str(tmp_path / "no.nii")]
    alone = list(read_grids(paths))
    monkeypatch.setattr(grids, "MIN_FILES_FOR_POOL", 4)
    assert list(read_grids(paths, workers=2)) == alone
    assert alone[-1] is None and alone[0] == Grid((14, 5, 15), (2.0, 2.0, 2.0))
