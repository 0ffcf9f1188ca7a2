"""The runtime as one file, `runtime.pyz`: Python runs it where NumPy, nibabel and ONNX Runtime are there."""

from __future__ import annotations

import ast
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow._files import write_bytes

PACKAGE = "fastflow"
# The program, and the module that programs of others import from the archive.
ROOTS = ("fastflow.runtime.command", "fastflow.export.runtime")

# The time of a copy or checkout says nothing about the content.
FIXED_TIME = (1980, 1, 1, 0, 0, 0)
# Fields of an entry in a zip archive.
CREATED_ON_UNIX, READABLE_BY_ALL = 3, 0o644 << 16

# The archive's `__main__.py`; Python versions that are too old for the package must be able to read it.
MAIN = '''\
"""Classifies scans with the export that this file lies in: python runtime.pyz FILES..."""

import sys
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])
try:
    from fastflow.runtime.command import main, own_folder
except ModuleNotFoundError as error:
    sys.exit("error: there is no " + str(error.name) + " here: pip install numpy nibabel onnxruntime")
# A spawned process that imports this file must not classify again.
if __name__ == "__main__":
    sys.exit(main(folder=own_folder(Path(__file__).parent)))
'''


def write_bundle(path: str | PathLike[str]) -> None:
    """Write the runtime, and the modules of this package that it imports, as an archive that Python runs.

    Equal sources give equal bytes.

    ``python DIR/runtime.pyz FILES...`` classifies files with the export in DIR, also where DIR/runtime.pyz is
    a link that leads elsewhere; ``--folder`` names another one.

    Args:
        path: the file, which is replaced.

    Raises:
        OSError: it cannot be written.
    """
    files = {"__main__.py": MAIN.encode()}
    for name, source in modules().items():
        ending = "/__init__.py" if source.name == "__init__.py" else ".py"
        files[name.replace(".", "/") + ending] = source.read_bytes()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, FIXED_TIME)
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, CREATED_ON_UNIX
            entry.external_attr = READABLE_BY_ALL
            archive.writestr(entry, files[name])
    write_bytes(path, stream.getvalue())


def modules() -> dict[str, Path]:
    """Files of the modules of this package that the runtime imports, by name, with their packages."""
    found: dict[str, Path] = {}
    waiting = [*ROOTS]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = _file(name)
        waiting += [name.rpartition(".")[0]] if "." in name else []
        tree = ast.parse(found[name].read_bytes())
        waiting += _imports(tree, name if found[name].name == "__init__.py" else name.rpartition(".")[0])
    return found


def _file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the runtime imports {name}, which has no file", name=name)
    return Path(spec.origin)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules of this package that code imports, in functions too, but not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if base.split(".")[0] == PACKAGE:
                yield base
                yield from (
                    f"{base}.{alias.name}" for alias in node.names if _is_module(f"{base}.{alias.name}")
                )
        else:
            yield from _imports(node, package)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # The name before the last dot is a module, not a package.
        return False
