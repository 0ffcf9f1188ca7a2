"""The command; see the package."""

from __future__ import annotations

import argparse

from bench import fake_gpu


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.capture_lint", description="what a CUDA graph cannot hold of a training step"
    )
    parser.add_argument("cases", nargs="*", help="such as 'classification pairwise bfloat16 reversible'; all")
    options = parser.parse_args()
    fake_gpu.load()
    from bench.capture_lint.steps import CASES, findings

    if unknown := set(options.cases) - set(CASES):
        parser.error(f"cases are {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    total = 0
    for name in options.cases or CASES:
        found = findings(CASES[name])
        total += len(found)
        print(f"{name}: {len(found)} findings", flush=True)
        for finding, count in found.items():
            print(f"  {finding}" + (f" ({count} times)" if count > 1 else ""))
    return 1 if total else 0


if __name__ == "__main__":
    fake_gpu.leave(main())
