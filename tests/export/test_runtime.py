from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fastflow.export import _session, runtime
from fastflow.export._session import CPU, CUDA, Bound, Plain, default_threads, open_session
from fastflow.export.runtime import OnnxScorer, main, posterior, read_export, spans
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fastflow.data.preprocess import Preprocess, to_unit_range
from fastflow.data.slices import load_image
from fastflow.errors import ExportError, InvalidImageWarning, VolumeError
from fastflow.models.scoring import from_uint8, posterior_from_log_probs
from tests.export.handmade import CLASSES, PREPROCESS, SHAPE, document, expected, score_graph, weights, write_export

# What must not be there where an export runs; a process that imports any of it fails.
BLOCKED = """
import sys
REFUSED = "torch triton scipy PIL typer rich sklearn onnx matplotlib safetensors".split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
"""


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def scorer(export_folder: Path) -> OnnxScorer:
    return OnnxScorer(export_folder, "cpu", threads=1)


# -- scores ---------------------------------------------------------------------------------------------------------------


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
    assert scorer.device == "cpu" and scorer.provider == CPU and scorer.class_names == CLASSES


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
    with pytest.warns(InvalidImageWarning, match="2 of 7 images hold NaN or infinity, their scores are NaN: rows 2, 6"):
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
        # Only where nothing smaller holds what is left.
        assert stop - first == size or not any(stop - first <= other < size for other in buckets)
    assert all(stop - first == buckets[-1] for first, stop, _ in passes[:-1])


def test_passes_have_the_sizes_of_the_buckets_and_end_with_the_last_image(export_folder: Path) -> None:
    scorer = OnnxScorer(export_folder, "cpu", threads=1, buckets=(4, 2, 4))
    assert scorer.buckets == (2, 4)
    seen: list[np.ndarray] = []
    real = scorer._run

    def noted(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return real(x)

    scorer._run = noted
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

    monkeypatch.setattr(scorer, "_run", run("Failed to allocate memory for requested buffer of size 5"))
    with pytest.raises(MemoryError, match="cannot score 1 images: Failed to allocate memory"):
        scorer.score(images(1))
    monkeypatch.setattr(scorer, "_run", run("node Conv_3 failed"))
    with pytest.raises(RuntimeError, match="cannot score 1 images: node Conv_3 failed"):
        scorer.score(images(1))


# -- posteriors -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)), min_size=1, max_size=4),
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


# -- volumes --------------------------------------------------------------------------------------------------------------


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
            folder = write_export(tmp_path / f"{middle}{slices}", validation={"slices": slices, "log_prob": values})
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
        (tmp_path, "unsupported_format"),
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

    monkeypatch.setattr(runtime, "read_image", broken)
    with pytest.raises(VolumeError, match="KeyError: 'affine'") as caught:
        scorer.classify_volume(good)
    assert caught.value.code == "unreadable"


def test_png_slices_need_pillow(scorer: OnnxScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.fromarray(np.full((16, 16), 100, dtype=np.uint8)).save(tmp_path / "a.png")
    want = expected(to_unit_range(np.full((1, *SHAPE), 100, dtype=np.uint8)))[0]
    np.testing.assert_allclose(scorer.classify_volume(tmp_path / "a.png").log_probs, want, atol=1e-5)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(VolumeError, match="PNG image, which Pillow reads: pip install pillow"):
        scorer.classify_volume(tmp_path / "a.png")


def test_an_export_that_knows_no_preprocessing_scores_arrays_only(scans: Path, tmp_path: Path) -> None:
    scorer = OnnxScorer(write_export(tmp_path, preprocess=None), "cpu")
    assert scorer.score(images(1)).shape == (1, 2)
    with pytest.raises(ExportError, match=r"export\.json does not say how images are prepared"):
        scorer.classify_volume(scans / "flat/sub-000_T1w.nii.gz")


# -- folders that are none, damaged or of two exports ---------------------------------------------------------------------


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not an export folder: no such folder"):
        OnnxScorer(tmp_path / "gone")
    with pytest.raises(ExportError, match=r"is not an export folder: no export\.json in it"):
        OnnxScorer(tmp_path)
    for content, message in (
        (b"{", r"export\.json cannot be read"),
        (b"\xff\xfe", r"export\.json cannot be read"),
        (b"[" * 100_000, r"export\.json cannot be read"),
        (b"[1]", "must have format 1, got 'list'"),
        (b'{"format": 2}', "must have format 1, got 2"),
        (b'{"format": 1, "graphs": {}, "temperature": 1}', "lacks model_hash, weights_sha256, precision, class_names"),
    ):
        (tmp_path / "export.json").write_bytes(content)
        with pytest.raises(ExportError, match=message):
            OnnxScorer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": []}, "class_names must be a list of names"),
        ({"class_names": "ab"}, "class_names must be a list of names"),
        ({"class_names": [1, 2]}, "class_names must be a list of names"),
        ({"input_shape": [1, 16]}, r"input_shape must be \[C, H, W\]"),
        ({"input_shape": [1, 0, 16]}, r"input_shape must be \[C, H, W\]"),
        ({"dims": 255}, "dims must be the product of input_shape"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": "warm"}, "could not convert"),
        ({"prior": [1.0]}, "prior must be 2 probabilities"),
        ({"prior": None}, "prior must be 2 probabilities"),
        ({"preprocess": {"size": [16]}}, "size must be 2 positive whole numbers"),
        ({"preprocess": 3}, "not usable"),
        ({"validation": {"log_prob": ["a"]}}, "could not convert"),
        ({"graphs": {"score": "../score.onnx"}}, "graphs and sha256 must be files of the folder"),
        ({"graphs": ["score"]}, "not usable"),
        ({"sha256": {"/etc/passwd": "00"}}, "graphs and sha256 must be files of the folder"),
        ({"model_hash": 7}, "model_hash must be text"),
    ],
)
def test_documents_that_are_not_usable(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "export.json").write_text(json.dumps({"sha256": {}} | document(**changes)))
    with pytest.raises(ExportError, match=rf"export\.json is not usable: .*{message}|export\.json is {message}"):
        read_export(tmp_path)


@pytest.mark.parametrize("name", ["score.onnx", "weights.data"])
def test_files_that_were_tampered_with_or_are_missing(tmp_path: Path, name: str) -> None:
    file = write_export(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ExportError, match=rf"{name} has sha256 [0-9a-f]{{64}}, but export\.json records [0-9a-f]{{64}}"):
        OnnxScorer(tmp_path)
    file.unlink()
    for verify in (True, False):
        with pytest.raises(ExportError, match=rf"{name} is missing: export\.json lists it"):
            OnnxScorer(tmp_path, verify_hashes=verify)
    file.mkdir()
    with pytest.raises(ExportError, match=rf"{name} cannot be read: Is a directory"):
        OnnxScorer(tmp_path)


def test_hashes_are_not_looked_at_where_nobody_asks(tmp_path: Path) -> None:
    file = write_export(tmp_path) / "weights.data"
    changed = weights() * 2
    file.write_bytes(changed.tobytes())
    x = images(2)
    got = OnnxScorer(tmp_path, "cpu", verify_hashes=False).score(x)
    np.testing.assert_allclose(got, 2 * expected(x) + 300.0, atol=1e-4)


def test_graphs_that_are_not_needed_need_not_be_there(tmp_path: Path) -> None:
    folder = write_export(tmp_path, graphs={"sample": "sample.onnx", "score": "score.onnx"})
    values = json.loads((folder / "export.json").read_text())
    values["sha256"]["sample.onnx"] = "00" * 32
    (folder / "export.json").write_text(json.dumps(values))
    assert OnnxScorer(folder).score(images(1)).shape == (1, 2)
    values["graphs"].pop("score")
    (folder / "export.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match="holds no score graph, only sample: export it with --graphs score"):
        OnnxScorer(folder)
    values["graphs"] = {"score": "score.onnx"}
    values["sha256"].pop("score.onnx")
    (folder / "export.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"has no sha256 of score\.onnx"):
        OnnxScorer(folder)


@pytest.mark.parametrize(
    ("props", "message"),
    [
        (dict.fromkeys(["prior", "temperature", "weights"]), r"score\.onnx has no metadata temperature, prior, weights: it is"),
        ({"model_hash": "fedcba9876543210"}, r"score\.onnx has model_hash fedcba.*, but export\.json says 0123456789abcdef"),
        ({"class_names": '["striped", "flat"]'}, r"has class_names .*, but export\.json says \['flat', 'striped'\]"),
        ({"temperature": "1.0"}, r"has temperature 1\.0, but export\.json says 5\.0"),
        ({"temperature": "warm"}, r"has temperature warm, but export\.json says 5\.0"),
        ({"preprocess": "null"}, "has preprocess null, but"),
        ({"graph": "latent"}, "has graph latent, but"),
        (
            {"weights": json.dumps({"file": "weights.data", "sha256": "00"})},
            r"belongs to weights 00, which are not those of export",
        ),
        ({"weights": "{}"}, r"has metadata weights '\{\}', which is no file with its sha256"),
        ({"weights": "weights.data"}, "has metadata weights 'weights.data', which is no file"),
    ],
)
def test_metadata_that_are_missing_or_of_another_export(tmp_path: Path, props: dict[str, str | None], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        OnnxScorer(write_export(tmp_path, props=props))


def test_weights_may_be_in_the_graph(tmp_path: Path) -> None:
    folder = write_export(tmp_path, props={"weights": "null"})
    graph = helper.make_model(score_graph().graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(graph, {p.key: p.value for p in onnx.load(folder / "score.onnx").metadata_props})
    onnx.save(graph, folder / "score.onnx")
    (folder / "weights.data").unlink()
    values = json.loads((folder / "export.json").read_text())
    values["sha256"] = {"score.onnx": hashlib.sha256((folder / "score.onnx").read_bytes()).hexdigest()}
    (folder / "export.json").write_text(json.dumps(values))
    np.testing.assert_allclose(OnnxScorer(folder).score(images(2)), expected(images(2)), atol=1e-5)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            score_graph(image="x"),
            r"must have input \[\('image', 'tensor\(float\)', \(1, 16, 16\)\)\] after the batch, has \[\('x'",
        ),
        (score_graph(shape=(1, 8, 32)), r"must have input .* has \[\('image', 'tensor\(float\)', \(1, 8, 32\)\)\]"),
        (score_graph(output=TensorProto.FLOAT), r"must have output \[\('log_probs', 'tensor\(double\)', \(2,\)\)\]"),
        (score_graph(batch=2), "input image has a fixed number of images"),
    ],
)
def test_graphs_that_are_not_the_score_graph(tmp_path: Path, graph: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        OnnxScorer(write_export(tmp_path, graph))


def test_a_graph_that_onnxruntime_cannot_load(tmp_path: Path) -> None:
    (write_export(tmp_path) / "score.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"score\.onnx cannot be loaded by onnxruntime \d.*Protobuf parsing failed"):
        OnnxScorer(tmp_path, verify_hashes=False)


# -- providers ------------------------------------------------------------------------------------------------------------


class FakeOrt(types.SimpleNamespace):
    """An ``onnxruntime`` with CUDA, which works or does not. Sessions of it compute on the CPU all the same."""

    def __init__(self, works: bool | Exception = True, cuda: bool = True) -> None:
        super().__init__(**{name: getattr(onnxruntime, name) for name in ("SessionOptions", "ExecutionMode", "__version__")})
        self.works, self.cuda = works, cuda
        self.asked: list[Any] = []
        self.preloads = 0
        self.bound: list[dict[str, Any]] = []
        self.runs: list[str | None] = []
        fake = self

        class OrtValue:
            @staticmethod
            def ortvalue_from_numpy(array: np.ndarray, device: str, index: int) -> Any:
                fake.bound.append({"shape": array.shape, "device": device, "index": index})
                return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu", 0)

            @staticmethod
            def ortvalue_from_shape_and_type(shape: list[int], kind: type, device: str, index: int) -> Any:
                return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cpu", 0)

        class RunOptions:
            graph: str | None = None

            def add_run_config_entry(self, key: str, value: str) -> None:
                assert key == "gpu_graph_id"
                self.graph = value

        self.OrtValue, self.RunOptions = OrtValue, RunOptions

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU] if self.cuda else [CPU]

    def preload_dlls(self) -> None:
        self.preloads += 1
        print("Failed to load libcudnn.so.9")

    def InferenceSession(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        self.asked.append(providers)
        names = [one if isinstance(one, str) else one[0] for one in providers]
        if CUDA in names and isinstance(self.works, Exception):
            raise self.works
        session = onnxruntime.InferenceSession(path, options, providers=[CPU])
        used = names if self.works is True else [CPU]
        fake = self

        class Session:
            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def get_providers(self) -> list[str]:
                return used

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                fake.runs.append(options.graph)
                session.run_with_iobinding(binding)

        return Session()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*arguments: Any, **options: Any) -> FakeOrt:
        ort = FakeOrt(*arguments, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", ort)
        return ort

    return install


def test_auto_takes_cuda_where_it_works(export_folder: Path, fake: Any, caplog: pytest.LogCaptureFixture) -> None:
    ort = fake()
    with caplog.at_level(logging.INFO, "fastflow.export"):
        scorer = OnnxScorer(export_folder)
    ((name, options), second), *rest = ort.asked
    assert (name, second, rest, ort.preloads) == (CUDA, CPU, [], 1)
    # Exact products, the same convolutions in every process.
    assert options == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert (scorer.device, scorer.provider, scorer.buckets) == ("cuda", CUDA, (1, 2, 4, 8, 16))
    assert [record.getMessage() for record in caplog.records] == [
        f"{export_folder / 'score.onnx'} runs on CUDAExecutionProvider, CPUExecutionProvider"
    ]


@pytest.mark.parametrize("works", [False, RuntimeError("CUDA failure 35: driver too old")])
def test_cuda_that_does_not_work(
    export_folder: Path, fake: Any, works: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "its session uses CPUExecutionProvider" if works is False else "RuntimeError: CUDA failure 35: driver too old"
    fake(works)
    with pytest.raises(ValueError, match=rf"providers 'cuda' were asked for, but {reason}\. CUDA needs .*onnxruntime-gpu"):
        OnnxScorer(export_folder, "cuda")
    with caplog.at_level(logging.WARNING, "fastflow.export"):
        scorer = OnnxScorer(export_folder, "auto")
    assert scorer.device == "cpu" and isinstance(scorer._run, Plain)
    assert [record.getMessage() for record in caplog.records] == [
        f"{export_folder / 'score.onnx'}: CUDA cannot be used here, so it runs on the CPU: {reason}"
    ]
    np.testing.assert_allclose(scorer.score(images(3)), expected(images(3)), atol=1e-5)
    # What the runtime prints must not get among results.
    out, err = capsys.readouterr()
    assert out == "" and err.count("Failed to load libcudnn.so.9") == 2


def test_without_cuda_auto_is_the_cpu_and_says_nothing(export_folder: Path, fake: Any, caplog: pytest.LogCaptureFixture) -> None:
    ort = fake(cuda=False)
    assert OnnxScorer(export_folder).device == "cpu"
    assert (ort.asked, ort.preloads, caplog.records) == ([[CPU]], 0, [])
    with pytest.raises(
        ValueError, match=r"'cuda' were asked for, but this ONNX Runtime offers CPUExecutionProvider\. CUDA needs"
    ):
        OnnxScorer(export_folder, "cuda")


def test_cpu_does_not_touch_cuda(export_folder: Path, fake: Any) -> None:
    ort = fake()
    assert OnnxScorer(export_folder, "cpu").device == "cpu"
    assert (ort.asked, ort.preloads) == ([[CPU]], 0)


def test_lists_of_providers_are_handed_on(export_folder: Path, fake: Any) -> None:
    ort = fake()
    assert OnnxScorer(export_folder, [(CUDA, {"device_id": "1"}), CPU]).device == "cuda"
    assert ort.asked == [[(CUDA, {"device_id": "1"}), CPU]]
    fake(False)
    with pytest.raises(ValueError, match=r"providers \['CUDAExecutionProvider'\] were asked for, but its session uses CPU"):
        OnnxScorer(export_folder, [CUDA])
    for providers in ("gpu", []):
        with pytest.raises(ValueError, match=r"providers must be one of auto, cpu, cuda or a list of ONNX Runtime's, got"):
            OnnxScorer(export_folder, providers)


def test_a_list_with_a_provider_that_does_not_exist(export_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"providers \['Abacus'\] were asked for, but"):
            OnnxScorer(export_folder, ["Abacus"])


def test_without_onnxruntime_the_extras_are_named(export_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs ONNX Runtime: pip install 'fastflow\[export-cpu\]'.* or 'fastflow\[export\]'"):
        OnnxScorer(export_folder)


def test_arguments_that_do_not_fit(export_folder: Path) -> None:
    for buckets in ((), (0,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="buckets must be integers of at least 1, got"):
            OnnxScorer(export_folder, buckets=buckets)
    for threads in (0, 1.0, True):
        with pytest.raises(ValueError, match="threads must be an integer of at least 1, got"):
            OnnxScorer(export_folder, threads=threads)
    with pytest.raises(ValueError, match="cuda_graph needs CUDA, the session uses CPUExecutionProvider"):
        OnnxScorer(export_folder, "cpu", cuda_graph=True)


def test_options_of_a_session(export_folder: Path) -> None:
    options = open_session(export_folder / "score.onnx", "cpu", threads=3).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.use_deterministic_compute and options.enable_mem_pattern and options.log_severity_level == 3
    default = open_session(export_folder / "score.onnx", "cpu").get_session_options()
    assert default.intra_op_num_threads == default_threads()


def test_threads_are_physical_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 4: "0,4"}

    def read_text(path: Path, encoding: str) -> str:
        cpu = int(path.parent.parent.name[3:])
        if cpu not in siblings:
            raise FileNotFoundError
        return siblings[cpu]

    monkeypatch.setattr(_session.Path, "read_text", read_text)
    for allowed, cores in (({0, 4}, 1), ({0, 1, 2, 4}, 3), ({7, 8}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: allowed)
        assert default_threads() == cores
    # Not every system has it.
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads() == 6


# -- the CUDA path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True])
def test_on_cuda_each_size_has_its_tensors_and_its_graph(export_folder: Path, fake: Any, graphs: bool) -> None:
    ort = fake()
    scorer = OnnxScorer(export_folder, cuda_graph=graphs)
    assert ort.asked[0][0][1].get("enable_cuda_graph") == ("1" if graphs else None)
    plain = OnnxScorer(export_folder, "cpu")
    for count in (21, 3, 21, 1, 0):
        x = images(count, seed=count)
        np.testing.assert_allclose(scorer.score(x), plain.score(x), rtol=0, atol=1e-5)
    # 21 is 16 and 5, which 8 holds; 3 goes into 4.
    assert [one["shape"][0] for one in ort.bound] == [16, 8, 4, 1]
    assert {(one["device"], one["index"]) for one in ort.bound} == {("cuda", 0)}
    assert ort.runs == (["1", "2", "3", "1", "2", "4"] if graphs else [None] * 6)


def test_results_of_bound_tensors_stay_when_the_next_batch_comes(export_folder: Path) -> None:
    session = open_session(export_folder / "score.onnx", "cpu", threads=1)
    bound, plain = Bound(session, onnxruntime, 2, "cpu"), Plain(session)
    first, second = bound(images(4, 1)), bound(images(4, 2))
    assert np.array_equal(first, plain(images(4, 1))) and np.array_equal(second, plain(images(4, 2)))


@pytest.mark.parametrize("kind", ["plain", "bound"])
def test_threads_do_not_mix_their_images_up(export_folder: Path, kind: str) -> None:
    scorer = OnnxScorer(export_folder, "cpu", threads=1, buckets=(4,))
    if kind == "bound":
        session = open_session(export_folder / "score.onnx", "cpu", threads=1)
        scorer._run = Bound(session, onnxruntime, 2, "cpu")
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


# -- the command ----------------------------------------------------------------------------------------------------------


def lines(text: str) -> list[dict[str, str]]:
    head, *rows = (line.split("\t") for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_command_prints_a_line_per_file(
    export_folder: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = scans / "striped/sub-103_T1w.nii.gz"
    assert main([str(export_folder), str(good), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    want = OnnxScorer(export_folder, "cpu", threads=1).classify_volume(good)
    (row,) = lines(out)
    assert list(row) == ["path", "status", "predicted", "posterior", "margin", "typicality", "error"]
    assert (row["path"], row["status"], row["predicted"], row["typicality"], row["error"]) == (str(good), "ok", "striped", "", "")
    assert float(row["posterior"]) == pytest.approx(want.posterior.max(), rel=1e-5)
    assert float(row["margin"]) == pytest.approx(want.margin, rel=1e-5)
    assert err == f"{export_folder}: float32, runs on CPUExecutionProvider\n"


def test_a_bad_file_costs_its_line_only(
    export_folder: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(scans / "striped/sub-103_T1w.nii.gz")
    odd = tmp_path / "two\tcells\nor lines.nii.gz"
    shutil.copy(good, odd)
    assert main([str(export_folder), "nowhere.nii", good, str(odd)]) == 3
    rows = lines(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["error", "ok", "ok"]
    assert rows[0]["error"] == "missing: there is no such file" and rows[0]["predicted"] == ""
    assert rows[2]["path"] == str(odd).replace("\t", r"\t").replace("\n", r"\n")
    assert main([str(export_folder), "nowhere.nii", good, "--json"]) == 3
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        **dict.fromkeys(["predicted", "posterior", "margin", "typicality", "log_probs"]),
        "path": "nowhere.nii",
        "status": "error",
        "error": "missing: there is no such file",
    }
    assert list(second["posterior"]) == list(second["log_probs"]) == list(CLASSES)
    assert sum(second["posterior"].values()) == pytest.approx(1.0)


def test_flags_and_priors_of_the_command(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.linspace(0.0, 1.0, 999).tolist()
    folder = write_export(tmp_path, validation={"slices": "center+-1", "log_prob": values})
    good = str(scans / "striped/sub-103_T1w.nii.gz")
    assert main([str(folder), good, "--prior", "1,0", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["status"], row["predicted"], row["posterior"]) == ("flagged", "flat", {"flat": 1.0, "striped": 0.0})
    # Infinity is no JSON.
    assert row["margin"] is None
    assert row["error"] == "atypical: typicality p-value 0.002"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prior", "a,b"], 2, "could not convert string to float"),
        (["--prior", "0.5,0.6"], 2, "prior must be 2 probabilities"),
        (["--providers", "cuda"], 2, "were asked for, but this ONNX Runtime offers"),
        (["--threads", "0"], 2, "threads must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_read(
    export_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main([str(export_folder), "nowhere.nii", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_exports_that_cannot_be_used_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "gone"), "a.nii"]) == 2
    assert "is not an export folder" in capsys.readouterr().err
    assert main([str(write_export(tmp_path, preprocess=None)), "a.nii"]) == 2
    assert "does not say how images are prepared" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError("too little"), 1, "error: too little"),
        (RuntimeError("node failed"), 1, "error: node failed"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
    ],
)
def test_runs_that_fail(
    export_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fail(scorer: OnnxScorer, path: str, prior: object) -> None:
        raise error

    monkeypatch.setattr(OnnxScorer, "classify_volume", fail)
    assert main([str(export_folder), "a.nii"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == message


def run(code: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_it_runs_where_only_numpy_nibabel_and_onnxruntime_can_be_imported(export_folder: Path, scans: Path) -> None:
    code = (
        "import runpy; sys.argv[0] = 'runtime'; runpy.run_module('fastflow.export.runtime', run_name='__main__', alter_sys=True)"
    )
    done = run(code, export_folder, scans / "striped/sub-103_T1w.nii.gz", "nowhere.nii")
    assert done.returncode == 3, done.stderr
    assert [row["predicted"] for row in lines(done.stdout)] == ["striped", ""]
    # The block works.
    assert "blocked: torch" in run("import torch").stderr


def test_names_that_are_no_unicode_and_readers_that_leave(export_folder: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/bad\xff.nii"
    command = [sys.executable, "-m", "fastflow.export.runtime", os.fsencode(export_folder), name]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 3
    assert b"bad\\udcff.nii\terror" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert left.returncode == 1
    assert b"Traceback" not in left.stderr and b"BrokenPipe" not in left.stderr


def test_output_that_is_no_file_is_written_to(export_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([str(export_folder), "nowhere.nii"]) == 3
    assert len(stream.getvalue().splitlines()) == 2


def test_help_names_the_columns_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "typicality" in text and "1 the run failed" in text and "fastflow 0." in text
