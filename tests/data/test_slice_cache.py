from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastflow._locks import locked
from fastflow.data import _segments, slice_cache, slices
from fastflow.data.grids import read_grids
from fastflow.data.indexed_images import IndexedImages
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess
from fastflow.data.slice_cache import SliceCache
from fastflow.data.slices import SliceSet, load_slices, read_image
from fastflow.errors import CacheWarning, OutputFolderError, VolumeError

NAMES = ("a", "b")
PREPROCESS = Preprocess((16, 16), "center+-1")


def scan(path: Path, seed: int) -> Path:
    data = np.random.default_rng(seed).integers(1, 1000, (12, 9, 14)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Five scans and, in the middle, a file that cannot be read."""
    (tmp_path / "scans").mkdir()
    paths = [scan(tmp_path / "scans" / f"sub-{i}.nii", i) for i in range(5)]
    paths.insert(2, tmp_path / "scans" / "broken.nii")
    paths[2].write_bytes(b"broken")
    return [Record(str(path), NAMES[i % 2], path.stem) for i, path in enumerate(paths)]


def load(
    records: list[Record], folder: Path, preprocess: Preprocess = PREPROCESS, **options: Any
) -> tuple[SliceSet, list[VolumeError], SliceCache]:
    cache = SliceCache(folder)
    data, errors = load_slices(records, preprocess, NAMES, cache=cache, **options)
    return data, errors, cache


def assert_equal(found: SliceSet, expected: SliceSet) -> None:
    for name in ("images", "labels", "volumes", "measured"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("paths", "subjects", "class_names"):
        assert getattr(found, name) == getattr(expected, name)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/"))


# -- the same as without -------------------------------------------------------------------------------------


def test_slices_are_those_of_the_files_and_are_decoded_once(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_errors = load_slices(records, PREPROCESS, NAMES)
    cold, cold_errors, _ = load(records, tmp_path / "cache")
    decoded, done = [], []
    monkeypatch.setattr(slices, "read_image", lambda path, how: decoded.append(path) or read_image(path, how))
    warm, warm_errors, cache = load(records, tmp_path / "cache", progress=done.append)
    assert decoded == [records[2].path]
    assert done == [1, 2, 3, 4, 5, 6]
    assert (cache.reused, cache.asked) == (5, 6)
    for data, errors in ((cold, cold_errors), (warm, warm_errors)):
        assert isinstance(data.images, IndexedImages)
        assert_equal(data, expected)
        assert list(map(str, errors)) == list(map(str, expected_errors))
        # What another process gets names the file and does not hold its slices.
        content = pickle.dumps(data.images)
        assert b"images.u8" in content
        np.testing.assert_array_equal(pickle.loads(content), expected.images)


def test_labels_subjects_and_order_are_those_of_the_records(records: list[Record], tmp_path: Path) -> None:
    load(records, tmp_path / "cache")
    others = [Record(r.path, None if i else "b", f"s{i}") for i, r in enumerate(reversed(records[3:]))]
    found, _, cache = load(others, tmp_path / "cache")
    assert cache.reused == 3
    assert_equal(found, load_slices(others, PREPROCESS, NAMES)[0])


def test_files_of_several_runs_are_found_together(records: list[Record], tmp_path: Path) -> None:
    load(records[:2], tmp_path / "cache")
    load(records[1:4], tmp_path / "cache")
    found, _, cache = load(records, tmp_path / "cache", workers=2)
    assert (cache.reused, len(segments(tmp_path / "cache"))) == (3, 3)
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])


def test_changed_files_and_other_preprocessing_are_decoded_again(
    records: list[Record], tmp_path: Path
) -> None:
    load(records, tmp_path / "cache")
    scan(Path(records[0].path), 77)
    # The second file has the same content and another time.
    os.utime(records[1].path, ns=(1, 1))
    found, _, cache = load(records, tmp_path / "cache")
    assert cache.reused == 3
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])
    assert load(records, tmp_path / "cache")[2].reused == 5
    assert load(records, tmp_path / "cache", Preprocess((16, 16), "center"))[2].reused == 0


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(records[0].path)
    content, before = path.read_bytes(), path.stat()

    def read(name: str, how: Preprocess) -> Any:
        if name == records[0].path:
            scan(path, 99)
        return read_image(name, how)

    monkeypatch.setattr(slices, "read_image", read)
    found = load(records, tmp_path / "cache")[0]
    monkeypatch.undo()
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])
    # The first state of the file comes back, of which the cache has never seen the slices.
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again, _, cache = load(records, tmp_path / "cache")
    assert cache.reused == 4
    assert_equal(again, load_slices(records, PREPROCESS, NAMES)[0])


def test_the_version_of_decoding_stands_for_its_results(tmp_path: Path) -> None:
    """Where this test fails, `DECODING` must be raised, or caches give what is no longer decoded."""
    image = read_image(str(scan(tmp_path / "scan.nii", 3)), Preprocess((16, 16), "center+-1"))
    digest = hashlib.sha256(image.images.tobytes() + np.nan_to_num(image.measure()).round(2).tobytes())
    assert (_segments.DECODING, digest.hexdigest()[:16]) == (1, "2fe754a34118d585")


def test_headers_are_read_once(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [record.path for record in records]
    expected = list(read_grids(paths))
    assert expected[0] is not None and expected[2] is None
    read: list[str] = []
    monkeypatch.setattr(
        slice_cache, "read_grids", lambda given, workers: read.extend(given) or read_grids(given, workers)
    )
    for wanted in (paths, [paths[2]]):
        read.clear()
        assert SliceCache(tmp_path / "cache").read_grids(paths) == expected
        assert read == wanted
    os.utime(paths[1], ns=(1, 1))
    read.clear()
    assert SliceCache(tmp_path / "cache").read_grids(paths[::-1]) == expected[::-1]
    assert read == [paths[2], paths[1]]
    file = tmp_path / "cache" / "grids.json"
    file.write_bytes(file.read_bytes().replace(b"[12, 9, 14]", b"[12, 9, 15]", 1))
    read.clear()
    with pytest.warns(CacheWarning, match="damaged and not used, headers are read again"):
        assert SliceCache(tmp_path / "cache").read_grids(paths) == expected
    assert read == paths
    # The file was made anew, and a cache that cannot be written changes nothing.
    assert SliceCache(tmp_path / "cache").read_grids(paths) == expected
    (tmp_path / "file").write_text("")
    assert SliceCache(tmp_path / "file" / "cache").read_grids(paths) == expected


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images.u8", "measured.f8", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_cache_is_noticed_and_made_anew(
    records: list[Record], tmp_path: Path, name: str, damage: str
) -> None:
    load(records, tmp_path / "cache")
    (segment,) = segments(tmp_path / "cache")
    path = segment / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-9], "flipped": content, "empty": b""}[damage])
    if (name, damage) == ("index.json", "gone"):
        # A segment without an index is one that a killed run had begun.
        os.utime(segment, (0, 0))
        found, _, cache = load(records, tmp_path / "cache")
    else:
        with pytest.warns(CacheWarning, match="damaged and not used, its files are decoded again"):
            found, _, cache = load(records, tmp_path / "cache")
    assert cache.reused == 0
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])
    assert segments(tmp_path / "cache") != [segment] and not segment.exists()
    assert load(records, tmp_path / "cache")[2].reused == 5


def test_it_can_be_removed_at_any_time(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    expected = load_slices(records, PREPROCESS, NAMES)[0]
    mapped = load(records, tmp_path / "cache")[0]
    shutil.rmtree(tmp_path / "cache")
    assert_equal(mapped, expected)

    def gone(done: int) -> None:
        if done == 4:
            shutil.rmtree(tmp_path / "cache")

    assert_equal(load(records, tmp_path / "cache", progress=gone)[0], expected)
    assert not segments(tmp_path / "cache")
    assert_equal(load(records, tmp_path / "cache")[0], expected)


def test_other_folders_are_left_alone(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_text("{}")
    with pytest.raises(OutputFolderError, match=r"holds other files, such as 'run.json'; a cache needs"):
        SliceCache(tmp_path / "results")
    load(records, tmp_path / "cache")
    assert (
        (tmp_path / "cache" / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f0688680")
    )


# -- disks ---------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_before(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(records[:1], tmp_path / "cache")
    monkeypatch.setattr(slice_cache, "RESERVE_BYTES", 1 << 60)
    with pytest.warns(CacheWarning, match=r"stay in memory: they take about .* are free there"):
        found = load(records, tmp_path / "cache")[0]
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])
    assert len(segments(tmp_path / "cache")) == 1


@pytest.mark.parametrize("writes", [1, 2, 3, 5])
def test_a_disk_that_is_full_half_way(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    write, left = _segments._write_all, [writes]

    def fill(stream: Any, values: Any) -> None:
        if not left[0]:
            stream.write(values.tobytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        write(stream, values)

    monkeypatch.setattr(_segments, "_write_all", fill)
    with pytest.warns(CacheWarning, match="stay in memory: No space left on device"):
        found = load(records, tmp_path / "cache")[0]
    monkeypatch.undo()
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])
    again, _, cache = load(records, tmp_path / "cache")
    assert cache.reused == writes // 2
    assert_equal(again, found)


def test_slices_that_did_not_reach_the_disk_stop_the_training(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_segments.os, "fsync", fail)
    monkeypatch.setattr(SliceCache, "make", lambda cache: cache.folder.mkdir())
    with pytest.raises(OSError, match=r"did not reach the disk.*use no cache"):
        load(records, tmp_path / "cache")


def test_a_folder_that_cannot_be_made(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="stay in memory"):
        found = load(records, tmp_path / "file" / "cache")[0]
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])
    with pytest.raises(OSError, match="file is a file"):
        load_slices(records, PREPROCESS, NAMES, cache=SliceCache(tmp_path / "file" / "cache", required=True))


# -- several runs --------------------------------------------------------------------------------------------


def test_runs_that_fill_it_at_once(records: list[Record], tmp_path: Path) -> None:
    expected = load_slices(records, PREPROCESS, NAMES)[0]
    inner: list[SliceSet] = []

    def meanwhile(done: int) -> None:
        if done == 4:
            for folder in segments(tmp_path / "cache"):
                os.utime(folder, (0, 0))
            inner.append(load(records, tmp_path / "cache")[0])

    outer = load(records, tmp_path / "cache", progress=meanwhile)[0]
    assert_equal(outer, expected)
    assert_equal(inner[0], expected)
    assert len(segments(tmp_path / "cache")) == 2
    assert load(records, tmp_path / "cache")[2].reused == 5


def fill_and_wait(records: list[Record], folder: Path) -> None:
    """Fill a cache and stop before the last file, for as long as nobody ends this process."""
    _segments.PUBLISH_INTERVAL = 0.0

    def wait(done: int) -> None:
        if done == 5:
            (folder.parent / "waiting").touch()
            time.sleep(60)

    load(records, folder, progress=wait)


def test_a_run_that_is_killed_leaves_what_it_had_written(records: list[Record], tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=fill_and_wait, args=(records, tmp_path / "cache")
    )
    process.start()
    while not (tmp_path / "waiting").exists():
        assert process.is_alive()
        time.sleep(0.01)
    # Its segment is held while it lives.
    (segment,) = segments(tmp_path / "cache")
    with pytest.raises(OutputFolderError), locked(segment):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _, cache = load(records, tmp_path / "cache")
    assert cache.reused == 4
    assert_equal(found, load_slices(records, PREPROCESS, NAMES)[0])


def test_an_interrupted_run_leaves_what_it_had_written(records: list[Record], tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(records, tmp_path / "cache", progress=stop)
    assert load(records, tmp_path / "cache")[2].reused == 4


# -- memory --------------------------------------------------------------------------------------------------


def test_neither_filling_nor_use_holds_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, count = 256, 200
    whole = count * size * size

    def read(path: str, how: Preprocess) -> slices.LoadedImage:
        rng = np.random.default_rng(int(Path(path).stem))
        return slices.LoadedImage(rng.integers(0, 256, (1, 1, size, size), dtype=np.uint8), ())

    monkeypatch.setattr(slices, "read_image", read)
    paths = [tmp_path / f"{i}.nii" for i in range(count)]
    for path in paths:
        path.touch()
    records = [Record(str(path), NAMES[i % 2], path.stem) for i, path in enumerate(paths)]
    preprocess = Preprocess((size, size))
    for reused in (0, count):
        tracemalloc.start()
        data, _, cache = load(records, tmp_path / "cache", preprocess)
        part = data.subset(range(0, count, 2))
        total = sum(int(part.images[i : i + 4].sum()) for i in range(0, len(part), 4))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert cache.reused == reused
        assert total == sum(int(read(r.path, preprocess).images.sum()) for r in records[::2])
        assert peak < whole / 5, (peak, whole)
