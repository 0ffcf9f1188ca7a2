"""Providers, threads and runners of ONNX Runtime; CUDA is played by a fake."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from fastflow.runtime import sessions
from fastflow.runtime.scorer import OnnxScorer
from fastflow.runtime.sessions import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    BoundRunner,
    PlainRunner,
    default_threads,
    open_session,
)
from tests.export.handmade import expected, images


def test_auto_takes_cuda_where_it_works(
    export_folder: Path, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ort = fake()
    with caplog.at_level(logging.INFO, "fastflow.export"):
        scorer = OnnxScorer(export_folder)
    ((name, options), second), *rest = ort.asked
    assert (name, second, rest, ort.preloads) == (CUDA_PROVIDER, CPU_PROVIDER, [], 1)
    # Products are exact, and every process takes the same convolutions.
    assert options == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert (scorer.device, scorer.provider, scorer.buckets) == ("cuda", CUDA_PROVIDER, (1, 2, 4, 8, 16))
    assert [record.getMessage() for record in caplog.records] == [
        f"{export_folder / 'score.onnx'} runs on CUDAExecutionProvider, CPUExecutionProvider"
    ]


@pytest.mark.parametrize("works", [False, RuntimeError("CUDA failure 35: driver too old")])
def test_cuda_that_does_not_work(
    export_folder: Path,
    fake: Any,
    works: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = (
        "its session uses CPUExecutionProvider"
        if works is False
        else "RuntimeError: CUDA failure 35: driver too old"
    )
    fake(works)
    with pytest.raises(
        ValueError, match=rf"providers 'cuda' were asked for, but {reason}\. CUDA needs .*onnxruntime-gpu"
    ):
        OnnxScorer(export_folder, "cuda")
    with caplog.at_level(logging.WARNING, "fastflow.export"):
        scorer = OnnxScorer(export_folder, "auto")
    assert scorer.device == "cpu" and isinstance(scorer._runner, PlainRunner)
    assert [record.getMessage() for record in caplog.records] == [
        f"{export_folder / 'score.onnx'}: CUDA cannot be used here, so it runs on the CPU: {reason}"
    ]
    np.testing.assert_allclose(scorer.score(images(3)), expected(images(3)), atol=1e-5)
    # Lines that the runtime prints must not get among results.
    out, err = capsys.readouterr()
    assert out == "" and err.count("Failed to load libcudnn.so.9") == 2


def test_without_cuda_auto_is_the_cpu_and_says_nothing(
    export_folder: Path, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ort = fake(cuda=False)
    assert OnnxScorer(export_folder).device == "cpu"
    assert (ort.asked, ort.preloads, caplog.records) == ([[CPU_PROVIDER]], 0, [])
    with pytest.raises(
        ValueError,
        match=r"'cuda' were asked for, but this ONNX Runtime offers CPUExecutionProvider\. CUDA needs",
    ):
        OnnxScorer(export_folder, "cuda")


def test_cpu_does_not_touch_cuda(export_folder: Path, fake: Any) -> None:
    ort = fake()
    assert OnnxScorer(export_folder, "cpu").device == "cpu"
    assert (ort.asked, ort.preloads) == ([[CPU_PROVIDER]], 0)


def test_lists_of_providers_are_handed_on(export_folder: Path, fake: Any) -> None:
    ort = fake()
    assert OnnxScorer(export_folder, [(CUDA_PROVIDER, {"device_id": "1"}), CPU_PROVIDER]).device == "cuda"
    assert ort.asked == [[(CUDA_PROVIDER, {"device_id": "1"}), CPU_PROVIDER]]
    fake(False)
    with pytest.raises(
        ValueError, match=r"providers \['CUDAExecutionProvider'\] were asked for, but its session uses CPU"
    ):
        OnnxScorer(export_folder, [CUDA_PROVIDER])
    for providers in ("gpu", []):
        with pytest.raises(
            ValueError, match=r"providers must be one of auto, cpu, cuda or a list of ONNX Runtime's, got"
        ):
            OnnxScorer(export_folder, providers)


def test_a_list_with_a_provider_that_does_not_exist(export_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"providers \['Abacus'\] were asked for, but"):
            OnnxScorer(export_folder, ["Abacus"])


def test_without_onnxruntime_the_extras_are_named(
    export_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ValueError,
        match=r"needs ONNX Runtime: pip install 'fastflow\[export-cpu\]'.* or 'fastflow\[export\]'",
    ):
        OnnxScorer(export_folder)


def test_options_of_a_session(export_folder: Path) -> None:
    options = open_session(export_folder / "score.onnx", "cpu", threads=3).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert (
        options.use_deterministic_compute and options.enable_mem_pattern and options.log_severity_level == 3
    )
    default = open_session(export_folder / "score.onnx", "cpu").get_session_options()
    assert default.intra_op_num_threads == default_threads()


def test_threads_are_physical_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 4: "0,4"}

    def read_text(path: Path, encoding: str) -> str:
        cpu = int(path.parent.parent.name[3:])
        if cpu not in siblings:
            raise FileNotFoundError
        return siblings[cpu]

    monkeypatch.setattr(sessions.Path, "read_text", read_text)
    for allowed, cores in (({0, 4}, 1), ({0, 1, 2, 4}, 3), ({7, 8}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: allowed)
        assert default_threads() == cores
    # Some systems lack this function.
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads() == 6


def test_results_of_bound_tensors_stay_when_the_next_batch_comes(export_folder: Path) -> None:
    session = open_session(export_folder / "score.onnx", "cpu", threads=1)
    bound, plain = BoundRunner(session, onnxruntime, 2, "cpu"), PlainRunner(session)
    first, second = bound(images(4, 1)), bound(images(4, 2))
    assert np.array_equal(first, plain(images(4, 1))) and np.array_equal(second, plain(images(4, 2)))
