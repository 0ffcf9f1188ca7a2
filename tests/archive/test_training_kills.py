"""A training that is killed at any moment is resumed to the bits of one that nothing stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflow import MagicFlow
from fastflow.archive.model_folder import UNFINISHED, can_resume
from fastflow.archive.train import recipe, train_on_archive
from fastflow.data.manifest import Record, index_folder, read_manifest, write_manifest
from fastflow.errors import OutputFolderError, ResumeError
from fastflow.training.trainer import TrainConfig

# Two epochs of two steps.
CONFIG = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "objective": "pairwise", "ema": 0.5, "threads": 1}


@pytest.fixture(scope="module")
def manifest(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of each class to train on, two for validation."""
    chosen = [r for i, r in enumerate(index_folder(scans)) if i % 10 < 6]
    splits = ["train"] * 4 + ["val"] * 2
    records = [Record(r.path, r.label, r.subject, splits[i % 6]) for i, r in enumerate(chosen)]
    path = tmp_path_factory.mktemp("kills") / "manifest.csv"
    write_manifest(records, path)
    return path


def start(manifest: Path, folder: Path, **options: Any) -> None:
    """Train, with a state after every step."""
    records = read_manifest(manifest)
    train_on_archive(
        records, folder, "tiny", config=TrainConfig(**CONFIG), device="cpu", save_steps=1, **options
    )


def content(folder: Path) -> dict[str, Any]:
    """All that is in a finished model folder, but for times and hidden files."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        name, text = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""
        if path.name == "history.jsonl":
            records = map(json.loads, text.splitlines())
            found[name] = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
        elif path.name == "steps.csv":
            rows = [line.split(",") for line in text.decode().splitlines()]
            found[name] = [row[:6] + row[7:] for row in rows]
        else:
            found[name] = text
    return found


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of the folder of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    start(manifest, folder)
    return content(folder)


# A process that has loaded its modules forks one for each order. The fork ends without Python's cleaning up,
# and where a file is synchronised, half of it is lost, as in a power cut.
MORTAL = """
import json, os, stat, sys, traceback
import torch
from fastflow.archive.train import train_on_archive
from fastflow.data.manifest import read_manifest
from fastflow.training.trainer import TrainConfig

torch.set_num_threads(1)

def die(name, at):
    original, calls = getattr(os, name), iter(range(10**9))
    def call(*arguments, **options):
        if next(calls) == at:
            if name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os._exit(9)
        return original(*arguments, **options)
    setattr(os, name, call)

for line in sys.stdin:
    name, at, manifest, folder, config, options = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            die(name, at)
            train_on_archive(read_manifest(manifest), folder, "tiny", config=TrainConfig(**config),
                             device="cpu", save_steps=1, **options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
Mortal = Callable[..., int]


@pytest.fixture(scope="module")
def mortal(manifest: Path) -> Iterator[Mortal]:
    """Trains until a call of a function of `os`, where the process ends; gives its exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", MORTAL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def call(name: str, at: int, folder: Path, **options: bool) -> int:
            order = [name, at, str(manifest), str(folder), CONFIG, options]
            print(json.dumps(order), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield call
        process.stdin.close()


def go_on(manifest: Path, folder: Path) -> None:
    """Resume, or begin anew where the training was killed before it had saved a state."""
    try:
        start(manifest, folder, resume=True)
    except ResumeError as error:
        if "holds a finished model" in str(error):
            return
        assert not can_resume(folder)
        start(manifest, folder)


@pytest.mark.parametrize(("name", "at"), [("fsync", 32), pytest.param("replace", 34, marks=pytest.mark.slow)])
def test_killed_and_resumed(
    manifest: Path, tmp_path: Path, mortal: Mortal, whole: dict[str, Any], name: str, at: int
) -> None:
    """One kill is amid the writing of a state, one amid the moves of finished files."""
    assert mortal(name, at, tmp_path / "m") == 9
    assert (tmp_path / "m" / UNFINISHED).exists() and can_resume(tmp_path / "m")
    go_on(manifest, tmp_path / "m")
    assert content(tmp_path / "m") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("fsync", 23), ("replace", 7), ("unlink", 9)])
def test_killed_at_every_call(
    manifest: Path, tmp_path: Path, mortal: Mortal, whole: dict[str, Any], name: str, stride: int
) -> None:
    for at in range(0, 200, stride):
        folder = tmp_path / str(at)
        code = mortal(name, at, folder)
        assert code in (0, 9), at
        if code == 9:
            go_on(manifest, folder)
        assert content(folder) == whole, at
        if code == 0:
            return
    raise AssertionError("never came to an end")


@pytest.mark.slow
def test_killed_again_and_again(
    manifest: Path, tmp_path: Path, mortal: Mortal, whole: dict[str, Any]
) -> None:
    """Each process comes a little further than the one before."""
    folder, kills = tmp_path / "m", 0
    while (code := mortal("replace", 20, folder, resume=can_resume(folder))) == 9:
        kills += 1
        assert kills < 30
    if code == 1:
        with pytest.raises(ResumeError, match="holds a finished model"):
            start(manifest, folder, resume=True)
    assert kills > 1 and content(folder) == whole


@pytest.mark.slow
def test_an_earlier_model_stays_while_its_successor_is_killed(
    manifest: Path, tmp_path: Path, mortal: Mortal, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "m"
    config = TrainConfig(**{**CONFIG, "seed": 5, "epochs": 1})
    train_on_archive(read_manifest(manifest), folder, "tiny", config=config, device="cpu")
    before = MagicFlow.load(folder).state_dict()
    for at in (15, 26, 32, 35):
        assert mortal("replace", at, folder, overwrite=True) == 9
        assert can_resume(folder)
        found = MagicFlow.load(folder).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in before.items())
    with pytest.raises(
        OutputFolderError, match=r"a finished model and an unfinished training; go on with it"
    ):
        start(manifest, folder)
    go_on(manifest, folder)
    assert content(folder) == whole


# The command in a process of its own, which signals are sent to.
COMMAND = [sys.executable, "-c", "from fastflow.cli.main import run; run()", "train"]
OPTIONS = [
    *("--preset", "tiny", "--epochs", "4", "--batch-size", "4", "--warmup", "0"),
    *("--save-seconds", "0", "--device", "cpu"),
]


def command(manifest: Path, folder: Path) -> subprocess.Popen[str]:
    resume = ["--resume"] if can_resume(folder) else []
    return subprocess.Popen(
        [*COMMAND, str(manifest), "--out", str(folder), *OPTIONS, *resume],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file is another one than it is."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.002)


@pytest.mark.slow
def test_signals_and_kills_at_random_moments(manifest: Path, tmp_path: Path) -> None:
    alone, folder, chance = tmp_path / "alone", tmp_path / "m", random.Random(0)
    config = recipe("tiny", "classification", epochs=4, batch_size=4, warmup_epochs=0.0)
    train_on_archive(read_manifest(manifest), alone, "tiny", config=config, device="cpu")
    for signum, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = command(manifest, folder)
        wait_for(folder / UNFINISHED / "state" / "state.json", process)
        time.sleep(chance.uniform(0.0, 0.05))
        process.send_signal(signum)
        _, text = process.communicate()
        assert process.returncode == code, text
        assert signum == signal.SIGKILL or "--resume" in text
    process = command(manifest, folder)
    _, text = process.communicate()
    assert process.returncode == 0, text
    assert content(folder) == content(alone)
