from __future__ import annotations

import pytest

from fastflow.cli import _console


def test_lines_of_progress_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("fastflow.cli._console.time.monotonic", lambda: now)
    with _console.run_progress("classifying") as notify:
        # 1000 inputs were done before; from then on there are two a second.
        for done in range(1001, 1201):
            now += 0.5
            notify(done, None if done < 1100 else 1500, done // 1150)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "classifying: 1060, 2/s",
        "classifying: 1120 of 1500, 2/s, about 0:03:10 left",
        "classifying: 1180 of 1500, 2/s, 1 failed, about 0:02:40 left",
    ]
