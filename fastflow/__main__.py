"""``python -m fastflow`` is the command `fastflow`."""

from __future__ import annotations

from fastflow.cli.main import run

if __name__ == "__main__":
    run()
