"""The GPU's benchmark: its script on a CPU, its table and its time."""

import csv
import subprocess
import sys
from pathlib import Path

from bench.gpu import report as reporting
from bench.gpu.report import Figure, Key, Report

ROOT = Path(__file__).parents[1]


def figures(value=1.0, batch=2):
    def work():
        yield Key("training", "classification", "eager", batch=batch), Figure(value, "images/s", "a note")

    return work


def lines(table):
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_figure_takes_the_place_of_the_one_with_its_key(tmp_path):
    table = tmp_path / "gpu.csv"
    report = Report("tiny", 60, table)
    report.attempt("a", figures(1.0))
    report.attempt("b", figures(2.0, batch=3))
    Report("tiny", 60, table).attempt("a", figures(5.0))
    Report("paper", 60, table).attempt("a", figures(7.0))
    found = [(line["preset"], line["batch"], float(line["value"])) for line in lines(table)]
    assert found == [("tiny", "2", 5.0), ("tiny", "3", 2.0), ("paper", "2", 7.0)]
    assert lines(table)[0]["note"] == "a note" and [p.name for p in tmp_path.iterdir()] == ["gpu.csv"]


def test_items_without_time_are_skipped_and_named(capsys):
    report = Report("tiny", 5, None)
    report.attempt("long", figures(), seconds=30)
    assert report.skipped == ["long"] and "long: skipped" in capsys.readouterr().out


def test_a_failure_hides_no_other_item(capsys, tmp_path):
    def fails():
        yield Key("a", "b"), Figure(1.0, "s")
        raise RuntimeError("no such luck")

    report = Report("tiny", 60, tmp_path / "gpu.csv")
    report.attempt("broken", fails)
    report.attempt("whole", figures())
    assert report.failed == ["broken"] and "no such luck" in capsys.readouterr().out
    assert len(lines(tmp_path / "gpu.csv")) == 2


def test_script_runs_on_a_cpu_and_writes_no_table():
    before = reporting.TABLE.read_bytes() if reporting.TABLE.exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--seconds", "25", "--classes", "2"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "measures nothing" in done.stdout and "error of log-odds classification" in done.stdout
    assert "differing bits, replay 3 classification eager float32 2: 0 elements" in done.stdout
    assert before == (reporting.TABLE.read_bytes() if reporting.TABLE.exists() else None)
