"""Scoring all labels: the engines of `LabelScorer` beside a pass per label, the published one and ours.

Run it with ``pytest bench/test_scoring.py --benchmark-only``. It takes about 15 minutes on two cores,
compilation included.

Paper preset, 7 labels, 1x184x184, random weights, 4 and 16 images. A row's time is the scorer's; before each
of its rounds the two baselines do the same work with the same weights, so that drift of a shared machine
touches all three: (a) the published algorithm op for op in plain ATen (`bench/published.py`: a pass per
label), (b) a call of this package's `log_prob` per label. `extra_info` holds the medians of the rounds'
ratios (baseline / scorer), rows and images per second, the peak of allocated tensors in MiB, the share of the
time in convolutions, the largest difference of a log-odds to (b), threads, versions. ``"mixed"`` is skipped
where the device has no bfloat16 arithmetic, since conditioners then stay in float32.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from bench import published
from bench.measuring import DEVICE, device_name, peak_mib, randomize, share_of, synchronised
from fastflow import FlowConfig, MagicFlow
from fastflow.models.scoring import LabelScorer, has_bfloat16

CLASSES = 7
ROUNDS = {4: 5, 16: 3}
ENGINES = ("eager", "compile", "cuda_graph") if DEVICE == "cuda" else ("eager", "compile")


def build(classes: int = CLASSES, **changes) -> MagicFlow:
    """The paper preset with random weights."""
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.paper(classes, **changes)).to(DEVICE)
    randomize(model)
    model.initialize(images(4))
    return model.eval()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(count, 1, 184, 184, generator=generator) * 2 - 1).to(DEVICE)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def scorers(model):
    made: dict[tuple[str, str], LabelScorer] = {}

    def get(engine: str, precision: str) -> LabelScorer:
        if (engine, precision) not in made:
            # Only one is kept, since a compiled scorer holds its own copy of the weights.
            made.clear()
            made[engine, precision] = LabelScorer(model, precision, engine)
        return made[engine, precision]

    return get


@torch.inference_mode()
def log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    log_probs = log_probs.double()
    return log_probs - log_probs[:, :1]


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch", list(ROUNDS))
def test_all_labels(benchmark, model, scorers, engine, precision, batch):
    if precision == "mixed" and not has_bfloat16(torch.device(DEVICE)):
        pytest.skip("no bfloat16 arithmetic here: mixed is float32")
    x, scorer = images(batch), scorers(engine, precision)
    weights = published.weights_of(model)
    labels = [torch.full((batch,), k, device=DEVICE) for k in range(CLASSES)]

    @torch.inference_mode()
    def published_form():
        return published.log_prob_all(model, x, weights)

    @torch.inference_mode()
    def one_call_a_label():
        return torch.stack([model.log_prob(x, y) for y in labels], dim=1)

    before: dict[str, list[float]] = {"published": [], "log_prob": []}
    baselines = {"published": synchronised(published_form), "log_prob": synchronised(one_call_a_label)}

    def time_baselines():
        for name, work in baselines.items():
            start = time.perf_counter()
            work()
            before[name].append(time.perf_counter() - start)

    start = time.perf_counter()
    found = scorer(x)
    first = time.perf_counter() - start
    benchmark.group = f"{batch} images"
    benchmark.pedantic(synchronised(lambda: scorer(x)), setup=time_baselines, rounds=ROUNDS[batch])
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.data
    ratios = {
        f"ratio_{name}": statistics.median(
            a / b for a, b in zip(times[-len(seconds) :], seconds, strict=True)
        )
        for name, times in before.items()
    }
    benchmark.extra_info |= ratios | {
        "rows_per_second": batch * CLASSES / benchmark.stats.stats.median,
        "images_per_second": batch / benchmark.stats.stats.median,
        "peak_mib": peak_mib(lambda: scorer(x)),
        "convolution_share": share_of("convolution", lambda: scorer(x)),
        "max_log_odds_difference": float((log_odds(found) - log_odds(one_call_a_label())).abs().max()),
        "first_call_seconds": first,
        "max_rows": scorer.max_rows,
        "conditioner_dtype": str(scorer.conditioner_dtype),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "torch": torch.__version__,
    }
