"""Archives: `classify` beside the loop that one would write, and reading a slice beside nibabel's slicing.

Run it with ``pytest bench/test_archive.py --benchmark-only``. It takes about 25 minutes on two cores.
``FASTFLOW_BENCH_VOLUMES=n`` classifies n volumes instead of 160 at 2 mm and 48 at 1 mm, and
``FASTFLOW_BENCH_ROUNDS=n`` does it n times instead of 3.

Volumes are the shipped heads on the grid with Rician noise that is drawn anew for each, so that gzip (level
6) finds what it finds in a scan. The first `DISTINCT` differ, the others are copies of them.

**End to end** (`test_classify`): the demo preset, 7 labels, random weights, the centre slice, float32,
default workers. Before each round `plain_loop` does the same work: nibabel, one image at a time through
``log_prob_all``, a CSV at the end. Neither time holds imports or the loading of the model. `extra_info` has
the medians of the rounds' ratios (loop / classify) and the rates: all of the run with the start of its
workers, and from the end of the first batch on without it. Batches are always full, so numbers of volumes
that 16 does not divide pay for what the last batch lacks. ``cold`` asks the system to drop the files from its
page cache before each run of either. That is advice, so `loop_storage_mib` says how much then came from
storage.

**Reading** (`test_read_slice`): `decode_one` (CRC, finiteness, orientation, percentile of the volume, 8 bits)
in this process, beside ``nib.load(path).dataobj[:, j, :]``, which checks and computes none of that, and
beside nibabel and NumPy doing the same work.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

# `fastflow classify` sets it too, before OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nibabel as nib
import numpy as np
import pytest
import torch

from bench.archive_inputs import (
    CLASSES,
    KINDS,
    make_volume,
    preprocess_for,
    write_archive,
    write_model,
    write_volume,
)
from bench.measuring import device_name
from fastflow import MagicFlow
from fastflow.archive.classify import Summary, classify, pick_workers
from fastflow.archive.decode import decode_one
from fastflow.archive.inputs import Item
from fastflow.data.preprocess import Preprocess, pad_evenly

# Volumes of an archive by their size of voxels in millimetres.
VOLUMES = {2: 160, 1: 48}
ROUNDS = int(os.environ.get("FASTFLOW_BENCH_ROUNDS", "3"))


# -- files ---------------------------------------------------------------------------------------------------


def forget(paths: Sequence[str]) -> None:
    """Ask the system to drop files from its page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def storage_bytes() -> int:
    """Bytes that this process has read from storage so far; -1 where the system does not count them."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return -1
    return int(fields["read_bytes"])


# -- the two runs --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Times:
    """Seconds a volume.

    Attributes:
        total: of the run.
        steady: without the start of the workers: from the end of the first batch to that of the last.
        reading: of one reading process.
        scoring: of the model.
    """

    total: float
    steady: float
    reading: float
    scoring: float


def read_plainly(path: str, size: tuple[int, int]) -> np.ndarray:
    """The middle slice as a plain program reads it, (H, W) uint8."""
    data = nib.as_closest_canonical(nib.load(path)).get_fdata()
    plane = data[:, data.shape[1] // 2, ::-1].T
    top = np.percentile(data[data > 0], 99.9)
    return pad_evenly(np.clip(np.rint(plane * (255.0 / top)), 0, 255).astype(np.uint8), size)


@torch.inference_mode()
def plain_loop(
    paths: Sequence[str], model: MagicFlow, size: tuple[int, int], out: Path
) -> tuple[Times, np.ndarray]:
    """A plain program: file by file, rows in a list, a CSV at the end. Returns also the (n, K) nats."""
    reading = scoring = 0.0
    rows, scores = [], []
    start = time.perf_counter()
    for path in paths:
        begin = time.perf_counter()
        image = read_plainly(path, size)
        read = time.perf_counter()
        x = torch.from_numpy(image).float()[None, None] * (2.0 / 255.0) - 1.0
        log_probs = model.log_prob_all(x)
        posterior = torch.softmax(log_probs / model.temperature, dim=1)[0].tolist()
        scores.append(log_probs[0].tolist())
        rows.append([path, int(np.argmax(posterior)), *scores[-1], *posterior])
        reading, scoring = reading + read - begin, scoring + time.perf_counter() - read
    with out.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    n = len(paths)
    total = (time.perf_counter() - start) / n
    return Times(total, total, reading / n, scoring / n), np.array(scores)


def run_classify(paths: Sequence[str], model_folder: Path, out: Path) -> tuple[Times, Summary]:
    """`classify` with its defaults."""
    marks: list[tuple[float, int]] = []

    def progress(done: int, total: int | None, errors: int) -> None:
        marks.append((time.perf_counter(), done))

    shutil.rmtree(out, ignore_errors=True)
    summary = classify(paths, model_folder, out, progress=progress)
    (first, begun), (last, done) = marks[0], marks[-1]
    total = summary.seconds / len(paths)
    steady = (last - first) / (done - begun) if done > begun else total
    rates = summary.rates
    return Times(
        total, steady, 1 / rates["reading_files_per_second"], 1 / rates["scoring_files_per_second"]
    ), summary


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a result file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def log_probs_of(out: Path) -> tuple[np.ndarray, list[str]]:
    """((n, K) log-likelihoods, n predictions) of a run's folder."""
    rows = [row for path in sorted(out.glob("results-*.csv")) for row in read_csv(path)]
    return np.array([[float(row[f"logp_{k}"]) for k in range(CLASSES)] for row in rows]), [
        row["predicted"] for row in rows
    ]


def ratios(loop: Sequence[Times], own: Sequence[Times]) -> dict[str, float]:
    """Medians over rounds of loop / classify."""
    return {
        f"ratio_{name}": statistics.median(
            getattr(a, name) / getattr(b, name) for a, b in zip(loop, own, strict=True)
        )
        for name in ("total", "steady", "reading", "scoring")
    }


def rates(name: str, times: Sequence[Times]) -> dict[str, float]:
    """Medians over rounds of volumes per second."""
    return {
        f"{name}_{field.name}_per_second": 1 / statistics.median(getattr(one, field.name) for one in times)
        for field in dataclasses.fields(Times)
    }


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Written when first asked for: (paths, model folder, model) by voxel size."""

    @functools.cache
    def get(mm: int) -> tuple[list[str], Path, MagicFlow]:
        folder = tmp_path_factory.mktemp(f"archive-{mm}mm")
        paths = write_archive(folder, mm, int(os.environ.get("FASTFLOW_BENCH_VOLUMES", VOLUMES[mm])))
        return paths, folder / "model", write_model(folder / "model", mm, paths)

    return get


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("mm", list(VOLUMES))
def test_classify(benchmark, archives, tmp_path, mm, cache):
    paths, folder, model = archives(mm)
    size = preprocess_for(mm).size
    loop: list[Times] = []
    own: list[Times] = []
    scores = np.empty((0, CLASSES))
    storage = 0

    def before():
        nonlocal scores, storage
        if cache == "cold":
            forget(paths)
        read = storage_bytes()
        times, scores = plain_loop(paths, model, size, tmp_path / "loop.csv")
        storage = storage_bytes() - read
        loop.append(times)
        if cache == "cold":
            forget(paths)

    def work():
        times, summary = run_classify(paths, folder, tmp_path / "results")
        assert summary.counts["ok"] + summary.counts["flagged"] == len(paths)
        own.append(times)

    # The first call compiles and fills caches.
    plain_loop(paths[:2], model, size, tmp_path / "loop.csv")
    benchmark.group = f"classify {mm} mm"
    benchmark.pedantic(work, setup=before, rounds=ROUNDS)
    found, predicted = log_probs_of(tmp_path / "results")
    if not predicted or not len(scores):
        return
    assert predicted == [str(k) for k in scores.argmax(axis=1)]
    loop = loop[-len(own) :]
    benchmark.extra_info |= (
        ratios(loop, own)
        | rates("loop", loop)
        | rates("classify", own)
        | {
            "volumes": len(paths),
            "megabytes": sum(map(os.path.getsize, paths)) / 1e6,
            "max_log_prob_difference": float(np.abs(found - scores).max()),
            "classes_predicted": len(set(predicted)),
            "cache": "POSIX_FADV_DONTNEED on every file before each run: advice"
            if cache == "cold"
            else "warm",
            "loop_storage_mib": storage / 2**20,
            "workers": pick_workers(None),
            "threads": torch.get_num_threads(),
            "device": device_name(),
            "torch": torch.__version__,
        }
    )


# -- reading alone -------------------------------------------------------------------------------------------


def slice_by_nibabel(path: str) -> np.ndarray:
    """One plane of a volume, reading no more of it than the format demands."""
    image = nib.load(path)
    return np.asarray(image.dataobj[:, image.shape[1] // 2, :])


def read_round(path: str, preprocess: Preprocess) -> dict[str, float]:
    """Seconds of the two baselines."""
    seconds = {}
    for name, work in {
        "slicing": lambda: slice_by_nibabel(path),
        "same_work": lambda: read_plainly(path, preprocess.size),
    }.items():
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start
    return seconds


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mm", [2, 1])
def test_read_slice(benchmark, tmp_path, mm, kind, ending):
    preprocess = preprocess_for(mm)
    path = write_volume(tmp_path, mm, kind, ending)
    item = Item(path, path)
    before: list[dict[str, float]] = []
    decoded = decode_one(item, preprocess)
    assert np.array_equal(decoded.result[0, 0], read_plainly(path, preprocess.size))
    benchmark.group = f"read {mm} mm"
    benchmark.pedantic(
        lambda: decode_one(item, preprocess),
        setup=lambda: before.append(read_round(path, preprocess)),
        rounds=15,
        warmup_rounds=1,
    )
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.data
    before = before[-len(seconds) :]
    benchmark.extra_info |= {
        f"ratio_{name}": statistics.median(a[name] / b for a, b in zip(before, seconds, strict=True))
        for name in before[0]
    } | {
        "volumes_per_second": 1 / benchmark.stats.stats.median,
        "compressed_to": os.path.getsize(path) / len(make_volume(mm, kind, 0).to_bytes()),
        "nibabel": nib.__version__,
    }
