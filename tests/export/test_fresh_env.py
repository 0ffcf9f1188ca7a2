"""The three commands of the deployment guide, in an environment that has no PyTorch, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "deploy.md"


def commands() -> list[str]:
    """The lines of the guide's first block."""
    block = re.search(r"^```\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    return [line.split("  #")[0].strip() for line in block[1].splitlines() if line.strip()]


def run(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "TRITON_INTERPRET")
        },
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **variables,
    }
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )


def test_the_guide_begins_with_three_commands():
    export, install, classify = commands()
    assert export.startswith("fastflow export model --out deploy")
    assert "numpy nibabel onnxruntime" in install and "torch" not in install
    assert classify.endswith("deploy/runtime.pyz scan.nii.gz")


@pytest.mark.slow
def test_three_commands_lead_from_a_model_to_a_prediction_without_torch(model_folder, scans, tmp_path):
    export, install, classify = commands()
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    shutil.copytree(model_folder, here / "model")
    scan = next((scans / "striped").glob("*.nii.gz"))
    done = run(export, here)
    assert done.returncode == 0, done.stderr
    assert "log odds error" in done.stdout
    # Nothing but the folder goes to the other place.
    shutil.move(here / "deploy", there / "deploy")
    shutil.copy(scan, there / "scan.nii.gz")
    done = run(install, there, PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    assert done.returncode == 0, done.stderr
    packages = json.loads(run("env/bin/python -m pip list --format json", there).stdout)
    assert {"torch", "triton", "fastflow", "scipy", "pillow", "typer"}.isdisjoint(
        package["name"] for package in packages
    )
    done = run(classify, there)
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider" in done.stderr
    header, row = (line.split("\t") for line in done.stdout.splitlines())
    got = dict(zip(header, row, strict=True))

    import torch

    from fastflow import MagicFlow
    from fastflow.archive.classify import preprocess_of
    from fastflow.data.slices import load_image
    from fastflow.models.scoring import posterior_from_log_probs, score_slices

    model = MagicFlow.load(model_folder)
    log_probs = score_slices(model, load_image(str(scan), preprocess_of(model))).sum(axis=0)
    posterior = posterior_from_log_probs(torch.from_numpy(log_probs)[None], model.temperature)[0]
    assert got["status"] in ("ok", "flagged")
    assert got["predicted"] == model.config.class_names[int(posterior.argmax())]
    assert float(got["posterior"]) == pytest.approx(float(posterior.max()), abs=1e-4)
