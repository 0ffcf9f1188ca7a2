"""The rules of CONTRIBUTING.md that a program can check: imports, circles, private names, budgets, comments.

``python tests/test_layers.py`` prints every finding; `test_layers_checks.py` shows that rules can be broken.

Imports are held against the table of folders in CONTRIBUTING.md: its first column names paths, its last one
says what they may import beside themselves and the modules of its first row. Imports inside functions and
under TYPE_CHECKING count as any other. An import of ``fastflow.x.y`` is none of the ``__init__`` of
``fastflow.x``, unless a name is taken from it. A package has names like ``__version__`` before it imports
anything, so taking one counts as no import.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The folders that are checked, and the name under which each is imported.
FOLDERS = {"fastflow": "fastflow", "export": "fastflow.export", "bench": "bench"}
KERNEL_LINES, OTHER_LINES, TEST_LINES = 400, 350, 500
# A file that is longer holds a comment line with this beginning and the reason.
EXCUSE = "# Over budget:"
MAX_PARAMETERS = 14
NO_SENTENCE = ("Of", "What")
# Private in form, public by documentation: methods of named tuples.
PUBLIC_UNDERSCORES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}


@dataclasses.dataclass(frozen=True)
class Use:
    """A dotted name that a module takes from another one by an import or through an imported module."""

    line: int
    dotted: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed file.

    Attributes:
        name: under which it is imported.
        path: relative to the root.
        package: in which it lies; the name itself for an ``__init__``.
        source: its text.
        nodes: of its syntax tree.
        uses: what it takes from elsewhere.
    """

    name: str
    path: str
    package: str
    source: str
    nodes: tuple[ast.AST, ...]
    uses: tuple[Use, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: where its files lie, which of them it may import, and whether torch is kept out."""

    paths: tuple[str, ...]
    allowed: tuple[str, ...]
    torch_free: bool


def load(root: Path) -> dict[str, Module]:
    """All modules of the checked folders by their names."""
    modules = {}
    for folder, package in FOLDERS.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            package_of_file = name if is_package else name.rpartition(".")[0]
            source = file.read_text(encoding="utf-8")
            nodes = tuple(ast.walk(ast.parse(source, file)))
            path = file.relative_to(root).as_posix()
            modules[name] = Module(
                name, path, package_of_file, source, nodes, tuple(uses(nodes, package_of_file))
            )
    return modules


# -- imports -------------------------------------------------------------------------------------------------


def is_metadata(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def is_private(name: str) -> bool:
    return name.startswith("_") and not is_metadata(name)


def attribute_chain(node: ast.expr) -> list[str]:
    """``["a", "b", "c"]`` of the expression ``a.b.c``; empty where it does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def uses(nodes: Sequence[ast.AST], package: str) -> Iterator[Use]:
    """Every dotted name that a file imports or reaches through a name that it imported."""
    bound = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Use(node.lineno, alias.name)
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")[: package.count(".") + 2 - node.level]
                origin = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield Use(node.lineno, f"{origin}.{alias.name}")
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute):
            root, *names = attribute_chain(node) or [""]
            if root in bound:
                yield Use(node.lineno, ".".join([bound[root], *names]))


def target(dotted: str, modules: dict[str, Module]) -> str | None:
    """The module from which a dotted name is taken; None where it is none of ours, or nothing is taken."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in modules:
            rest = parts[length:]
            nothing_taken = not rest and modules[name].package == name
            return None if nothing_taken or (rest and is_metadata(rest[0])) else name
    return None


def imports(module: Module, modules: dict[str, Module]) -> dict[str, int]:
    """The modules that a module imports, each with the line at which it does first."""
    lines: dict[str, int] = {}
    taken = [(use.line, target(use.dotted, modules)) for use in module.uses]
    # `from fastflow import kernels` takes the whole package, whatever is used of it.
    for node in module.nodes:
        if isinstance(node, ast.ImportFrom) and not node.level:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            taken += [(node.lineno, name) for name in named if name in modules]
    for line, name in sorted(taken, key=lambda item: item[0]):
        if name is not None and name != module.name:
            lines.setdefault(name, line)
    return lines


def read_table(text: str) -> list[Row]:
    """The rows of the table whose last column is "may import".

    Raises:
        ValueError: there is no such table, or a cell names what no row has.
    """
    lines = iter(text.splitlines())
    if not any(re.match(r"\|.*\| may import \|$", line) for line in lines):
        raise ValueError("CONTRIBUTING.md has no table with a column 'may import'")
    next(lines)
    cells = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    known = {}
    for first, *_ in cells:
        for path in re.findall(r"`([^`]+)`", first):
            known[path.rstrip("/").removesuffix(".py").removeprefix("fastflow/")] = path
    rows = []
    for first, text_cell, last in cells:
        words = [word.strip(" `") for word in last.split(",")]
        unknown = set(words) - set(known) - {"everything", "nothing"}
        if unknown:
            raise ValueError(f"the table lets {first} import {', '.join(sorted(unknown))}, which no row has")
        everything = tuple(path for path in known.values() if path != "bench/")
        allowed = (
            everything if "everything" in words else tuple(known[word] for word in words if word in known)
        )
        rows.append(Row(tuple(re.findall(r"`([^`]+)`", first)), allowed, "no torch" in text_cell.lower()))
    return rows


def row_of(path: str, rows: list[Row]) -> Row | None:
    """The row with the longest path that holds a file."""
    holding = [
        (len(p), row) for row in rows for p in row.paths if path == p or (p[-1] == "/" and path.startswith(p))
    ]
    return max(holding, key=lambda item: item[0])[1] if holding else None


def layer_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Imports that the table does not allow, files that it has no row for, rows that have no files."""
    rows = read_table((root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for path in (path for row in rows for path in row.paths if not (root / path).exists()):
        yield f"CONTRIBUTING.md: there is no {path}"
    for module in modules.values():
        row = row_of(module.path, rows)
        if row is None:
            yield f"{module.path}: the table in CONTRIBUTING.md has no row for it"
            continue
        allowed = (*row.paths, *row.allowed, *rows[0].paths)
        for name, line in imports(module, modules).items():
            path = modules[name].path
            if not any(path == p or (p[-1] == "/" and path.startswith(p)) for p in allowed):
                yield f"{module.path}:{line}: {row.paths[0]} may not import {name}"
        if row.torch_free:
            for use in module.uses:
                if use.dotted.partition(".")[0] in ("torch", "triton"):
                    yield f"{module.path}:{use.line}: no torch here"
                    break


def circle_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Groups of modules that import one another."""
    graph = {name: sorted(imports(module, modules)) for name, module in modules.items()}
    for group in circles(graph):
        way = " -> ".join(a_way_round(group, graph))
        yield f"circle of {len(group)}: {', '.join(sorted(group))}; such as {way}"


def circles(graph: dict[str, list[str]]) -> list[set[str]]:
    """Strongly connected components of two and more nodes."""
    below: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        queue = list(graph[start])
        while queue:
            name = queue.pop()
            if name not in seen:
                seen.add(name)
                queue += graph[name]
        below[start] = seen
    groups: list[set[str]] = []
    for name in graph:
        if name in below[name] and not any(name in group for group in groups):
            groups.append({other for other in below[name] if name in below[other]})
    return groups


def a_way_round(group: set[str], graph: dict[str, list[str]]) -> list[str]:
    """A shortest way from the first module of a circle back to it."""
    first = min(group)
    ways = [[first]]
    seen = set()
    while True:
        way = ways.pop(0)
        for name in graph[way[-1]]:
            if name == first:
                return [*way, first]
            if name in group and name not in seen:
                seen.add(name)
                ways.append([*way, name])


# -- private names -------------------------------------------------------------------------------------------


def private_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Private modules and names that are used outside of their package."""
    packages = {module.package for module in modules.values()}
    defined: dict[str, set[str]] = {}
    for module in modules.values():
        defined.setdefault(module.package, set()).update(private_definitions(module.nodes))
    for module in modules.values():
        said, foreign = set(), set()
        for use in module.uses:
            parts = use.dotted.split(".")
            place = next((i for i, part in enumerate(parts) if is_private(part)), None)
            if parts[0] not in ("fastflow", "bench"):
                foreign |= {(use.line, part) for part in parts}
            if place is None or parts[0] not in ("fastflow", "bench"):
                continue
            owner = ".".join(parts[:place])
            while owner and owner not in packages:
                owner = owner.rpartition(".")[0]
            private = ".".join(parts[: place + 1])
            inside = f"{module.package}.".startswith(f"{owner}.")
            if not inside and private not in said and parts[place] not in PUBLIC_UNDERSCORES:
                said.add(private)
                yield f"{module.path}:{use.line}: {private} is private to {owner}"
        own = set().union(*(defined[p] for p in defined if f"{module.package}.".startswith(f"{p}.")))
        elsewhere = set().union(*defined.values()) - own - private_definitions(module.nodes)
        for node in module.nodes:
            if (
                isinstance(node, ast.Attribute)
                and node.attr in elsewhere - PUBLIC_UNDERSCORES
                and attribute_chain(node)[:1] not in (["self"], ["cls"])
                and (node.lineno, node.attr) not in foreign
                and not any(node.attr in name.split(".") for name in said)
            ):
                yield f"{module.path}:{node.lineno}: .{node.attr} is private to another package's objects"


def private_definitions(nodes: Sequence[ast.AST]) -> set[str]:
    """Private names that a file gives to functions, classes, variables and attributes."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


# -- sizes and comments --------------------------------------------------------------------------------------


def budget_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Files with more lines than their folder allows and no line that says why."""
    for folder in (*FOLDERS, "tests"):
        for file in sorted((root / folder).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            budget = KERNEL_LINES if path.startswith("fastflow/kernels/") else OTHER_LINES
            budget = TEST_LINES if folder == "tests" else budget
            lines = file.read_text(encoding="utf-8").splitlines()
            reasons = [line.removeprefix(EXCUSE).strip() for line in lines if line.startswith(EXCUSE)]
            if len(lines) > budget and not any(reasons):
                yield f"{path}: {len(lines)} lines, the budget is {budget}"


def parameter_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Functions that take more parameters than a reader can keep apart.

    Launchers of kernels may, and so may commands, which have one for each of their options.
    """
    for module in modules.values():
        if module.path.startswith("fastflow/kernels/"):
            continue
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = node.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                name = getattr(node, "name", "lambda")
                command = module.path.startswith("fastflow/cli/") and not is_private(name)
                if count > MAX_PARAMETERS and not command:
                    yield f"{module.path}:{node.lineno}: {name} takes {count} parameters"


def comment_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Comments that open with a word that begins no sentence."""
    for module in modules.values():
        if not re.search(rf"#\s*({'|'.join(NO_SENTENCE)})\s", module.source):
            continue
        previous = -1
        for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
            if token.type != tokenize.COMMENT:
                continue
            line, column = token.start
            alone = not token.line[:column].strip()
            opens = not (alone and previous == line - 1)
            previous = line if alone else -1
            words = token.string.lstrip("#! ").split(maxsplit=1)
            if opens and words and words[0] in NO_SENTENCE:
                yield f"{module.path}:{line}: {token.string}"


# -- ops -----------------------------------------------------------------------------------------------------


def op_findings(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    """Ops whose kernels, tests or benchmarks are not found by the name of the op's file."""
    benches = "\n".join(module.source for module in modules.values() if module.path.startswith("bench/"))
    for module in modules.values():
        folder, _, file = module.path.rpartition("/")
        calls = [node for node in module.nodes if isinstance(node, ast.Call)]
        calls = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "register"]
        if folder != "fastflow/kernels" or not calls:
            continue
        launchers = [key.value for node in calls for key in node.keywords if key.arg == "triton"]
        without_kernels = all(isinstance(value, ast.Constant) and value.value is None for value in launchers)
        kernels = [] if launchers and without_kernels else [f"{folder}/triton/{file}"]
        for path in (*kernels, f"tests/kernels/test_{file}"):
            if not (root / path).exists():
                yield f"{module.path}: there is no {path}"
        if not re.search(rf"\b{file.removesuffix('.py')}", benches):
            yield f"{module.path}: nothing in bench/ has its name"


CHECKS: dict[str, Callable[[Path, dict[str, Module]], Iterator[str]]] = {
    "layers": layer_findings,
    "circles": circle_findings,
    "private names": private_findings,
    "budgets": budget_findings,
    "parameters": parameter_findings,
    "comments": comment_findings,
    "ops": op_findings,
}


# -- the tree ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house() -> dict[str, Module]:
    return load(ROOT)


@pytest.mark.parametrize("check", CHECKS)
def test_house_keeps_the_rules(check: str, house: dict[str, Module]) -> None:
    found = list(CHECKS[check](ROOT, house))
    assert not found, "\n".join(found)


if __name__ == "__main__":
    everything = load(ROOT)
    total = 0
    for title, run in CHECKS.items():
        listed = list(run(ROOT, everything))
        total += len(listed)
        print(f"\n== {title}: {len(listed)}", *listed, sep="\n")
    sys.exit(int(total > 0))
