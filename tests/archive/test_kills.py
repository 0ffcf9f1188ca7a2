"""A run that is killed at any step is resumed to the rows of a whole one."""

from __future__ import annotations

import json
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

from fastflow.archive.classify import classify
from fastflow.errors import OutputFolderError
from tests.archive.interrupted import BATCH, COUNT, few, rows_of, run

pytestmark = pytest.mark.usefixtures("matrix")


RUN = """
import sys
from fastflow.archive import classify as module
from fastflow.archive.classify import classify
source, model, out, quick = sys.argv[1:5]
if __name__ == "__main__":
    if quick:
        sys.path.insert(0, quick)
        from quick import MatrixScorer, prepare_matrix
        # As long as a model takes.
        MatrixScorer.pause = 0.02
        module.prepare = prepare_matrix
    classify([source], model, out, batch_size=6, workers=1, resume=True, shard_rows=25)
"""


@pytest.fixture(scope="module")
def whole(
    archive: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The rows of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "r"
    assert run(archive, model_folder, out).counts == {"ok": COUNT - 3, "flagged": 0, "error": 3}
    rows = rows_of(out)
    assert len({row["path"] for row in rows}) == COUNT
    return rows


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


def kill_and_resume(archive: Path, model: Path, tmp_path: Path, kills: int, seed: int, scorer: str) -> Path:
    """Kill a run over and over again, and resume it; `scorer` is the model or the matrix."""
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(RUN)
    chance = random.Random(seed)
    journal = out / "journal.jsonl"
    killed = 0
    for _ in range(10 * kills):
        size = journal.stat().st_size if journal.exists() else 0
        quick_modules = str(Path(__file__).parent) if scorer == "matrix" else ""
        process = subprocess.Popen(
            [sys.executable, str(script), str(archive), str(model), str(out), quick_modules],
            stderr=subprocess.PIPE,
        )
        # Most of the time goes into imports; the moments around and after the first new bytes matter.
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
def test_killed_and_resumed(
    archive: Path, whole: list[dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    assert rows_of(kill_and_resume(archive, model_folder, tmp_path, 2, 0, "model")) == whole


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    out = kill_and_resume(archive, model_folder, tmp_path, 20, 1, "matrix")
    run(archive, model_folder, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert len(rows_of(out)) == COUNT


# A process that has loaded its modules forks one for each order. The fork ends without Python's cleaning up.
MORTAL = """
import json, os, sys, traceback
from fastflow.archive import classify as module
from fastflow.archive.classify import classify

sys.path.insert(0, sys.argv[1])
import quick
module.prepare = quick.prepare_matrix

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
    with subprocess.Popen(
        [sys.executable, "-c", MORTAL, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def call(name: str, at: int, arguments: dict[str, Any]) -> int:
            print(json.dumps([name, at, arguments]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield call
        process.stdin.close()


@pytest.mark.parametrize("name", ["pwrite", "fdatasync", "replace", "unlink"])
@pytest.mark.parametrize("scene", ["new", "overwrite", "changed", "retry"])
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
        # A run that is replaced has another setting, and nothing of it may be left.
        classify(
            [source],
            model_folder,
            tmp_path / "start",
            **options,
            prior=[0.9, 0.1] if scene == "overwrite" else None,
        )
    if scene == "changed":
        files[0].unlink()
        shutil.copy(files[3], files[2])
    how = {
        "new": {},
        "overwrite": {"overwrite": True},
        "changed": {"resume": True},
        "retry": {"retry_failed": True},
    }[scene]

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
