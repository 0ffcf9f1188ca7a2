"""Score graphs with a second output, and the decision that it allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastflow.data.grain import grain_numbers
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image
from fastflow.errors import ExportError
from fastflow.novelty import KnownScanners
from fastflow.runtime.command import main
from fastflow.runtime.scorer import OnnxScorer
from fastflow.runtime.sessions import BoundRunner, PlainRunner, open_session
from tests.export.handmade import PREPROCESS, images, score_graph, write_export

FACTORS = np.array([0.5, -0.25])


def graph_with_correlations(name: str = "correlations", last: int = 2) -> onnx.ModelProto:
    """The scores times two factors, as if they were correlations (B, 2, 1, 2) of one block."""
    model = score_graph()
    apart = numpy_helper.from_array(np.array([-1, 2, 1, 1]), "apart")
    model.graph.node.append(helper.make_node("Constant", [], ["apart"], value=apart))
    model.graph.initializer.append(numpy_helper.from_array(FACTORS[None, None, None, :last], "factors"))
    model.graph.node.append(helper.make_node("Reshape", ["log_probs", "apart"], ["each"]))
    model.graph.node.append(helper.make_node("Mul", ["each", "factors"], [name]))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["batch", 2, 1, last]))
    return model


def document(slices: str = "center+-1", validation: int = 30) -> dict[str, Any]:
    scores = tuple(float(i) for i in range(validation))
    return KnownScanners(slices, np.zeros((2, 8)), np.eye(8), scores).to_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("latents"), graph_with_correlations(), scanners=document())


def test_both_outputs_come_from_one_pass(folder: Path, export_folder: Path) -> None:
    scorer = OnnxScorer(folder, "cpu", threads=1)
    given = images(3)
    log_probs, correlations = scorer.score_with_latents(given)
    assert scorer.latent_blocks == 1 and correlations.shape == (3, 2, 1, 2)
    np.testing.assert_array_equal(log_probs, OnnxScorer(export_folder, "cpu", threads=1).score(given))
    np.testing.assert_array_equal(log_probs, scorer.score(given))
    np.testing.assert_allclose(correlations, log_probs[:, :, None, None] * FACTORS)
    given[1, 0, 3, 3] = np.nan
    with pytest.warns(UserWarning, match="rows 1"):
        again, missing = scorer.score_with_latents(given)
    assert np.isnan(missing[1]).all() and np.isnan(again[1]).all()
    np.testing.assert_array_equal(missing[[0, 2]], correlations[[0, 2]])
    assert scorer.score_with_latents(given[:0])[1].shape == (0, 2, 1, 2)


def test_bound_tensors_hold_both_outputs(folder: Path) -> None:
    session = open_session(folder / "score.onnx", "cpu", threads=1)
    bound, plain = BoundRunner(session, onnxruntime, 2, "cpu", latent_blocks=1), PlainRunner(session)
    for got, wanted in zip(bound.with_latents(images(4)), plain.with_latents(images(4)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(bound(images(4)), plain(images(4)))


def test_a_volume_gets_its_p_value_and_flag(folder: Path, scans: Path, capsys: Any) -> None:
    scan = scans / "striped/sub-103_T1w.nii.gz"
    scorer = OnnxScorer(folder, "cpu", threads=1)
    slices = load_image(str(scan), Preprocess.from_dict(PREPROCESS))
    known = scorer.scanners
    assert known is not None
    wanted = known.p_of_volume(*scorer.score_with_latents(slices), grain_numbers(slices[:, 0]))
    plain = scorer.classify_volume(scan)
    assert plain.scanner_p == wanted == pytest.approx(1 / 31) and plain.flags == ()
    flagged = scorer.classify_volume(scan, reject_below=0.05)
    assert [code for code, _ in flagged.flags] == ["unknown_scanner"]
    assert main([str(folder), str(scan), "--json", "--reject-below", "0.05"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["status"], row["scanner_p"]) == ("flagged", pytest.approx(1 / 31))
    assert row["error"].startswith("unknown_scanner: ")


def test_without_graph_document_or_slices_there_is_no_p_value(
    folder: Path, export_folder: Path, scans: Path, tmp_path: Path, capsys: Any
) -> None:
    scan = scans / "flat/sub-000_T1w.nii.gz"
    other = document("center")
    for place in (
        export_folder,
        write_export(tmp_path / "old graph", scanners=document()),
        write_export(tmp_path / "slices", graph_with_correlations(), scanners=other),
    ):
        scorer = OnnxScorer(place, "cpu", threads=1)
        assert scorer.classify_volume(scan).scanner_p is None
        with pytest.raises(ValueError, match="knows its scanners"):
            scorer.classify_volume(scan, reject_below=0.05)
        assert main([str(place), str(scan), "--reject-below", "0.05"]) == 2
    with pytest.raises(ExportError, match="no correlations"):
        OnnxScorer(export_folder, "cpu", threads=1).score_with_latents(images(1))
    with pytest.raises(ValueError, match="least p-value of 30"):
        OnnxScorer(folder, "cpu", threads=1).classify_volume(scan, reject_below=0.01)
    damaged = write_export(tmp_path / "damaged", scanners={"format": 1})
    with pytest.raises(ExportError, match="scanners have format 1"):
        OnnxScorer(damaged, "cpu", threads=1)


@pytest.mark.parametrize(("name", "last"), [("latents", 2), ("correlations", 1)])
def test_another_second_output_is_refused(tmp_path: Path, name: str, last: int) -> None:
    folder = write_export(tmp_path, graph_with_correlations(name, last))
    with pytest.raises(ExportError, match="must have output"):
        OnnxScorer(folder, "cpu", threads=1)
