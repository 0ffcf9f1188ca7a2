"""Every check of `test_layers.py` finds what it must, and nothing else, in small houses made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_layers import CHECKS, load, read_table

TABLE = """
| folder | what is in it | may import |
|---|---|---|
| `fastflow/errors.py`, `fastflow/_files.py` | basics | nothing |
| `fastflow/__init__.py` | names | models |
| `fastflow/kernels/` | ops | nothing |
| `fastflow/models/` | models | kernels |
| `fastflow/models/masks.py` | masks | data |
| `fastflow/data/` | files, no torch | nothing |
| `fastflow/cli/` | commands | everything |
| `export/` | graphs | models |
| `bench/` | timings | everything |
"""


# Empty files that the table speaks of.
EMPTY = (
    "kernels/__init__",
    "models/__init__",
    "models/masks",
    "data/__init__",
    "cli/__init__",
    "errors",
    "_files",
)


def build(root: Path, files: dict[str, str]) -> None:
    """A small house: files by their paths, and empty ones where the table needs some."""
    (root / "CONTRIBUTING.md").write_text(TABLE)
    empty = {f"fastflow/{name}.py": "" for name in ("__init__", *EMPTY)} | {"export/__init__.py": ""}
    for path, text in ({"bench/__init__.py": ""} | empty | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def findings(check: str, root: Path) -> list[str]:
    return list(CHECKS[check](root, load(root)))


def test_a_house_in_order_has_no_findings(tmp_path):
    build(
        tmp_path,
        {
            "fastflow/kernels/squeeze.py": "import torch\nfrom fastflow import _files",
            "fastflow/models/flow.py": "from fastflow import __version__, kernels\nfrom . import masks",
            "fastflow/models/masks.py": "def mask():\n    from fastflow.data.volume import read",
            "fastflow/data/volume.py": "import numpy",
            "fastflow/cli/run.py": "import fastflow.export.onnx\nfrom fastflow import errors",
            "export/onnx.py": "from .parts import part\nfrom fastflow.models.flow import Flow",
            "export/parts.py": "# A part\n# Of two.\n",
            "bench/speed.py": "from bench import other\nfrom fastflow.models import flow",
            "bench/other.py": "",
        },
    )
    assert {check: findings(check, tmp_path) for check in CHECKS} == {check: [] for check in CHECKS}


@pytest.mark.parametrize(
    "statement",
    [
        "from fastflow.models.flow import Flow",
        "from fastflow.models import flow",
        "from fastflow import models",
        "import fastflow.models.flow",
        "import fastflow.models.flow as f",
        "from ..models.flow import Flow",
        "from fastflow import models\nmodels.flow.Flow",
        "import fastflow\nfastflow.models.flow.Flow",
        "def late():\n    from fastflow.models.flow import Flow",
        "if TYPE_CHECKING:\n    from fastflow.models.flow import Flow",
        "from bench.speed import time",
    ],
)
def test_import_against_the_table_is_found_in_every_form(tmp_path, statement):
    build(
        tmp_path,
        {"fastflow/kernels/squeeze.py": statement, "fastflow/models/flow.py": "", "bench/speed.py": ""},
    )
    (found, *_) = findings("layers", tmp_path)
    assert found.startswith("fastflow/kernels/squeeze.py:") and "may not import" in found


def test_row_of_a_single_file_goes_before_that_of_its_folder(tmp_path):
    build(tmp_path, {"fastflow/models/flow.py": "import fastflow.data.volume", "fastflow/data/volume.py": ""})
    assert findings("layers", tmp_path) == [
        "fastflow/models/flow.py:1: fastflow/models/ may not import fastflow.data.volume"
    ]


def test_nobody_below_may_import_benches_not_even_commands(tmp_path):
    build(tmp_path, {"fastflow/cli/run.py": "from bench.speed import time", "bench/speed.py": ""})
    assert len(findings("layers", tmp_path)) == 1


@pytest.mark.parametrize(
    "statement", ["import torch.nn", "def late():\n    from torch import Tensor", "import triton"]
)
def test_torch_is_found_where_the_table_keeps_it_out(tmp_path, statement):
    build(tmp_path, {"fastflow/data/volume.py": statement})
    assert len(findings("layers", tmp_path)) == 1


def test_file_without_a_row_and_row_without_a_file_are_found(tmp_path):
    build(tmp_path, {"fastflow/stray.py": ""})
    (tmp_path / "fastflow/_files.py").unlink()
    assert findings("layers", tmp_path) == [
        "CONTRIBUTING.md: there is no fastflow/_files.py",
        "fastflow/stray.py: the table in CONTRIBUTING.md has no row for it",
    ]


def test_table_with_a_word_that_is_no_row_is_refused():
    with pytest.raises(ValueError, match="modles"):
        read_table(TABLE.replace("| models |\n", "| modles |\n"))
    with pytest.raises(ValueError, match="may import"):
        read_table("no table")


@pytest.mark.parametrize(
    "late", ["from fastflow.models.a import x", "def f():\n    import fastflow.models.a"]
)
def test_circle_is_found_with_a_way_round(tmp_path, late):
    build(
        tmp_path,
        {
            "fastflow/models/a.py": "from fastflow.models.b import x",
            "fastflow/models/b.py": "if TYPE_CHECKING:\n    from fastflow.models import c",
            "fastflow/models/c.py": late,
            "fastflow/models/d.py": "from fastflow.models.a import x",
        },
    )
    (found,) = findings("circles", tmp_path)
    assert found.startswith("circle of 3: ") and "a -> fastflow.models.b -> fastflow.models.c -> " in found


def test_package_that_hands_on_its_modules_is_part_of_a_circle_only_if_they_import_it(tmp_path):
    build(
        tmp_path,
        {
            "fastflow/models/__init__.py": "from fastflow.models.a import x",
            "fastflow/models/a.py": "from fastflow.models.b import x",
            "fastflow/models/b.py": "x = 1",
        },
    )
    assert findings("circles", tmp_path) == []
    (tmp_path / "fastflow/models/b.py").write_text("from fastflow.models import x")
    assert len(findings("circles", tmp_path)) == 1


@pytest.mark.parametrize(
    ("importer", "statement", "count"),
    [
        ("fastflow/kernels/b.py", "from fastflow.kernels.a import _x", 0),
        ("fastflow/models/b.py", "from fastflow.kernels.a import _x", 1),
        ("fastflow/models/b.py", "from fastflow.kernels import a\na._x", 1),
        ("fastflow/models/b.py", "import fastflow.kernels.a\nfastflow.kernels.a._x()", 1),
        ("fastflow/models/b.py", "from fastflow.kernels._c import x", 1),
        ("fastflow/models/b.py", "from fastflow.kernels import _c", 1),
        ("fastflow/kernels/b.py", "from fastflow.kernels._c import x", 0),
        ("fastflow/models/b.py", "from fastflow._files import write", 0),
        ("export/b.py", "from fastflow._files import write", 0),
        ("bench/b.py", "from fastflow._files import write", 1),
        ("fastflow/models/b.py", "from fastflow.kernels.a import A\nA()._hidden", 1),
        ("fastflow/kernels/b.py", "from fastflow.kernels.a import A\nA()._hidden", 0),
        (
            "fastflow/models/b.py",
            "import torch\ntorch._hidden.reset()\nx = pair._replace(a=1)\nx._version",
            0,
        ),
        ("fastflow/models/b.py", "class B:\n    def f(self):\n        return self._hidden", 0),
    ],
)
def test_private_names_are_found_outside_of_their_package(tmp_path, importer, statement, count):
    build(
        tmp_path,
        {
            "fastflow/kernels/a.py": "_x = 1\nclass A:\n    def f(self):\n        self._hidden = 1",
            "fastflow/kernels/_c.py": "x = 1",
            importer: statement,
        },
    )
    assert len(findings("private names", tmp_path)) == count


@pytest.mark.parametrize(
    ("path", "budget"),
    [
        ("fastflow/kernels/a.py", 400),
        ("fastflow/models/a.py", 350),
        ("bench/a.py", 350),
        ("tests/test_a.py", 500),
    ],
)
def test_file_over_budget_is_found_unless_it_gives_a_reason(tmp_path, path, budget):
    build(tmp_path, {})
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text("x = 1\n" * budget)
    assert findings("budgets", tmp_path) == []
    file.write_text("x = 1\n" * (budget + 1))
    assert findings("budgets", tmp_path) == [f"{path}: {budget + 1} lines, the budget is {budget}"]
    file.write_text("# Over budget:\n" + "x = 1\n" * budget)
    assert len(findings("budgets", tmp_path)) == 1
    file.write_text("# Over budget: one table of constants.\n" + "x = 1\n" * budget)
    assert findings("budgets", tmp_path) == []


def test_function_with_many_parameters_is_found_unless_it_is_a_launcher_or_a_command(tmp_path):
    many, few = ", ".join(f"a{i}" for i in range(15)), ", ".join(f"a{i}" for i in range(14))
    fields = "class A:\n" + "".join(f"    a{i}: int\n" for i in range(20))
    methods = f"    def f(self, {few}): ...\n    def g(self, {few}, *rest): ...\n"
    text = f"{fields}{methods}def h({few}, *, last): ...\n"
    files = {"fastflow/models/a.py": text, "fastflow/kernels/a.py": f"def launch({many}): ...\n"}
    build(tmp_path, files | {"fastflow/cli/a.py": f"def command({many}): ...\ndef _helper({many}): ...\n"})
    found = sorted(line.split(": ")[1] for line in findings("parameters", tmp_path))
    assert found == [f"{name} takes 15 parameters" for name in ("_helper", "g", "h")]


def test_comment_that_is_no_sentence_is_found_by_its_first_word(tmp_path):
    text = (
        "# Of a thing.\nx = 1  # What it is.\n# A sentence\n# Of two lines.\ny = '# Of a string'\n"
        "# Offsets.\n\n# Of a new block.\n"
    )
    build(tmp_path, {"fastflow/models/a.py": text})
    assert [line.split(": ")[0] for line in findings("comments", tmp_path)] == [
        f"fastflow/models/a.py:{line}" for line in (1, 2, 8)
    ]


def test_op_is_found_that_lacks_kernels_tests_or_benchmarks_of_its_name(tmp_path):
    files = {
        "fastflow/kernels/registry.py": "def register(name): ...",
        "fastflow/kernels/squeeze.py": "register('squeeze2x2')",
        "fastflow/kernels/layouts.py": "",
    }
    build(tmp_path, files)
    assert len(findings("ops", tmp_path)) == 3
    there = ("fastflow/kernels/triton/squeeze.py", "tests/kernels/test_squeeze.py")
    build(tmp_path, files | dict.fromkeys(there, "") | {"bench/test_ops.py": "squeeze2x2"})
    assert findings("ops", tmp_path) == []
    (tmp_path / there[0]).unlink()
    assert len(findings("ops", tmp_path)) == 1
    (tmp_path / "fastflow/kernels/squeeze.py").write_text("register('squeeze2x2', triton=None)")
    assert findings("ops", tmp_path) == []
