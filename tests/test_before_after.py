"""The comparison of two checkouts takes turns, and forms its ratios from rounds that belong together."""

import os
import sys
from pathlib import Path

import pytest

from bench import before_after

ROOT = Path(__file__).parents[1]


def test_checkouts_take_turns():
    calls = []

    def seconds_of(name, seconds):
        return lambda case: calls.append(name) or seconds

    pairs = before_after.compare(seconds_of("old", 3.0), seconds_of("new", 2.0), "train", 3)
    assert pairs == [(3.0, 2.0)] * 3
    # Two calls of each are not counted.
    assert calls == ["old", "new"] * 5


def test_summary_is_of_ratios_by_round():
    # The machine was ten times slower in the second round.
    line = before_after.summary("eager", [(1.0, 2.0), (10.0, 20.0), (3.0, 2.0), (1.0, 1.0)])
    assert "old / new 0.750, quartiles 0.500 to 1.375" in line and "4 rounds" in line
    assert "old / new 2.000, quartiles 2.000 to 2.000" in before_after.summary("eager", [(2.0, 1.0)])


def test_a_process_of_another_package_is_refused(tmp_path):
    (tmp_path / "fastflow").mkdir()
    refused = pytest.raises(SystemExit, match="ended during train")
    with before_after.process_of(str(tmp_path), sys.executable) as seconds, refused:
        seconds("train")


@pytest.mark.slow
def test_a_checkout_against_itself(capsys, monkeypatch):
    checkout = [os.fspath(ROOT), sys.executable]
    monkeypatch.setattr(sys, "argv", ["before_after", *checkout * 2, "--rounds", "2", "--cases", "train"])
    before_after.main()
    printed = capsys.readouterr().out
    assert printed.startswith("train") and "2 rounds" in printed
