"""The words and exit codes of `fastflow plot`."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from fastflow.cli.main import app


def plot(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


def test_runs_become_a_page_and_a_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = {"epoch": 1, "train_bits_per_dim": 5.0, "seconds": 2.0}
        (tmp_path / name / "history.jsonl").write_text(json.dumps(record) + "\nhalf a li")
    page, picture = tmp_path / "page.html", tmp_path / "curves.png"
    result = plot(tmp_path / "a", tmp_path / "b", "--out", page, "--png", picture)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{page}: 2 runs, {picture}\n"
    assert result.stderr.count("warning:") == 2 and "line 2 is no record" in result.stderr
    assert page.exists() and picture.exists()
    again = plot(tmp_path / "a", "--out", page)
    assert again.exit_code == 2 and "replace it (--overwrite)" in again.stderr.replace("\n", " ")
    assert plot(tmp_path / "a", "--out", page, "--overwrite").stdout == f"{page}: 1 run\n"


def test_what_is_no_run_ends_with_2(tmp_path: Path) -> None:
    result = plot(tmp_path / "none", "--out", tmp_path / "page.html")
    assert result.exit_code == 2 and "there is no such folder" in result.stderr
    assert not (tmp_path / "page.html").exists()
