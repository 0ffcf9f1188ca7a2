"""The package as it is installed: light imports, and a wheel that holds what it must and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fastflow

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement", ["import fastflow", "import fastflow; dir(fastflow)", "import fastflow.errors"]
)
def test_import_loads_the_standard_library_only(statement: str) -> None:
    # That is what keeps it far below 0.2 s, on any machine.
    code = (
        f"import sys; before = set(sys.modules); {statement}\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    assert set(run(sys.executable, "-c", code).split()) - set(sys.stdlib_module_names) <= {"fastflow"}


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fastflow.cli.main import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0\n"
        "heavy = {'torch', 'triton', 'matplotlib', 'scipy', 'sklearn'}\n"
        "print(*{m.split('.')[0] for m in sys.modules} & heavy)"
    )
    assert run(sys.executable, "-c", code).split() == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'flows'"):
        _ = fastflow.flows


def test_version_is_that_of_the_distribution() -> None:
    assert fastflow.__version__ == version("fastflow")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built by way of the source distribution, from a copy: a stale build/ must not leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("fastflow", "export"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_anatomy(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    release = f"fastflow-{fastflow.__version__}"
    assert {name.split("/")[0] for name in names} == {"fastflow", f"{release}.dist-info"}
    expected = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "fastflow").rglob("*")
        if p.suffix in (".py", ".html", ".css", ".typed")
    }
    expected |= {f"fastflow/data/assets/{p.name}" for p in (ROOT / "fastflow/data/assets").iterdir()}
    expected |= {f"fastflow/export/{p.name}" for p in (ROOT / "export").glob("*.py")}
    assert {name for name in names if name.startswith("fastflow/")} == expected
    licences = {name.rsplit("/", 1)[1] for name in names if f"{release}.dist-info/licenses" in name}
    assert licences == {"LICENSE", "LICENCES.md"}


@pytest.mark.slow
def test_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", fresh)
    run(fresh / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    # The dependencies come from this environment; an entry of a .pth file brings no editable installation
    # with it.
    (packages,) = (fresh / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    code = (
        "import fastflow, fastflow.export, fastflow.data.anatomy as anatomy\n"
        "print(fastflow.__file__, fastflow.export.__file__, anatomy.coronal_mask().shape)\n"
        "print([anatomy.load_head(name).name for name in anatomy.HEADS])"
    )
    out = run(fresh / "bin/python", "-c", code, cwd=tmp_path)
    assert (
        out.splitlines()[0]
        == f"{packages}/fastflow/__init__.py {packages}/fastflow/export/__init__.py (184, 184)"
    )
    assert (
        run(fresh / "bin/fastflow", "--version", cwd=tmp_path).strip() == f"fastflow {fastflow.__version__}"
    )
    run(fresh / "bin/fastflow", "doctor", cwd=tmp_path)
