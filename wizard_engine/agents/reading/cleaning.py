"""What every reader does first: takes off reasoning and special tokens, unifies digits and brackets, finds JSON.

    reply   = { reasoning } , content , { special token }
    reasoning = "<think>" ... "</think>" (also thinking, thought, reasoning, reflection, scratchpad, analysis, [THINK])
              | ... "</think>"                       a chat template opened it
    content of `plain`: NFKC, ASCII digits, lines ended by \\n, no invisible marks, `\\boxed{x}` as `[[x]]`,
    `<tag>x</tag>` as a line `tag: x`, no other tags, no backslash before punctuation

An opened reasoning without an end has no content behind it.
"""

import ast
import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from wizard_engine.runtime.text_lines import split_lines

T = TypeVar("T")


class Ambiguous(Exception):
    """A reply that can be read in two ways, or states something outside its form."""


_TAGS = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis"
_OPENED = re.compile(rf"\s*(?:<({_TAGS})>|\[(THINK)\]|◁(think)▷)", re.IGNORECASE)
_INNER = re.compile(rf"<({_TAGS})>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)", re.IGNORECASE | re.DOTALL)
_ONLY_CLOSED = re.compile(r"</(?:think|thinking)>(?=\s|$)|\[/THINK\](?=\s|$)|◁/think▷", re.IGNORECASE)
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_ROLE = re.compile(
    r"\s*(?:<\|im_start\|>\s*assistant\s|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<\|assistant\|>"
    r"|<start_of_turn>model\s|<s>|<bos>|<\|begin_of_text\|>)"
)
_END = re.compile(
    r"<\|(?:im_end|eot_id|end_of_text|endoftext|eom_id|return|end|im_start|assistant_end)\|>|<end_of_turn>|<eos>"
    r"|<｜end▁of▁sentence｜>|</s>\s*\Z"
)


def without_reasoning(text: str) -> str:
    """The reply's content, stripped: no reasoning before it, no special token at its ends."""
    if _FINAL_CHANNEL in text:
        text = text.rpartition(_FINAL_CHANNEL)[2]
    role = _ROLE.match(text)
    text = text[role.end() :] if role else text
    while opened := _OPENED.match(text):
        name = opened[1] or opened[2] or opened[3]
        close = {"[": f"[/{name}]", "◁": f"◁/{name}▷"}.get(text.lstrip()[0], f"</{name}>")
        end = text.lower().find(close.lower(), opened.end())
        if end < 0:
            return ""
        text = text[end + len(close) :]
    closed = list(_ONLY_CLOSED.finditer(text))
    if closed and "<think>" not in text.lower()[: closed[-1].start()]:
        text = text[closed[-1].end() :]
    end = _END.search(text)
    return (text[: end.start()] if end else text).strip()


_INVISIBLE = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufe0f\U0001f300-\U0001faff\u2600-\u2793\u2795-\u27bf]"
)
_HALVES = re.compile(r"(?<=\d)\s?½")
_SIGN = re.compile(r"(?<![\w.\]])[−–—‐﹣](?=\d)")
_ELEMENT = re.compile(r"<([A-Za-z][\w-]{0,30})>\s*([^<>\n]{1,80}?)\s*</\1>")
_FORMATTING = {"b", "strong", "i", "em", "u", "p", "li", "span", "code", "td", "th", "h1", "h2", "h3", "h4", "div"}
_TAG = re.compile(r"</?[A-Za-z][\w-]{0,30}(?:\s[^<>\n]{0,100})?/?>")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathbf|mathrm|texttt|textit)\s*\{([^{}\n]*)\}")
_BOXED = re.compile(r"\\boxed\s*\{([^{}\n]*)\}")
_ESCAPED = re.compile(r"\\([\[\]()*_#`|.>+-])")
_BRACKETS = str.maketrans({"【": "[", "】": "]", "〔": "[", "〕": "]", "⟦": "[[", "⟧": "]]", "、": ",", "｡": "."})


def plain(text: str) -> str:
    """The content of a verdict's reply in one form; see the module."""
    text = _INNER.sub(" ", without_reasoning(text))
    text = unicodedata.normalize("NFKC", _HALVES.sub(".5", text)).translate(_BRACKETS)
    text = _INVISIBLE.sub("", "\n".join(split_lines(text)))
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)
    text = _SIGN.sub("-", text)
    if "\\" in text:
        text = _BOXED.sub(r"[[\1]]", _LATEX_TEXT.sub(r"\1", text)).replace("$", "")
        text = _ESCAPED.sub(r"\1", text)
    if "<" in text:
        text = re.sub(r"<br\s*/?>", "\n", text, flags=re.IGNORECASE)
        text = _TAG.sub("", _ELEMENT.sub(_element, text))
    return html.unescape(text).strip() if "&" in text else text.strip()


def _element(match: re.Match[str]) -> str:
    name, content = match.groups()
    return content if name.lower() in _FORMATTING else f"\n{name}: {content}\n"


def agreed(values: Iterable[T]) -> T | None:
    """The value on which all agree; None for no value.

    Raises:
        Ambiguous: two of them differ.
    """
    distinct: list[T] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if len(distinct) > 1:
        raise Ambiguous
    return distinct[0] if distinct else None


_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_MOST_ATTEMPTS = 40  # brackets of other kinds before it


# ---- JSON -----------------------------------------------------------------------------------------------------------


def json_values(text: str) -> list[Any]:
    """The JSON objects and arrays that stand in a text, outermost ones only, in order.

    Comma before a closing bracket, a plus sign and Python's quotes, True, False and None are forgiven; an object with
    the same key twice is none.
    """
    values, position, attempts = [], 0, 0
    brackets = re.compile(r"[{\[]")
    while attempts < _MOST_ATTEMPTS and (matched := brackets.search(text, position)):
        attempts += 1
        end = _matching(text, matched.start())
        value = _load(text[matched.start() : end]) if end > 0 else None
        if value is None:
            position = matched.start() + 1
        else:
            values.append(value)
            position = end
    return values


def json_objects(text: str) -> list[dict[str, Any]]:
    """The objects among `json_values`, keys in lower case with `_` for blanks and hyphens."""
    return [lower_keys(value) for value in json_values(text) if isinstance(value, dict)]


def lower_keys(value: dict[str, Any]) -> dict[str, Any]:
    """The object with keys in lower case, `_` for blanks and hyphens."""
    return {re.sub(r"[\s-]+", "_", key.strip().lower()): item for key, item in value.items()}


def _matching(text: str, start: int) -> int:
    """Position behind the bracket that closes the one at `start`, or -1; brackets in double quotes do not count."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
        if not depth:
            return match.end()
    return -1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _load(text: str) -> Any:
    mended = re.sub(r",\s*([}\]])", r"\1", re.sub(r"([\[:,]\s*)\+(?=\d)", r"\1", text))
    for attempt in (text, mended):
        try:
            return json.loads(attempt, object_pairs_hook=_unique, strict=False)
        except (ValueError, RecursionError):
            continue
    try:
        value = ast.literal_eval(mended) if len(mended) < 5000 and "'" in mended else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None


# ---- Markdown -------------------------------------------------------------------------------------------------------


def content_lines(text: str) -> list[str]:
    """The lines with something on them, stripped; marks of fences and rules are left out."""
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not re.fullmatch(r"(?:`{3,}|~{3,})\s*[\w-]*|[-*_=]{3,}|[*_`]+", line)]


def without_emphasis(text: str) -> str:
    """The text without `*`, backticks, and underscores at the ends of words."""
    return re.sub(r"(?<!\w)_+|_+(?!\w)", "", text.replace("*", "").replace("`", ""))


def tables(text: str) -> Iterator[list[list[str]]]:
    """The Markdown tables: rows of cells without emphasis; the line under the head is left out."""
    rows: list[list[str]] = []
    for line in [*text.split("\n"), ""]:
        line = line.strip()
        if line.count("|") >= 2 or (rows and "|" in line):
            cells = [without_emphasis(cell).strip() for cell in line.strip("|").split("|")]
            if not all(re.fullmatch(r":?-{2,}:?|", cell) for cell in cells):
                rows.append(cells)
        elif rows:
            yield rows
            rows = []
