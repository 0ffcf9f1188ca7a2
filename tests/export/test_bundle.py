"""The archive is run where nothing can be imported but the standard library and what the test puts there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from fastflow.export import bundle
from fastflow.export.bundle import modules, write_bundle

from tests.export.handmade import write_export

NEEDED = ("numpy", "nibabel", "onnxruntime")
RUN = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
del sys.argv[0]
runpy.run_path(sys.argv[0], None, "__main__")
"""
RUN_AS_OLD_PYTHON = """
import runpy, sys
sys.version_info = (3, 10, 4)
runpy.run_path(sys.argv[1], None, "__main__")
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions and what they need, extras aside."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:
            # Only another version of Python needs this one.
            assert name not in NEEDED
            continue
        found.add(name)
        bare = (re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in required if "extra ==" not in one)
        waiting += [one for one in bare if one not in found]
    return found


def link(names: set[str], folder: Path) -> Path:
    """A folder to import distributions from, and nothing else."""
    folder.mkdir()
    for name in names:
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "bin", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(closure(NEEDED), tmp_path_factory.mktemp("packages") / "all")


def run(file: Path, packages: Path | None, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As `python file arguments`, but without the packages and paths of this environment."""
    command = [sys.executable, "-I", "-S", "-c", RUN, str(packages or ""), str(file), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_same_sources_give_the_same_small_file(tmp_path: Path) -> None:
    write_bundle(tmp_path / "a.pyz")
    (tmp_path / "b.pyz").write_bytes(b"an older one")
    write_bundle(tmp_path / "b.pyz")
    content = (tmp_path / "a.pyz").read_bytes()
    assert content == (tmp_path / "b.pyz").read_bytes()
    assert len(content) < 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pyz", "b.pyz"]
    with zipfile.ZipFile(tmp_path / "a.pyz") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(archive.namelist())
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_it_holds_what_the_runtime_imports_and_no_more(tmp_path: Path) -> None:
    found = modules()
    assert {
        "fastflow",
        "fastflow.export.runtime",
        "fastflow.runtime.scorer",
        "fastflow.data",
        "fastflow.data.slices",
        "fastflow.decision",
    } <= set(found)
    # The archive holds no module that only type checkers read, and none that needs more than is there.
    assert not any(
        name.startswith(("fastflow.models", "fastflow.kernels", "fastflow.cli", "fastflow.archive"))
        for name in found
    )
    assert "fastflow.data.manifest" not in found and "fastflow.export.onnx" not in found
    write_bundle(tmp_path / "runtime.pyz")
    with zipfile.ZipFile(tmp_path / "runtime.pyz") as archive:
        names = set(archive.namelist()) - {"__main__.py"}
        assert len(names) == len(found)
        assert archive.read("fastflow/__init__.py") == found["fastflow"].read_bytes()
        assert archive.read("fastflow/export/runtime.py") == found["fastflow.export.runtime"].read_bytes()


def test_imports_of_all_kinds_are_found() -> None:
    import ast

    source = """
from __future__ import annotations
import numpy as np, fastflow.errors
from fastflow import __version__, errors as e
from fastflow.data import _gzip
from . import runtime
from ._trace import trace
if TYPE_CHECKING:
    from fastflow.data.manifest import Record
def f():
    from fastflow.data.slices import read_image
"""
    assert set(bundle._imports(ast.parse(source), "fastflow.export")) == {
        *("fastflow", "fastflow.errors", "fastflow.data", "fastflow.data._gzip", "fastflow.data.slices"),
        *("fastflow.export", "fastflow.export.runtime", "fastflow.export._trace"),
    }


def test_it_runs_alone_with_the_export_that_it_lies_in(packages: Path, scans: Path, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    write_bundle(folder / "runtime.pyz")
    good = scans / "striped/sub-103_T1w.nii.gz"
    # There is no export where the link lies, so that the program looks where it leads.
    (tmp_path / "link.pyz").symlink_to(folder / "runtime.pyz")
    done = run(tmp_path / "link.pyz", packages, good, "nowhere.nii", "--threads", "1")
    assert done.returncode == 3, done.stderr
    head, first, second = (line.split("\t") for line in done.stdout.splitlines())
    assert head[:3] == ["path", "status", "predicted"]
    assert first[:3] == [str(good), "ok", "striped"]
    assert second[1] == "error"
    assert f"{folder}: float32, runs on CPUExecutionProvider" in done.stderr
    # A copy elsewhere needs to be told.
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(folder / "runtime.pyz", tmp_path / "elsewhere/runtime.pyz")
    assert run(Path(moved), packages, good).returncode == 2
    assert (
        run(Path(moved), packages, "--folder", folder, good).stdout.splitlines()[1:]
        == done.stdout.splitlines()[1:2]
    )


def test_it_runs_in_a_folder_of_links(packages: Path, scans: Path, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    write_bundle(folder / "runtime.pyz")
    links = tmp_path / "links"
    links.mkdir()
    (tmp_path / "store").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / f"store/content-{i}")
        (links / file.name).symlink_to(f"../store/content-{i}")
    done = run(links / "runtime.pyz", packages, scans / "striped/sub-103_T1w.nii.gz", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split("\t")[1:3] == ["ok", "striped"]
    assert f"{links}: float32, runs on CPUExecutionProvider" in done.stderr


def test_what_is_missing_is_named(packages: Path, scans: Path, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    write_bundle(folder / "runtime.pyz")
    done = run(folder / "runtime.pyz", None, "a.nii")
    assert done.returncode == 1
    assert done.stderr == "error: there is no numpy here: pip install numpy nibabel onnxruntime\n"
    without = link(closure(("numpy", "nibabel")), tmp_path / "without")
    done = run(folder / "runtime.pyz", without, "a.nii")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: .*needs ONNX Runtime: pip install 'fastflow\[export-cpu\]' \(or onnxruntime\).*\n",
        done.stderr,
    )


def test_python_that_is_too_old_is_told(tmp_path: Path) -> None:
    write_bundle(tmp_path / "runtime.pyz")
    command = [sys.executable, "-I", "-S", "-c", RUN_AS_OLD_PYTHON, str(tmp_path / "runtime.pyz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11 or newer is needed, this is 3.")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "runtime.pyz").mkdir()
    with pytest.raises(OSError, match="runtime"):
        write_bundle(tmp_path / "runtime.pyz")
    assert [path.name for path in tmp_path.iterdir()] == ["runtime.pyz"]
