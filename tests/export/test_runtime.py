"""`fastflow.export.runtime`, the face of `fastflow.runtime`: importable and runnable where PyTorch is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastflow.export import runtime

from fastflow.runtime import command, export_folder, scorer, sessions

# A process that imports any of these where an export runs fails.
CODE = """
import runpy, sys
REFUSED = "torch triton scipy PIL typer rich sklearn onnx matplotlib safetensors".split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError as error:
    print(error)
sys.argv[0] = "runtime"
runpy.run_module("fastflow.export.runtime", run_name="__main__", alter_sys=True)
"""


def test_it_runs_where_only_numpy_nibabel_and_onnxruntime_can_be_imported(
    export_folder: Path, scans: Path
) -> None:
    files = (scans / "striped/sub-103_T1w.nii.gz", "nowhere.nii")
    arguments = [sys.executable, "-c", CODE, str(export_folder), *map(str, files)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    # The first line shows that the block works.
    blocked, head, *rows = (line.split("\t") for line in done.stdout.splitlines())
    assert blocked == ["blocked: torch"] and head[2] == "predicted"
    assert [row[2] for row in rows] == ["striped", ""]


def test_names_are_those_of_the_torch_free_package() -> None:
    homes = (command, export_folder, scorer, sessions)
    for name in set(runtime.__all__) - {"NOT_FINITE", "posterior"}:
        assert any(getattr(home, name, None) is getattr(runtime, name) for home in homes), name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Bound", "BoundRunner"),
        ("CHOICES", "PROVIDER_CHOICES"),
        ("CUDA", "CUDA_PROVIDER"),
        ("Plain", "PlainRunner"),
        ("Run", "Runner"),
    ],
)
def test_old_names_warn(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"runtime\.{old} is now .*\.{new}; the old name goes in"):
        assert getattr(runtime, old) is getattr(sessions, new)


def test_names_that_never_were_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = runtime.Nothing
