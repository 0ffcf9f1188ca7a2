"""The grids of many volumes, by their headers alone, and the one that most of them share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflow.data.endings import is_image
from fastflow.data.preprocess import SPACING_TOLERANCE
from fastflow.data.volume import open_scan
from fastflow.errors import ManifestError

# For fewer files than this, starting processes takes longer than reading headers.
MIN_FILES_FOR_POOL = 256
# One process is given so many files at once.
_FILES_PER_TASK = 16
# So many grids of one shape are told apart, and so many are shown.
MAX_GROUPS = 8
# So many spacings of one shape, the most frequent, are tried as the centre of a group.
_MAX_CANDIDATES = 64


class Grid(NamedTuple):
    """Where a volume has its voxels, in canonical orientation.

    Attributes:
        shape: voxels along X, Y, Z.
        spacing: voxel size along X, Y, Z in mm.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def __str__(self) -> str:
        shape, spacing = (" x ".join(f"{n:.4g}" for n in values) for values in self)
        return f"{shape} voxels of {spacing} mm"


class GridGroup(NamedTuple):
    """Volumes that lie on one grid: equal shapes, spacings within the tolerance of `Preprocess`.

    Attributes:
        grid: of the group.
        volumes: how many they are.
        example: the first of their paths in sorted order.
    """

    grid: Grid
    volumes: int
    example: str


def read_grid(path: str) -> Grid | None:
    """The grid that a volume's header promises; None where it cannot be used, as the reader will tell."""
    try:
        with open_scan(path) as scan:
            return Grid(scan.header.canonical_shape, scan.header.spacing)
    # One file must never stop the others, whatever is in it.
    except Exception:
        return None


def read_grids(paths: Sequence[str], workers: int = 1) -> Iterator[Grid | None]:
    """`read_grid` of each path, in order.

    Args:
        paths: of volumes.
        workers: processes that read where there are many files; 1 reads in this process.
    """
    if workers <= 1 or len(paths) < MIN_FILES_FOR_POOL:
        yield from map(read_grid, paths)
        return
    # Processes are spawned, as a fork would copy a torch that is running threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(read_grid, paths, chunksize=_FILES_PER_TASK)


def majority_grid(
    paths: Iterable[str],
    workers: int = 1,
    read: Callable[[Sequence[str], int], Iterable[Grid | None]] = read_grids,
) -> Grid | None:
    """The grid of more than half of the volumes whose headers can be read, in whatever order they come.

    Args:
        paths: of volumes and PNG files; the latter have no grid.
        workers: see `read_grids`.
        read: gives the grids of paths; a cache has one that opens fewer files.

    Returns:
        The grid; None where no header of a volume can be read.

    Raises:
        ManifestError: no grid is that of more than half of the volumes; the message is a table of them.
    """
    volumes = [path for path in paths if not is_image(path)]
    found = [
        (path, grid) for path, grid in zip(volumes, read(volumes, workers), strict=True) if grid is not None
    ]
    if not found:
        return None
    groups = group_grids(found)
    if 2 * groups[0].volumes > len(found):
        return groups[0].grid
    rows = [f"  {volumes} on {grid}, such as {path}" for grid, volumes, path in groups[:MAX_GROUPS]]
    others = len(found) - sum(group.volumes for group in groups[:MAX_GROUPS])
    rows += [f"  {others} on other grids"] if others else []
    raise ManifestError(
        f"the {len(found)} training volumes lie on several grids, and none holds more than half of them:\n"
        + "\n".join(rows)
        + "\nresample them to one grid, or train on those of one grid"
    )


def group_grids(found: Iterable[tuple[str, Grid]]) -> list[GridGroup]:
    """Group volumes by grid, the largest group first; of one shape, at most `MAX_GROUPS` groups.

    The result does not depend on the order: the spacing that most volumes agree with makes the first group,
    and what is left of the shape is grouped in the same way.

    Args:
        found: (path, grid) of volumes.
    """
    by_shape: dict[tuple[int, int, int], list[tuple[tuple[float, float, float], str]]] = {}
    for path, grid in found:
        by_shape.setdefault(grid.shape, []).append((grid.spacing, path))
    groups = [group for shape, members in by_shape.items() for group in _group_shape(shape, members)]
    return sorted(groups, key=lambda group: (-group.volumes, group.grid))


def _group_shape(
    shape: tuple[int, int, int], members: Sequence[tuple[tuple[float, float, float], str]]
) -> Iterator[GridGroup]:
    # Sorted by path, so that a group's first member is its example.
    members = sorted(members, key=lambda member: member[1])
    spacings, inverse, counts = np.unique(
        np.array([spacing for spacing, _ in members]), axis=0, return_inverse=True, return_counts=True
    )
    inverse = inverse.reshape(-1)
    left = np.ones(len(spacings), dtype=np.bool_)
    for _ in range(MAX_GROUPS):
        if not left.any():
            return
        centre, agree = _most_agreed(spacings, counts * left)
        inside = np.flatnonzero((agree & left)[inverse])
        x, y, z = spacings[centre].tolist()
        yield GridGroup(Grid(shape, (x, y, z)), len(inside), members[inside[0]][1])
        left &= ~agree


def _most_agreed(spacings: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[int, NDArray[np.bool_]]:
    """The index of the spacing that most volumes agree with, and (n,) which spacings agree with it.

    Among equals the one that more volumes have exactly is taken, then the smallest.
    """
    candidates = np.argsort(-counts, kind="stable")[:_MAX_CANDIDATES]
    candidates = candidates[counts[candidates] > 0]
    agree = np.all(np.isclose(spacings[None], spacings[candidates, None], rtol=SPACING_TOLERANCE), axis=2)
    # `candidates` are sorted by count and then by size, and the first of equals is taken.
    best = int(np.argmax(agree @ counts))
    return int(candidates[best]), agree[best]
