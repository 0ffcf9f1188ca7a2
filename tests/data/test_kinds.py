"""Files that are not what their name says are told by what is in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastflow.data._kinds import HEAD_BYTES, kind_of
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import read_image
from fastflow.data.volume import ERROR_CODES
from fastflow.errors import VolumeError
from tests.data.files import DATA, mgh, nifti

PREPROCESS = Preprocess((8, 8))


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(stream, format=kind)
    return stream.getvalue()


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("scan.nii", nifti())
    else:
        with tarfile.open(fileobj=stream, mode="w") as packed:
            packed.addfile(tarfile.TarInfo("scan.nii"), io.BytesIO())
    return stream.getvalue()


def analyze() -> bytes:
    header = nib.AnalyzeHeader()
    header.set_data_shape(DATA.shape)
    header.set_data_dtype(np.int16)
    return bytes(header.binaryblock)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 3412345\n"
ANNEX = b"/annex/objects/MD5E-s3412345--0123456789abcdef0123456789abcdef.nii.gz\n"
ANNEX_LINK = b"../../.git/annex/objects/Xx/1z/MD5E-s34--01.nii.gz/MD5E-s34--01.nii.gz"
HTML = b"<!DOCTYPE html>\n<html><body>404 not found</body></html>"
# Content, code, the words by which it is told, and the ending of a name that it fits, if any.
CONTENTS: dict[str, tuple[Callable[[], bytes], str, str, str | None]] = {
    "NIfTI": (nifti, "wrong_kind", "is an uncompressed NIfTI: rename it to .nii", ".nii"),
    "NIfTI-2": (lambda: nifti(version=2), "wrong_kind", "uncompressed NIfTI: rename it to .nii", ".nii"),
    "big-endian": (lambda: nifti(order=">"), "wrong_kind", "uncompressed NIfTI: rename it to .nii", ".nii"),
    "packed NIfTI": (
        lambda: gzip.compress(nifti()),
        "wrong_kind",
        "is a NIfTI compressed by gzip: rename it to .nii.gz",
        ".nii.gz",
    ),
    "MGH": (mgh, "wrong_kind", "is an uncompressed MGH volume: rename it to .mgh", ".mgh"),
    "packed MGH": (
        lambda: gzip.compress(mgh()),
        "wrong_kind",
        "is an MGH volume compressed by gzip: rename it to .mgz",
        ".mgz",
    ),
    "PNG": (lambda: picture("PNG"), "wrong_kind", "is a PNG image: rename it to .png", ".png"),
    "JPEG": (lambda: picture("JPEG"), "wrong_kind", "is JPEG, which loses detail: save it as", None),
    "TIFF": (lambda: picture("TIFF"), "wrong_kind", "is TIFF", None),
    "BMP": (lambda: picture("BMP"), "wrong_kind", "is BMP", None),
    "GIF": (lambda: picture("GIF"), "wrong_kind", "is GIF", None),
    "LFS": (
        lambda: LFS,
        "pointer",
        "is a Git LFS pointer, not the file: fetch the file by 'git lfs pull'",
        None,
    ),
    "annex": (lambda: ANNEX, "pointer", "is a git-annex pointer, not the file", None),
    "annex link": (lambda: ANNEX_LINK, "pointer", "'git annex get' or 'datalad get'", None),
    "HTML": (lambda: HTML, "wrong_kind", "is an HTML page", None),
    "HTML after a mark": (lambda: b"\xef\xbb\xbf\r\n" + HTML.upper(), "wrong_kind", "is an HTML page", None),
    "XML": (lambda: b"<?xml version='1.0'?><Error/>", "wrong_kind", "is XML text", None),
    "JSON": (lambda: b'{"message": "Not Found"}', "wrong_kind", "is JSON text", None),
    "text": (lambda: "Zugriff verweigert: Öffnen".encode(), "wrong_kind", "is plain text", None),
    "long text": (lambda: "Öffnen ".encode() * 2000, "wrong_kind", "is plain text", None),
    "bzip2": (lambda: bz2.compress(nifti()), "wrong_kind", "is compressed by bzip2: decompress it", None),
    "xz": (lambda: lzma.compress(nifti()), "wrong_kind", "is compressed by xz", None),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd\x04X" + bytes(range(90)), "wrong_kind", "by Zstandard", None),
    "ZIP": (lambda: archive("zip"), "wrong_kind", "is a ZIP archive: unpack it", None),
    "7-Zip": (lambda: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40), "wrong_kind", "is a 7-Zip archive", None),
    "tar": (lambda: archive("tar"), "wrong_kind", "is a tar archive: unpack it", None),
    "packed tar": (lambda: gzip.compress(archive("tar")), "wrong_kind", "its content is a tar archive", None),
    "packed HTML": (lambda: gzip.compress(HTML), "wrong_kind", "its content is an HTML page", None),
    "packed PNG": (lambda: gzip.compress(picture("PNG")), "wrong_kind", "its content is a PNG image", None),
    "packed twice": (
        lambda: gzip.compress(gzip.compress(nifti())),
        "wrong_kind",
        "its content is compressed by gzip: decompress it",
        None,
    ),
    "DICOM": (lambda: bytes(128) + b"DICM\x02\0\0\0UL", "wrong_kind", "is DICOM: convert it", None),
    "Analyze": (analyze, "wrong_kind", "is an Analyze 7.5 header", None),
    "pair": (lambda: nifti(magic=b"ni1")[:348], "wrong_kind", "is the header of a .hdr/.img pair", None),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n\0" + bytes(90), "wrong_kind", "is HDF5, or MINC 2", None),
    "netCDF": (lambda: b"CDF\x01" + bytes(90), "wrong_kind", "MINC 1", None),
    "NRRD": (lambda: b"NRRD0004\ntype: short\n\n" + bytes(90), "wrong_kind", "is NRRD", None),
    "AppleDouble": (lambda: b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(90), "wrong_kind", "AppleDouble", None),
    "zeros": (lambda: bytes(8000), "wrong_kind", "is zeros where its header should be", None),
}
NAMES = ("scan.nii", "scan.nii.gz", "scan.mgh", "scan.mgz", "scan.png", "SCAN.NII.GZ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_the_name_does_not_promise(tmp_path: Path, case: str, name: str) -> None:
    make, code, words, fits = CONTENTS[case]
    (tmp_path / name).write_bytes(make())
    if fits == name[4:].lower():
        assert read_image(str(tmp_path / name), PREPROCESS).images.any()
        return
    with pytest.raises(VolumeError) as caught:
        read_image(str(tmp_path / name), PREPROCESS)
    assert (caught.value.code, caught.value.path) == (code, str(tmp_path / name))
    assert words in caught.value.message
    assert code in ERROR_CODES


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scan.nii.bz2", "is compressed by bzip2: decompress it, or compress it with gzip; .nii, .nii.gz, "),
        ("SCAN.IMA", "is DICOM: convert it to .nii.gz"),
        ("scan.img.gz", "is half of a .hdr/.img pair"),
        ("scan.gz", "is a NIfTI compressed by gzip: rename it to .nii.gz; "),
        ("scan.nii.gz.part", "is a NIfTI compressed by gzip: rename it to .nii.gz"),
    ],
)
def test_other_endings_are_told_what_to_do(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(nifti()))
    with pytest.raises(VolumeError) as caught:
        read_image(str(tmp_path / name), PREPROCESS)
    assert caught.value.code == "unsupported_format"
    assert words in caught.value.message


def test_what_no_table_knows(tmp_path: Path) -> None:
    noise = bytes(np.random.default_rng(0).integers(128, 256, 5000, dtype=np.uint8))
    for name, code in (
        ("a.nii", "header"),
        ("a.mgh", "header"),
        ("a.nii.gz", "wrong_kind"),
        ("a.png", "image"),
    ):
        (tmp_path / name).write_bytes(noise)
        with pytest.raises(VolumeError) as caught:
            read_image(str(tmp_path / name), PREPROCESS)
        assert caught.value.code == code
    (tmp_path / "a.bin").write_bytes(noise)
    with pytest.raises(VolumeError, match=r"is none of \.nii, \.nii\.gz, \.mgz, \.mgh"):
        read_image(str(tmp_path / "a.bin"), PREPROCESS)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.mgz", "scan.png"])
def test_the_first_bytes_of_a_file_that_was_cut(tmp_path: Path, name: str) -> None:
    content = {"scan.nii": nifti(), "scan.png": picture("PNG")}.get(name, gzip.compress(nifti()))
    for length in range(1, 40):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(VolumeError) as caught:
            read_image(str(tmp_path / name), PREPROCESS)
        # A stream that is cut is truncated, and never taken for a file of another kind.
        assert name == "scan.png" or caught.value.code in ("truncated", "header"), length


@given(st.binary(max_size=600))
def test_any_bytes_have_a_kind_or_none(content: bytes) -> None:
    kind = kind_of(content)
    assert kind is None or kind.code in ERROR_CODES


def test_pipes_and_folders_keep_their_own_code(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.dcm")
    for name, words in (("folder", "is a folder"), ("pipe.dcm", "is a pipe")):
        with pytest.raises(VolumeError, match=words) as caught:
            read_image(str(tmp_path / name), PREPROCESS)
        assert caught.value.code == "not_a_file"
    assert len(LFS) < HEAD_BYTES
