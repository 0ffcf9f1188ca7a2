"""A tree full of what archives hold by accident: one row each, a stable code, no effect on any other row."""

from __future__ import annotations

import gzip
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastflow.archive.classify import classify
from fastflow.archive.results import read_results

pytestmark = pytest.mark.usefixtures("loaded_once")

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
# Memory above that of a run over the good files alone. A reader may hold some chunks and a slice; the bombs
# promise 512 MiB.
BOUND = 64 << 20
GOOD = 7


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_results(folder)]


def image(data: np.ndarray, **header: Any) -> bytes:
    made = nib.Nifti1Image(data, AFFINE)
    for name, value in header.items():
        made.header[name] = value
    return bytes(made.to_bytes())


def with_bytes(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def zeros(size: int) -> bytes:
    """A gzip member of so many zero bytes, made without holding them: all MiBs are packed alike."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(size >> 20):
        crc = zlib.crc32(block, crc)
    header = b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"
    return header + packed * (size >> 20) + packer.flush() + struct.pack("<II", crc, size)


def conflict(data: np.ndarray) -> bytes:
    made = nib.Nifti1Image(data, AFFINE)
    made.set_sform(AFFINE, 1)
    made.set_qform(np.diag([-2.0, 2.0, 2.0, 1.0]), 1)
    return bytes(made.to_bytes())


def faults(root: Path, good: bytes) -> dict[str, set[str]]:
    """Write the tree; name -> codes that are right for it."""
    plain = gzip.decompress(good)
    data = np.random.default_rng(0).normal(120, 10, (14, 9, 15)).astype(np.float32)
    series = np.stack([data] * 3, axis=-1)
    nan = data.copy()
    nan[3, 4, 5] = np.nan
    # dim[0] is at byte 40 of a NIfTI-1 header; sform_code at 254.
    dims = np.array([3, 32767, 32767, 32767], dtype=np.int16).tobytes()
    promise = np.array([3, 512, 512, 512], dtype=np.int16).tobytes()
    bomb = zeros(512 << 20)
    assert len(bomb) < 600_000
    files: dict[str, tuple[bytes, set[str]]] = {
        "truncated.nii.gz": (good[: len(good) // 2], {"truncated"}),
        "crc.nii.gz": (good[:-8] + bytes([good[-8] ^ 1]) + good[-7:], {"crc"}),
        "empty.nii.gz": (b"", {"empty"}),
        "empty.nii": (b"", {"empty"}),
        "text.nii.gz": (b"not a scan", {"wrong_kind"}),
        "text.nii": (b"not a scan", {"wrong_kind"}),
        "plain.nii.gz": (plain, {"wrong_kind"}),
        "packed.nii": (good, {"wrong_kind"}),
        "lfs.nii.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", {"pointer"}),
        "garbage.nii.gz": (good + b"garbage", {"too_long"}),
        "garbage.nii": (plain + b"garbage", {"too_long"}),
        # dim[4] is at byte 48 of a NIfTI-1 header.
        "hidden.nii": (with_bytes(plain, 48, b"\2\0") + plain[352:], {"too_long"}),
        "hidden.nii.gz": (gzip.compress(with_bytes(plain, 48, b"\2\0") + plain[352:]), {"too_long"}),
        "scan.png": (good, {"wrong_kind"}),
        "bomb.nii.gz": (gzip.compress(plain[:352]) + bomb, {"too_long"}),
        "promised_bomb.nii.gz": (
            gzip.compress(with_bytes(plain, 40, promise)[:352]) + bomb,
            {"grid_mismatch"},
        ),
        "huge.nii.gz": (gzip.compress(with_bytes(plain, 40, dims)), {"too_large"}),
        "huge.nii": (with_bytes(plain, 40, dims), {"too_large"}),
        "nan.nii.gz": (gzip.compress(image(nan)), {"non_finite"}),
        "codes.nii.gz": (gzip.compress(with_bytes(plain, 254, b"\x4d\0")), {"orientation_code"}),
        "conflict.nii.gz": (gzip.compress(conflict(data)), {"orientation_conflict"}),
        "four.nii.gz": (gzip.compress(image(series)), {"four_dimensional"}),
        "five.nii.gz": (gzip.compress(image(series[..., None].repeat(2, -1))), {"dims"}),
        "new\nline.nii.gz": (good, {""}),
        "com,ma.nii.gz": (good, {""}),
        'quo"te.nii.gz': (good, {""}),
        "=formula.nii.gz": (good, {""}),
        "Übergröße-脳.nii.gz": (good, {""}),
        "bad\udcff.nii.gz": (good, {""}),
    }
    rng = np.random.default_rng(1)
    for i in range(8):
        flipped = bytearray(good)
        # Behind the gzip header, before the trailer.
        flipped[int(rng.integers(30, len(good) - 8))] ^= 1 << int(rng.integers(8))
        files[f"flipped{i}.nii.gz"] = (bytes(flipped), {"crc", "truncated", "too_long", "header", "dims"})
    for name, (content, _) in files.items():
        (root / name).write_bytes(content)
    expected = {name: codes for name, (_, codes) in files.items()}
    (root / "folder.nii.gz").mkdir()
    (root / "folder.nii.gz" / "inner.nii.gz").write_bytes(good)
    (root / "broken_link.nii.gz").symlink_to(root / "nowhere.nii.gz")
    (root / "loop.nii.gz").symlink_to(root / "loop.nii.gz")
    (root / "cycle").symlink_to(root)
    os.mkfifo(root / "pipe.nii")
    (root / "secret.nii").write_bytes(plain)
    (root / "secret.nii").chmod(0)
    return expected | {
        "folder.nii.gz": {"not_a_file"},
        "folder.nii.gz/inner.nii.gz": {""},
        "broken_link.nii.gz": {"missing"},
        "loop.nii.gz": {"unreadable"},
        "pipe.nii": {"not_a_file"},
        # Who may read everything may read this.
        "secret.nii": {"" if os.geteuid() == 0 else "unreadable"},
    }


@pytest.fixture(scope="module")
def trees(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, set[str]]]:
    """(good scans alone, good scans among faults, codes of the faults)."""
    root = tmp_path_factory.mktemp("trees")
    for tree in ("good", "mixed"):
        # The good ones alone are fewer than a pool of readers is started for.
        for i, path in enumerate(sorted(scans.rglob("*.nii.gz"))[:GOOD]):
            target = root / tree / f"sub-{i:03d}.nii.gz"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, ns=(10**18, 10**18))
    return root / "good", root / "mixed", faults(root / "mixed", next(scans.rglob("*.nii.gz")).read_bytes())


def written(name: str) -> str:
    """A name as CSV has it."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return f"'{name}" if name.startswith("=") else name


@pytest.mark.parametrize(("workers", "format"), [(1, "csv"), (2, "parquet")])
def test_every_file_is_answered_and_moves_no_other(
    trees: tuple[Path, Path, dict[str, set[str]]],
    model_folder: Path,
    tmp_path: Path,
    workers: int,
    format: str,
) -> None:
    good, mixed, expected = trees
    classify([good], model_folder, tmp_path / "good", batch_size=7, format=format)
    summary = classify(
        [mixed], model_folder, tmp_path / "mixed", batch_size=7, workers=workers, format=format
    )
    rows = rows_of(tmp_path / "mixed")
    by_name = {row["path"]: row for row in rows}
    assert len(rows) == len(by_name) == GOOD + len(expected) == summary.total
    alone = rows_of(tmp_path / "good")
    assert [by_name[row["path"]] for row in alone] == alone
    for name, codes in expected.items():
        row = by_name[written(name) if format == "csv" else name.encode("utf-8", "backslashreplace").decode()]
        assert (row["error_code"] or "") in codes, (name, row)
        flag = row["error_code"] == "orientation_code"
        assert row["status"] == ("flagged" if flag else "error" if row["error_code"] else "ok")
        assert bool(row["predicted"]) == (row["status"] != "error")
        assert bool(row["error_message"]) == bool(row["error_code"])
        assert row["status"] != "error" or not row["logp_flat"]
    assert summary.failed == sum(row["status"] == "error" for row in rows)


MEASURE = """
import json, resource, sys
from fastflow.archive.classify import classify
source, model, out = sys.argv[1:]
if __name__ == "__main__":
    classify([source], model, out, batch_size=7, workers=1)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_faults_take_no_memory(
    trees: tuple[Path, Path, dict[str, set[str]]], scans: Path, model_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    peaks = []
    # Both are read by a pool.
    for tree in (scans, trees[1]):
        command = [sys.executable, str(script), str(tree), str(model_folder), str(tmp_path / tree.name)]
        peaks.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for alone, mixed in zip(*peaks, strict=True):
        assert (mixed - alone) * 1024 < BOUND, peaks


def test_as_many_open_files_after_a_run_as_before(
    trees: tuple[Path, Path, Any], model_folder: Path, tmp_path: Path
) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    classify([trees[1]], model_folder, tmp_path / "a", batch_size=7)
    before = count()
    classify([trees[1]], model_folder, tmp_path / "b", batch_size=7)
    assert count() <= before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifests_name_what_is_not_there(scans: Path, model_folder: Path, tmp_path: Path, kind: str) -> None:
    good = sorted(scans.rglob("*.nii.gz"))[0]
    lines = [str(good), str(tmp_path / "gone.nii"), str(tmp_path), str(good)]
    content = (
        "path\n" + "\n".join(lines)
        if kind == "csv"
        else "\n".join(json.dumps({"path": line}) for line in lines)
    )
    (tmp_path / f"m.{kind}").write_text(content + "\n")
    summary = classify([], model_folder, tmp_path / "r", manifest=tmp_path / f"m.{kind}")
    assert [row["error_code"] for row in rows_of(tmp_path / "r")] == ["", "missing", "not_a_file", ""]
    assert summary.codes == {"missing": 1, "not_a_file": 1}
