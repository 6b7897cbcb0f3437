"""What stands around a text that was asked for: fences, quotes, JSON, remarks, further sections of the prompt."""

import re

_PLAIN_FENCES = {"", "text", "txt", "plaintext", "plain", "markdown", "md", "instruction", "prompt", "answer", "json"}
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "「": "」", "『": "』", "'": "'", "‘": "’"}
_RULE = r"[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})[ \t]*"
_LEAD = r"[\s>]*[（(\[*_#\s]*"
# From such a paragraph on, a reply speaks about its text.
_LABELLED_REMARK = re.compile(
    _LEAD + r"(?:explanation|rationale|justification|reasoning|review|comments?|operator(?: applied| used)?"
    r"|method(?: applied| used)?|analysis|change log|word count|words added|added words|added constraint"
    r"|changes?(?: made)?"
    r"|key changes|key improvements|improvements?(?: made)?|what (?:i |has |was )?changed|why this (?:works"
    r"|is better)|why"
    r"|how this|summary of changes|reason for|erklärung|änderungen|explicación|cambios|explication|modifications"
    r"|说明|解释|修改说明|改动|変更点|説明|설명|변경)[^\n:：]{0,60}[*_]*[:：]",
    re.IGNORECASE,
)
# Such a paragraph is a remark where nothing but remarks follows it.
_REMARK = re.compile(
    _LEAD + r"(?:note[*_]*[:：][*_\s]*(?:i\b|this (?:version|rewrite|rewritten|answer|instruction)"
    r"|the (?:rewritten|new|added|change|revised|improved|above|message))"
    r"|i(?:['’]ve| have)? (?:added|changed|applied|rewrote|rewritten|made|chose|improved|clarified|corrected"
    r"|removed|replaced"
    r"|included|kept|shortened)\b[^\n]*\b(?:instruction|prompt|answer|version|constraint|requirement|condition|original"
    r"|operator|step|clarity|sentence|remark|it)\b"
    r"|(?:this|the) (?:new |rewritten |revised |improved |updated |added |above )+(?:version|instruction|prompt"
    r"|answer|rewrite"
    r"|constraint|requirement|response)"
    r"|this (?:version|rewrite|rewriting|evolution|follows up|suggestion|message)\b|the (?:change|addition)\b"
    r"|added (?:a|one|the) (?:constraint|condition|requirement)|(?:\+|~)?\d+ words?(?: added)?\W*$"
    r"|(?:以上|注[:：]|备注[:：])|(?:quality|score|rating)[*_]*[:：][*_ ]*\d"
    r"|(?:i )?hope (?:this|that|it)(?: answer| version)? (?:helps|is|meets|works)|let me know (?:if|whether|what)\b"
    r"|good luck\b"
    r"|(?:would you like|do you want) me to\b|feel free to (?:ask|let me)|is there anything else (?:i|you)\b)",
    re.IGNORECASE,
)
_COUNT_BEHIND = re.compile(
    r"[ \t]*\((?:\+|~|about )?\d+ (?:words?|Wörter|palabras|mots)(?: added)?\)\s*$", re.IGNORECASE
)


def without_closing(text: str) -> str:
    """The text without remarks in its last paragraphs; a rule before them goes, too."""
    pieces = re.split(r"(\n[ \t]*\n\s*)", text.strip())
    paragraphs, gaps = pieces[0::2], pieces[1::2]
    end = next(
        (i for i in range(1, len(paragraphs)) if _LABELLED_REMARK.match(_unruled(paragraphs[i]))), len(paragraphs)
    )
    while end > 1 and (not _unruled(paragraphs[end - 1]) or _REMARK.match(_unruled(paragraphs[end - 1]))):
        end -= 1
    kept = "".join(piece for pair in zip(paragraphs[:end], [*gaps, ""]) for piece in pair).rstrip()
    if end < len(paragraphs):
        kept = re.sub(rf"\n{_RULE}$", "", kept).rstrip()
    lines = _COUNT_BEHIND.sub("", kept).split("\n")
    while len(lines) > 1 and re.match(r"\s*[（(\[*_]", lines[-1]) and _is_remark(lines[-1]):
        lines.pop()
    return "\n".join(lines).rstrip()


def _is_remark(line: str) -> bool:
    return bool(_REMARK.match(line) or _LABELLED_REMARK.match(line))


def _unruled(paragraph: str) -> str:
    """The paragraph without a rule as its first line."""
    return re.sub(rf"^\s*{_RULE}\s*(?:\n|$)", "", paragraph)


def unwrapped(text: str) -> str:
    """The text without a fence, quotes, bold or `>` around the whole of it."""
    for _ in range(3):
        shorter = unfenced(text.strip())
        shorter = _unquoted(shorter)
        if shorter == text:
            break
        text = shorter
    return text


def unfenced(text: str) -> str:
    """The text without a fence around the whole of it; one that names a programming language stays."""
    match = re.match(r"(`{3,}|~{3,})[ \t]*([\w-]*)[ \t]*\n(.*?)\n?[ \t]*\1[ \t]*(?:\n|$)", text, re.DOTALL)
    if not match or match[2].lower() not in _PLAIN_FENCES or text[match.end() :].strip():
        return text
    return match[3].strip()


def _unquoted(text: str) -> str:
    lines = text.split("\n")
    if len(text) > 1 and all(line.startswith(">") for line in lines if line.strip()):
        text = "\n".join(line[1:].removeprefix(" ") for line in lines).strip()
    bold = re.fullmatch(r"(\*\*|__|\*|`)(?![\s*_`])(.+?)(?<![\s*_`])\1", text)
    if bold and bold[1] not in bold[2]:
        text = bold[2]
    close = _QUOTES.get(text[:1])
    if close and len(text) > 2 and text[-1] == close and close not in text[1:-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
