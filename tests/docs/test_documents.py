"""Pages against what they are made of: rows of benchmarks, messages in the sources, files and headings they link to."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from benchmarks import check_phases, results_pages

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def sources() -> str:
    """All sources, with strings that go on in the next line joined."""
    files = [
        path for top in ("wizard_engine", "recipes", "kernels", "benchmarks") for path in (ROOT / top).rglob("*.py")
    ]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_tables_are_those_of_the_committed_rows(capsys):
    assert results_pages.main(["--check"]) == 0, capsys.readouterr().out


def test_table_changed_by_hand_is_detected(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "results" / "mixture.md"
    page.parent.mkdir(parents=True)
    text = (ROOT / "docs/results/mixture.md").read_text(encoding="utf-8")
    page.write_text(text.replace("54.1 %", "64.1 %"), encoding="utf-8")
    monkeypatch.setattr(results_pages, "PAGES", page.parent)
    monkeypatch.setattr(results_pages, "ROOT", tmp_path)
    assert results_pages.main(["--check"]) == 1 and "stale" in capsys.readouterr().out
    assert results_pages.main([]) == 0 and page.read_text(encoding="utf-8") == text


def test_messages_of_troubleshooting_are_in_the_sources():
    text, page = sources(), (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = [title for title in re.findall(r"^### (.*)$", page, re.MULTILINE) if not title.endswith("?")]
    assert len(headings) > 40
    assert [title for title in headings if title not in text] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings(path):
    wrong = []
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        page = (path.parent / target).resolve() if target else path
        if not page.exists() or (anchor and page.suffix == ".md" and anchor not in anchors(page)):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(path):
    named = re.findall(r"`((?:recipes|benchmarks|kernels|csrc|tests)/[\w./]+)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists() and "results/" not in name] == []


def test_every_recipe_has_a_page():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert recipes == {path.stem for path in (ROOT / "docs" / "recipes").glob("*.md")} - {"index"}


def test_phases_of_the_gpu_check_are_those_of_its_page():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = text[text.index("| phase | does |") : text.index("Each row is on disk")]
    assert re.findall(r"`(\w+)`", table) == [phase.name for phase in check_phases.PHASES]


def test_names_that_python_in_a_page_imports_are_there():
    python = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = [block for path in PAGES for block in python.findall(path.read_text(encoding="utf-8"))]
    assert len(blocks) >= 3
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kernels":
            assert hasattr(importlib.import_module("kernels"), node.attr), ast.unparse(node)
