"""Scores and decisions of an export, with graphs that NumPy can compute as well."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from fastflow.data.preprocess import Preprocess, to_unit_range
from fastflow.data.slices import load_image
from fastflow.decision import DecisionRule, decide, posterior
from fastflow.errors import ExportError, InvalidImageWarning, ReadoutError, VolumeError
from fastflow.models.scoring import from_uint8, posterior_from_log_probs
from fastflow.readout import GaussianReadout, gaps
from fastflow.runtime import scorer as module
from fastflow.runtime.scorer import OnnxScorer, spans
from fastflow.runtime.sessions import CPU_PROVIDER, BoundRunner, open_session
from tests.export.handmade import CLASSES, PREPROCESS, SHAPE, expected, images, score_graph, write_export

# -- scores --------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_graph(scorer: OnnxScorer) -> None:
    x = images(5)
    got = scorer.score(x)
    assert (got.shape, got.dtype) == ((5, 2), np.float64)
    np.testing.assert_allclose(got, expected(x), rtol=0, atol=1e-5)
    for dtype in (np.float64, ">f4"):
        assert np.array_equal(scorer.score(x.astype(dtype)), got)
    assert np.array_equal(scorer.score(np.asfortranarray(x)), got)
    half = x.astype(np.float16)
    assert np.array_equal(scorer.score(half), scorer.score(half.astype(np.float32)))
    assert scorer.score(x[:0]).shape == (0, 2)
    assert scorer.device == "cpu" and scorer.provider == CPU_PROVIDER and scorer.class_names == CLASSES


def test_8_bit_images_are_scaled_as_the_model_scales_them(scorer: OnnxScorer) -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_unit_range(levels), from_uint8(torch.from_numpy(levels)).numpy())
    pixels = np.random.default_rng(1).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    assert np.array_equal(scorer.score(pixels), scorer.score(from_uint8(torch.from_numpy(pixels)).numpy()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("buckets", [None, (2, 4)])
def test_images_that_are_not_finite_get_nan_and_change_no_other_row(
    export_folder: Path, bad: float, buckets: tuple[int, ...] | None
) -> None:
    scorer = OnnxScorer(export_folder, "cpu", threads=1, buckets=buckets)
    x = images(7).astype(np.float64)
    want = scorer.score(x)
    before = x.copy()
    x[[2, 6], 0, 3, 4] = bad
    with pytest.warns(
        InvalidImageWarning, match="2 of 7 images hold NaN or infinity, their scores are NaN: rows 2, 6"
    ):
        got = scorer.score(x)
    assert np.isnan(got[[2, 6]]).all()
    rest = [0, 1, 3, 4, 5]
    assert np.array_equal(got[rest], want[rest])
    # The caller's array stays as it was.
    assert x[2, 0, 3, 4] == bad or np.isnan(bad)
    assert np.array_equal(x[rest], before[rest])


def test_float32_images_of_the_caller_are_not_written_to(scorer: OnnxScorer) -> None:
    x = images(2)
    x[1, 0, 0, 0] = np.nan
    x.flags.writeable = False
    with pytest.warns(InvalidImageWarning):
        assert np.isnan(scorer.score(x)[1]).all()
    assert np.isnan(x[1, 0, 0, 0])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(2)[:, 0], r"images must be \(B, 1, 16, 16\), got \(2, 16, 16\)"),
        (np.zeros((2, 1, 16, 15), np.float32), r"images must be \(B, 1, 16, 16\), got \(2, 1, 16, 15\)"),
        (np.zeros((2, *SHAPE), np.int64), "float dtype in .-1, 1., or uint8, got int64"),
        (np.zeros((2, *SHAPE), np.complex64), "float dtype in .-1, 1., or uint8, got complex64"),
        (np.zeros((2, *SHAPE), bool), "float dtype in .-1, 1., or uint8, got bool"),
        (torch.zeros(2, *SHAPE), r"images must be a NumPy array \(B, 1, 16, 16\), got Tensor"),
    ],
)
def test_images_that_do_not_fit_are_told(scorer: OnnxScorer, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(x)


@given(st.integers(0, 70), st.sets(st.integers(1, 33), min_size=1, max_size=5))
def test_passes_cover_every_image_once(count: int, sizes: set[int]) -> None:
    buckets = sorted(sizes)
    passes = list(spans(count, buckets))
    assert [i for first, stop, _ in passes for i in range(first, stop)] == list(range(count))
    for first, stop, size in passes:
        assert size in sizes and stop - first <= size
        # A pass is filled up only where no smaller size holds the remaining images.
        assert stop - first == size or not any(stop - first <= other < size for other in buckets)
    assert all(stop - first == buckets[-1] for first, stop, _ in passes[:-1])


def test_passes_have_the_sizes_of_the_buckets_and_end_with_the_last_image(export_folder: Path) -> None:
    scorer = OnnxScorer(export_folder, "cpu", threads=1, buckets=(4, 2, 4))
    assert scorer.buckets == (2, 4)
    seen: list[np.ndarray] = []
    real = scorer._runner

    def noted(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return real(x)

    scorer._runner = noted
    x = images(7)
    got = scorer.score(x)
    assert [len(one) for one in seen] == [4, 4]
    assert np.array_equal(seen[1], x[[4, 5, 6, 6]])
    np.testing.assert_allclose(got, expected(x), rtol=0, atol=1e-5)


def test_a_row_depends_on_no_other_and_not_on_its_place(scorer: OnnxScorer) -> None:
    x = images(6)
    got = scorer.score(x)
    assert scorer.buckets == (1,)
    assert np.array_equal(scorer.score(x[::-1])[::-1], got)
    assert np.array_equal(np.concatenate([scorer.score(x[i : i + 1]) for i in range(6)]), got)


def test_what_the_runtime_cannot_do_is_told(scorer: OnnxScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(message: str) -> Any:
        def fail(x: np.ndarray) -> np.ndarray:
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(message)

        return fail

    monkeypatch.setattr(scorer, "_runner", run("Failed to allocate memory for requested buffer of size 5"))
    with pytest.raises(MemoryError, match="cannot score 1 images: Failed to allocate memory"):
        scorer.score(images(1))
    monkeypatch.setattr(scorer, "_runner", run("node Conv_3 failed"))
    with pytest.raises(RuntimeError, match="cannot score 1 images: node Conv_3 failed"):
        scorer.score(images(1))


# -- posteriors ----------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)), min_size=1, max_size=4
    ),
    st.floats(0.1, 1000),
    st.one_of(st.none(), st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3)),
)
def test_posterior_is_that_of_the_model(
    log_probs: list[tuple[float, ...]], temperature: float, shares: list[float] | None
) -> None:
    values = np.array(log_probs)
    prior = None if shares is None else [share / sum(shares) for share in shares]
    want = posterior_from_log_probs(torch.from_numpy(values), temperature, prior).numpy()
    np.testing.assert_allclose(posterior(values, temperature, prior), want, rtol=1e-9, atol=1e-300)


def test_the_prior_is_the_exports_own_unless_it_is_given(tmp_path: Path) -> None:
    scorer = OnnxScorer(write_export(tmp_path, prior=[0.8, 0.2]), "cpu", threads=1)
    x, even = images(3), [0.5, 0.5]
    scores = scorer.score(x)
    assert np.array_equal(scorer.posterior(x), posterior(scores, 5.0, [0.8, 0.2]))
    assert np.array_equal(scorer.posterior(x, even), posterior(scores, 5.0, even))
    np.testing.assert_allclose(scorer.posterior(x, [1.0, 0.0]), [[1.0, 0.0]] * 3)
    x[1] = np.nan
    with pytest.warns(InvalidImageWarning):
        assert np.isnan(scorer.posterior(x)).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    for prior in ([1.0], [0.5, 0.6], [1.5, -0.5], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="prior must be 2 probabilities that sum to 1"):
            scorer.posterior(x, prior)


# -- volumes -------------------------------------------------------------------------------------------------


def test_a_volume_is_classified_by_the_sum_of_its_slices(scorer: OnnxScorer, scans: Path) -> None:
    for label in CLASSES:
        for path in sorted((scans / label).iterdir()):
            found = scorer.classify_volume(path, prior=[0.6, 0.4])
            each = expected(to_unit_range(load_image(str(path), Preprocess.from_dict(PREPROCESS))))
            assert each.shape == (3, 2)
            logits = each.sum(axis=0) / 5.0 + np.log([0.6, 0.4])
            np.testing.assert_allclose(found.log_probs, each.sum(axis=0), rtol=0, atol=1e-4)
            np.testing.assert_allclose(found.posterior, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)
            assert found.margin == pytest.approx(abs(logits[0] - logits[1]), abs=1e-4)
            assert found.label == CLASSES[int(logits.argmax())]
            assert (found.path, found.typicality, found.flags) == (str(path), None, ())
    assert {scorer.classify_volume(path).label for path in (scans / "striped").iterdir()} == {"striped"}


def test_a_volume_unlike_the_validation_data_is_flagged(scans: Path, tmp_path: Path) -> None:
    path = scans / "flat/sub-000_T1w.nii.gz"
    plain = OnnxScorer(write_export(tmp_path / "plain"), "cpu").classify_volume(path)
    each = float(plain.log_probs.max()) / 3
    for middle, flagged in ((each, False), (each + 50.0, True)):
        values = np.linspace(middle - 1.0, middle + 1.0, 999).tolist()
        for slices, known in (("center+-1", True), ("4", False)):
            folder = write_export(
                tmp_path / f"{middle}{slices}", validation={"slices": slices, "log_prob": values}
            )
            found = OnnxScorer(folder, "cpu").classify_volume(path)
            if not known:
                assert (found.typicality, found.flags) == (None, ())
                continue
            assert found.typicality == pytest.approx(2 / 1000 if flagged else 1.0, abs=0.01)
            assert [code for code, _ in found.flags] == (["atypical"] if flagged else [])


def test_files_that_cannot_be_used_are_volume_errors(
    scorer: OnnxScorer, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = scans / "flat/sub-000_T1w.nii.gz"
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:200])
    for path, code in (
        (tmp_path / "gone.nii", "missing"),
        (tmp_path / "cut.nii.gz", "truncated"),
        (tmp_path, "not_a_file"),
    ):
        with pytest.raises(VolumeError) as caught:
            scorer.classify_volume(path)
        assert (caught.value.code, caught.value.path) == (code, str(path))
    monkeypatch.setattr(scorer, "score", lambda x: np.full((3, 2), -np.inf))
    with pytest.raises(VolumeError, match="log-likelihood that is not finite") as caught:
        scorer.classify_volume(good)
    assert caught.value.code == "likelihood"

    def broken(path: str, preprocess: Preprocess) -> None:
        raise KeyError("affine")

    monkeypatch.setattr(module, "read_image", broken)
    with pytest.raises(VolumeError, match="KeyError: 'affine'") as caught:
        scorer.classify_volume(good)
    assert caught.value.code == "unreadable"


def test_png_slices_need_pillow(scorer: OnnxScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(image).save(tmp_path / "a.png")
    want = expected(to_unit_range(image[None, None]))[0]
    np.testing.assert_allclose(scorer.classify_volume(tmp_path / "a.png").log_probs, want, atol=1e-5)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(VolumeError, match="PNG image, which Pillow reads: pip install pillow"):
        scorer.classify_volume(tmp_path / "a.png")


def test_an_export_that_knows_no_preprocessing_scores_arrays_only(scans: Path, tmp_path: Path) -> None:
    scorer = OnnxScorer(write_export(tmp_path, preprocess=None), "cpu")
    assert scorer.score(images(1)).shape == (1, 2)
    with pytest.raises(ExportError, match=r"export\.json does not say how images are prepared"):
        scorer.classify_volume(scans / "flat/sub-000_T1w.nii.gz")


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            score_graph(image="x"),
            r"must have input \[\('image', 'tensor\(float\)', \(1, 16, 16\)\)\] after the batch, has \[\('x'",
        ),
        (
            score_graph(shape=(1, 8, 32)),
            r"must have input .* has \[\('image', 'tensor\(float\)', \(1, 8, 32\)\)\]",
        ),
        (
            score_graph(output=TensorProto.FLOAT),
            r"must have output \[\('log_probs', 'tensor\(double\)', \(2,\)\)\]",
        ),
        (score_graph(batch=2), "input image has a fixed number of images"),
    ],
)
def test_graphs_that_are_not_the_score_graph(tmp_path: Path, graph: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        OnnxScorer(write_export(tmp_path, graph))


def test_arguments_that_do_not_fit(export_folder: Path) -> None:
    for buckets in ((), (0,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="buckets must be integers of at least 1, got"):
            OnnxScorer(export_folder, buckets=buckets)
    for threads in (0, 1.0, True):
        with pytest.raises(ValueError, match="threads must be an integer of at least 1, got"):
            OnnxScorer(export_folder, threads=threads)
    with pytest.raises(ValueError, match="cuda_graph needs CUDA, the session uses CPUExecutionProvider"):
        OnnxScorer(export_folder, "cpu", cuda_graph=True)


# -- the CUDA path -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True])
def test_on_cuda_each_size_has_its_tensors_and_its_graph(
    export_folder: Path, fake: Any, graphs: bool
) -> None:
    ort = fake()
    scorer = OnnxScorer(export_folder, cuda_graph=graphs)
    assert ort.asked[0][0][1].get("enable_cuda_graph") == ("1" if graphs else None)
    plain = OnnxScorer(export_folder, "cpu")
    for count in (21, 3, 21, 1, 0):
        x = images(count, seed=count)
        np.testing.assert_allclose(scorer.score(x), plain.score(x), rtol=0, atol=1e-5)
    # 21 images make passes of 16 and 8, 3 images one of 4.
    assert [one["shape"][0] for one in ort.bound] == [16, 8, 4, 1]
    assert {(one["device"], one["index"]) for one in ort.bound} == {("cuda", 0)}
    assert ort.runs == (["1", "2", "3", "1", "2", "4"] if graphs else [None] * 6)


@pytest.mark.parametrize("kind", ["plain", "bound"])
def test_threads_do_not_mix_their_images_up(export_folder: Path, kind: str) -> None:
    scorer = OnnxScorer(export_folder, "cpu", threads=1, buckets=(4,))
    if kind == "bound":
        session = open_session(export_folder / "score.onnx", "cpu", threads=1)
        scorer._runner = BoundRunner(session, onnxruntime, 2, "cpu")
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = images(8, seed)
        want = expected(x)
        for _ in range(30):
            if not np.allclose(scorer.score(x), want, rtol=0, atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- read-out ------------------------------------------------------------------------------------------------


def test_an_export_decides_by_its_readout_as_the_model_would(scans: Path, tmp_path: Path) -> None:
    slices = PREPROCESS["slices"]
    count = len(load_image(str(scans / "flat/sub-000_T1w.nii.gz"), Preprocess.from_dict(PREPROCESS)))
    file = scans / "striped/sub-103_T1w.nii.gz"
    log_probs = expected(to_unit_range(load_image(str(file), Preprocess.from_dict(PREPROCESS))))
    center = gaps(log_probs.mean(axis=0))
    best = int(log_probs.sum(axis=0).argmax())
    # The class that the likelihoods rank second lies where the volume is.
    means = center + np.array([[1.0], [0.0]] if best == 0 else [[0.0], [-1.0]])
    readout = GaussianReadout(CLASSES, means, np.eye(1), 1.5, slices, (count, count))
    scorer = OnnxScorer(write_export(tmp_path / "e", readout=readout.to_dict()), "cpu", threads=1)
    plain, found = scorer.classify_volume(file), scorer.classify_volume(file, readout="gaussian")
    rule = DecisionRule(prior=scorer.export.prior, readout=readout)
    np.testing.assert_allclose(found.posterior, decide(log_probs, rule).posterior, atol=1e-5)
    assert found.label == CLASSES[1 - best] != found.argmax == plain.argmax == plain.label
    assert np.array_equal(found.log_probs, plain.log_probs) and found.typicality == plain.typicality


def test_an_export_without_a_readout_says_how_to_get_one(scorer: OnnxScorer, scans: Path) -> None:
    with pytest.raises(ReadoutError, match=r"no read-out; fit one with .*export again"):
        scorer.classify_volume(scans / "flat/sub-000_T1w.nii.gz", readout="gaussian")
    with pytest.raises(ValueError, match="readout must be one of"):
        scorer.readout("svm")
