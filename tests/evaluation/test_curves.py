from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflow.archive import model_folder
from fastflow.errors import CheckpointError, OutputFolderError
from fastflow.evaluation import run_logs
from fastflow.evaluation.curves import MAX_POINTS, curves_of_runs, thinned, write_curves
from fastflow.evaluation.figures import LINES
from fastflow.evaluation.run_logs import differing_settings, read_runs
from fastflow.training import trainer

STEPS = "step,epoch,learning_rate,phase,loss,bits_per_dim,images_per_second,skipped\n"


def epochs(count: int, shift: float = 0.0, **more: float) -> list[dict[str, float]]:
    return [
        {
            "epoch": e,
            "learning_rate": 1e-3 / e,
            "train_bits_per_dim": 5 + 1 / e + shift,
            "val_bits_per_dim": 5 + abs(e - 3) / 9 + shift,
            "val_accuracy": min(e, 4) / 5,
            "seconds": 30.0,
            **more,
        }
        for e in range(1, count + 1)
    ]


def run(folder: Path, history: list[Any], training: dict[str, Any] | None = None, steps: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in history]
    (folder / "history.jsonl").write_text("".join(line + "\n" for line in lines))
    if training is not None:
        document = {
            "config": {"widths": [[8, 8]], "task": "classification"},
            "metadata": {"training": training, "preprocess": {"slices": "center"}},
        }
        (folder / "config.json").write_text(json.dumps(document))
    if steps:
        (folder / "steps.csv").write_text(STEPS + steps)
    return folder


def lines_of(axes: Any) -> dict[tuple[str, str], list[float]]:
    """The values of the curves of a panel by colour and dashes."""
    return {
        (line.get_color(), line.get_linestyle()): list(line.get_ydata())
        for line in axes.get_lines()
        if len(line.get_xdata())
    }


def test_names_of_files_are_those_of_trainings() -> None:
    assert (run_logs.HISTORY, run_logs.CHECKPOINTS) == (trainer.HISTORY, trainer.CHECKPOINTS)
    assert (run_logs.UNFINISHED, run_logs.CONFIG) == (model_folder.UNFINISHED, model_folder.CONFIG)


# -- reading -------------------------------------------------------------------------------------------------


def test_finished_and_unfinished_runs_are_read(tmp_path: Path) -> None:
    run(tmp_path / "a", epochs(5), {"kept_epoch": 3, "seed": 0})
    run(tmp_path / "b" / "unfinished", epochs(2))
    log_a, log_b = read_runs([tmp_path / "a", str(tmp_path / "b")])
    assert (log_a.name, log_b.name) == ("a", "b")
    assert list(log_a.history) == epochs(5) and list(log_b.history) == epochs(2)
    assert (log_a.kept_epoch, log_b.kept_epoch) == (3, None)
    assert log_a.settings == {
        "flow.widths": [[8, 8]],
        "flow.task": "classification",
        "training.seed": 0,
        "preprocess.slices": "center",
    }
    assert log_a.best("val_bits_per_dim") == (5.0, 3)
    # Of equal accuracies the first is the best.
    assert log_a.best("val_accuracy", highest=True) == (0.8, 4)
    assert log_a.best("val_balanced_accuracy") is None
    assert log_a.steps is None and log_a.warnings == ()


def test_the_history_of_a_checkpoint_and_of_a_file(tmp_path: Path) -> None:
    folder = run(tmp_path / "m" / "unfinished", epochs(2))
    run(folder / "checkpoints" / "loss", epochs(1), {"seed": 5})
    for path in (tmp_path / "m", folder, folder / "history.jsonl"):
        (log,) = read_runs([path])
        assert log.folder == folder and log.name == "m" and log.settings["training.seed"] == 5


def test_a_finished_model_comes_before_the_training_that_will_replace_it(tmp_path: Path) -> None:
    run(tmp_path / "m", epochs(4))
    run(tmp_path / "m" / "unfinished", epochs(1))
    assert len(read_runs([tmp_path / "m"])[0].history) == 4
    both = read_runs([tmp_path / "m", tmp_path / "m" / "unfinished"])
    assert [log.name for log in both] == ["m", "m (unfinished)"]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [run(tmp_path / name / "model", epochs(1)) for name in ("fold-1", "fold-2")]
    assert [log.name for log in read_runs(paths)] == ["fold-1/model", "fold-2/model"]


def test_damaged_lines_are_named_and_left_out(tmp_path: Path) -> None:
    first, second, third = epochs(3)
    broken = ['{"epoch": 2, "val', "[1]", '{"loss": 1}', '{"epoch": "two"}', "null"]
    folder = run(tmp_path / "m", [first, *broken, third, second, {**first, "seconds": 7.0}, ""])
    (log,) = read_runs([folder])
    assert [record["epoch"] for record in log.history] == [1, 2, 3]
    # The epoch that was repeated counts as it was the last time.
    assert log.history[0]["seconds"] == 7.0
    assert log.warnings == (
        f"{folder / 'history.jsonl'}: lines 2, 3, 4 and 2 more are no record of an epoch and left out",
    )


def test_steps_are_read_where_they_are(tmp_path: Path) -> None:
    steps = "2,1,0.1,likelihood,4,5.5,60,0\n1,1,0.1,likelihood,,,60,1\nx,1,,,,,,\n3,1\n"
    folder = run(tmp_path / "m", epochs(1), steps=steps)
    (log,) = read_runs([folder])
    assert log.steps is not None and log.steps["step"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(log.steps["bits_per_dim"], [np.nan, 5.5, np.nan])
    assert log.warnings == (f"{folder / 'steps.csv'}: line 4 is no record of a step and left out",)
    (folder / "steps.csv").write_text("a,b\n1,2\n")
    (log,) = read_runs([folder])
    assert log.steps is None and "has no column 'step'" in log.warnings[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.mkdir(), "no run of `train`, neither history.jsonl nor unfinished/history.jsonl"),
        (lambda path: path.write_text("x"), "no run of `train`"),
        (lambda path: (path.mkdir(), (path / "config.json").touch()), "a model without the history"),
        (lambda path: run(path, ["{"]), "holds no epoch that can be read"),
        (lambda path: run(path, []), "holds no epoch that can be read"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "m")
    good = run(tmp_path / "good", epochs(1))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path / 'm'))}.*{message}"):
        read_runs([good, tmp_path / "m"])


def test_a_run_is_named_once(tmp_path: Path) -> None:
    run(tmp_path / "m", epochs(1))
    with pytest.raises(ValueError, match="is named twice"):
        read_runs([tmp_path / "m", tmp_path / "m" / "history.jsonl"])
    with pytest.raises(ValueError, match="at least one model folder, got none"):
        read_runs([])


def test_settings_that_differ(tmp_path: Path) -> None:
    runs = read_runs(
        [
            run(tmp_path / "a", epochs(1), {"seed": 0, "learning_rate": 1e-3, "kept_epoch": 1}),
            run(tmp_path / "b", epochs(1), {"seed": 0, "learning_rate": 5e-4, "kept_epoch": 9, "ema": 0.99}),
            run(tmp_path / "c", epochs(1)),
        ]
    )
    none = "\N{EN DASH}"
    assert differing_settings(runs) == {
        "training.learning_rate": ["0.001", "0.0005", none],
        "training.ema": [none, "0.99", none],
    }
    assert differing_settings(runs[::2]) == {}
    damaged = tmp_path / "a" / "config.json"
    damaged.write_text("{")
    (log,) = read_runs([tmp_path / "a"])
    assert log.settings == {} and str(damaged) in log.warnings[0]


# -- drawing -------------------------------------------------------------------------------------------------


def test_every_run_is_drawn_in_every_panel(tmp_path: Path) -> None:
    steps = "".join(f"{i},1,0.1,likelihood,4,{5 + i},60,0\n" for i in range(1, 4))
    runs = read_runs(
        [
            run(tmp_path / "a", epochs(5), steps=steps),
            run(tmp_path / "b", epochs(3, 0.5, val_balanced_accuracy=0.25)),
        ]
    )
    panels = {axes.get_title(): axes for axes in curves_of_runs(runs).axes if axes.get_title()}
    assert list(panels) == [
        "bits/dim (lower is better)",
        "validation accuracy",
        "bits/dim over steps (training)",
        "learning rate",
        "seconds of each epoch",
    ]
    bits, accuracy, by_step, _, seconds = map(lines_of, panels.values())
    for i, log in enumerate(runs):
        assert bits[LINES[i], "-"] == [record["val_bits_per_dim"] for record in log.history]
        assert bits[LINES[i], ":"] == [record["train_bits_per_dim"] for record in log.history]
        assert accuracy[LINES[i], "--"] == [record["val_accuracy"] for record in log.history]
        assert seconds[LINES[i], "-"] == [30.0] * len(log.history)
    assert accuracy[LINES[1], "-"] == [0.25] * 3 and (LINES[0], "-") not in accuracy
    assert by_step == {(LINES[0], "-"): [6.0, 7.0, 8.0]}


def test_long_curves_are_thinned() -> None:
    steps = np.arange(1, 10 * MAX_POINTS + 1, dtype=np.float64)
    x, y = thinned(steps, 2 * steps)
    assert len(x) == MAX_POINTS and x[0] == 5.5
    np.testing.assert_allclose(y, 2 * x)
    x, y = thinned(np.array([1.0, 2.0, 3.0]), np.array([np.nan, 4.0, np.inf]))
    assert (x.tolist(), y.tolist()) == ([2.0], [4.0])
    assert all(np.isnan(part).all() for part in thinned(steps, np.full(len(steps), np.nan)))


def test_numbers_that_are_not_finite_and_many_runs_are_drawn(tmp_path: Path) -> None:
    histories = [epochs(2, 0.1 * i) for i in range(14)]
    histories[0] = [{"epoch": 1, "train_bits_per_dim": float("nan")}]
    runs = read_runs([run(tmp_path / f"a {i}", history) for i, history in enumerate(histories)])
    write_curves(tmp_path / "page.html", runs, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    with pytest.raises(ValueError, match="at least one run"):
        curves_of_runs([])


def test_the_page_stands_alone_and_names_everything(tmp_path: Path) -> None:
    runs = read_runs(
        [
            run(tmp_path / "a <b>", ["{", *epochs(5)], {"seed": 0, "kept_epoch": 3}),
            run(tmp_path / "c", epochs(4, 1.0, skipped_steps=2), {"seed": 1, "kept_epoch": 4}),
        ]
    )
    write_curves(tmp_path / "new" / "page.html", runs)
    text = (tmp_path / "new" / "page.html").read_text()
    assert "a &lt;b&gt;" in text and "a <b>" not in text
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    for part in (
        "5.0000<small>epoch 3</small>",
        "0.800<small>epoch 4</small>",
        "training.seed",
        "<td>8</td>",
    ):
        assert part in text
    assert "Balanced accuracy" not in text
    assert "line 1 is no record of an epoch" in text


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    runs = read_runs([run(tmp_path / "m", epochs(2))])
    page, picture = tmp_path / "page.html", tmp_path / "curves.png"
    picture.write_text("mine")
    with pytest.raises(OutputFolderError, match=r"curves\.png: there is such a file; replace it \(--overw"):
        write_curves(page, runs, picture)
    assert not page.exists() and picture.read_text() == "mine"
    write_curves(page, runs, picture, overwrite=True)
    assert Image.open(io.BytesIO(picture.read_bytes())).format == "PNG"
    with pytest.raises(OutputFolderError, match=r"page\.html: there is such a file"):
        write_curves(page, runs)
    with pytest.raises(OutputFolderError, match="is a folder; name a file"):
        write_curves(tmp_path, runs, overwrite=True)
