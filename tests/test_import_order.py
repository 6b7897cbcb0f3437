"""Imports point one way: between the trees of the project, between the rooms of the engine, between modules."""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("csrc", "kernels", "wizard_engine", "recipes")
# The engine's rooms in the order of the tour in CONTRIBUTING: each may import from those before it.
ROOMS = tuple(re.findall(r"^\| `wizard_engine/(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(path): path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))}


def imports(text: str, package: str) -> list[tuple[int, str]]:
    """(line, module) of every import of the project's own modules, those in functions and for type checking too."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            lines += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                lines.append((node.lineno, inner if inner in MODULES else base))
    return [(line, name) for line, name in lines if name.partition(".")[0] in TREES]


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


@functools.cache
def all_imports() -> dict[str, list[tuple[int, str]]]:
    """Module -> its imports; read once, and not where another worker runs these tests."""
    return {name: imports(path.read_text(), package_of(name)) for name, path in MODULES.items()}


def rank(module: str) -> tuple[int, int]:
    """Where a module stands: its tree, and in the engine its room; __init__ below all rooms, __main__ above."""
    tree, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    inside = {"": 0, "__main__": len(ROOMS) + 1}
    if tree == "wizard_engine" and room not in inside:
        return TREES.index(tree), 1 + ROOMS.index(room)
    return TREES.index(tree), inside[room] if tree == "wizard_engine" else 0


def test_the_tour_lists_every_room_once_and_no_module_is_loose():
    engine = ROOT / "wizard_engine"
    assert sorted(ROOMS) == sorted(path.parent.name for path in engine.glob("*/__init__.py"))
    assert sorted(path.name for path in engine.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_imports_point_to_what_stands_above():
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line}: {other}"
        for name, edges in all_imports().items()
        for line, other in edges
        if rank(other) > rank(name)
    ]
    assert not wrong, "; ".join(wrong)


def test_no_modules_import_each_other():
    graph = {name: {other for _, other in edges if other != name} for name, edges in all_imports().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " -> ".join(reversed(error.args[1])))


def test_imports_are_relative_within_a_room_and_absolute_from_others():
    wrong = []
    for name, path in MODULES.items():
        room = package_of(name)
        if room in ("wizard_engine", "recipes"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                is_own = not node.level and f"{node.module}.".startswith(f"{room}.")
                # A room within a room may reach up into it.
                if is_own or node.level > max(1, room.count(".")):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "; ".join(wrong)
