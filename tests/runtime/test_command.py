"""The command line of an export."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastflow.runtime.command import main, own_folder
from fastflow.runtime.scorer import OnnxScorer
from tests.export.handmade import CLASSES, write_export


def lines(text: str) -> list[dict[str, str]]:
    head, *rows = (line.split("\t") for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_command_prints_a_line_per_file(
    export_folder: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = scans / "striped/sub-103_T1w.nii.gz"
    assert main([str(export_folder), str(good), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    want = OnnxScorer(export_folder, "cpu", threads=1).classify_volume(good)
    (row,) = lines(out)
    assert list(row) == [
        *("path", "status", "predicted", "posterior", "margin", "typicality", "error", "argmax", "scanner_p")
    ]
    assert (row["path"], row["status"], row["predicted"], row["typicality"], row["error"]) == (
        str(good),
        "ok",
        "striped",
        "",
        "",
    )
    assert float(row["posterior"]) == pytest.approx(want.posterior.max(), rel=1e-5)
    assert float(row["margin"]) == pytest.approx(want.margin, rel=1e-5)
    assert err == f"{export_folder}: float32, runs on CPUExecutionProvider\n"


def test_a_bad_file_costs_its_line_only(
    export_folder: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(scans / "striped/sub-103_T1w.nii.gz")
    odd = tmp_path / "two\tcells\nor lines.nii.gz"
    shutil.copy(good, odd)
    assert main([str(export_folder), "nowhere.nii", good, str(odd)]) == 3
    rows = lines(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["error", "ok", "ok"]
    assert rows[0]["error"] == "missing: there is no such file" and rows[0]["predicted"] == ""
    assert rows[2]["path"] == str(odd).replace("\t", r"\t").replace("\n", r"\n")
    assert main([str(export_folder), "nowhere.nii", good, "--json"]) == 3
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        **dict.fromkeys(
            ["predicted", "posterior", "margin", "typicality", "log_probs", "argmax", "scanner_p"]
        ),
        "path": "nowhere.nii",
        "status": "error",
        "error": "missing: there is no such file",
    }
    assert list(second["posterior"]) == list(second["log_probs"]) == list(CLASSES)
    assert sum(second["posterior"].values()) == pytest.approx(1.0)


def test_flags_and_priors_of_the_command(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.linspace(0.0, 1.0, 999).tolist()
    folder = write_export(tmp_path, validation={"slices": "center+-1", "log_prob": values})
    good = str(scans / "striped/sub-103_T1w.nii.gz")
    assert main([str(folder), good, "--prior", "1,0", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["status"], row["predicted"], row["posterior"]) == (
        "flagged",
        "flat",
        {"flat": 1.0, "striped": 0.0},
    )
    # JSON has no infinity.
    assert row["margin"] is None
    assert row["error"] == "atypical: typicality p-value 0.002"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prior", "a,b"], 2, "could not convert string to float"),
        (["--prior", "0.5,0.6"], 2, "prior must be 2 probabilities"),
        (["--providers", "cuda"], 2, "were asked for, but this ONNX Runtime offers"),
        (["--threads", "0"], 2, "threads must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_read(
    export_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main([str(export_folder), "nowhere.nii", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_exports_that_cannot_be_used_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "gone"), "a.nii"]) == 2
    assert "is not an export folder" in capsys.readouterr().err
    assert main([str(write_export(tmp_path, preprocess=None)), "a.nii"]) == 2
    assert "does not say how images are prepared" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError("too little"), 1, "error: too little"),
        (RuntimeError("node failed"), 1, "error: node failed"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
    ],
)
def test_runs_that_fail(
    export_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fail(scorer: OnnxScorer, path: str, *options: object) -> None:
        raise error

    monkeypatch.setattr(OnnxScorer, "classify_volume", fail)
    assert main([str(export_folder), "a.nii"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_names_that_are_no_unicode(
    export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    name = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.nii")
    assert main([str(export_folder), name]) == 3
    stream.flush()
    assert b"bad\\udcff.nii\terror" in stream.buffer.getvalue()


def test_readers_that_leave(export_folder: Path) -> None:
    command = [sys.executable, "-m", "fastflow.export.runtime", str(export_folder), "nowhere.nii"]
    reader, writer = os.pipe()
    os.close(reader)
    left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert left.returncode == 1
    assert b"Traceback" not in left.stderr and b"BrokenPipe" not in left.stderr


def test_output_that_is_no_file_is_written_to(export_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([str(export_folder), "nowhere.nii"]) == 3
    assert len(stream.getvalue().splitlines()) == 2


def test_help_names_the_columns_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "typicality" in text and "1 the run failed" in text and "fastflow 0." in text


def linked(folder: Path, root: Path, apart: bool) -> Path:
    """A folder of links: their targets lie in one folder, or each in its own."""
    (root / "links").mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        target = root / "store" / (str(i) if apart else "") / f"content-{i}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        (root / "links" / file.name).symlink_to(os.path.relpath(target, root / "links"))
    return root / "links"


def test_a_program_finds_its_export_where_it_is_named(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    (folder / "runtime.pyz").touch()
    links = linked(folder, tmp_path / "snapshot", apart=False)
    assert own_folder(links / "runtime.pyz") == links
    # Nothing is beside these names, so that the export lies where they lead.
    (tmp_path / "link.pyz").symlink_to(folder / "runtime.pyz")
    (tmp_path / "second.pyz").symlink_to("link.pyz")
    (tmp_path / "third.pyz").symlink_to(links / "runtime.pyz")
    assert own_folder(tmp_path / "second.pyz") == folder
    assert own_folder(tmp_path / "third.pyz") == links
    shutil.copy(folder / "runtime.pyz", tmp_path / "copy.pyz")
    assert own_folder(tmp_path / "copy.pyz") == tmp_path


def test_a_program_finds_its_export_from_where_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_export(tmp_path / "export")
    (folder / "runtime.pyz").touch()
    (tmp_path / "linked").symlink_to("export")
    monkeypatch.chdir(tmp_path)
    assert own_folder("linked/runtime.pyz") == tmp_path / "linked"
    monkeypatch.chdir(folder)
    assert own_folder("runtime.pyz") == folder


def test_links_into_one_folder_are_scored(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links = linked(write_export(tmp_path / "export"), tmp_path / "snapshot", apart=False)
    assert main([str(links), str(scans / "striped/sub-103_T1w.nii.gz")]) == 0
    assert lines(capsys.readouterr().out)[0]["predicted"] == "striped"


def test_links_into_several_folders_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    links = linked(write_export(tmp_path / "export"), tmp_path / "annex", apart=True)
    assert main([str(links), "scan.nii.gz"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {links}/score.onnx: it and the files beside it are links into several")
    assert "copy the folder with cp -L and use the copy" in message
    subprocess.run(["cp", "-rL", str(links), str(tmp_path / "copy")], check=True)
    assert OnnxScorer(tmp_path / "copy", "cpu").class_names == CLASSES


@pytest.mark.parametrize("name", ["export.json", "weights.data"])
def test_links_without_content_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    links = linked(write_export(tmp_path / "export"), tmp_path / "annex", apart=True)
    (links / name).resolve().unlink()
    assert main([str(links), "scan.nii.gz"]) == 2
    message = capsys.readouterr().err
    assert f"{name} is a link whose target is missing: fetch its content (git annex get, dvc pull)" in message
