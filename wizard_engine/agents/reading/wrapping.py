"""What stands around a text that was asked for: fences, quotes, JSON, remarks, further sections of the prompt."""

import re
from collections.abc import Sequence

from wizard_engine.runtime.text_lines import split_lines

from .cleaning import json_values, lower_keys

_PLAIN_FENCES = {"", "text", "txt", "plaintext", "plain", "markdown", "md", "instruction", "prompt", "answer"}
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "「": "」", "『": "』", "'": "'", "‘": "’"}
REMARK_RULE = re.compile(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})[ \t]*\n")
_REMARK = re.compile(
    r"[\s>]*[(\[*_#\s]*(?:"
    r"(?:explanation|rationale|justification|reasoning|review|comments?|operator(?: applied| used)?"
    r"|method(?: applied| used)?|analysis"
    r"|change log|word count|words added|added words|added constraint|changes?(?: made)?|key changes|key improvements"
    r"|improvements?(?: made)?|what (?:i |has |was )?changed|why this (?:works|is better)|how this"
    r"|summary of changes|reason for"
    r"|erklärung|änderungen|explicación|cambios|explication|modifications|说明|解释|修改说明|改动|変更点|説明|설명|변경)"
    r"[^\n:：]{0,60}[*_]*[:：]"
    r"|note[*_]*[:：][*_\s]*(?:i\b|this (?:version|rewrite|rewritten|answer|instruction)|the (?:rewritten|new|added"
    r"|change|revised|improved|above))"
    r"|i(?:['’]ve| have)? (?:added|changed|applied|rewrote|rewritten|made|chose|improved|clarified|corrected"
    r"|removed|replaced|included|kept)\b"
    r"[^\n]*\b(?:instruction|prompt|answer|version|constraint|requirement|condition|original|operator|step|clarity"
    r"|it)\b"
    r"|(?:this|the) (?:new |rewritten |revised |improved |updated |added |above )+(?:version|instruction|prompt"
    r"|answer|rewrite|constraint|requirement|response)"
    r"|this (?:version|rewrite|rewriting|evolution)\b|the (?:change|addition)\b|let me know if you(?:['’]d"
    r"| would) like (?:me to )?(?:any|further|another|adjust|change)"
    r"|added (?:a|one|the) (?:constraint|condition|requirement)|(?:\+|~)?\d+ words added)",
    re.IGNORECASE,
)


def named_value(text: str, keys: Sequence[str]) -> str | None:
    """The text under the first of the keys that the only JSON object of a text has, where the text is little else."""
    if "{" not in text:
        return None
    values = [value for value in json_values(text) if isinstance(value, dict)]
    if len(values) != 1 or not re.fullmatch(r"[^{}]{0,200}\{.*\}[\s`]*", text.strip(), re.DOTALL):
        return None
    item = lower_keys(values[0])
    return next((item[key].strip() for key in keys if isinstance(item.get(key), str)), None)


def without_sections(text: str, names: Sequence[str]) -> str:
    """The text before the first line that is a heading `#Name#:` of the prompt."""
    pattern = re.compile(rf"[ \t*_]*[#＃]+[ \t]*(?:{'|'.join(names)})[ \t]*[#＃][ \t]*[:：]?", re.IGNORECASE)
    lines = split_lines(text) if "#" in text or "＃" in text else []
    for index, line in enumerate(lines):
        if pattern.match(line):
            return "\n".join(lines[:index]).strip()
    return text.strip()


def without_closing(text: str) -> str:
    """The text without remarks in its last paragraphs; a rule before them goes, too."""
    pieces = re.split(r"(\n[ \t]*\n\s*)", text.strip())
    paragraphs, gaps = pieces[0::2], pieces[1::2]
    end = next((i for i in range(1, len(paragraphs)) if _is_remark(paragraphs, i)), len(paragraphs))
    kept = "".join(piece for pair in zip(paragraphs[:end], [*gaps, ""]) for piece in pair).rstrip()
    if end < len(paragraphs):
        kept = re.sub(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,})$", "", kept).rstrip()
    lines = kept.split("\n")
    while len(lines) > 1 and _REMARK.match(lines[-1]) and re.match(r"\s*[(\[*_]", lines[-1]):
        lines.pop()
    return "\n".join(lines).rstrip()


def _is_remark(paragraphs: list[str], index: int) -> bool:
    """Whether a remark begins with this paragraph; a rule before a remark is part of it."""
    paragraph = paragraphs[index]
    if re.fullmatch(r"\s*(?:-{3,}|\*{3,}|_{3,})\s*", paragraph):
        return index + 1 < len(paragraphs) and bool(_REMARK.match(paragraphs[index + 1]))
    return bool(_REMARK.match(re.sub(r"^\s*(?:-{3,}|\*{3,}|_{3,})\s*\n", "", paragraph)))


def unwrapped(text: str) -> str:
    """The text without a fence, quotes, bold or `>` around the whole of it."""
    for _ in range(3):
        shorter = _unfenced(text.strip())
        shorter = _unquoted(shorter)
        if shorter == text:
            break
        text = shorter
    return text


def _unfenced(text: str) -> str:
    match = re.match(r"(`{3,}|~{3,})[ \t]*([\w-]*)[ \t]*\n(.*?)\n?[ \t]*\1[ \t]*(?:\n|$)", text, re.DOTALL)
    if not match or match[2].lower() not in _PLAIN_FENCES or text[match.end() :].strip():
        return text
    return match[3].strip()


def _unquoted(text: str) -> str:
    lines = text.split("\n")
    if len(text) > 1 and all(line.startswith(">") for line in lines if line.strip()):
        text = "\n".join(line[1:].removeprefix(" ") for line in lines).strip()
    bold = re.fullmatch(r"(\*\*|__)(?!\s)(.+?)(?<!\s)\1", text)
    if bold and bold[1] not in bold[2]:
        text = bold[2]
    close = _QUOTES.get(text[:1])
    if close and len(text) > 2 and text[-1] == close and close not in text[1:-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
