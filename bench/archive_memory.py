"""How memory follows the number of inputs. ``python -m bench.archive_memory [OUT]``.

Runs over 100, 1,000 and 10,000 inputs (hard links to a few tiny volumes, a tiny model, one worker), each in a
process of its own; then the listing of a manifest of 1,000,000 paths, and what a resumed run keeps of a
journal of 1,000,000 rows. Peaks are VmHWM: of the process, and of the largest process that read files. Writes
OUT/archive_memory.csv (default: docs/data). Linux only.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

COUNTS, LISTED = (100, 1_000, 10_000), 1_000_000
VOLUMES, LINKS_A_FOLDER = 8, 1_000
COLUMNS = ("what", "inputs", "peak_mib", "before_mib", "worker_peak_mib", "seconds")
SHAPE = (14, 9, 15)


def peak_mib(process: int | str = "self") -> float:
    """The peak of resident memory (VmHWM) of a process in MiB; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def children() -> list[int]:
    """Processes that this one has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            # The thread has ended.
            continue
    return found


# -- inputs --------------------------------------------------------------------------------------------------


def write_links(folder: Path, count: int) -> None:
    """Write `VOLUMES` tiny volumes, and `count` hard links to them into ``folder/links``."""
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(VOLUMES):
        voxels = rng.normal(120.0, 10.0, SHAPE).astype(np.float32)
        volume = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
        (folder / f"volume-{i}").write_bytes(gzip.compress(volume.to_bytes()))
    for i in range(count):
        parent = folder / "links" / f"{i // LINKS_A_FOLDER:04d}"
        parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f"volume-{i % VOLUMES}", parent / f"sub-{i:07d}_T1w.nii.gz")


def write_model(folder: Path) -> None:
    """Save a tiny model that knows how to prepare the volumes."""
    import torch

    from fastflow import FlowConfig, MagicFlow
    from fastflow.data.preprocess import Preprocess

    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(2))
    model.initialize(torch.rand(8, 1, 16, 16) * 2 - 1)
    model.metadata["preprocess"] = Preprocess((16, 16), "center", (2.0, 2.0, 2.0), SHAPE).to_dict()
    model.eval().save(folder)


def write_paths(path: Path, count: int) -> None:
    """Write a manifest of `count` paths of files that do not exist."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write("path,label\n")
        stream.writelines(
            f"site-{i % 40:02d}/sub-{i:07d}/anat/sub-{i:07d}_T1w.nii.gz,A\n" for i in range(count)
        )


# -- measures, each run in a process of its own --------------------------------------------------------------


def run(links: str, model: str, out: str) -> dict[str, float]:
    """Classify everything below `links`."""
    from fastflow.archive.classify import classify

    largest = 0.0
    before = peak_mib()

    def progress(done: int, total: int | None, errors: int) -> None:
        nonlocal largest
        largest = max(largest, *map(peak_mib, children()), 0.0)

    start = time.perf_counter()
    summary = classify([links], model, out, workers=1, progress=progress)
    seconds = time.perf_counter() - start
    return measured(summary.counts["ok"], before, seconds) | {"worker_peak_mib": round(largest, 1)}


def listing(manifest: str) -> dict[str, float]:
    """Go through the inputs that a manifest names."""
    from fastflow.archive.inputs import Inputs

    before, start = peak_mib(), time.perf_counter()
    count = sum(1 for _ in Inputs((manifest,)))
    return measured(count, before, time.perf_counter() - start)


def resuming(count: str) -> dict[str, float]:
    """Make what a resumed run keeps of a journal with `count` rows."""
    from fastflow.archive.journal import KEY_BYTES, FinishedInputs

    def keys() -> Iterator[bytes]:
        for _ in range(int(count)):
            yield os.urandom(KEY_BYTES)

    before, start = peak_mib(), time.perf_counter()
    FinishedInputs(keys())
    return measured(int(count), before, time.perf_counter() - start)


def measured(inputs: int, before: float, seconds: float) -> dict[str, float]:
    """The measurements of this process so far, as a row."""
    return {
        "inputs": inputs,
        "peak_mib": round(peak_mib(), 1),
        "before_mib": round(before, 1),
        "seconds": round(seconds, 1),
    }


MEASURES: dict[str, Callable[..., dict[str, float]]] = {"run": run, "listing": listing, "resuming": resuming}


def alone(what: str, *arguments: object) -> dict[str, object]:
    """One of `MEASURES` in a fresh interpreter."""
    command = [sys.executable, "-m", "bench.archive_memory", "--measure", what, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"what": what, **json.loads(done.stdout.splitlines()[-1])}


def measure(counts: Sequence[int] = COUNTS, listed: int = LISTED) -> Iterator[dict[str, object]]:
    """Rows of runs over each of `counts` inputs, and of a listing and a resumed run of `listed` inputs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for count in counts:
            inputs = folder / str(count)
            inputs.mkdir()
            write_links(inputs, count)
            yield alone("run", inputs / "links", folder / "model", folder / f"results-{count}")
        write_paths(folder / "manifest.csv", listed)
        yield alone("listing", folder / "manifest.csv")
        yield alone("resuming", listed)


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--measure"]:
        print(json.dumps(MEASURES[arguments[1]](*arguments[2:])))
        return
    out = Path(arguments[0] if arguments else "docs/data")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure():
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
    with (out / "archive_memory.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
