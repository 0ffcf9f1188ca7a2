"""The README and the guides name what exists, and their Python examples run as they are written."""

import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from fastflow.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))),
]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that headings of a page have in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = python_blocks("README.md")
    assert len(example.strip().splitlines()) <= 16
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["probabilities"].shape == (6, 3)
    assert (tmp_path / "my-model" / "config.json").exists()


def test_examples_of_the_model_run_one_after_the_other():
    torch.manual_seed(0)
    names = {}
    for block in python_blocks("docs/model.md"):
        exec(compile(block, "docs/model.md", "exec"), names)
    torch.testing.assert_close(names["x_again"], names["x"], rtol=0, atol=1e-4)
    assert names["log_probs"].shape == (6, 3)
    assert not names["invalid"].any()
    assert names["logdet"].shape == (6,)


@pytest.mark.parametrize("page", PAGES)
def test_other_examples_are_python(page):
    for block in python_blocks(page):
        compile(block, page, "exec")


def test_table_of_commands_is_complete():
    listed = set(re.findall(r"^\| `fastflow ([a-z-]+)` \|", README, re.MULTILINE))
    assert listed == set(get_command(app).commands)


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_exist(page):
    commands = get_command(app).commands
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for name, line in re.findall(r"fastflow ([a-z-]+)((?: [^`\n#]*)?)", text):
        if name in commands:
            known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_readme_has_a_picture_and_names_its_namesake():
    assert re.search(r"!\[[^\]]+\]\(docs/images/", README)
    assert "not the FastFlow anomaly detector of the same name" in README
