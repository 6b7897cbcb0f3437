"""Reader of evolving methods."""

import re

from wizard_engine.runtime.text_lines import split_lines

from .cleaning import without_reasoning
from .text_replies import TextForm, find_text, is_heading, trimmed

_FENCE_LINE = re.compile(r"\s*(?:>\s*)?(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
_NEW_METHOD = re.compile(
    r"\b(?:new|improved|updated|revised|optimi[sz]ed|final|modified|nuevo|neue|nouvelle"
    r"|nuovo)\b[^\n]{0,40}\b(?:method|método|methode|méthode|version|metodo)\b"
    r"|新(?:的)?方法|改进后的方法|新しい方法|새로운 방법|новый метод",
    re.IGNORECASE,
)
_OTHER_BLOCK = re.compile(
    r"\b(?:old|original|previous|current|example|for instance|usage|given)\b[^\n]*$", re.IGNORECASE
)
_METHOD = TextForm(
    r"(?:the )?(?:whole )?(?:new|improved|revised|updated|optimi[sz]ed|final) (?:evolving )?method|(?:nuevo"
    r"|novo) método|neue methode"
    r"|nouvelle méthode|nuovo metodo|新的?方法|改进后的方法|新しい方法|새로운 방법|новый метод",
    r"\b(?:method|método|methode|méthode|metodo)\b|方法|방법|метод",
    ("method", "new_method", "improved_method", "revised_method", "updated_method"),
)
_LIST = re.compile(r"\s*1[.)]\s+\S.*(?:\n\s*(?:\d+[.)]|[-*•])\s+\S.*)+\s*")


def read_method(text: str) -> str | None:
    """The new method, or None where there is none, or several.

        reply = { text, block } [text] | heading or preface, text | numbered list, alone | JSON object or tag with it
        block = line of three or more backticks or tildes [name] , lines , line of as many

    Of several blocks the last behind "new method", "revised method" or the like counts, else the only one that is not
    called an example or the old one; two that differ are none. A block that is not closed is none.
    """
    content = _unquoted(without_reasoning(text))
    blocks = _blocks(content)
    if blocks and not content.startswith(("```json", "{")):
        return _chosen(blocks)
    if not blocks and ("```" in content or "~~~" in content):
        inline = re.fullmatch(r"[^`]{0,80}```([^`\n]+)```\s*", content)
        return inline[1].strip() if inline else None
    matched = find_text(content, _METHOD)
    is_marked = matched is not None and (matched != content or _LIST.fullmatch(content))
    return matched if is_marked and not re.fullmatch(r"[^\n]*[:：]", matched) else None


def _chosen(blocks: list[tuple[str, str]]) -> str | None:
    """The block that is the new method."""
    rest = [(before, block) for before, block in blocks if not _OTHER_BLOCK.search(before)] or blocks
    new = [item for item in rest if _NEW_METHOD.search(item[0])]
    texts = [text for _, block in new[-1:] or rest if (text := trimmed(_unheaded(block), _METHOD))]
    return texts[0] if len(set(texts)) == 1 else None


def _unheaded(block: str) -> str:
    """The block without a heading as its first line."""
    first, _, rest = block.partition("\n")
    return rest if is_heading(first, _METHOD) and not _METHOD.heading.match(first)["rest"].strip() else block


def _unquoted(content: str) -> str:
    lines = content.split("\n")
    is_quote = all(line.startswith(">") for line in lines if line.strip())
    return "\n".join(line[1:].removeprefix(" ") for line in lines) if is_quote else content


def _blocks(content: str) -> list[tuple[str, str]]:
    """(the last line before it, content) of each closed block."""
    blocks, fence, lines, before, previous = [], "", [], "", ""
    for line in split_lines(content):
        match = _FENCE_LINE.match(line)
        closes = fence and re.search(rf"{fence[0]}{{{len(fence)},}}\s*$", line)
        if not fence:
            if match:
                fence, lines, before = match["fence"], [], previous
            previous = line if line.strip() else previous
        elif closes:
            lines.append(re.sub(rf"{fence[0]}{{{len(fence)},}}\s*$", "", line))
            blocks.append((before, "\n".join(lines).strip()))
            fence, previous = "", ""
        else:
            lines.append(line)
    return blocks
