"""Docstrings of this project as Markdown: sections become lists, equations and drawings keep their lines."""

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Source)(?:: ?(.*))?:?$")
RELATION = re.compile(r"\S +(=|<=|>=|->) +\S")
ITEM = re.compile(r"(?:^|(?<=\S)   )(?=[A-Za-z_*][\w, *.]*: )")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring as Markdown."""
    blocks: list[str] = []
    section: list[str] | None = None
    for line in [*textwrap.dedent(text).split("\n"), ""]:
        found = SECTION.fullmatch(line) if not line.startswith(" ") else None
        if found and line.startswith(f"{found[1]}:"):
            if section is not None:
                blocks.append(listed(section))
            section = [f"**{found[1]}**", *([found[2]] if found[2] else [])]
        elif section is not None and (line.startswith(" ") or (section[0] == "**Source**" and line)):
            section.append(line.strip() if section[0] == "**Source**" else line)
        else:
            if section is not None:
                blocks.append(listed(section))
                section = None
            blocks.append(line)
    return "\n".join(paragraphs("\n".join(blocks)))


def listed(section: list[str]) -> str:
    """A section: its items as a list; an item may continue on lines that are indented further."""
    title, *lines = section
    if title == "**Source**":
        return f"\n{title}: {' '.join(lines)}\n"
    items: list[str] = []
    for line in lines:
        is_first = len(line) - len(line.lstrip()) <= 4
        for piece in [p.strip() for p in ITEM.split(line.strip()) if p.strip()] if is_first else [line.strip()]:
            if not is_first and items:
                items[-1] += " " + piece
            else:
                items.append(piece)
    return "\n".join([f"\n{title}", "", *(f"- {named(item)}" for item in items), ""])


def named(item: str) -> str:
    """`name: text` with the name in code."""
    name, sign, text = item.partition(": ")
    return f"`{name}`: {text}" if sign and re.fullmatch(r"[\w, *.]+", name) else item


def paragraphs(text: str) -> list[str]:
    """Paragraphs; those behind the first that are equations become code."""
    found = []
    for number, block in enumerate(re.split(r"\n{2,}", text.strip("\n"))):
        lines = block.split("\n")
        is_plain = number and not lines[0].startswith(("- ", "|", "**", "    ", "#", "`"))
        if is_plain and all(RELATION.search(line) for line in lines):
            block = "\n".join(["```text", *lines, "```"])
        elif not lines[0].startswith("    "):
            block = "`".join(literal(piece) if not n % 2 else piece for n, piece in enumerate(block.split("`")))
        found += [block, ""]
    return found


def literal(text: str) -> str:
    """Text whose brackets and stars are no links, tags or emphasis; the bold titles of sections stay."""
    return re.sub(r"(?<!\*)\*(?!\*)", r"\\*", text.replace("[", r"\[").replace("<", "&lt;"))
