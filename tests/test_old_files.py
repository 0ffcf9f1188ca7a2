"""Files that the code of version 0.1.0 wrote still load, give the numbers that they gave, and run.

`fixtures/v0` holds a model folder, its export with all four graphs, and numbers that the old code computed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow import MagicFlow

OLD_FILES = Path(__file__).parent / "fixtures" / "v0"
# Roundings of float32, relative to log-likelihoods of some 70 nats and to latents of about 1.
ROUNDING = {"rtol": 1e-6, "atol": 2e-6}


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    with np.load(OLD_FILES / "numbers.npz") as stored:
        return dict(stored)


def test_an_old_model_gives_its_numbers(numbers: dict[str, np.ndarray]) -> None:
    model = MagicFlow.load(OLD_FILES / "model")
    images, labels = torch.from_numpy(numbers["images"]), torch.from_numpy(numbers["labels"])
    with torch.no_grad():
        latent, logdet = model(images, labels)
        log_probs = model.log_prob_all(images)
        back = model.inverse(torch.from_numpy(numbers["latent"]), labels)
    np.testing.assert_allclose(latent, numbers["latent"], **ROUNDING)
    np.testing.assert_allclose(logdet, numbers["logdet"], **ROUNDING)
    np.testing.assert_allclose(log_probs, numbers["log_probs"], **ROUNDING)
    np.testing.assert_allclose(back, images, atol=1e-5)
    assert model.config.class_names == ("flat", "striped") and model.temperature == 5.0
    assert model.metadata["preprocess"]["size"] == [8, 8]


def test_an_old_export_gives_its_numbers(numbers: dict[str, np.ndarray]) -> None:
    pytest.importorskip("onnxruntime")
    from fastflow.runtime.scorer import OnnxScorer

    scorer = OnnxScorer(OLD_FILES / "export", "cpu", threads=1)
    assert scorer.class_names == ("flat", "striped") and scorer.export.temperature == 5.0
    np.testing.assert_allclose(scorer.score(numbers["images"]), numbers["onnx"], **ROUNDING)


def test_an_old_program_runs() -> None:
    command = [sys.executable, "-I", str(OLD_FILES / "export" / "runtime.pyz"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "fastflow 0.1.0"), done.stderr
