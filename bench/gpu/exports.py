"""Exports by ONNX Runtime on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from bench.gpu.checks import log_odds_error
from bench.gpu.report import Figure, Key
from bench.gpu.setting import median
from bench.measuring import DEVICE


def export(folder: str) -> Iterator[tuple[Key, Figure]]:
    """Images/s of an export with and without CUDA graphs, and its log-odds against its own on the CPU."""
    from fastflow.export.runtime import OnnxScorer

    for graph in (True, False) if DEVICE == "cuda" else (False,):
        scorer, cpu = OnnxScorer(folder, DEVICE, cuda_graph=graph), OnnxScorer(folder, "cpu")
        x = (np.random.default_rng(1).random((16, *cpu.input_shape)) * 2 - 1).astype(np.float32)
        error = log_odds_error(torch.from_numpy(scorer.score(x[:8])), torch.from_numpy(cpu.score(x[:8])))
        engine = "onnx cuda_graph" if graph else "onnx"
        note = f"log-odds {error:.2e} nats from its CPU's; {', '.join(scorer.providers)}"
        for count in (1, 4, 16):
            rate = count / median(lambda scorer=scorer, part=x[:count]: scorer.run(part))
            yield Key("scoring", folder, engine, batch=count), Figure(rate, "images/s", note)
