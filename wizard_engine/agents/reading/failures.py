"""Reader of the failures of an evolved instruction."""

import re
from collections.abc import Iterable
from typing import Any

from wizard_engine.runtime.text_lines import one_line

from .cleaning import Ambiguous, content_lines, json_values, lower_keys, plain, tables, without_emphasis

# The closed list of classes, in the order in which they are counted; `prompts/diagnose.txt` defines them.
FAILURE_CLASSES = (
    "task changed",
    "facts lost",
    "answer leaked",
    "contradiction",
    "not answerable",
    "not harder",
    "copied headings",
    "other language",
)
_ALIASES = {
    "task changed": "changed task|task change|changes? of task|different task",
    "facts lost": "lost facts|fact lost|facts changed|changed facts|loss of facts|lost information|information lost",
    "answer leaked": "leaked answer|answer leak(?:age)?|answer given away",
    "contradiction": "contradictions|contradictory|self contradiction",
    "not answerable": "unanswerable|cannot be answered|can not be answered",
    "not harder": "no harder|not evolved|not more difficult",
    "copied headings": "copied heading|headings? copied|copied prompt words",
    "other language": "language changed|changed language|different language|another language|language change",
}
_CLASS = {name: re.compile(f"{name}|{others}") for name, others in _ALIASES.items()}
_LISTS = ("failures", "failure", "failed", "failure_classes", "classes", "faults", "problems", "issues", "errors")
_NAMES = ("class", "failure_class", "name", "failure", "type", "kind", "category")
_REASONS = ("reason", "reasons", "explanation", "why", "detail", "details", "description")
_REMARKS = ("assessment", "summary", "note", "notes", "comment", "comments", "thoughts", *_REASONS)
_FAILED = ("failed", "is_failure", "present", "found", "failure", "value", "verdict")
_NONE = re.compile(
    r"(?:there (?:are|is) )?(?:no|none|zero|0)(?: of (?:the|these) (?:classes|failures))?"
    r"(?: (?:failures?|problems?|issues?|faults?|errors?|such failures?))?"
    r"(?: (?:found|detected|present|applies|apply|at all|whatsoever))?|n/?a|empty(?: list)?|\[\s*\]|\{\s*\}|-",
    re.IGNORECASE,
)
# Behind "no" alone a sentence may go on: "no question is left" is a reason.
_ABSENT = re.compile(
    r"(?:no|none|false|absent|ok(?:ay)?|fine|passed|n/?a|0)\b(?:\W*$|\s*[,;:.(–—-].*)"
    r"|(?:not (?:a )?(?:failure|problem|applicable|present|found|failed)|does not apply"
    r"|(?:no|none) (?:found|detected|present|failures?|problems?|issues?|changes?|leak|contradictions?))\b.*",
    re.IGNORECASE | re.DOTALL,
)
# A class beside such a reason is said and denied.
_UNCLEAR = re.compile(
    r"none of\b|no [^.,;]{1,30} (?:is|are|was|were|has|have) (?:been )?(?:lost|gone|missing|changed|altered|dropped"
    r"|removed|leaked|stated|given away|copied)\b",
    re.IGNORECASE,
)
_PRESENT = re.compile(r"(?:yes|true|failed|present|found)\b[\s,;:.(–—-]*", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:the )?(?:failures?|classes|failure class(?:es)?|verdict|result|answer|conclusion|diagnosis)"
    r"(?: (?:found|are|is))?\s*[:=]\s*(?P<rest>.*)",
    re.IGNORECASE,
)
_MARK = re.compile(r"^(?:[-•+>]\s*|#+\s*|\(?\d{1,2}[.)]\s+)+")
_DENIED = re.compile(
    r"\b(?:no (?:such )?failures?|none of (?:the|these) (?:classes|failures) appl(?:y|ies))\b",
    re.IGNORECASE,
)
_START = re.compile(
    rf"\W{{0,3}}(?P<name>{'|'.join(p.pattern for p in _CLASS.values())})".replace(" ", "[ _-]")
    + r"\b\W{0,2}?\s*(?:$|[.:(,;–—=-]+\s*(?P<reason>.*))",
    re.IGNORECASE,
)


def read_failures(text: str) -> dict[str, str] | None:
    """Class of failure -> reason, in the order of FAILURE_CLASSES; {} where there is none; None for other replies.

        reply   = JSON object {"failures": list | mapping | class | null, [remarks]} | JSON list | mapping alone
                | lines { class [(":" | "-" | "(") reason] } | label ":" class { "," class } | table of class and reason
                | "No failures." | "None"
        list    = [ class | {"class": class, "reason": text} , ... ]
        mapping = {class: reason | true | false | {"failed": true | false, "reason": text} , ...}
        class   = one of FAILURE_CLASSES in any case, with `_` or `-` for blanks, or a usual variant of it

    A class whose reason says that it does not apply ("no", "false", "none: ...") is left out. Another class, a class
    that both applies and does not, and failures beside the word that there are none are not read.
    """
    content = plain(text)
    try:
        found = _of_json(json_values(content))
        found = _of_tables(content) if found is None else found
        found = _of_lines([without_emphasis(line) for line in content_lines(content)]) if found is None else found
    except Ambiguous:
        return None
    return None if found is None else {name: found[name] for name in FAILURE_CLASSES if name in found}


def _class(text: str) -> str | None:
    """The class that a text names, and nothing else."""
    bare = re.sub(r"[\s_-]+", " ", text.lower()).strip(" .:;,!\"'`*()[]")
    return next((name for name, pattern in _CLASS.items() if pattern.fullmatch(bare)), None)


def _known(text: str) -> str:
    name = _class(text)
    if name is None:
        raise Ambiguous
    return name


def _merged(pairs: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Class -> reason of those that apply; a reason of None says that one does not. The first reason stays."""
    given = list(pairs)
    failed = {name: reason for name, reason in reversed(given) if reason is not None}
    if failed.keys() & {name for name, reason in given if reason is None}:
        raise Ambiguous
    return failed


def _said(value: Any) -> str | None:
    """The reason that stands beside a class, None where it says that the class does not apply."""
    if value is None or value is False or value == [] or value == 0:
        return None
    if isinstance(value, str):
        reason = one_line(value)
        if _UNCLEAR.match(reason):
            raise Ambiguous
        return None if not reason or _ABSENT.fullmatch(reason) else _PRESENT.sub("", reason, count=1)
    if isinstance(value, dict):
        item = lower_keys(value)
        verdicts = [item[key] for key in _FAILED if isinstance(item.get(key), bool)]
        reason = _reason(item)
        return _said(reason) if not verdicts else (reason if verdicts[0] else None)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _said("; ".join(value))
    return ""


def _reason(item: dict[str, Any]) -> str:
    return next((one_line(item[key]) for key in _REASONS if isinstance(item.get(key), str)), "")


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _of_json(values: list[Any]) -> dict[str, str] | None:
    objects = [lower_keys(value) for value in values if isinstance(value, dict)]
    read = [found for item in objects if (found := _of_object(item)) is not None]
    single = [item for item in objects if _of_object(item) is None and _named(item) is not None]
    lists = [value for value in values if isinstance(value, list) and _is_list(value)]
    if single and not read and not lists:
        return _merged(_pair(item) for item in single)
    read += [_of_list(value) for value in lists]
    if any(found != read[0] for found in read[1:]):
        raise Ambiguous
    return read[0] if read else None


def _of_object(item: dict[str, Any]) -> dict[str, str] | None:
    """What an object with a list of failures, or with classes as its keys, says; None for another one."""
    keys = [key for key in _LISTS if key in item and not isinstance(item[key], bool)]
    if keys and _named(item) is None:
        return _of_value(item[keys[0]])
    rest = {key: value for key, value in item.items() if key not in _REMARKS}
    if rest and all(_class(key) for key in rest):
        return _merged((_known(key), _said(value)) for key, value in rest.items())
    return None


def _of_value(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, list):
        return _of_list(value)
    if isinstance(value, dict):
        return _merged((_known(key), _said(said)) for key, said in value.items())
    if isinstance(value, str):
        return {} if _NONE.fullmatch(value.strip(" .")) else _of_names(value)
    raise Ambiguous


def _of_list(items: list[Any]) -> dict[str, str]:
    if len(items) == 1 and isinstance(items[0], str) and _NONE.fullmatch(items[0].strip(" .")):
        return {}
    return _merged(_pair(item) for item in items)


def _is_list(items: list[Any]) -> bool:
    """Whether a list that stands alone holds failures; a bare `[]` does, text in brackets does not."""
    return all(isinstance(item, str) or (isinstance(item, dict) and _named(lower_keys(item))) for item in items)


def _pair(item: Any) -> tuple[str, str | None]:
    if isinstance(item, str):
        return _line(item)
    if not isinstance(item, dict):
        raise Ambiguous
    item = lower_keys(item)
    name = _named(item)
    if name is None:
        if len(item) != 1:
            raise Ambiguous
        ((key, said),) = item.items()
        return _known(key), _said(said)
    verdicts = [item[key] for key in _FAILED if isinstance(item.get(key), bool)]
    reason = _reason(item)
    return _known(name), None if verdicts and not verdicts[0] else _said(reason) if reason else ""


def _named(item: dict[str, Any]) -> str | None:
    """The value of the key that names one class."""
    return next((item[key] for key in _NAMES if isinstance(item.get(key), str) and item[key].strip()), None)


# ---- text -----------------------------------------------------------------------------------------------------------


def _of_tables(content: str) -> dict[str, str] | None:
    for rows in tables(content):
        named = [row for row in rows if len(row) > 1 and _class(row[0])]
        if named and len(rows) - len(named) <= 1:
            return _merged((_known(row[0]), _said(" ".join(row[1:]))) for row in named)
    return None


def _of_lines(lines: list[str]) -> dict[str, str] | None:
    pairs: list[tuple[str, str | None]] = []
    is_none = False
    for line in lines:
        line = _MARK.sub("", line).strip()
        label = _LABEL.fullmatch(line)
        said = label["rest"].strip() if label else line
        if _NONE.fullmatch(said.strip(" .!\"'()")) and (label or len(said) > 1):
            is_none = True
        elif label and said:
            pairs += _of_names(said).items()
        elif _starts(line) is not None:
            pairs.append(_line(line))
        elif _DENIED.search(line):
            is_none = True
    found = _merged(pairs)
    if found and is_none:
        raise Ambiguous
    return found if pairs or is_none else None


def _starts(line: str) -> re.Match[str] | None:
    """A class at the beginning of a line, alone or with a separator behind it."""
    return _START.match(line)


def _line(line: str) -> tuple[str, str | None]:
    match = _starts(_MARK.sub("", line).strip())
    if match is None:
        raise Ambiguous
    reason = (match["reason"] or "").strip()
    return _known(match["name"]), _said(reason) if reason else ""


def _of_names(text: str) -> dict[str, str]:
    """Classes with commas between them, or one with its reason."""
    parts = [part for part in re.split(r"\s*(?:[,;/]|\band\b|&)\s*", text.strip(" .[]")) if part]
    names = [_class(part) for part in parts]
    if parts and None not in names:
        return {name: "" for name in names if name}
    return _merged([_line(text)])
