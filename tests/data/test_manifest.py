from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflow.data.manifest import (
    Record,
    read_manifest,
    subject_of,
    write_manifest,
)
from fastflow.data.words import class_name, split_name
from fastflow.errors import ManifestError

FORMATS = (".csv", ".tsv", ".jsonl")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# -- reading and writing -------------------------------------------------------------------------------------

# Every character but NUL and surrogates, which file names or UTF-8 lack; fields are read without white space
# around them.
text = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12
).map(str.strip)
names = text.filter(lambda name: name not in ("", ".", "..") and "/" not in name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.tuples(names, st.none() | text.filter(bool), text.filter(bool), st.none() | text.filter(bool)),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0],
    ),
    ending=st.sampled_from(FORMATS),
)
def test_round_trip_of_any_text(
    tmp_path: Path, rows: list[tuple[str, str | None, str, str | None]], ending: str
) -> None:
    # Labels, subjects and splits have one form of Unicode and of blanks.
    records = [
        Record(
            str(tmp_path / name),
            class_name(label),
            class_name(subject) or subject_of(name),
            split_name(split),
        )
        for name, label, subject, split in rows
    ]
    write_manifest(records, tmp_path / f"m{ending}")
    assert read_manifest(tmp_path / f"m{ending}") == records


@pytest.mark.parametrize("ending", FORMATS)
def test_paths_are_relative_to_the_manifest(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        Record(str(tmp_path / "data/a.nii.gz"), "x", "a", "train"),
        Record("/elsewhere/b.nii.gz", None, "b"),
    ]
    write_manifest(records, tmp_path / "data" / f"m{ending}")
    content = (tmp_path / "data" / f"m{ending}").read_text()
    assert "a.nii.gz" in content and str(tmp_path) not in content and "/elsewhere/b.nii.gz" in content
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = read_manifest(tmp_path / "moved" / f"m{ending}")
    assert [record.path for record in moved] == [str(tmp_path / "moved/a.nii.gz"), "/elsewhere/b.nii.gz"]
    monkeypatch.chdir(tmp_path)
    assert read_manifest(f"moved/m{ending}")[0].path == "moved/a.nii.gz"


def test_relative_records_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest([Record("data/a.nii", None, "a")], "lists/m.csv")
    (record,) = read_manifest("lists/m.csv")
    assert os.path.abspath(record.path) == str(tmp_path / "data/a.nii")


def test_links_keep_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "store/MD5-1234.nii.gz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sub-01_T1w.nii.gz").symlink_to(tmp_path / "store/MD5-1234.nii.gz")
    write_manifest(
        [Record(str(tmp_path / "data/sub-01_T1w.nii.gz"), None, "sub-01")], tmp_path / "data/m.csv"
    )
    assert read_manifest(tmp_path / "data/m.csv")[0].path.endswith("data/sub-01_T1w.nii.gz")


def test_only_the_path_is_needed(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(
        "\ufeffpath,note\r\nsub-01_T1w.nii.gz,first\r\n  b.c.nii.gz ,\r\n", encoding="utf-8"
    )
    (tmp_path / "m.jsonl").write_text(
        '{"path": "sub-01_T1w.nii.gz", "label": null}\n{"path": "b.c.nii.gz", "note": 3}\n'
    )
    expected = [
        Record(str(tmp_path / "sub-01_T1w.nii.gz"), None, "sub-01"),
        Record(str(tmp_path / "b.c.nii.gz"), None, "b.c"),
    ]
    assert read_manifest(tmp_path / "m.csv") == expected
    assert read_manifest(tmp_path / "m.jsonl") == expected


def test_numbers_are_names_too(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "label": 3, "subject": 17, "split": "train"}\n')
    assert read_manifest(tmp_path / "m.jsonl") == [Record(str(tmp_path / "a.png"), "3", "17", "train")]


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\n\na.nii,x\n\n\n,y\n")
    with pytest.raises(ManifestError, match=r"m\.csv, line 6: path is empty"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.jsonl").write_text('\n{"path": "a.nii"}\n\n{"label": "x"}\n')
    with pytest.raises(ManifestError, match=r"m\.jsonl, line 4: path is empty"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", r"line 1: no column 'path'"),
        (
            "m.csv",
            "place,label\na.nii,x\n",
            r"line 1: no column 'path'; columns are path, label, subject, split; the line has 'place'",
        ),
        ("m.csv", "path,label\n", "has no entries"),
        ("m.csv", "path,label\na.nii,x\nb.nii\n", "line 3: has another number of fields"),
        ("m.csv", "path,label\na.nii,x,y\n", "line 2: has another number of fields"),
        ("m.csv", "path,label\na.nii,x\n   ,y\n", "line 3: path is empty"),
        ("m.csv", "path\na.nii\nb.nii\n./a.nii\n", r"line 4: .*a\.nii stands in line 2 already"),
        ("m.csv", 'path,label\na.nii,"x\n', "line 2: is not CSV"),
        ("m.csv", "path\n" + "a" * 200_000 + "\n", "line 2: is not CSV"),
        ("m.jsonl", "", "has no entries"),
        ("m.jsonl", '{"path": "a.nii"}\n{"path": \n', "line 2: is not JSON"),
        ("m.jsonl", "[" * 100_000, "line 1: is not JSON"),
        ("m.jsonl", '["a.nii"]\n', "line 1: must be a JSON object, got list"),
        ("m.jsonl", '{"path": ["a.nii"]}\n', r"line 1: path must be a string, got \['a\.nii'\]"),
        ("m.jsonl", '{"path": "a.nii", "label": true}\n', "line 1: label must be a string, got True"),
        ("m.jsonl", '{"path": "a.nii"}\n\n{"path": "a.nii"}\n', r"line 3: .*a\.nii stands in line 1 already"),
        ("m.txt", "path\na.nii\n", r"ends in \.csv, \.tsv or \.jsonl"),
    ],
)
def test_bad_manifest(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_manifest_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no such manifest"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "folder.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\na.nii,süß\n".encode("latin-1"))
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "latin.csv")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=80) | st.text(',"\npath\r{}:[]').map(str.encode),
    ending=st.sampled_from(FORMATS),
)
def test_any_content_gives_records_or_a_named_error(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"m{ending}"
    path.write_bytes((b"path,label\n" if ending == ".csv" else b"") + content)
    try:
        records = read_manifest(path)
    except ManifestError as error:
        message = str(error)
    else:
        assert records
        return
    assert message.startswith(str(path))


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    good = [Record(str(tmp_path / "a.nii"), "x", "a")]
    write_manifest(good, tmp_path / "m.csv")
    assert stat.S_IMODE((tmp_path / "m.csv").stat().st_mode) == 0o644
    odd = os.fsdecode(b"caf\xe9.nii")
    with pytest.raises(ManifestError, match="not valid Unicode"):
        write_manifest([Record(str(tmp_path / odd), "x", "b")], tmp_path / "m.csv")
    with pytest.raises(ManifestError, match=r"ends in \.csv, \.tsv or \.jsonl"):
        write_manifest(good, tmp_path / "m.xlsx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.csv"]
    assert read_manifest(tmp_path / "m.csv") == good
    write_manifest([Record(str(tmp_path / odd), "x", "b")], tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl")[0].path == str(tmp_path / odd)


def test_files_are_json_lines(tmp_path: Path) -> None:
    write_manifest(
        [Record(str(tmp_path / f"{i}.nii"), "a", "s", None) for i in range(2)], tmp_path / "m.jsonl"
    )
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["label", "path", "split", "subject"]] * 2
