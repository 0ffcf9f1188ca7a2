"""Nothing is lost: killed, out of disk, or torn anywhere, a run is resumed to the rows of an uninterrupted one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastflow import MagicFlow
from fastflow.archive import journal as journal_module
from fastflow.archive.classify import classify
from fastflow.archive.shards import read_results
from fastflow.cli.main import app
from fastflow.errors import CheckpointError, JournalError, ManifestError, OutputFolderError

COUNT, BATCH, SHARD = 120, 6, 25

RUN = """
import sys
from fastflow.archive.classify import classify
source, model, out = sys.argv[1:4]
if __name__ == "__main__":
    classify([source], model, out, batch_size=6, workers=1, resume=True, shard_rows=25)
"""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_results(folder)]


def run(source: Path, model: Path, out: Path, **options: Any) -> Any:
    return classify([source], model, out, batch_size=BATCH, shard_rows=SHARD, **options)


@pytest.fixture(scope="module")
def archive(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 scans, three of which cannot be read."""
    root = tmp_path_factory.mktemp("archive")
    files = sorted(scans.rglob("*.nii.gz"))
    for i in range(COUNT):
        target = root / f"part{i % 3}" / f"sub-{i:03d}.nii.gz"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(files[i % len(files)], target)
    for i in (3, 50, 119):
        (root / f"part{i % 3}" / f"sub-{i:03d}.nii.gz").write_bytes(b"\x1f\x8bnot a scan")
    return root


@pytest.fixture(scope="module")
def whole(archive: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "r"
    assert run(archive, model_folder, out).counts == {"ok": COUNT - 3, "flagged": 0, "error": 3}
    rows = rows_of(out)
    assert len({row["path"] for row in rows}) == COUNT
    return rows


def few(archive: Path, tmp_path: Path, count: int = 12) -> Path:
    """A folder of a few of the scans, to be changed."""
    root = tmp_path / "few"
    root.mkdir()
    for path in sorted(archive.rglob("*.nii.gz"))[:count]:
        shutil.copy(path, root / path.name)
    return root


def workers_of(parent: int) -> list[int]:
    """Processes that were spawned by a process, now or before it died."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if f"parent_pid={parent}".encode() in command and status[0] != "Z":
                found.append(int(entry.name))
    return found


def kill_and_resume(archive: Path, model: Path, tmp_path: Path, kills: int, seed: int) -> Path:
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(RUN)
    chance = random.Random(seed)
    journal = out / "journal.jsonl"
    killed = 0
    for _ in range(10 * kills):
        size = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen([sys.executable, str(script), str(archive), str(model), str(out)], stderr=subprocess.PIPE)
        # Most of the time goes into imports; the moments that matter are those around and after the first new bytes.
        while process.poll() is None and (not journal.exists() or journal.stat().st_size <= size):
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 2.0 / kills))
        if process.poll() is None and killed < kills:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            deadline = time.monotonic() + 20
            while workers_of(process.pid):
                assert time.monotonic() < deadline, "reading processes outlive the run"
                time.sleep(0.05)
            continue
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()
        if killed == kills:
            return out
        # It was done before it could be killed: begin again.
        shutil.rmtree(out)
    raise AssertionError(f"killed only {killed} of {kills} times")


@pytest.mark.slow
def test_killed_and_resumed(archive: Path, whole: list[dict[str, Any]], model_folder: Path, tmp_path: Path) -> None:
    assert rows_of(kill_and_resume(archive, model_folder, tmp_path, 2, 0)) == whole


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(archive: Path, whole: list[dict[str, Any]], model_folder: Path, tmp_path: Path) -> None:
    assert rows_of(kill_and_resume(archive, model_folder, tmp_path, 20, 1)) == whole


class Stop(BaseException):
    """What no part of the run may catch."""


def stopping(monkeypatch: pytest.MonkeyPatch, name: str, at: int, before: Callable[..., None] | None = None) -> None:
    """Let the `at`-th call of a function of `os` stop the run, after `before` did part of its work."""
    original, calls = getattr(os, name), iter(range(10**9))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            if before is not None:
                before(original, *arguments)
            raise Stop
        return original(*arguments, **options)

    monkeypatch.setattr(os, name, call)


def half(original: Callable[..., Any], handle: int, block: bytes, at: int) -> None:
    original(handle, bytes(block)[: len(block) // 2], at)


@pytest.mark.parametrize(
    ("name", "at", "before"),
    [
        # The first two calls are of the lock and the first batch.
        ("pwrite", 2, half),
        ("pwrite", 5, half),
        ("fdatasync", 0, None),
        ("fdatasync", 3, None),
        # run.json, the result files, the summary.
        ("replace", 0, None),
        ("replace", 1, None),
        ("replace", 2, None),
        ("replace", 3, None),
        ("replace", 4, None),
    ],
)
def test_stopped_between_any_two_steps(
    archive: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int, before: Any
) -> None:
    source = few(archive, tmp_path)
    classify([source], model_folder, tmp_path / "whole", batch_size=BATCH, shard_rows=5)
    with monkeypatch.context() as patched:
        stopping(patched, name, at, before)
        with pytest.raises(Stop):
            classify([source], model_folder, tmp_path / "r", batch_size=BATCH, shard_rows=5)
    # What is there is valid: whole rows of the run, in whole files.
    if (tmp_path / "r").exists() and list((tmp_path / "r").glob("results-*")):
        part = rows_of(tmp_path / "r")
        assert part == rows_of(tmp_path / "whole")[: len(part)]
    classify([source], model_folder, tmp_path / "r", batch_size=BATCH, shard_rows=5, resume=True)
    assert rows_of(tmp_path / "r") == rows_of(tmp_path / "whole")
    assert not [path for path in (tmp_path / "r").iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_torn_at_any_byte(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source = few(archive, tmp_path, 4)
    out = tmp_path / "r"
    run(source, model_folder, out)
    content, rows = (out / "journal.jsonl").read_bytes(), rows_of(out)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    # The last two rows are a batch; each cut costs a second.
    for cut in [0, 1, ends[1] - 1, *range(ends[1], ends[-1], max(1, (ends[-1] - ends[1]) // 12)), ends[-1] - 1]:
        (out / "journal.jsonl").write_bytes(content[:cut])
        before = sum(end <= cut for end in ends)
        assert run(source, model_folder, out, resume=True).new == len(ends) - before
        assert rows_of(out) == rows


def test_garbage_behind_the_last_line_is_cut_off(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 4), tmp_path / "r"
    run(source, model_folder, out)
    rows, journal = rows_of(out), out / "journal.jsonl"
    for garbage in (b"00000000 {", b"\0" * 300, b"deadbeef 00 {}\n"):
        with journal.open("ab") as stream:
            stream.write(garbage)
        assert run(source, model_folder, out, resume=True).new == 0
        assert rows_of(out) == rows


def test_damage_before_the_end_is_told(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 4), tmp_path / "r"
    run(source, model_folder, out)
    content = bytearray((out / "journal.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "journal.jsonl").write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.jsonl: the line at byte \d+ is damaged"):
        run(source, model_folder, out, resume=True)
    arguments = ["classify", str(source), "--model", str(model_folder), "--out", str(out), "--resume", "--batch-size", "6"]
    result = CliRunner().invoke(app, arguments)
    # Its result files have another length.
    assert result.exit_code == 2
    assert "shard_rows was 25 and is now 100000" in result.stderr


@pytest.mark.parametrize("fails", ["journal", "results"])
def test_full_disk(archive: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    arguments = ["classify", str(source), "--model", str(model_folder), "--out", str(out), "--batch-size", "6"]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    pwrite, left = os.pwrite, [4000]

    def limited(handle: int, block: bytes, at: int) -> int:
        """A file system that takes what fits and then nothing more."""
        if left[0] == 0:
            raise full
        taken = pwrite(handle, bytes(block)[: left[0]], at)
        left[0] -= taken
        return taken

    def no_room(handle: int) -> None:
        if b"path,size" in os.pread(handle, 100, 0):
            raise full

    with monkeypatch.context() as patched:
        if fails == "journal":
            patched.setattr(journal_module.os, "pwrite", limited)
        else:
            patched.setattr(os, "fsync", no_room)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.output
    lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) <= 12
    assert all(line.endswith(b"\n") for line in lines)
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 3, again.output
    classify([source], model_folder, tmp_path / "whole", batch_size=BATCH)
    assert rows_of(out) == rows_of(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full(archive: Path, model_folder: Path, tmp_path: Path, small_disk: Path) -> None:
    source, out = few(archive, tmp_path, 40), small_disk / "r"
    with pytest.raises(OSError, match="No space left"):
        run(source, model_folder, out)
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    run(source, model_folder, out, resume=True)
    run(source, model_folder, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_second_run_is_refused(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    refused = []

    def second(done: int, total: int | None, errors: int) -> None:
        if not refused:
            for options in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(OutputFolderError, match=f"another run is writing here .process {os.getpid()} on "):
                    run(source, model_folder, out, **options)
            refused.append(done)

    run(source, model_folder, out, progress=second)
    assert refused
    run(source, model_folder, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


# -- what resuming takes for done -----------------------------------------------------------------------------------------


def test_files_that_change_come_and_go(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    run(source, model_folder, out)
    names = sorted(path.name for path in source.iterdir())
    shutil.copy(source / names[1], source / names[0])
    (source / names[5]).unlink()
    shutil.copy(source / names[1], source / "sub-zzz.nii.gz")
    summary = run(source, model_folder, out, resume=True)
    assert (summary.new, summary.total) == (2, 12)
    run(source, model_folder, tmp_path / "whole")
    by_path = {row["path"]: row for row in rows_of(out)}
    assert by_path == {row["path"]: row for row in rows_of(tmp_path / "whole")}
    assert len(rows_of(out)) == 12


def test_failed_ones_are_tried_again(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    bad = [row["path"] for row in (run(source, model_folder, out), rows_of(out))[1] if row["status"] == "error"]
    assert len(bad) == 1
    good = next(path for path in sorted(source.iterdir()) if path.name not in bad)
    assert run(source, model_folder, out, resume=True).new == 0
    summary = run(source, model_folder, out, retry_failed=True)
    assert (summary.new, summary.failed, summary.total) == (1, 1, 12)
    shutil.copy(good, source / bad[0])
    summary = run(source, model_folder, out, retry_failed=True)
    assert (summary.new, summary.failed, summary.total) == (1, 0, 12)
    assert [row["path"] for row in rows_of(out)].count(bad[0]) == 1


def test_inputs_given_twice_stay_two(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 3), tmp_path / "r"
    first = sorted(source.iterdir())[0]
    classify([source, first], model_folder, out)
    assert classify([source, first], model_folder, out, resume=True).new == 0
    assert len(rows_of(out)) == 4


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prior": [0.9, 0.1]}, "prior"),
        ({"slices": "center"}, "preprocess"),
        ({"combine": "mean"}, "combine"),
        ({"id_from": "hash"}, "id_from"),
        ({"format": "parquet"}, "format"),
    ],
)
def test_other_settings_do_not_resume(
    archive: Path, model_folder: Path, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    run(source, model_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputFolderError, match=f"cannot be resumed, because {name} was .* and is now"):
        run(source, model_folder, out, resume=True, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(source, model_folder, out, overwrite=True, **options)
    assert len(rows_of(out)) == 2


def test_another_model_does_not_resume(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    run(source, model_folder, out)
    model = MagicFlow.load(model_folder)
    model.temperature = 7.0
    model.save(tmp_path / "model")
    with pytest.raises(OutputFolderError, match="because model_hash was"):
        run(source, tmp_path / "model", out, resume=True)


def test_folders_that_are_not_its_own_are_left_alone(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputFolderError, match=r"holds other files, such as 'thesis\.txt'"):
            run(source, model_folder, out, **options)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputFolderError, match="must be a folder, it is a file"):
        run(source, model_folder, out / "thesis.txt")


def test_nothing_is_left_of_a_run_that_could_not_begin(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(model_folder, tmp_path / "model")
    next(broken.glob("*.safetensors")).write_bytes(b"tampered")
    for source, model, error in [
        (archive, tmp_path / "none", CheckpointError),
        (archive, broken, CheckpointError),
        (tmp_path / "empty", model_folder, ManifestError),
        (tmp_path / "none.csv", model_folder, ManifestError),
    ]:
        with pytest.raises(error):
            run(source, model, tmp_path / "r")
        assert not (tmp_path / "r").exists()


def test_a_summary_is_there_whenever_a_run_was_finished(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    run(source, model_folder, out)
    (out / "summary.json").unlink()
    run(source, model_folder, out, resume=True)
    document = json.loads((out / "summary.json").read_text())
    assert (document["rows"], document["rows_of_this_run"]) == (2, 0)


def test_damage_ends_the_command_with_one_line(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 4), tmp_path / "r"
    arguments = ["classify", str(source), "--model", str(model_folder), "--out", str(out), "--resume"]
    assert CliRunner().invoke(app, arguments).exit_code in (0, 3)
    content = bytearray((out / "journal.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "journal.jsonl").write_bytes(content)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "is damaged" in result.stderr and result.stderr.count("\n") == 1


def test_an_empty_source_is_told_before_any_work(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    """Behind the work, it would be told at every resumption, and the inputs of a run cannot be changed."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="empty: no "):
        classify([archive, tmp_path / "empty"], model_folder, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("content", ["[]", "[1]", "5", "null", "{", "[" * 100_000, ""])
def test_a_run_json_that_says_nothing(archive: Path, model_folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text(content)
    with pytest.raises(OutputFolderError, match=r"cannot be (read|resumed)"):
        run(archive, model_folder, tmp_path / "r", resume=True)


def test_a_name_that_no_file_system_has_costs_a_row(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    paths = [str(next(scans.rglob("*.nii.gz"))), "x\ud800.nii", "nul\0.nii"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    for resume in (False, True):
        classify([tmp_path / "m.jsonl"], model_folder, tmp_path / "r", resume=resume)
        assert [row["error_code"] for row in rows_of(tmp_path / "r")] == ["", "unreadable", "unreadable"]


# A process that has loaded torch, and from it for each order a process that ends without any of Python's cleaning up.
MORTAL = """
import json, os, sys, traceback
from fastflow.archive.classify import classify

def die(name, at):
    original, calls = getattr(os, name), iter(range(10**9))
    def call(*arguments, **options):
        if next(calls) == at:
            if name == "pwrite":
                original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
            os._exit(9)
        return original(*arguments, **options)
    setattr(os, name, call)

for line in sys.stdin:
    name, at, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            die(name, at)
            classify(**arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def mortal() -> Iterator[Callable[[str, int, dict[str, Any]], int]]:
    """Runs `classify` until a call of a function of `os`, where the process ends; gives its exit code."""
    with subprocess.Popen([sys.executable, "-c", MORTAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def call(name: str, at: int, arguments: dict[str, Any]) -> int:
            print(json.dumps([name, at, arguments]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield call
        process.stdin.close()


# Half a minute each.
QUICK = (("new", "replace"),)
STEPS = itertools.product(("new", "overwrite", "changed", "retry"), ("pwrite", "fdatasync", "replace", "unlink"))


@pytest.mark.parametrize(
    ("scene", "name"), [pytest.param(*step, marks=() if step in QUICK else pytest.mark.slow) for step in STEPS]
)
def test_killed_at_every_step(
    archive: Path,
    model_folder: Path,
    tmp_path: Path,
    mortal: Callable[[str, int, dict[str, Any]], int],
    scene: str,
    name: str,
) -> None:
    """Other than an exception, a kill leaves behind what was being written."""
    source = few(archive, tmp_path, 5)
    files = sorted(source.iterdir())
    files[1].write_bytes(b"not a scan")
    options = {"batch_size": BATCH, "shard_rows": 2}
    if scene != "new":
        # Of another setting, where nothing of it may be left.
        classify([source], model_folder, tmp_path / "start", **options, prior=[0.9, 0.1] if scene == "overwrite" else None)
    if scene == "changed":
        files[0].unlink()
        shutil.copy(files[3], files[2])
    how = {"new": {}, "overwrite": {"overwrite": True}, "changed": {"resume": True}, "retry": {"retry_failed": True}}[scene]

    def begin(out: Path) -> dict[str, Any]:
        if scene != "new":
            shutil.copytree(tmp_path / "start", out)
        return {"inputs": [str(source)], "model_folder": str(model_folder), "out": str(out)} | options | how

    classify(**begin(tmp_path / "whole"))
    whole = sorted(rows_of(tmp_path / "whole"), key=lambda row: row["path"])
    for at in range(30):
        arguments = begin(tmp_path / str(at))
        code = mortal(name, at, arguments)
        assert code in (0, 9)
        if code == 0:
            break
        try:
            classify(**arguments | {"overwrite": False, "resume": True})
        except OutputFolderError:
            # The earlier run is still there, and may still be replaced.
            assert scene == "overwrite"
            classify(**arguments)
        assert sorted(rows_of(tmp_path / str(at)), key=lambda row: row["path"]) == whole, at
        names = {path.name for path in (tmp_path / str(at)).iterdir()}
        assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    else:
        raise AssertionError("never came to an end")


def test_a_run_that_ended_before_the_lock_was_taken_is_not_cleared(
    archive: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    out.mkdir()

    def late(folder: Path) -> Any:
        monkeypatch.undo()
        run(source, model_folder, out)
        return journal_module.locked(folder)

    monkeypatch.setattr("fastflow.archive.classify.locked", late)
    with pytest.raises(OutputFolderError, match="holds an earlier run"):
        run(source, model_folder, out)
    assert len(rows_of(out)) == 2
