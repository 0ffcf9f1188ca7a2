"""The start of a training, from the manifest to the slices: without a cache, into a new one, and from it.

Run it with ``pytest bench/test_training_data.py --benchmark-only``. ``FASTFLOW_BENCH_MANIFEST=manifest.csv``
reads the files of a manifest with splits instead of an archive that is written here, and
``FASTFLOW_BENCH_ROUNDS=n`` does it n times instead of 3.

Each round lists the manifest, reads the headers of the training files for their grid and loads the slices of
``train`` and ``val`` (``center+-4:2``, 96 x 96): without a cache, then into a new one, then from it. The
warm start holds the comparison of all rows with their checksums. `extra_info` has the medians of the three
times and of the rounds' ratios, the share of the warm start that grids take, and the size of the cache. All
files are in the system's page cache after the first round: a slow disk would make the ratio larger.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import pytest

from bench.archive_inputs import write_archive
from fastflow.archive.train import preprocess_like
from fastflow.archive.training_data import TRAIN, Reading, choose, load_chosen
from fastflow.data.listing import list_records
from fastflow.data.manifest import Record, write_manifest
from fastflow.data.slice_cache import SliceCache

MANIFEST = os.environ.get("FASTFLOW_BENCH_MANIFEST")
ROUNDS = int(os.environ.get("FASTFLOW_BENCH_ROUNDS", "3"))
VOLUMES, SIZE, SLICES = 160, (96, 96), "center+-4:2"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose files have splits."""
    if MANIFEST:
        return Path(MANIFEST)
    folder = tmp_path_factory.mktemp("archive")
    splits = (TRAIN, TRAIN, TRAIN, "val")
    records = [
        Record(path, f"scanner-{i % 7}", f"sub-{i:05d}", splits[i // 7 % 4])
        for i, path in enumerate(write_archive(folder, 2, VOLUMES))
    ]
    write_manifest(records, folder / "manifest.csv")
    return folder / "manifest.csv"


def start(manifest: Path, cache: Path | None) -> tuple[float, float, int]:
    """Seconds of a start, those of its grids, and the number of slices."""
    begin = time.perf_counter()
    chosen = choose(list_records(manifest))
    before = time.perf_counter()
    reading = Reading(cache=None if cache is None else SliceCache(cache, required=True))
    preprocess = preprocess_like(chosen.splits[TRAIN], SIZE, SLICES, cache=reading.cache)
    headers = time.perf_counter() - before
    sets, _ = load_chosen(chosen, preprocess, reading=reading)
    return time.perf_counter() - begin, headers, sum(map(len, sets.values()))


def test_start(benchmark, manifest: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    rounds: list[tuple[float, float, float, float]] = []

    def prepare() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        plain, cold = start(manifest, None), start(manifest, cache)
        assert plain[2] == cold[2]
        rounds.append((plain[0], cold[0], 0.0, 0.0))

    def warm() -> None:
        seconds, headers, _ = start(manifest, cache)
        rounds[-1] = (*rounds[-1][:2], seconds, headers / seconds)

    benchmark.pedantic(warm, setup=prepare, rounds=ROUNDS)
    medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
    names = ("plain_seconds", "cold_seconds", "warm_seconds", "grids_share_of_warm")
    benchmark.extra_info |= {name: round(value, 4) for name, value in zip(names, medians, strict=True)}
    benchmark.extra_info |= {
        "cold_to_plain": round(statistics.median(cold / plain for plain, cold, _, _ in rounds), 3),
        "plain_to_warm": round(statistics.median(plain / warm for plain, _, warm, _ in rounds), 2),
        "cache_mib": round(sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) / 2**20, 2),
    }
