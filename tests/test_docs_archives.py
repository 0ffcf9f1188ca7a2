"""The guide to archives names what the code has."""

import re
from pathlib import Path

import pytest

from fastflow.archive import output_folder, rows
from fastflow.archive.results import columns
from fastflow.cli._console import FAILED, FINISHED_WITH_ERRORS, INTERRUPTED, OK, USAGE
from fastflow.data.volume import ERROR_CODES, FLAG_CODES

GUIDE = (Path(__file__).parents[1] / "docs" / "archives.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    """First cell, without backticks, to the second, of the first table below a heading."""
    section = re.split(r"^#+ ", GUIDE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.findall(r"^\| (.+?) \| (.+?) \|", section, re.MULTILINE)
    return {cell.replace("`", ""): text for cell, text in lines[1:] if not cell.startswith("-")}


def test_codes_are_complete_and_have_the_meaning_of_the_code():
    errors = ERROR_CODES | {code: text for code, text in rows.CODES.items() if code not in rows.FLAGS}
    assert set(table("Error codes")) == set(errors)
    assert set(table("Flag codes")) == {*FLAG_CODES, *rows.FLAGS}
    for code, text in ERROR_CODES.items():
        assert table("Error codes")[code].startswith(text), code


def test_statuses_and_exit_codes_are_complete():
    assert set(table("Statuses")) == set(rows.STATUSES)
    assert {int(code) for code in table("Exit codes")} == {
        OK,
        FAILED,
        USAGE,
        FINISHED_WITH_ERRORS,
        INTERRUPTED,
    }


def test_columns_are_complete_and_in_order():
    listed = [name for cell in table("Columns") for name in cell.split(", ")]
    assert listed == columns(["LABEL"])


@pytest.mark.parametrize("name", [output_folder.RUN, output_folder.JOURNAL, output_folder.SUMMARY])
def test_files_of_the_folder_are_named(name):
    assert name in table("The folder")


def test_options_exist():
    from typer.main import get_command

    from fastflow.cli.main import app

    known = {name for option in get_command(app).commands["classify"].params for name in option.opts}
    # The batch system and pytest have these.
    others = {"--array", "--cpus-per-task", "--requeue", "--benchmark-only"}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE)) - others
    assert used <= known, used - known
