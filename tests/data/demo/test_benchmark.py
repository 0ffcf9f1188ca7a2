"""The archive of the scanner benchmark: the paper's counts, sessions of one subject together, geometry."""

from collections import Counter

import numpy as np
import pytest

from fastflow.data.anatomy import GRID
from fastflow.data.demo import archive as archive_module
from fastflow.data.demo import acquisition
from fastflow.data.demo.benchmark import (
    BENCHMARK_SCANNERS,
    PAPER_COUNTS,
    UNSEEN,
    build_benchmark,
    plan_benchmark,
)
from tests.data.demo.test_archive import Pool


def test_the_plan_has_the_papers_counts_and_pairs_of_sessions():
    scans = plan_benchmark()
    known = [scan for scan in scans if scan.split != UNSEEN]
    counts = Counter(scan.scanner for scan in known)
    assert tuple(counts[k] for k in range(7)) == PAPER_COUNTS and sum(PAPER_COUNTS) == 1352
    assert set(Counter(scan.scanner for scan in scans if scan.split == UNSEEN).values()) == {20}
    by_subject = {}
    for scan in scans:
        by_subject.setdefault(scan.subject, []).append(scan)
    several = [scans for scans in by_subject.values() if len(scans) == 2]
    assert len(several) > 100 and max(map(len, by_subject.values())) == 2
    assert all(a.scanner == b.scanner and a.anatomy == b.anatomy and a.seed != b.seed for a, b in several)
    # Nothing of a scan is that of another, but for sessions of a subject.
    assert len({scan.seed for scan in scans}) == len(scans)
    assert len({scan.anatomy for scan in scans}) == len(by_subject)
    with pytest.raises(ValueError, match="paper, third, tiny, got 'huge'"):
        plan_benchmark("huge")


def test_splits_keep_sessions_together_and_the_unseen_head_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "ProcessPoolExecutor", Pool)
    made = []

    def make(scan, scanner):
        made.append((scan, scanner))
        return np.zeros((2, 2, 2), np.int16), {}

    monkeypatch.setattr(archive_module, "make_scan", make)
    records = build_benchmark(tmp_path, size="tiny", workers=1)
    assert {scanner.name for _, scanner in made} == {record.label for record in records}
    splits = {}
    for record in records:
        splits.setdefault(record.subject, set()).add(record.split)
    assert all(len(each) == 1 for each in splits.values())
    assert {"train", "val", "test", UNSEEN} == set.union(*splits.values())
    assert len({record.path for record in records}) == len(records) == 56


def test_scanners_change_geometry_as_they_say():
    scanner = next(scanner for scanner in BENCHMARK_SCANNERS if scanner.name == "Mensa")
    box = np.zeros(GRID, dtype=np.float32)
    box[20:71, 30:80, 20:71] = 1.0
    out = acquisition.distort(scanner, box, np.random.default_rng(0))
    # A head that is 1.2 % longer from left to right: 51 voxels become 51.6.
    assert out[:, 54, 45].sum() == pytest.approx(51 * scanner.stretch[0], abs=0.7)
    assert out[:, 54, 45].sum() > out[45, 54, :].sum()
    plain = BENCHMARK_SCANNERS[0].__class__(**{**vars(scanner), "stretch": (1.0, 1.0, 1.0), "distortion": (0.0, 0.0)})
    rng = np.random.default_rng(0)
    assert acquisition.distort(plain, box, rng) is box
    # It drew nothing, so that the demo's archive keeps its bytes.
    assert rng.random() == np.random.default_rng(0).random()
