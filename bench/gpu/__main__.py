"""The command; see the package."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from bench.gpu import checks, exports, ops, speed
from bench.gpu.report import TABLE, Report
from bench.gpu.setting import CLASSES, TASKS, Setting
from bench.measuring import DEVICE, device_name

ON_GPU = DEVICE == "cuda"
PRECISIONS = {"training": ("float32", "tf32", "bfloat16"), "other": ("float32", "tf32", "mixed")}
# A compilation takes minutes and may take no more than this.
COMPILE_SECONDS = 150
# Inductor compiles as many single ops as it can in this time.
OP_COMPILE_SECONDS = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="a GPU in eight minutes")
    parser.add_argument("exports", nargs="*", metavar="EXPORT", help="folders of `fastflow export`")
    parser.add_argument("--preset", default="paper" if ON_GPU else "tiny")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--classes", type=int, default=CLASSES)
    options = parser.parse_args()
    setting = Setting(options.preset, options.classes)
    report = Report(options.preset, options.seconds, TABLE if ON_GPU else None)
    print(f"{device_name()}, torch {torch.__version__}, preset {options.preset}, {options.classes} labels")
    if not ON_GPU:
        print("no GPU: this tests the script and measures nothing")
    run(report, setting, options.exports)
    if report.skipped:
        print(f"no time for: {', '.join(report.skipped)}")
    if report.failed:
        print(f"failed: {', '.join(report.failed)}")
    raise SystemExit(1 if report.failed else 0)


def run(report: Report, setting: Setting, folders: list[str]) -> None:
    """All items, the most important first."""
    batches, one = ((16, 64), (1, 16, 64)) if ON_GPU else ((2,), (1,))
    small = batches[0]
    for task in TASKS:
        report.attempt(f"errors, {task}", partial(checks.errors, setting, task, 4 if ON_GPU else 2))
        bits = partial(checks.capture_bits, setting, task, small)
        report.attempt(f"bits of captured steps, {task}", bits, 10)
    for i, precision in enumerate(PRECISIONS["training"]):
        other = PRECISIONS["other"][i]
        if not ON_GPU and precision != "float32":
            continue
        for task in TASKS:
            for name, work, choice in (
                ("training", speed.training, precision),
                ("sampling", speed.sampling, other),
                ("scoring", speed.scoring, other),
            ):
                item = partial(work, setting, task, small, choice)
                report.attempt(f"{name}, {task}, {choice}, {small}", item, 15)
    for task in TASKS:
        # At 64 images, training of the generation model outgrows smaller cards.
        others = [("training", speed.training, batches[1:] if task == "classification" else ())]
        others += [("sampling", speed.sampling, batches[1:]), ("scoring", speed.scoring, one)]
        for name, work, counts in others:
            for count in counts:
                if count != small:
                    item = partial(work, setting, task, count, "float32")
                    report.attempt(f"{name}, {task}, {count}", item, 15)
    limits = (None, OP_COMPILE_SECONDS) if ON_GPU else (1, 0.0)
    report.attempt("ops", partial(ops.forward_ops, *limits), 40 if ON_GPU else 0)
    if ON_GPU:
        for task in TASKS:
            limit = max(1.0, min(COMPILE_SECONDS, report.seconds_left))
            item = partial(speed.compiled, setting, task, small, limit)
            report.attempt(f"compiled reference, {task}", item, 60)
    for folder in folders:
        report.attempt(f"export {folder}", partial(exports.export, folder), 10)


if __name__ == "__main__":
    main()
