from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastflow.archive.classify import classify
from tests.archive import interrupted, quick


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `classify` load a model and make its scorer once."""
    monkeypatch.setattr("fastflow.archive.classify.prepare", quick.prepare_once)


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `classify` score by a matrix."""
    monkeypatch.setattr("fastflow.archive.classify.prepare", quick.prepare_matrix)


@pytest.fixture(scope="session")
def few_scans(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of each class, fewer than a pool of readers is started for. Do not write into it."""
    root = tmp_path_factory.mktemp("few")
    for path in sorted(scans.rglob("sub-?0[012]_*.nii.gz")):
        (root / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, root / path.parent.name / path.name)
    return root


@pytest.fixture(scope="session")
def archive(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 scans, three of which cannot be read. Do not write into it."""
    root = tmp_path_factory.mktemp("archive")
    files = sorted(scans.rglob("*.nii.gz"))
    for i in range(interrupted.COUNT):
        target = root / f"part{i % 3}" / f"sub-{i:03d}.nii.gz"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(files[i % len(files)], target)
    for i in (3, 50, 119):
        (root / f"part{i % 3}" / f"sub-{i:03d}.nii.gz").write_bytes(b"\x1f\x8bnot a scan")
    return root


@pytest.fixture(scope="session")
def small(
    archive: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """(a folder of a few scans, the rows of a run over it). Do not write into it."""
    root = tmp_path_factory.mktemp("small")
    source = interrupted.few(archive, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflow.archive.classify.prepare", quick.prepare_matrix)
        classify([source], model_folder, root / "whole", batch_size=interrupted.BATCH, shard_rows=3)
    return source, interrupted.rows_of(root / "whole")
