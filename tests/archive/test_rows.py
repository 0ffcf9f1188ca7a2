from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fastflow.archive.batches import ScoredInput
from fastflow.archive.inputs import Item
from fastflow.archive.rows import CODES, STATUSES, Settings, make_row
from fastflow.data.preprocess import Preprocess
from fastflow.data.statistics import measure
from fastflow.data.training_images import TrainingImages
from fastflow.decision import decide
from fastflow.errors import VolumeError
from fastflow.novelty import KnownScanners

SETTINGS = Settings(
    "abc", ("old", "young"), 2.0, (0.75, 0.25), Preprocess((16, 16)), "sum", "relpath", 256, None
)
SLICES = np.array([[-300.0, -301.0], [-302.0, -300.0]])


def row_of(
    result: np.ndarray | VolumeError, settings: Settings = SETTINGS, **changes: object
) -> dict[str, object]:
    scored = ScoredInput(Item("/x/a.nii", "a.nii", "old"), 7, 8, (), result, 0.1234567)
    return make_row(dataclasses.replace(scored, **changes), settings)  # type: ignore[arg-type]


def test_a_row_holds_the_decision() -> None:
    decision = decide(SLICES, SETTINGS.rule)
    row = row_of(SLICES)
    known = {"path": "a.nii", "size": 7, "mtime_ns": 8, "label": "old", "seconds": 0.123457, "status": "ok"}
    assert known.items() <= row.items()
    assert (row["logp"], row["posterior"]) == ([-602.0, -601.0], decision.posterior.tolist())
    assert (row["predicted"], row["margin"]) == ("old", pytest.approx(math.log(3.0) - 0.5))
    assert row["bits_per_dim"] == pytest.approx(-(-301.0 / 256 + math.log(2 / 255)) / math.log(2.0))
    assert (row["typicality"], row["error_code"], row["error_message"]) == (None, None, None)
    assert row_of(SLICES, dataclasses.replace(SETTINGS, combine="mean"))["logp"] == [-301.0, -300.5]
    assert len(str(row_of(SLICES, dataclasses.replace(SETTINGS, id_from="hash"))["path"])) == 32


def test_doubts_of_the_file_come_before_that_of_the_model() -> None:
    settings = dataclasses.replace(SETTINGS, validation=tuple(np.linspace(0.0, 1.0, 999)))
    row = row_of(SLICES, settings, flags=(("orientation_code", "unknown"),))
    assert (row["status"], row["error_code"]) == ("flagged", "orientation_code;atypical")
    assert row["error_message"] == "unknown; typicality p-value 0.002"
    assert row["predicted"] == "old"


def test_images_unlike_those_of_training_are_flagged_before_their_likelihood() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(100, 20, (20, 16, 16)).clip(0, 255).astype(np.uint8)
    images = TrainingImages.of(measure(pixels, 0.0), np.arange(20), "center")
    settings = dataclasses.replace(SETTINGS, images=images, validation=(-200.0, -100.0))
    row = row_of(SLICES, settings, measured=measure(255 - pixels[:1] // 2, 0.5))
    assert (row["status"], row["error_code"]) == ("flagged", "unlike_training;atypical")
    assert "share of voxels below 0 50 % (training 0 %)" in str(row["error_message"])
    wide = dataclasses.replace(settings, accepted=(-400.0, 0.0))
    assert row_of(SLICES, wide, measured=measure(pixels[:1], 0.0))["status"] == "ok"
    # An image that was not measured, and a model without statistics, have nothing to compare.
    assert row_of(SLICES, wide)["status"] == "ok"
    assert row_of(SLICES, measured=measure(255 - pixels[:1] // 2, 0.5))["status"] == "ok"


def test_scans_of_an_unknown_scanner_are_flagged_last() -> None:
    known = KnownScanners("center", np.zeros((2, 8)), np.eye(8), tuple(range(30)))
    settings = dataclasses.replace(SETTINGS, scanners=known, validation=(-200.0, -100.0))
    features = {"correlations": np.full((2, 2, 1, 2), 0.1), "grain": np.full((2, 6), 50.0)}
    assert row_of(SLICES, settings, **features)["scanner_p"] == pytest.approx(1 / 31)
    assert row_of(SLICES, settings, **features)["error_code"] == "atypical"
    limited = dataclasses.replace(settings, reject_below=0.05)
    assert row_of(SLICES, limited, **features)["error_code"] == "atypical;unknown_scanner"
    near = features | {"grain": np.zeros((2, 6))}
    assert row_of(SLICES, limited, **near)["error_code"] == "atypical"
    # An input without features has nothing to compare.
    assert row_of(SLICES, limited)["scanner_p"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_likelihoods_that_are_not_finite_are_an_error(value: float) -> None:
    row = row_of(np.array([[-1.0, value]]))
    assert (row["status"], row["error_code"], row["error_message"]) == (
        "error",
        "likelihood",
        CODES["likelihood"],
    )
    assert "predicted" not in row


def test_a_file_that_could_not_be_read_is_an_error() -> None:
    row = row_of(VolumeError("/x/a.nii", "crc", "is damaged"))
    assert (row["status"], row["error_code"], row["error_message"]) == ("error", "crc", "is damaged")
    assert row["status"] in STATUSES


def test_columns_that_are_the_same_in_every_row() -> None:
    fixed = {"readout": "argmax", "temperature": 2.0, "prior": "0.75 0.25", "model_hash": "abc"}
    assert SETTINGS.constant == fixed
    assert dataclasses.replace(SETTINGS, prior=None).constant["prior"] == "uniform"
