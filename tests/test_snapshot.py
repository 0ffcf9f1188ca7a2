"""Fixed-seed results of both tasks, kept and compared: the safety net under every change that should change
no result.

``python tests/test_snapshot.py store FILE`` writes the results of the code as it stands, ``compare FILE``
prints for each of them whether its bits are the same and, where not, the largest difference relative to the
largest value. The test compares with the file in ``tests/fixtures`` by tolerance, because BLAS and oneDNN
round differently on other processors.

Parameters are drawn by their names in the state dict, so the order in which a model is built does not matter.
Results that are large are kept as a few random projections and a hash of their bytes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

STORED = Path(__file__).parent / "fixtures" / "snapshot.npz"
TASKS = ("classification", "generation")
PROJECTIONS = 3
# Larger results are kept as projections.
MAX_STORED = 16
DIGEST_BYTES = 8
# Largest difference relative to the largest value of a result, by what computed it.
# A gradient of these results is held against this share at least of the largest gradient of its model: joint
# launches add in another order than the code that was stored.
SMALL_GRADIENTS_OF, SMALL_GRADIENT = "float32/interpreter/", 1e-4
TOLERANCES = {"float64": 1e-9, "default": 2e-4, "gradient": 5e-3}


def _fill(model: torch.nn.Module) -> None:
    """Draw every parameter by its name, and mark ActNorm as initialised."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if name.endswith("permutation"):
                value.copy_(torch.randperm(len(value), generator=generator))
            elif name.endswith("sign"):
                value.copy_(torch.randint(0, 2, value.shape, generator=generator) * 2 - 1)
            elif name.endswith("initialized"):
                value.fill_(True)
            elif name.endswith(("running_var", "original0")):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
            elif value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                scale = 0.1 if value.ndim <= 1 else 0.5 / max(1, value[0].numel()) ** 0.5
                shift = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
                value.copy_(shift + scale * noise)
    model.load_state_dict(model.state_dict())


def _model(layout: str, task: str, dtype: torch.dtype, **changes):
    from fastflow import FlowConfig, MagicFlow

    config = FlowConfig.preset(layout, 3, task=task, **changes)
    height, width = config.input_shape[1:]
    mask = np.random.default_rng(5).integers(0, 2, (height, width)) if layout == "tiny" else None
    model = MagicFlow(config, mask).to(dtype)
    _fill(model)
    return model.eval()


def _images(config, batch: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return (torch.rand(batch, *config.input_shape, generator=generator, dtype=torch.float64) * 2 - 1).to(
        dtype
    )


def _densities(model, dtype: torch.dtype, batch: int = 3) -> Iterator[tuple[str, Tensor]]:
    x = _images(model.config, batch, dtype)
    y = torch.arange(batch) % 3
    with torch.no_grad():
        z, logdet = model(x, y)
        yield "latent", z
        yield "logdet", logdet
        yield "log_prob", model.log_prob(x, y)
        yield "log_prob_all", model.log_prob_all(x)
        yield "posterior", model.posterior(x, [0.5, 0.3, 0.2])
        yield "inverse", model.inverse(z, y)
        yield "sample", model.sample(y, 0.7, torch.Generator().manual_seed(3))
        heat, rest = model.attribution(x, y)
        yield "attribution", heat
        yield "attribution_rest", rest


def _gradients(model, dtype: torch.dtype, batch: int = 3) -> Iterator[tuple[str, Tensor]]:
    model.train()
    x = _images(model.config, batch, dtype).requires_grad_()
    torch.manual_seed(21)
    loss = model.log_prob(x, torch.arange(batch) % 3).mean() / model.config.num_dims
    yield "loss", loss.detach()
    loss.backward()
    yield "gradient_x", x.grad
    for name, parameter in sorted(model.named_parameters()):
        if parameter.grad is not None:
            yield f"gradient_{name}", parameter.grad


def _reference() -> Iterator[tuple[str, Tensor]]:
    from fastflow import kernels

    before = kernels.get_backend()
    kernels.set_backend("reference")
    try:
        for task in TASKS:
            model = _model("tiny", task, torch.float64)
            yield from _named(f"float64/reference/tiny/{task}", _densities(model, torch.float64))
            yield from _named(f"float64/reference/tiny/{task}", _gradients(model, torch.float64))
            yield from _named(
                f"float32/reference/small/{task}",
                _densities(_model("small", task, torch.float32), torch.float32, 2),
            )
    finally:
        kernels.set_backend(before)


def _cpu() -> Iterator[tuple[str, Tensor]]:
    for task in TASKS:
        for layout, batch in (("tiny", 3), ("small", 2)):
            model = _model(layout, task, torch.float32)
            yield from _named(f"float32/cpu/{layout}/{task}", _densities(model, torch.float32, batch))
            yield from _named(f"float32/cpu/{layout}/{task}", _gradients(model, torch.float32, batch))
        model = _model("tiny", task, torch.float64, share_halves=False, condition_from_step=2)
        yield from _named(f"float64/cpu/unshared/{task}", _densities(model, torch.float64))
        yield from _named(f"float64/cpu/unshared/{task}", _gradients(model, torch.float64))
    model = _model("tiny", "generation", torch.float64, norm="batch")
    yield from _named("float64/cpu/batchnorm/generation", _densities(model, torch.float64))
    yield from _named("float64/cpu/batchnorm/generation", _gradients(model, torch.float64))


def _reversible() -> Iterator[tuple[str, Tensor]]:
    for task in TASKS:
        for layout, batch in (("tiny", 3), ("small", 2)):
            model = _model(layout, task, torch.float32, reversible=True)
            yield from _named(f"float32/reversible/{layout}/{task}", _gradients(model, torch.float32, batch))


def _interpreter() -> Iterator[tuple[str, Tensor]]:
    """Results of the kernels in Triton's interpreter."""
    # The tests' settings make the interpreter faster. They look for a GPU, so they are read in this process
    # only.
    import conftest  # noqa: F401

    os.environ["TRITON_INTERPRET"] = "1"
    for task in TASKS:
        model = _model("tiny", task, torch.float32)
        yield from _named(f"float32/interpreter/tiny/{task}", _densities(model, torch.float32, 2))
        yield from _named(f"float32/interpreter/tiny/{task}", _gradients(model, torch.float32, 2))


# Label-free steps make a scorer start with images and go on with labels; one task is enough to see it.
SCORED = (("classification", {"condition_from_step": 2}), ("generation", {}))


def _compiled() -> Iterator[tuple[str, Tensor]]:
    from fastflow.models.scoring import LabelScorer

    for task, changes in SCORED:
        model = _model("tiny", task, torch.float32, **changes)
        scores = LabelScorer(model, engine="compile")(_images(model.config, 3, torch.float32))
        yield f"float32/compiled/tiny/{task}/log_prob_all", scores


def _onnx() -> Iterator[tuple[str, Tensor]]:
    from fastflow.export.onnx import export_onnx
    from fastflow.export.runtime import OnnxScorer

    for task, changes in SCORED:
        model = _model("tiny", task, torch.float32, **changes)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model")
            export_onnx(Path(folder) / "model", Path(folder) / "export", graphs=("score",))
            scorer = OnnxScorer(Path(folder) / "export", "cpu", threads=1)
            scores = scorer.score(_images(model.config, 3, torch.float32).numpy())
        yield f"float32/onnx/tiny/{task}/log_prob_all", torch.from_numpy(scores)


def _construction() -> Iterator[tuple[str, Tensor]]:
    """Parameters that a seed gives a new model, so that old training recipes stay what they were."""
    from fastflow import FlowConfig, MagicFlow

    for task in TASKS:
        torch.manual_seed(0)
        model = MagicFlow(FlowConfig.tiny(3, task=task), np.zeros((16, 16), dtype=int))
        values = [value.double().flatten() for _, value in sorted(model.state_dict().items())]
        yield f"float64/construction/tiny/{task}/state", torch.cat(values)


PARTS: dict[str, Callable[[], Iterator[tuple[str, Tensor]]]] = {
    "reference": _reference,
    "cpu": _cpu,
    "reversible": _reversible,
    "interpreter": _interpreter,
    "compiled": _compiled,
    "onnx": _onnx,
    "construction": _construction,
}


def _named(prefix: str, results: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{prefix}/{name}", value) for name, value in results)


class Result(NamedTuple):
    """One result: its values, or projections of many, and the beginning of the hash of its bytes."""

    values: np.ndarray
    digest: bytes


def shortened(values: np.ndarray) -> np.ndarray:
    """The values, or a few random projections where there are many."""
    if values.size <= MAX_STORED:
        return values
    rng = np.random.default_rng(values.size)
    return (
        np.array([values @ rng.standard_normal(values.size) for _ in range(PROJECTIONS)]) / values.size**0.5
    )


def collect(part: str) -> dict[str, Result]:
    """Results of one part."""
    torch.set_num_threads(1)
    found = {}
    for name, tensor in PARTS[part]():
        value = np.ascontiguousarray(tensor.detach().cpu().numpy())
        digest = hashlib.sha256(value.tobytes()).digest()[:DIGEST_BYTES]
        found[name] = Result(shortened(value.astype(np.float64).ravel()), digest)
    return found


def save(path: Path | str, found: dict[str, Result]) -> None:
    """Write results into few arrays: an entry of the file for each would cost more than its values."""
    np.savez_compressed(
        path,
        names=np.frombuffer("\n".join(found).encode(), dtype=np.uint8),
        sizes=np.array([result.values.size for result in found.values()], dtype=np.int32),
        values=np.concatenate([result.values for result in found.values()]),
        digests=np.frombuffer(b"".join(result.digest for result in found.values()), dtype=np.uint8),
    )


def load(path: Path | str) -> dict[str, Result]:
    """Read what `save` wrote."""
    with np.load(path) as file:
        names = bytes(file["names"]).decode().split("\n")
        values = np.split(file["values"], np.cumsum(file["sizes"])[:-1])
        digests = bytes(file["digests"])
    width = DIGEST_BYTES
    return {
        name: Result(value, digests[i * width : (i + 1) * width])
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    }


def collect_apart(part: str) -> dict[str, Result]:
    """`collect` in a process of its own: Triton's interpreter is chosen when Triton is imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.npz"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTFLOW_BACKEND": "auto"}
        environment.pop("TRITON_INTERPRET", None)
        if part == "interpreter":
            environment["TRITON_INTERPRET"] = "1"
        subprocess.run([sys.executable, __file__, "part", part, str(file)], check=True, env=environment)
        return load(file)


def compare(found: dict[str, Result], stored: dict[str, Result]) -> list[tuple[str, bool, float]]:
    """(name, whether all bits are the same, largest relative difference) of every result in either."""
    rows = []
    largest: dict[str, float] = {}
    for name, result in stored.items():
        model = name.partition("gradient_")[0]
        largest[model] = max(largest.get(model, 0.0), float(np.abs(result.values).max(initial=0.0)))
    for name in sorted(set(found) | set(stored)):
        got, want = found.get(name), stored.get(name)
        if got is None or want is None or got.values.shape != want.values.shape:
            rows.append((name, False, float("inf")))
            continue
        size = max(float(np.abs(want.values).max(initial=0.0)), 1e-30)
        model, is_gradient, _ = name.partition("gradient_")
        if is_gradient and name.startswith(SMALL_GRADIENTS_OF):
            # A bias before a norm and the length of a normed weight have no gradient but rounding.
            size = max(size, SMALL_GRADIENT * largest[model])
        difference = float(np.abs(got.values - want.values).max(initial=0.0))
        rows.append((name, got.digest == want.digest, difference / size))
    return rows


def tolerance(name: str) -> float:
    """The relative difference that other processors may make."""
    if name.startswith("float64"):
        return TOLERANCES["float64"]
    return TOLERANCES["gradient" if "gradient_" in name else "default"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_results_are_those_that_were_stored(part: str) -> None:
    stored = {name: result for name, result in load(STORED).items() if _part_of(name) == part}
    assert stored, f"{STORED.name} holds nothing of {part}"
    rows = compare(collect_apart(part), stored)
    wrong = [f"{name}: {difference:.2e}" for name, _, difference in rows if not difference <= tolerance(name)]
    assert not wrong, "\n".join(wrong)


def _part_of(name: str) -> str:
    return name.split("/")[1]


def main(arguments: list[str]) -> int:
    verb, *rest = arguments
    if verb == "part":
        save(rest[1], collect(rest[0]))
        return 0
    parts = rest[1:] or list(PARTS)
    found = {name: value for part in parts for name, value in collect_apart(part).items()}
    if verb == "store":
        save(rest[0], found)
        return 0
    rows = compare(found, {name: result for name, result in load(rest[0]).items() if _part_of(name) in parts})
    moved = [row for row in rows if not row[1]]
    for name, _, difference in sorted(moved, key=lambda row: -row[2]):
        print(f"{difference:9.2e}  {name}")
    print(f"{len(rows) - len(moved)} of {len(rows)} results have the same bits")
    return int(any(not difference <= tolerance(name) for name, _, difference in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
