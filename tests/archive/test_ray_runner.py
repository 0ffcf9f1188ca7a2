from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastflow import MagicFlow
from fastflow.archive.batches import ScoredInput, Timings
from fastflow.archive.classify import classify, preprocess_of
from fastflow.archive.inputs import Item
from fastflow.archive.journal import Journal
from fastflow.archive.results import read_results
from fastflow.data.preprocess import Preprocess
from fastflow.errors import RunStoppedError, VolumeError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
from fastflow.archive import ray_runner as module  # noqa: E402

# A reader that is killed by a file, for processes that know nothing of pytest.
DEADLY = """
import os
from fastflow.data.preprocess import Preprocess

class Deadly(Preprocess):
    def locate(self, path, *args):
        if "103" in path:
            os._exit(3)
        return super().locate(path, *args)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray that is there already, as on a cluster; a folder that its processes can import from."""
    folder = tmp_path_factory.mktemp("importable")
    (folder / "deadly.py").write_text(DEADLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        )
        patch.syspath_prepend(str(folder))
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield folder
        ray.shutdown()


def read(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_results(folder)]


def journal(folder: Path) -> list[tuple[bytes, dict[str, object]]]:
    """Every bit of the numbers, which a CSV does not have."""
    rows = Journal.open(folder / "journal.jsonl").read()
    return [(key, {name: value for name, value in row.items() if name != "seconds"}) for key, row in rows]


@pytest.mark.slow
def test_rows_of_a_run_that_was_stopped_and_resumed_are_those_of_the_local_engine(
    cluster: Path, scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad files between good ones, a name that is no Unicode, relative paths, several datasets."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scans, "scans")
    good = sorted(Path("scans").rglob("*.nii.gz"))
    Path("scans/flat/sub-004x.nii.gz").write_bytes(good[0].read_bytes()[:200])
    shutil.copy(good[1], os.fsencode("scans/striped/") + b"bad\xff.nii.gz")
    inputs = ["scans/striped", "nowhere.nii", "scans/flat"]
    classify(inputs, model_folder, "local", batch_size=7)
    monkeypatch.setattr(module, "MAX_TASK_INPUTS", 4)
    monkeypatch.setattr(module, "FIRST_BLOCK_INPUTS", 12)
    monkeypatch.setattr(module, "MAX_BLOCK_INPUTS", 24)
    before = {name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL")}
    with pytest.raises(RunStoppedError, match=r"nowhere\.nii: there is no such file"):
        classify(inputs, model_folder, "ray", batch_size=7, engine="ray", on_error="fail")
    stopped = journal(Path("ray"))
    assert len(stopped) == 12
    summary = classify(inputs, model_folder, "ray", batch_size=7, engine="ray", resume=True)
    assert journal(Path("ray")) == journal(Path("local"))
    assert journal(Path("ray"))[:12] == stopped
    assert read(Path("ray")) == read(Path("local"))
    assert summary.codes == {"missing": 1, "truncated": 1}
    assert (summary.total, summary.new) == (23, 11)
    assert min(summary.rates["seconds_of_the_model"].values()) > 0
    # Ray is as it was found.
    assert ray.is_initialized()
    assert before == {name: os.environ.get(name) for name in before}
    assert not ray.data.DataContext.get_current().execution_options.preserve_order


def rows_of(
    model_folder: Path,
    preprocess: Preprocess,
    files: list[Path],
    folder: Path | None = None,
    **options: object,
) -> list[ScoredInput]:
    arguments = {"batch_size": 64, "workers": 1, "precision": "float32", "device": "cpu"} | options
    run = module.ray_runner(folder or model_folder, preprocess, **arguments)
    return [
        row for batch in run(iter([Item(str(file), file.name) for file in files]), Timings()) for row in batch
    ]


@pytest.mark.slow
def test_a_file_that_kills_the_process_that_reads_it_costs_its_row(
    cluster: Path, scans: Path, model_folder: Path
) -> None:
    import deadly

    own = preprocess_of(MagicFlow.load(model_folder))
    files = sorted(scans.rglob("*.nii.gz"))
    rows = rows_of(model_folder, deadly.Deadly(own.size, own.slices, own.spacing, own.grid), files)
    errors = {row.item.name: row.result for row in rows if isinstance(row.result, VolumeError)}
    assert [row.item.path for row in rows] == [str(file) for file in files]
    assert {name: error.code for name, error in errors.items()} == {"sub-103_T1w.nii.gz": "worker"}


@pytest.mark.slow
def test_what_actors_cannot_do_is_told_in_one_line(
    cluster: Path, scans: Path, model_folder: Path, tmp_path: Path
) -> None:
    own = preprocess_of(MagicFlow.load(model_folder))
    files = sorted(scans.rglob("*.nii.gz"))[:2]
    with pytest.raises(
        RunStoppedError, match=r"not a model folder: no such folder\. The rows so far are kept"
    ) as caught:
        rows_of(model_folder, own, files, tmp_path / "gone")
    assert "\n" not in str(caught.value)


OWN_RAY = """
import os, signal, sys
import ray
from fastflow import MagicFlow
from fastflow.archive.batches import Timings
from fastflow.archive.classify import preprocess_of
from fastflow.archive.inputs import Item
from fastflow.archive.ray_runner import ray_runner

if __name__ == "__main__":
    model, *files = sys.argv[1:]
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    run = ray_runner(model, preprocess_of(MagicFlow.load(model)), 4, 1, "float32", "cpu")
    batches = run((Item(file, file) for file in files), Timings())
    rows = next(batches)
    assert ray.is_initialized() and signal.getsignal(signal.SIGTERM) == before[1]
    assert ray.cluster_resources()["CPU"] == 2
    batches.close()
    assert not ray.is_initialized()
    assert dict(os.environ) == before[0], set(os.environ.items()) ^ set(before[0].items())
    assert signal.getsignal(signal.SIGTERM) == before[1]
    print(rows[0].result.shape)
"""


@pytest.mark.slow
def test_a_ray_of_its_own_ends_with_the_run(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(OWN_RAY)
    files = [str(file) for file in sorted(scans.rglob("*.nii.gz"))]
    command = [sys.executable, str(tmp_path / "run.py"), str(model_folder), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Progress bars and logs of Ray would be in the way of what a command prints.
    assert done.stdout == "(3, 2)\n"


def test_tasks_are_whole_batches_of_the_local_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.nii", "b.PNG", "c.png", "d.nii.gz", "e.nii", "f.png"]
    items = [Item(name, name) for name in names]

    def tasks(slices: str, inputs: int) -> list[list[str]]:
        monkeypatch.setattr(module, "MAX_TASK_INPUTS", inputs)
        return [
            [item.name for item in task]
            for task in module._tasks(iter(items), Preprocess((16, 16), slices), 5)
        ]

    assert tasks("center+-1", 1) == [["a.nii", "b.PNG", "c.png"], ["d.nii.gz"], ["e.nii", "f.png"]]
    assert tasks("center+-1", 4) == [["a.nii", "b.PNG", "c.png", "d.nii.gz"], ["e.nii", "f.png"]]
    # An input of more slices than a batch has is a batch of its own, and one of more than a task a task.
    assert tasks("center+-4", 1) == [["a.nii"], ["b.PNG", "c.png"], ["d.nii.gz"], ["e.nii"], ["f.png"]]
    assert tasks("center+-400", 9) == tasks("center+-4", 1)


def test_blocks_grow_and_are_taken_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BLOCK_INPUTS", 2)
    monkeypatch.setattr(module, "MAX_BLOCK_INPUTS", 6)
    taken = []

    def items() -> Iterator[Item]:
        for i in range(20):
            taken.append(i)
            yield Item(f"{i}.png", f"{i}.png")

    monkeypatch.setattr(module, "MAX_TASK_INPUTS", 1)
    monkeypatch.setattr(module, "MAX_TASK_SLICES", 1)
    blocks = module._blocks(module._tasks(items(), Preprocess((16, 16)), 1))
    assert len(next(blocks)) == 2
    assert len(taken) <= 3
    assert [len(block) for block in blocks] == [4, 6, 6, 2]


def test_without_ray_nothing_is_begun(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, mixed, got 'half'"):
        classify([scans], model_folder, tmp_path / "r", engine="ray", precision="half")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine 'ray' needs Ray: pip install 'fastflow\[ray\]'"):
        classify([scans], model_folder, tmp_path / "r", engine="ray")
    assert not (tmp_path / "r").exists()
