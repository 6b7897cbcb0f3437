"""What `make docs` adds to the hand-written pages: README and CONTRIBUTING as pages, and one API page for each package.

Packages and modules are found in the tree, so that moving a module needs no change here. Only their docstrings are
read: nothing of the project is imported, and building the site needs neither torch nor a compiler.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
PACKAGES = ("wizard_engine", "kernels", "csrc")


def on_config(config: Any) -> Any:
    """Add the API pages to the navigation."""
    pages = api_pages()
    config.nav.append({"API reference": ["api/index.md", *(page for page in pages if page != "api/index.md")]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {page: from_root((ROOT / source).read_text(encoding="utf-8")) for page, source in PAGES.items()}
    for path, text in (pages | api_pages()).items():
        files.append(File.generated(config, path, content=text))
    return files


def from_root(text: str) -> str:
    """A page of the repository's root with its links as seen from docs/."""
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](README.md", "](index.md")


def api_pages() -> dict[str, str]:
    """Path -> text of every API page: one for each package, with its public modules."""
    pages: dict[str, str] = {}
    summary = ["# API reference", "", "Made from the docstrings. One page for each package.", "", "| package | holds |"]
    summary.append("|---|---|")
    for top in PACKAGES:
        for folder in [
            ROOT / top,
            *sorted(p.parent for p in (ROOT / top).rglob("__init__.py") if p.parent.name != top),
        ]:
            name = ".".join(folder.relative_to(ROOT).parts)
            modules = public_modules(folder)
            if not modules:
                continue
            pages[f"api/{name}.md"] = page(name, modules)
            summary.append(f"| [`{name}`]({name}.md) | {first_line(folder / '__init__.py')} |")
    return {"api/index.md": "\n".join(summary) + "\n"} | pages


def public_modules(folder: Path) -> list[Path]:
    """Modules of a package that have a docstring and a public name."""
    return [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_") and has_public(path)]


def has_public(path: Path) -> bool:
    """Whether a module documents anything."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(n, kinds) and not n.name.startswith("_") and ast.get_docstring(n) for n in body)


def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].replace("|", "\\|")


def page(name: str, modules: list[Path]) -> str:
    """The page of a package."""
    parts = [f"# {name}"]
    for path in modules:
        parts.append(f"## {path.stem}\n\n::: {name}.{path.stem}\n    options:\n      heading_level: 3")
    return "\n\n".join(parts) + "\n"
