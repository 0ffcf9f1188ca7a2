"""The README's Python example runs as it is written."""

import re
from pathlib import Path

from typer.main import get_command

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 16
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["probabilities"].shape == (6, 3)
    assert (tmp_path / "my-model" / "config.json").exists()


def test_table_of_commands_is_complete():
    from fastflow.cli.main import app

    listed = set(re.findall(r"^\| `fastflow ([a-z-]+)` \|", README, re.MULTILINE))
    assert listed == set(get_command(app).commands)


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    assert all((Path(__file__).parents[1] / picture).is_file() for picture in pictures)
