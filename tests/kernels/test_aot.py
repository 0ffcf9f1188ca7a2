"""Kernels built ahead of time for six GPU targets, held to the committed table.

A build says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(code: str) -> str:
    """Run code in a process of its own, where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


REPORT = """
    print(json.dumps({
        "results": results, "kernels": sorted(kernels),
        "regressions": aot.regressions(results, aot.read_table()),
    }))
"""

# One build of each kernel, for two of the targets in turn. Triton must be there before launches are recorded
# under the interpreter's variable.
SAMPLE = (
    """
import json, sys
sys.path.insert(0, ".")
import triton.language
from bench import aot
if True:
    kernels = {}
    for build in aot.builds():
        kernels.setdefault(build.kernel, []).append(build)
    results = []
    for i, group in enumerate(kernels.values()):
        for target in aot.TARGETS[2 * i % 6 :][:2]:
            results.append(aot.compile_one(group[len(group) // 2], target))
"""
    + REPORT
)

# Workers that are spawned read the main module again, so it must be a file that does nothing without its
# guard.
THIRD = (
    """
import json
from bench import aot
if __name__ == "__main__":
    kernels = {}
    for build in aot.builds():
        kernels.setdefault(build.kernel, []).append(build)
    chosen = [build for group in kernels.values() for build in (group[1::3] or group)]
    results = aot.compile_all([(build, target) for build in chosen for target in aot.TARGETS])
"""
    + REPORT
)


# Second stages of sums, and the networks and maps of a sample, read few numbers; their tiles are narrow.
SMALL_TENSORS = (
    "_context_bwd_kernel",
    "_context_kernel",
    "_maps_bwd_kernel",
    "_maps_kernel",
    "_convolution_bwd_kernel",
    "_layers_bwd_kernel",
    "_prior_sum_kernel",
    "_sum_chunks_kernel",
    "_weights_bwd_kernel",
)


def check(found):
    assert found["regressions"] == []
    assert {row[2] for row in found["results"]} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert {row[0] for row in found["results"]} == set(found["kernels"])


def test_a_build_of_each_kernel_keeps_its_budget():
    check(json.loads(python(SAMPLE)))


@pytest.mark.slow
def test_a_third_of_the_builds_keeps_its_budget(tmp_path):
    """All of them take 20 minutes; `python -m bench.aot` builds them where kernels were changed."""
    script = tmp_path / "build.py"
    script.write_text(THIRD)
    run = f"import sys, runpy; sys.path.insert(0, '.'); runpy.run_path({str(script)!r}, run_name='__main__')"
    check(json.loads(python(run)))


def table():
    from bench import aot

    return aot.read_table(ROOT / "bench" / "aot.csv")


@pytest.fixture
def bench_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_table_is_whole(bench_importable):
    from bench import aot

    rows = table()
    expected = {(build.kernel, build.variant, target) for build in aot.builds() for target in aot.TARGETS}
    assert set(rows) == expected


def test_nothing_spills_and_aligned_streams_move_in_128_bits(bench_importable):
    for (kernel, variant, target), row in table().items():
        assert row.spilled_bytes == 0, (kernel, variant, target)
        # `loose` images have odd sizes, and half of the channels of an unsqueezed image lie at every second
        # address.
        strided = (
            "loose" in variant or "squeezed" in variant or "channels_last" in variant or "swapped" in variant
        )
        if (
            kernel not in SMALL_TENSORS
            and not strided
            and variant.split()[0] in ("fp32", "bf16/fp32", "fp32/bf16")
        ):
            assert row.loads_128 + row.stores_128 > 0, (kernel, variant, target)


def test_a_regression_is_found(bench_importable):
    from bench import aot

    row = next(row for row in table().values() if row.loads_128)
    budget = {row[:3]: row}
    assert aot.regressions([row], budget) == []
    changes = [{"spilled_bytes": 4}, {"registers": 2 * row.registers}, {"loads_128": 0}]
    for change in [*changes, {"shared_bytes": 2 * row.shared_bytes + 1}]:
        assert len(aot.regressions([row._replace(**change)], budget)) == 1
    assert "not in the table" in aot.regressions([row], {})[0]
