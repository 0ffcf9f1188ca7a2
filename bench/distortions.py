"""Which distortions a model of the demo notices, on the demo's held-out scans.

``python -m bench.distortions DEMO [--out FILE] [--workers N]``

DEMO is the folder of ``make demo``. Copies of its held-out scans under each distortion of
`fastflow.data.demo.distortions` are classified by its model, and so are the scans themselves, whose row is
named ``none``. FILE gets a row for each distortion and test set; ``share`` is that of copies which are
flagged or an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.files import write_csv
from fastflow.archive.distorted import Noticed, classify_distorted
from fastflow.data.demo.distortions import DISTORTIONS, Distortion
from fastflow.data.manifest import read_manifest
from fastflow.workflow import TESTS

COLUMNS = ("test_set", "distortion", "volumes", "ok", "flagged", "error", "share", "codes")
NONE = Distortion("none", "the scan as it is", lambda data: data)


def row_of(test_set: str, noticed: Noticed) -> tuple[str | int, ...]:
    """A row of the table."""
    counts = (noticed.statuses.get(status, 0) for status in ("ok", "flagged", "error"))
    codes = " ".join(f"{code}:{count}" for code, count in sorted(noticed.codes.items()))
    return (test_set, noticed.name, noticed.count, *counts, f"{noticed.share:.3f}", codes)


def rows(demo: Path, workers: int) -> Iterator[tuple[str | int, ...]]:
    """The rows of both test sets."""
    records = read_manifest(demo / "manifest.csv")
    for split, (_, heading, _) in TESTS.items():
        paths = [record.path for record in records if record.split == split]
        for noticed in classify_distorted(
            paths,
            demo / "model",
            workers,
            distortions=(NONE, *DISTORTIONS),
            progress=lambda done, total, heading=heading: print(
                f"{heading}: {done}/{total}", file=sys.stderr
            ),  # type: ignore[misc]
        ):
            yield row_of(heading, noticed)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("demo", type=Path, help="the folder of make demo")
    parser.add_argument("--out", type=Path, default=Path("docs/data/distortions.csv"))
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    table = list(rows(options.demo, options.workers))
    write_csv(options.out, COLUMNS, table)
    for row in table:
        print(*row, sep="\t")


if __name__ == "__main__":
    main()
