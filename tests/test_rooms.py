"""The table of rooms: a room imports only from rooms below it, and there is no circle."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import captum_robust

ROOT = Path(captum_robust.__file__).parent
ROOMS = [
    {"__main__"},
    {"cli"},
    {"benchmark"},
    {"report"},
    {"show"},
    {"interop"},
    {"catalog"},
    {"inspection"},
    {"attr"},
    {"defenses"},
    {"transforms"},
    {"training"},
    {"models"},
    {"attacks"},
    {"data"},
    {"nn"},
    {"metrics"},
    {"optim"},
    {"draw"},
    {"runs"},
    {
        *("_captum", "_checks", "_contexts", "_draws", "_facts", "_files", "_memory"),
        *("_orientation", "_plurals", "_processes", "_progress", "_resize", "_scores", "_threads"),
    },
]
"""From top to bottom; rooms of one row do not import each other, but for the private files."""
PACKAGE = "captum_robust"
FILES = sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = [PACKAGE, *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path, *, deferred: bool) -> set[str]:
    """Modules of the package that a file imports; ``deferred``: also where it runs later."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith(PACKAGE):
                module = str(child.module)
                for alias in child.names:
                    full = f"{module}.{alias.name}"
                    found.add(full if full in MODULES else module)
            elif isinstance(child, ast.Import):
                found.update(a.name for a in child.names if a.name.startswith(PACKAGE))
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            if deferred or not later:
                visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def row_of(room: str) -> int:
    return next(i for i, row in enumerate(ROOMS) if room in row)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_room_imports_only_from_rooms_below(file: Path) -> None:
    own = room_of(module_of(file))
    if own == "":  # the package's own face
        return
    upwards = [
        module
        for module in imports_of(file, deferred=True)
        if room_of(module) not in ("", own)
        and row_of(room_of(module)) <= row_of(own)
        and not own.startswith("_")
    ]
    assert not upwards


def test_private_files_import_no_room() -> None:
    for file in ROOT.glob("_[a-z]*.py"):
        assert {room_of(m)[:1] for m in imports_of(file, deferred=True)} <= {"_", ""}, file.name


def test_no_circle_of_imports() -> None:
    graph = {m: imports_of(f, deferred=True) - {m, PACKAGE} for m, f in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        if module != PACKAGE:
            walk(module, ())


def test_no_file_has_the_name_of_another() -> None:
    times = Counter(f.name for f in FILES if f.name != "__init__.py")
    assert [name for name, n in times.items() if n > 1] == []
