"""The rooms: imports point one way, without circles, and no class or `main` grows too long."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("patching", "train", "evaluate")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imported_by(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is imported itself, not inside functions."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            found |= names & MODULES.keys()
    return found


def test_imports_have_no_circles():
    order = TopologicalSorter({name: imported_by(path) for name, path in MODULES.items()})
    assert len([*order.static_order()]) == len(MODULES)


def test_patching_imports_neither_training_nor_evaluation():
    for name, path in MODULES.items():
        room = name.partition(".")[0]
        foreign = {other for other in imported_by(path) if not other.startswith((room, "patching"))}
        assert not foreign, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_and_mains_stay_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= 150, f"{node.name} has {num_lines} lines"
            assert node.name != "main" or num_lines <= 60, f"main has {num_lines} lines"
