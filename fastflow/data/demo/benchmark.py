"""The archive of the scanner benchmark: seven scanners in the numbers of the paper's scanner task.

The scanners differ in bias field, resolution, geometry and contrast, each a little, and hardly in the grain
of their noise, whose strength and share of k-space vary more from scan to scan than from scanner to scanner:
numbers about grain alone do not decide the task. Pavo and PavoFit are nearly alike. Settings stand in
``assets/benchmark_scanners.json``.

Source of the numbers of scans: Caldera, Bottacini and Cavinato, arXiv 2510.22070 (scanner classification).
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from fastflow.data.demo.archive import Scan, write_archive
from fastflow.data.demo.scanners import load_scanners
from fastflow.data.folds import FOLDS, folds_of
from fastflow.data.manifest import Record, write_manifest

BENCHMARK_SCANNERS = load_scanners("benchmark_scanners.json")
# Scans of each scanner: of known heads, and of the unseen head.
PAPER_COUNTS = (322, 185, 74, 41, 494, 69, 167)
UNSEEN_COUNT = 20
BENCHMARK_SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "paper": (PAPER_COUNTS, UNSEEN_COUNT),
    "third": (tuple(max(20, count // 3) for count in PAPER_COUNTS), 10),
    "tiny": ((6,) * len(PAPER_COUNTS), 2),
}
# Every so many subjects, one comes back for a second session on the same scanner.
SECOND_SESSION = 6
KNOWN, UNSEEN = "known", "unseen_head"


def plan_benchmark(size: str = "paper", seed: int = 0) -> list[Scan]:
    """Every scan of the benchmark's archive; a subject may have two, always of the same scanner.

    Args:
        size: a key of `BENCHMARK_SIZES`.
        seed: of all randomness.

    Returns:
        Scans whose split is ``known`` or ``unseen_head``.

    Raises:
        ValueError: the size is unknown.
    """
    if size not in BENCHMARK_SIZES:
        raise ValueError(f"size must be one of {', '.join(BENCHMARK_SIZES)}, got {size!r}")
    counts, unseen = BENCHMARK_SIZES[size]
    scans: list[Scan] = []
    subjects = 0
    for split, each in ((KNOWN, counts), (UNSEEN, (unseen,) * len(counts))):
        for scanner, count in enumerate(each):
            planned = 0
            while planned < count:
                subjects += 1
                sessions = min(2 if subjects % SECOND_SESSION == 0 else 1, count - planned)
                for session in range(sessions):
                    scans.append(
                        Scan(
                            f"sub-{subjects:04d}",
                            scanner,
                            split,
                            (seed, len(scans), 1),
                            (seed, subjects, 2),
                            f"ses-{session + 1}",
                        )
                    )
                planned += sessions
    return scans


def build_benchmark(
    folder: str | PathLike[str],
    seed: int = 0,
    size: str = "paper",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Write the benchmark's archive, with the files of `fastflow.data.demo.build_archive`.

    Args:
        folder: where; created when missing.
        seed: equal seeds give equal bytes, whatever the number of workers.
        size: a key of `BENCHMARK_SIZES`; ``"paper"`` has the paper's 1,352 scans and 140 of the unseen head.
        workers: processes.
        progress: called with the number of volumes done and their total.

    Returns:
        One record per volume. Scans of known heads have the splits ``train``, ``val`` and ``test`` of the
        first of five folds (`fastflow.data.folds.folds_of`), those of the unseen head ``unseen_head``.

    Raises:
        ValueError: the size is unknown.
    """
    records = write_archive(folder, plan_benchmark(size, seed), BENCHMARK_SCANNERS, seed, workers, progress)
    known = [record for record in records if record.split == KNOWN]
    unseen = [record for record in records if record.split == UNSEEN]
    placed = [*folds_of(known, FOLDS, seed)[0], *unseen]
    write_manifest(placed, Path(folder) / "manifest.csv")
    return placed
