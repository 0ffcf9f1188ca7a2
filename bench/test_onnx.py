"""ONNX Runtime beside `LabelScorer` and a pass for each label: scoring, loading, and whole processes.

Run it with ``pytest bench/test_onnx.py --benchmark-only``. It takes about 35 minutes on one core, and 15 of
them go into exporting and compiling: each preset is exported once into a temporary folder (1.3 GB for
`paper`), of `paper` the score graph alone, and none is compared with the model.
``FASTFLOW_BENCH_PRESETS=demo`` leaves `paper` out.

Presets `demo` (1x96x96) and `paper` (1x184x184), 7 labels, random weights, float32. Arrays in and arrays out,
on the device that ONNX Runtime uses. A row's time is that of an `OnnxScorer` with its defaults; before each
of its rounds the others do the same work, so that drift of a shared machine touches all. `extra_info` holds
the medians of the rounds' ratios (other / OnnxScorer: above 1 OnnxScorer is faster), their smallest and
largest, the threads of both sides, which are equal, and sizes on disk.

**Scoring** (`test_all_labels`): `whole`, an `OnnxScorer` that takes all images in one pass (on a CPU the
default takes one image, so that with one image the ratio shows the noise), the engines of `LabelScorer`
(`compile` where there is a C++ compiler), and a pass for each label: `log_prob`, a call of this package's,
and `published`, the published algorithm op for op in plain ATen (`bench/published.py`).

**Loading** (`test_loading`), files in the page cache: an `OnnxScorer` that checks hashes, beside `unchecked`,
which does not, and `pytorch`: a model from its checkpoint, whose hash is checked, with an eager
`LabelScorer`.

**Processes** (`test_process`), on the CPU: start, imports, loading and scoring, and the peak of resident
memory, mapped files included (Linux).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra export or export-cpu")
pytest.importorskip("onnxscript", reason="needs the extra export or export-cpu")

from fastflow.export.graphs import GRAPHS
from fastflow.export.onnx import export_onnx
from fastflow.export.runtime import OnnxScorer

from bench import published
from bench.measuring import randomize
from fastflow import FlowConfig, MagicFlow
from fastflow.models.scoring import LabelScorer

CLASSES = 7
PRESETS = {"demo": tuple(GRAPHS), "paper": ("score",)}
ROUNDS = {"demo": {1: 25, 4: 11, 16: 5}, "paper": {1: 7, 4: 5, 16: 3}}
ROOT = Path(__file__).parents[1]

# Code of the processes whose time and memory are measured. The first one must not need PyTorch.
PROCESSES = {
    "onnx": """
from fastflow.export.runtime import OnnxScorer
before = peak_mib()
scores = OnnxScorer(export, threads=threads).score(images)
""",
    "whole": """
from fastflow.export.runtime import OnnxScorer
before = peak_mib()
scores = OnnxScorer(export, threads=threads, buckets=(len(images),)).score(images)
""",
    "eager": """
import torch
from fastflow import MagicFlow
from fastflow.models.scoring import LabelScorer
before = peak_mib()
torch.set_num_threads(threads)
scores = LabelScorer(MagicFlow.load(model), engine="eager")(torch.from_numpy(images)).numpy()
""",
}
BEGIN = """
import json, sys
import numpy as np
from bench.archive_memory import peak_mib
model, export, threads, images = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
"""
END = """
found = {"peak_mib": peak_mib(), "before_mib": before, "torch": "torch" in sys.modules}
print(json.dumps(found | {"finite": bool(np.isfinite(scores).all())}))
"""

Work = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in memory, on disk, and exported."""

    name: str
    model: MagicFlow
    folder: Path
    export: Path
    checkpoint_bytes: int
    export_seconds: float
    threads: int

    def sizes(self) -> dict[str, object]:
        """MiB of all files of the export, of those that scoring needs, and of the checkpoint."""
        mib = {path.name: path.stat().st_size / 2**20 for path in self.export.iterdir()}
        graphs = sorted(name.removesuffix(".onnx") for name in mib if name.endswith(".onnx"))
        score = mib["score.onnx"] + mib.get("weights.data", 0.0)
        return {
            "score_mib": score,
            "export_mib": sum(mib.values()),
            "exported_graphs": graphs,
            "checkpoint_mib": self.checkpoint_bytes / 2**20,
        }


# -- models --------------------------------------------------------------------------------------------------


def prepare(name: str, config: FlowConfig, folder: Path, graphs: Sequence[str]) -> Case:
    """A model with random weights, saved and exported.

    Args:
        name: what the case is called.
        config: the model.
        folder: gets the model and the export.
        graphs: of the export.
    """
    torch.manual_seed(0)
    model = MagicFlow(config)
    randomize(model)
    model.initialize(torch.from_numpy(images(model, 4)))
    model.eval().save(folder / "model")
    start = time.perf_counter()
    exported = export_onnx(folder / "model", folder / "export", graphs, check=False)
    seconds = time.perf_counter() - start
    return Case(
        name,
        model,
        folder / "model",
        exported.folder,
        exported.checkpoint_bytes,
        seconds,
        torch.get_num_threads(),
    )


def images(model: MagicFlow, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.uniform(-1.0, 1.0, (count, *model.config.input_shape)).astype(np.float32)


@pytest.fixture(scope="module", params=os.environ.get("FASTFLOW_BENCH_PRESETS", ",".join(PRESETS)).split(","))
def case(request) -> Iterator[Case]:
    # pytest would keep gigabytes of three runs in its own folders.
    with tempfile.TemporaryDirectory() as folder:
        config = FlowConfig.preset(request.param, CLASSES)
        made = prepare(request.param, config, Path(folder), PRESETS[request.param])
        # The scorers of the export are told to use as many threads.
        torch.set_num_threads(made.threads)
        yield made
    gc.collect()


@pytest.fixture(scope="module")
def engines(case) -> dict[str, LabelScorer]:
    return label_scorers(case.model.to(OnnxScorer(case.export, verify_hashes=False).device))


def label_scorers(model: MagicFlow) -> dict[str, LabelScorer]:
    """One for each engine that works here."""
    names = ("eager", "compile", "cuda_graph") if model.device.type == "cuda" else ("eager", "compile")
    made = {}
    for name in names:
        try:
            made[name] = LabelScorer(model, engine=name)
        except RuntimeError as error:
            if "compiler" not in str(error):
                raise
    return made


# -- measuring -----------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(before: Sequence[dict[str, float]], seconds: Sequence[float]) -> dict[str, object]:
    """Medians and extremes of others / own by round; only the last rounds of the others have one of ours."""
    rounds = list(zip(before[-len(seconds) :], seconds, strict=True))
    found: dict[str, object] = {}
    for name in before[0]:
        each = sorted(others[name] / own for others, own in rounds)
        found |= {f"ratio_{name}": statistics.median(each), f"range_{name}": [each[0], each[-1]]}
    return found


def interleave(
    benchmark, own: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int
) -> None:
    before: list[dict[str, float]] = []
    benchmark.pedantic(
        own, setup=lambda: before.append({name: timed(work) for name, work in others.items()}), rounds=rounds
    )
    if benchmark.stats is not None:
        benchmark.extra_info |= ratios(before, benchmark.stats.stats.data)


def conditions(case: Case) -> dict[str, object]:
    import onnxruntime

    return case.sizes() | {
        "export_seconds": case.export_seconds,
        "torch_threads": torch.get_num_threads(),
        "onnxruntime_intra_op_threads": case.threads,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


# -- scoring -------------------------------------------------------------------------------------------------


def works(case: Case, engines: dict[str, LabelScorer], batch: int) -> dict[str, Work]:
    """Ways to score the same images, (B, K) nats. The first one is what the others are compared with."""
    x = images(case.model, batch)
    own = OnnxScorer(case.export, threads=case.threads, verify_hashes=False)
    whole = OnnxScorer(case.export, threads=case.threads, buckets=(batch,), verify_hashes=False)

    def run(scorer: LabelScorer) -> Work:
        return lambda: scorer(torch.from_numpy(x).to(case.model.device)).cpu().numpy()

    @torch.inference_mode()
    def one_call_a_label() -> np.ndarray:
        on_device, every = torch.from_numpy(x).to(case.model.device), range(case.model.config.num_classes)
        labels = [torch.full((batch,), k, device=case.model.device) for k in every]
        return torch.stack([case.model.log_prob(on_device, y) for y in labels], dim=1).cpu().numpy()

    weights = published.weights_of(case.model)

    @torch.inference_mode()
    def published_form() -> np.ndarray:
        return (
            published.log_prob_all(case.model, torch.from_numpy(x).to(case.model.device), weights)
            .cpu()
            .numpy()
        )

    ways: dict[str, Work] = {"onnx": lambda: own.score(x), "whole": lambda: whole.score(x)}
    ways |= {name: run(scorer) for name, scorer in engines.items()}
    return ways | {"log_prob": one_call_a_label, "published": published_form}


def log_odds_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference of a log-odds to the first label, nats."""
    return float(np.abs((found - found[:, :1]) - (wanted - wanted[:, :1])).max())


@pytest.mark.parametrize("batch", list(ROUNDS["demo"]))
def test_all_labels(benchmark, case, engines, batch):
    ways = works(case, engines, batch)
    # The first calls compile, and settle what is allocated.
    found = {name: work() for name, work in ways.items()}
    benchmark.group = f"score {case.name} {batch} images"
    interleave(benchmark, ways.pop("onnx"), ways, ROUNDS[case.name][batch])
    if benchmark.stats is None:
        return
    benchmark.extra_info |= {
        "images_per_second": batch / benchmark.stats.stats.median,
        "max_log_odds_difference": log_odds_difference(found["onnx"], found["log_prob"].astype(np.float64)),
        **conditions(case),
    }


# -- loading -------------------------------------------------------------------------------------------------


def loaders(case: Case) -> dict[str, Callable[[], object]]:
    """Ways to get ready to score. The first one is what the others are compared with."""
    return {
        "onnx": lambda: OnnxScorer(case.export, threads=case.threads),
        "unchecked": lambda: OnnxScorer(case.export, threads=case.threads, verify_hashes=False),
        "pytorch": lambda: LabelScorer(MagicFlow.load(case.folder), engine="eager"),
    }


def test_loading(benchmark, case):
    ways = loaders(case)
    benchmark.group = f"load {case.name}"
    interleave(benchmark, ways.pop("onnx"), ways, rounds=5)
    benchmark.extra_info |= conditions(case)


# -- processes -----------------------------------------------------------------------------------------------


def run_process(case: Case, kind: str, array: Path) -> dict[str, float]:
    """One of `PROCESSES` over the images of a file, in a fresh interpreter on the CPU."""
    arguments = [case.folder, case.export, case.threads, array]
    command = [sys.executable, "-c", BEGIN + PROCESSES[kind] + END, *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("batch", [1, 16])
def test_process(benchmark, case, tmp_path, batch):
    np.save(tmp_path / "images.npy", images(case.model, batch))
    found: dict[str, dict[str, float]] = {}

    def run(kind: str) -> Callable[[], None]:
        def work() -> None:
            found[kind] = run_process(case, kind, tmp_path / "images.npy")

        return work

    benchmark.group = f"process {case.name} {batch} images"
    others = {kind: run(kind) for kind in PROCESSES if kind != "onnx"}
    interleave(benchmark, run("onnx"), others, rounds=3 if batch == 1 else 1)
    assert not found["onnx"]["torch"]
    benchmark.extra_info |= {f"peak_mib_{kind}": row["peak_mib"] for kind, row in found.items()}
    benchmark.extra_info |= {f"before_mib_{kind}": row["before_mib"] for kind, row in found.items()}
    benchmark.extra_info |= conditions(case)
