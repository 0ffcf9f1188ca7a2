"""The benchmarks of archives run on tiny inputs, and measure what they say."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bench import archive_inputs, archive_memory, test_archive
from fastflow.data.slices import load_image

# Volumes are of 23 x 27 x 23 voxels then.
MM = 8
# Four steps of two scales instead of the preset's twelve.
LAYOUT = {
    "masks": ("checkerboard", "channel", "checkerboard", "channel"),
    "squeeze_before": (1,),
    "split_after": (2,),
    "widths": ((8, 8, 8),) * 4,
}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    paths = archive_inputs.write_archive(folder, MM, count=5, distinct=3)
    return paths, folder / "model", archive_inputs.write_model(folder / "model", MM, paths, **LAYOUT)


def test_volumes_differ_and_copies_do_not(archive):
    content = [Path(path).read_bytes() for path in archive[0]]
    assert len(set(content)) == 3 and content[3] == content[0]
    assert nib.load(archive[0][0]).get_data_dtype() == np.int16


def test_loop_reads_the_images_that_classify_reads(archive):
    preprocess = archive_inputs.preprocess_for(MM)
    for path in archive[0]:
        assert np.array_equal(
            test_archive.read_plainly(path, preprocess.size), load_image(path, preprocess)[0, 0]
        )


def test_loop_and_classify_agree(archive, tmp_path):
    paths, folder, model = archive
    size = archive_inputs.preprocess_for(MM).size
    loop, scores = test_archive.plain_loop(paths, model, size, tmp_path / "loop.csv")
    test_archive.forget(paths)
    own, summary = test_archive.run_classify(paths, folder, tmp_path / "results")
    found, predicted = test_archive.log_probs_of(tmp_path / "results")
    assert predicted == [str(k) for k in scores.argmax(axis=1)]
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    assert summary.total == 5 and len((tmp_path / "loop.csv").read_text().splitlines()) == 5
    assert min(loop.reading, loop.scoring, own.total, own.reading, own.scoring) > 0
    assert loop.total >= loop.reading + loop.scoring


def test_ratios_are_of_rounds_that_belong_together():
    loop = [test_archive.Times(4.0, 4.0, 1.0, 3.0), test_archive.Times(40.0, 40.0, 10.0, 30.0)]
    own = [test_archive.Times(2.0, 1.0, 0.5, 1.0), test_archive.Times(20.0, 10.0, 5.0, 10.0)]
    assert test_archive.ratios(loop, own) == {
        "ratio_total": 2,
        "ratio_steady": 4,
        "ratio_reading": 2,
        "ratio_scoring": 3,
    }
    assert test_archive.rates("own", own)["own_total_per_second"] == pytest.approx(1 / 11)


@pytest.mark.parametrize("kind", archive_inputs.KINDS)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_reading_is_compared_on_the_same_file(tmp_path, kind, ending):
    preprocess = archive_inputs.preprocess_for(MM)
    path = archive_inputs.write_volume(tmp_path, MM, kind, ending)
    assert test_archive.slice_by_nibabel(path).shape == (23, 23)
    assert set(test_archive.read_round(path, preprocess)) == {"slicing", "same_work"}
    assert np.array_equal(
        test_archive.read_plainly(path, preprocess.size), load_image(path, preprocess)[0, 0]
    )


def test_memory_of_a_run_is_that_of_both_processes(tmp_path):
    archive_memory.write_links(tmp_path, 12)
    assert len(list((tmp_path / "links").rglob("*.nii.gz"))) == 12
    assert os.stat(tmp_path / "volume-0").st_nlink == 3
    assert gzip.decompress((tmp_path / "volume-1").read_bytes())[344:347] == b"n+1"
    archive_memory.write_model(tmp_path / "model")
    row = archive_memory.run(*(str(tmp_path / name) for name in ("links", "model", "results")))
    assert row["inputs"] == 12
    assert row["peak_mib"] >= row["before_mib"] > row["worker_peak_mib"] > 10


def test_memory_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    archive_memory.write_paths(tmp_path / "manifest.csv", 50)
    row = archive_memory.alone("listing", tmp_path / "manifest.csv")
    assert (row["what"], row["inputs"]) == ("listing", 50)
    # This process has imported PyTorch, that one has not.
    assert archive_memory.peak_mib() > row["peak_mib"] >= row["before_mib"] > 5


def test_listing_and_resuming_count_what_they_are_given(tmp_path):
    archive_memory.write_paths(tmp_path / "manifest.csv", 50)
    assert archive_memory.listing(str(tmp_path / "manifest.csv"))["inputs"] == 50
    assert archive_memory.resuming("50")["inputs"] == 50
