"""Two checkouts of the project against each other: scoring, a training step and an exported graph.

``python bench/before_after.py OLD OLD_PYTHON NEW NEW_PYTHON [--rounds 11] [--cases eager ...]``

OLD and NEW are folders of checkouts, each with a Python interpreter in which its package is installed. One
process per checkout stays alive, builds the same models, and answers over a pipe, so that imports,
compilation and caches are paid for once. The two take turns, call by call, so that drift of a shared machine
touches both. Printed for each case are the median and the quartiles of old / new over the rounds: above 1 the
new checkout is faster. With one thread each, times are CPU time of the process, which other work on the
machine touches less than wall time.

The model is the demo preset with random weights, 7 labels. ``eager`` and ``compile`` score 8 images under all
labels by a `LabelScorer`, ``train`` is a forward and a backward pass of 16 images, ``sample`` draws 16 images
by `MagicFlow.sample`, ``onnx`` scores 8 images by the exported score graph in ONNX Runtime on the CPU. The
script uses nothing but public calls that both checkouts have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CASES = ("eager", "compile", "train", "sample", "onnx")
CLASSES = 7
SCORED, TRAINED = 8, 16
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


# -- the process of a checkout -------------------------------------------------------------------------------


class Worker:
    """Runs cases with the interpreter's package, which must be that of `checkout`; files go to `folder`."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        import torch

        import fastflow
        from fastflow import FlowConfig, MagicFlow

        found = Path(fastflow.__file__).resolve()
        if checkout.resolve() not in found.parents:
            raise SystemExit(f"the package of this interpreter is {found}, not that of {checkout}")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = MagicFlow(FlowConfig.demo(CLASSES))
        # New heads are zero, and couplings the identity.
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.05 if parameter.ndim == 1 else 0.3 / parameter[0].numel() ** 0.5
                parameter.add_(scale * torch.randn_like(parameter))
        self.x = torch.rand(TRAINED, *model.config.input_shape) * 2 - 1
        model.initialize(self.x)
        self.model, self.folder = model.eval(), folder
        self.works: dict[str, Callable[[], object]] = {}

    def seconds(self, case: str) -> float:
        """CPU seconds of one call; the first call of a case prepares it first, and is not to be counted."""
        if case not in self.works:
            self.works[case] = self.prepare(case)
        work = self.works[case]
        start = time.process_time()
        work()
        return time.process_time() - start

    def prepare(self, case: str) -> Callable[[], object]:
        """The work of a case."""
        if case == "train":
            return self.prepare_training()
        if case == "sample":
            return self.prepare_sampling()
        if case == "onnx":
            return self.prepare_export()
        from fastflow.models.scoring import LabelScorer

        scorer, x = LabelScorer(self.model, engine=case), self.x[:SCORED]
        return lambda: scorer(x)

    def prepare_training(self) -> Callable[[], object]:
        """A forward and a backward pass of a model of its own."""
        import copy

        import torch

        model, y = copy.deepcopy(self.model).train(), torch.arange(TRAINED) % CLASSES

        def step() -> None:
            model.zero_grad()
            loss = -model.log_prob(self.x, y).mean()
            loss.backward()

        return step

    def prepare_sampling(self) -> Callable[[], object]:
        """A call of `MagicFlow.sample`."""
        import torch

        y = torch.arange(TRAINED) % CLASSES
        return lambda: self.model.sample(y)

    def prepare_export(self) -> Callable[[], object]:
        """The export that this checkout writes, scored by its runtime."""
        from fastflow.export.onnx import export_onnx
        from fastflow.export.runtime import OnnxScorer

        self.model.save(self.folder / "model")
        export_onnx(self.folder / "model", self.folder / "export", ("score",), check=False)
        scorer, x = OnnxScorer(self.folder / "export", "cpu", threads=1), self.x[:SCORED].numpy()
        return lambda: scorer.score(x)


def serve(checkout: str, folder: str) -> None:
    """Answer a case per line of standard input with a line of seconds."""
    # Whatever else is printed must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(Path(checkout), Path(folder))
    for line in sys.stdin:
        print(json.dumps(worker.seconds(line.strip())), file=answers, flush=True)


# -- the comparison ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_of(checkout: str, python: str) -> Iterator[Callable[[str], float]]:
    """A process of a checkout; gives a function from a case to the seconds of one call."""
    with tempfile.TemporaryDirectory() as folder:
        # -P keeps this folder, which holds modules with common names, from the path of imports.
        command = [python, "-P", str(Path(__file__).resolve()), "--serve", checkout, folder]
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | THREADS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def seconds(case: str) -> float:
            # A process that has ended gives no line.
            with contextlib.suppress(BrokenPipeError):
                print(case, file=requests, flush=True)
            line = answers.readline()
            if not line:
                raise SystemExit(f"the process of {checkout} ended during {case}")
            found: float = json.loads(line)
            return found

        try:
            yield seconds
        finally:
            with contextlib.suppress(BrokenPipeError):
                requests.close()
            process.wait()


def compare(
    old: Callable[[str], float], new: Callable[[str], float], case: str, rounds: int
) -> list[tuple[float, float]]:
    """(old, new) seconds of each round, after two calls of each that are not counted."""
    for seconds in (old, new) * 2:
        seconds(case)
    return [(old(case), new(case)) for _ in range(rounds)]


def summary(case: str, pairs: list[tuple[float, float]]) -> str:
    """A line with the median and the quartiles of old / new, and both medians."""
    ratios = [old / new for old, new in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
    times = f"old {before:.4f} s, new {after:.4f} s, {len(pairs)} rounds"
    return f"{case:8} old / new {middle:.3f}, quartiles {low:.3f} to {high:.3f}; {times}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="folder of the old checkout")
    parser.add_argument("old_python", help="its interpreter")
    parser.add_argument("new", help="folder of the new checkout")
    parser.add_argument("new_python", help="its interpreter")
    parser.add_argument("--rounds", type=int, default=11, help="calls of each (default: %(default)s)")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES)
    )
    args = parser.parse_args()
    with process_of(args.old, args.old_python) as old, process_of(args.new, args.new_python) as new:
        for case in args.cases:
            print(summary(case, compare(old, new, case, args.rounds)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
