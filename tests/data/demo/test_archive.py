"""The demo archive: repeatable, split by subject, the unseen head unseen, and real files on one grid."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest

from fastflow.data import anatomy, demo
from fastflow.data.demo import archive as archive_module
from fastflow.data.manifest import read_manifest

SIZE = {"train": (2, 0, 1, 0, 0, 0, 0), "test": (0, 0, 0, 1, 0, 0, 0), "unseen_head": (0, 0, 0, 0, 0, 0, 1)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    told = []
    records = demo.build_archive(
        folder, seed=5, size=SIZE, workers=2, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i, 5) for i in range(1, 6)]
    return folder, records


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_bytes_whatever_the_workers(archive, tmp_path):
    folder, _ = archive
    demo.build_archive(tmp_path / "again", seed=5, size=SIZE, workers=1)
    assert digests(tmp_path / "again") == digests(folder)
    scan = demo.plan_archive(SIZE, seed=6)[0]
    other, _ = demo.make_scan(scan)
    first = nib.load(folder / "sub-0001/anat/sub-0001_acq-Aster_T1w.nii.gz")
    assert not np.array_equal(other, np.asarray(first.dataobj))


class Pool(ThreadPoolExecutor):
    """In place of processes, which take seconds to start."""

    def __init__(self, workers, mp_context):
        super().__init__(workers)


def test_a_smaller_archive_leaves_no_volume_of_the_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(archive_module, "make_scan", lambda scan, scanner: (np.zeros((2, 2, 2), np.int16), {}))
    keep = tmp_path / "sub-0002-notes.txt"
    demo.build_archive(tmp_path, size={"test": (1, 1, 0, 0, 0, 0, 0)}, workers=1)
    keep.write_text("mine")
    records = demo.build_archive(tmp_path, size={"test": (1, 0, 0, 0, 0, 0, 0)}, workers=1)
    assert [str(p) for p in tmp_path.rglob("*.nii.gz")] == [records[0].path] and keep.exists()
    foreign = tmp_path / "foreign" / "sub-0007"
    foreign.mkdir(parents=True)
    demo.build_archive(tmp_path / "foreign", size={"test": (1, 0, 0, 0, 0, 0, 0)}, workers=1)
    assert foreign.exists()


def test_volumes_are_real_files_on_one_grid(archive):
    folder, records = archive
    assert read_manifest(folder / "manifest.csv") == records
    assert not list(folder.rglob("*.tmp"))
    for record in records:
        image = nib.load(record.path)
        assert image.shape == anatomy.GRID and np.array_equal(image.affine, anatomy.AFFINE)
        assert image.get_data_dtype() == np.int16
        data = np.asarray(image.dataobj)
        assert data.min() >= 0 and 200 < np.percentile(data, 99.9) < 3000
        assert record.path.endswith(f"{record.subject}/anat/{record.subject}_acq-{record.label}_T1w.nii.gz")


def test_sidecars_say_what_was_simulated(archive):
    folder, records = archive
    assert (
        json.loads((folder / "dataset_description.json").read_text())["Name"]
        == "Simulated scanners on real anatomy"
    )
    for record in records:
        with open(record.path.replace(".nii.gz", ".json")) as stream:
            sidecar = json.load(stream)
        assert sidecar["Description"] == "simulated scanner on real anatomy"
        assert sidecar["ManufacturersModelName"] == record.label
        assert {"MagneticFieldStrength", "RepetitionTime", "EchoTime", "FlipAngle", "Seed"} <= set(sidecar)
        seen = demo.UNSEEN_HEAD in sidecar["SourceHeads"]
        assert seen == (record.split == "unseen_head")
        assert abs(sum(sidecar["SourceHeads"].values()) - 1.0) < 1e-3


@pytest.mark.parametrize("size", ["demo", "tiny"])
def test_plan_is_imbalanced_and_split_by_subject(size):
    scans = demo.plan_archive(size)
    assert len({scan.subject for scan in scans}) == len(scans) == len({scan.seed for scan in scans})
    assert {scan.split for scan in scans} == {"train", "val", "test", "unseen_head"}
    for split in ("train", "val", "test", "unseen_head"):
        counts = Counter(scan.scanner for scan in scans if scan.split == split)
        assert set(counts) == set(range(7))
        if size == "demo" and split == "train":
            assert counts[0] >= 5 * counts[6]
        if size == "demo" and "test" in split:
            assert min(counts.values()) >= 8


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="huge"):
        demo.plan_archive("huge")
    with pytest.raises(ValueError, match=r"train.*7 scanners.*got \(1, 2\)"):
        demo.plan_archive({"train": (1, 2)})
    with pytest.raises(ValueError, match=r"val.*from 0"):
        demo.plan_archive({"val": (1, 1, 1, 1, 1, 1, -1)})
    with pytest.raises(ValueError, match=r"unseen_head, got 'unseen-head'"):
        demo.plan_archive({"unseen-head": (1,) * 7})
