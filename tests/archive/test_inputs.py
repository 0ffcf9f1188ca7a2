from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.archive.inputs import Inputs, Item, Shard, gather, gather_listing
from fastflow.data import manifest, walk
from fastflow.data.inventory import Inventory
from fastflow.errors import ManifestError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names(*sources: Path | str, **options: object) -> list[str]:
    return [item.name for item in Inputs(tuple(map(str, sources)), **options)]  # type: ignore[arg-type]


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1), unique=True, max_size=20), st.integers(1, 9))
def test_shards_are_disjoint_and_everything(files: list[str], count: int) -> None:
    held = [[name for name in files if Shard(i, count).holds(name)] for i in range(1, count + 1)]
    assert sorted(itertools.chain(*held)) == sorted(files)
    # Which one a file is in depends on its name alone.
    assert all(Shard(i, count).holds(name) for i, part in enumerate(held, start=1) for name in part)


def test_shards_are_about_equal_and_stay_so() -> None:
    files = [f"sub-{i:05d}/anat/sub-{i:05d}_T1w.nii.gz" for i in range(8000)]
    sizes = [sum(map(Shard(i, 8).holds, files)) for i in range(1, 9)]
    assert sum(sizes) == 8000
    assert all(abs(size - 1000) < 5 * 1000**0.5 for size in sizes)
    # The next release must send every file to the same job.
    assert [
        next(i for i in range(1, 6) if Shard(i, 5).holds(name))
        for name in ("a.nii", "b.nii", "c.nii", "d.nii")
    ] == EXPECTED


EXPECTED = [4, 5, 1, 4]


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "a/b", "1/0", "-1/4", "1/4/2", "1 / 4"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="shard must be i/N with 1 <= i <= N, got "):
        Shard.parse(text)


def test_shards_have_folders_of_their_own() -> None:
    assert (Shard.parse("3/12").folder, str(Shard.parse("3/12"))) == ("shard-00003-of-00012", "3/12")


def test_folders_in_order(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b/x.nii",
        "b.nii",
        "a/z.nii.gz",
        "a/y.mgz",
        "c.png",
        "notes.txt",
        ".hidden.nii",
        ".cache/x.nii",
        "a.d/q.nii",
    )
    expected = ["a/y.mgz", "a/z.nii.gz", "a.d/q.nii", "b/x.nii", "b.nii", "c.png"]
    assert names(tmp_path) == expected
    assert [str(path.relative_to(tmp_path)) for path in manifest.find_files(tmp_path)] == expected


def test_folders_too_large_to_be_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{i}.nii" for i in range(9)), "sub/a.nii", "sub/b.nii")
    monkeypatch.setattr(walk, "MAX_SORTED_ENTRIES", 4)
    found = names(tmp_path)
    assert sorted(found) == sorted([*(f"{i}.nii" for i in range(9)), "sub/a.nii", "sub/b.nii"])
    assert [name for name in found if "/" in name] == ["sub/a.nii", "sub/b.nii"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "archive/s1/a.nii", "elsewhere/s2/b.nii")
    (tmp_path / "archive/s2").symlink_to(tmp_path / "elsewhere/s2")
    (tmp_path / "archive/s1/up").symlink_to(tmp_path / "archive")
    (tmp_path / "archive/broken.nii").symlink_to("nowhere")
    assert names(tmp_path / "archive") == ["broken.nii", "s1/a.nii", "s2/b.nii"]


def test_folders_that_cannot_be_listed_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/x.nii", "b/y.nii")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refusing)
    assert names(tmp_path) == ["a", "b/y.nii"]


def test_names_are_relative_to_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "scans/a.nii", "more/a.nii")
    (tmp_path / "scans/m.csv").write_text(
        "path,label,split\na.nii,old,test\n/abs/b.nii,,train\n../more/a.nii,,test\n"
    )
    assert names(tmp_path / "scans") == ["a.nii"]
    assert names(tmp_path / "scans", tmp_path / "more") == [
        str(tmp_path / "scans/a.nii"),
        str(tmp_path / "more/a.nii"),
    ]
    assert names(tmp_path / "scans/m.csv") == [
        "a.nii",
        os.path.relpath("/abs/b.nii", tmp_path / "scans"),
        "../more/a.nii",
    ]
    assert names(tmp_path / "scans/m.csv", split="test") == ["a.nii", "../more/a.nii"]
    monkeypatch.chdir(tmp_path)
    assert names("scans/m.csv") == ["a.nii", "/abs/b.nii", "../more/a.nii"]
    assert names("scans/a.nii") == ["scans/a.nii"]
    items = list(Inputs(("scans/m.csv",)))
    assert (items[0].path, items[0].label, items[1].label) == ("scans/a.nii", "old", None)


def test_hashes_stand_for_names() -> None:
    a, b = Item("/x/a.nii", "a.nii"), Item("/y/a.nii", "a.nii")
    assert (a.id("relpath"), len(a.id("hash"))) == ("a.nii", 32)
    assert a.id("hash") == b.id("hash") != Item("b", "b.nii").id("hash")
    assert len(Item("bad\udcff", "bad\udcff").id("hash")) == 32


def test_inputs_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.csv").write_text("path,split\na.nii,train\n")
    (tmp_path / "e.jsonl").write_text("")
    for source, options, message in [
        (tmp_path / "empty", {}, r"no \.nii, .* file below this folder"),
        (tmp_path / "m.csv", {"split": "test"}, "no entry is in the split 'test'"),
        (tmp_path / "e.jsonl", {}, "the manifest has no entries"),
        (tmp_path / "none.csv", {}, "there is no such manifest"),
    ]:
        with pytest.raises(ManifestError, match=message):
            names(source, **options)
    with pytest.raises(ManifestError, match="nothing to classify"):
        Inputs(())
    # A part may be empty.
    assert names(tmp_path / "m.csv", shard=Shard(1, 10**9 - 1)) == []


def test_long_manifests_are_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "m.jsonl").open("w") as stream:
        stream.writelines(
            json.dumps({"path": f"sub-{i:07d}/anat/sub-{i:07d}_T1w.nii.gz"}) + "\n" for i in range(20_000)
        )
    tracemalloc.start()
    try:
        assert sum(1 for _ in Inputs((str(tmp_path / "m.jsonl"),))) == 20_000
        # The names alone would take more.
        assert tracemalloc.get_traced_memory()[1] < 700_000
    finally:
        tracemalloc.stop()


def test_a_few_as_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/a.nii")
    (record,) = gather([tmp_path])
    assert (record.path, record.label, record.subject) == (str(tmp_path / "sub-01/a.nii"), None, "sub-01")


def test_trees_deeper_than_the_stack(tmp_path: Path) -> None:
    touch(tmp_path, "d/" * 100 + "a.nii")
    before = sys.getrecursionlimit()
    # Less than the tree's depth above where this is.
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        found = names(tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert found == ["d/" * 100 + "a.nii"]


def test_folders_that_cannot_be_listed_are_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was given for its name already, and one whose listing breaks off."""
    touch(tmp_path, "a.nii/x.nii", "b/y.nii", "c.nii")

    class Broken:
        """A listing that a network file system gives up."""

        def __enter__(self) -> Iterator[object]:
            raise OSError(5, "Input/output error")

        def __exit__(self, *error: object) -> None: ...

    scandir = os.scandir
    monkeypatch.setattr(walk.os, "scandir", lambda path: Broken() if path != str(tmp_path) else scandir(path))
    assert names(tmp_path) == ["a.nii", "b", "c.nii"]


def test_names_that_no_file_system_has(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"path": "\\ud800.nii"}\n{"path": "\\ud801.nii"}\n{"path": "nul\\u0000.nii"}\n'
    )
    items = list(Inputs((str(tmp_path / "m.jsonl"),)))
    assert [item.name for item in items] == ["\ud800.nii", "\ud801.nii", "nul\0.nii"]
    assert len({item.id("hash") for item in items}) == 3
    assert sum(len(names(tmp_path / "m.jsonl", shard=Shard(i, 2))) for i in (1, 2)) == 3


def test_every_source_is_looked_at_before_the_first_is_worked_through(tmp_path: Path) -> None:
    touch(tmp_path, "full/a.nii", "m.csv")
    (tmp_path / "empty").mkdir()
    full, part = str(tmp_path / "full"), Shard(1, 10**9 - 1)
    Inputs((full, "nowhere.nii"), shard=part).check()
    for bad in ("empty", "m.csv"):
        with pytest.raises(ManifestError, match=bad):
            Inputs((full, str(tmp_path / bad))).check()


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    touch(tmp_path / "d", "a.NII", "b.nii.gz", "c.dcm", "d.DCM", "e.hdr", "._a.nii", "notes.txt")
    (tmp_path / "m.csv").write_text("path,split\na.nii,Test\nb.nii,train\nc.nii,testing\nd.nii,\n")
    inventory = Inventory()
    sources = (str(tmp_path / "d"), str(tmp_path / "m.csv"), str(tmp_path / "alone.dcm"))
    items = list(Inputs(sources, split="TESTING").counted(inventory))
    assert [os.path.basename(item.path) for item in items] == [
        "a.NII",
        "b.nii.gz",
        "a.nii",
        "c.nii",
        "alone.dcm",
    ]
    assert inventory.used == 5
    assert inventory.left_out == {".dcm": 2, ".hdr": 1, "hidden": 1, "other_split": 2}
    listing = gather_listing(sources, "test")
    assert (len(listing.records), listing.inventory.left_out) == (5, inventory.left_out)


def test_parts_count_what_belongs_to_them(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.nii" for i in range(20)), *(f"{i}.dcm" for i in range(20)))
    inventories = [Inventory() for _ in range(3)]
    for i, inventory in enumerate(inventories, start=1):
        list(Inputs((str(tmp_path),), shard=Shard(i, 3)).counted(inventory))
    assert sum(inventory.used for inventory in inventories) == 20
    assert sum(inventory.left_out[".dcm"] for inventory in inventories) == 20
    assert all(0 < inventory.left_out[".dcm"] < 20 for inventory in inventories)


def test_sources_without_inputs_say_what_they_have(tmp_path: Path) -> None:
    touch(tmp_path / "d", "a.dcm", "b.dcm")
    (tmp_path / "m.csv").write_text("path,split\na.nii,Train\nb.nii,training\nc.nii,\n")
    with pytest.raises(ManifestError, match=r"below this folder; left out were \.dcm 2: DICOM: convert it"):
        names(tmp_path / "d")
    with pytest.raises(
        ManifestError, match=r"no entry is in the split 'valid'; its splits are train 2, \(none\) 1"
    ):
        names(tmp_path / "m.csv", split="valid")
    assert names(tmp_path / "m.csv", split="n/a") == ["c.nii"]


def test_manifests_and_folders_are_known_by_what_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "scans.csv/a.nii")
    (tmp_path / "M.TSV").write_text("path\ta\na.nii\t1\n")
    assert names(tmp_path / "scans.csv") == names(tmp_path / "M.TSV") == ["a.nii"]
