"""Replies with one value for each of several numbered things: labels of steps, scores of instructions.

    reply    = JSON | table | sections | lines | list
    JSON     = array of `count` values or of objects {"step": n, "label": value} | object {"1" | "step_1": value, ...}
    table    = a column of the numbers 1 to count, and a column of values (by its head, or the only one)
    sections = header content ... for 1 to count;  header = [word] n (":" | "." | ")" | "-" | end of line)
    lines    = `count` lines in a row, each a value alone
    list     = `count` values in one line, separated by "," or blanks

All that a reply says in one of these ways must agree.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .cleaning import Ambiguous, agreed, content_lines, json_values, lower_keys, tables, without_emphasis

T = TypeVar("T")
Read = Callable[[str], T | None]  # the value that a text is; Ambiguous for a number outside the form

_WORD = (
    r"consignes?|aufgaben?|preguntas?|версия|вариант|バージョン|버전|版本|steps?|instructions?|versions?|options?|prompts?"
    r"|items?|lines?|labels?|scores?|no\.?|nr\.?|number|variants?"
    r"|schritt"
    r"|anweisung|paso|instrucción|étape|etape|passo|instrução|istruzione|stap|шаг|инструкция|步骤|步驟|指令|第|ステップ|手順"
    r"|단계|지시|지시문"
)
_HEADER = re.compile(
    rf"^[ \t]*(?:>[ \t]*)*(?P<mark>#{{1,6}}[ \t]+|[*•+-][ \t]+)?[*_`\[(]*"
    rf"(?P<word>(?:{_WORD})[ \t]*)?(?P<hash>#[ \t]*)?(?P<number>\d{{1,3}})(?P<unit>[ \t]*(?:步|番目?|단계|步骤))?[*_`]*"
    r"(?P<separator>[ \t]*(?:[:.)\]]|->|→|=>|=|—|–|\|)+|[ \t]+-(?=[ \t])|[ \t]*$|[ \t]*(?=\())[*_`]*",
    re.IGNORECASE | re.MULTILINE,
)
_PLACES = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
_ORDINAL = re.compile(rf"\b({'|'.join(_PLACES)})[ \t]+(instruction|version|step)\b", re.IGNORECASE)
_CORRECTS = re.compile(
    r"\b(?:correct(?:ed|ion|ing)?|revis(?:ed|ion)|mixed up|mistake|wait|updated|final|reconsider\w*"
    r"|on reflection)\b|更正|修正|訂正|수정",
    re.IGNORECASE,
)
_NUMBERING = re.compile(r"\W*(?:[^\W\d]+\s*)?\d{1,3}\s*(?:[:)]|\.(?!\d))")
# A list's own number in front of a name: `1. Version 3: 9`, the best one first.
_LISTED = re.compile(
    rf"^[ \t]*(?:[*•+-][ \t]+)?[*_]*#?\d{{1,3}}[*_]*(?:[.):]+|[ \t]+[-–—])[*_]*[ \t]+"
    rf"(?=[*_`\[(]*(?:(?:{_WORD})[ \t]*#?|#)(?P<number>\d{{1,3}})\b)",
    re.IGNORECASE | re.MULTILINE,
)
# A name in its place that is no number: whether `1. Version B: 9` is about the first thing or the second is not said.
_LISTED_NAME = re.compile(
    rf"^[ \t]*(?:[*•+-][ \t]+)?[*_]*#?(?P<place>\d{{1,3}})[*_]*(?:[.):]+|[ \t]+[-–—])[*_]*[ \t]+[*_`\[(]*"
    rf"(?:the[ \t]+)?(?:(?:{_WORD})[ \t]+)?(?P<name>[A-H]|one|two|three|four|first|second|third|fourth|\d{{1,3}}(?=:))"
    rf"(?:[ \t]+(?:one|{_WORD}))?[*_`\])]*[ \t]*(?:[:=(→|]|->|[-–—][ \t])",
    re.IGNORECASE | re.MULTILINE,
)
_RANK_HEAD = re.compile(
    r"rank(?:ing)?|place|position|rang|platz|puesto|posición|posto|место|排名|名次|順位|순위", re.IGNORECASE
)
_INLINE = re.compile(
    rf"(?:(?:{_WORD})[ \t]*(?P<number>\d{{1,3}})(?:[ \t](?:at|is|gets|scores)[ \t])?|(?<![\w.,])(?P<bare>\d{{1,3}}))"
    r"(?:(?<=[a-z][ \t])|[ \t]*(?:[:=]|->|→))",
    re.IGNORECASE,
)


def read_entries(text: str, count: int, value: Read, inside: Read, *, any_order: bool, names: str) -> tuple | None:
    """Values 1 to `count` of a text that `plain` made, or None.

    Args:
        value: reader of a text that is a value.   inside: reader of a section's content.
        any_order: whether sections may stand in another order than that of their numbers.
        names: pattern of the heads and keys that values have.
    Raises:
        Ambiguous: two readings.
    """
    from_json = agreed(v for item in json_values(text) if (v := _in_json(item, count, value, names)) is not None)
    if from_json is not None:
        return from_json
    from_tables = agreed(v for rows in tables(text) if (v := _in_table(rows, count, value, names)) is not None)
    if from_tables is not None:
        return from_tables
    text = _ORDINAL.sub(lambda match: f"{match[2]} {_PLACES.index(match[1].lower()) + 1}", text)
    text = _unlisted(text, count)
    _check_names(text, count)
    pairs = _pairs(text, count, value)
    readings = list(_sections(text, count, inside, any_order))
    readings += [pairs, _bare_lines(text, count, value), None if pairs else _one_line(text, count, value)]
    return agreed(reading for reading in readings if reading is not None)


# ---- JSON and tables ------------------------------------------------------------------------------------------------


def _in_json(item: Any, count: int, value: Read, names: str) -> tuple | None:
    if isinstance(item, list):
        if len(item) != count or not count:
            return None
        if all(isinstance(entry, dict) for entry in item):
            return _numbered_objects([lower_keys(entry) for entry in item], value, names)
        return _whole([_of_json(entry, value, names) for entry in item])
    keys = lower_keys(item)
    numbers = {int(m[1]): key for key in keys if (m := re.fullmatch(r"(?:[^\W\d]+_?)?(\d{1,3})", key))}
    if numbers and sorted(numbers) == list(range(1, count + 1)) and len(numbers) == len(keys):
        return _whole([_of_json(keys[numbers[n]], value, names) for n in sorted(numbers)])
    inner = [v for key, v in keys.items() if isinstance(v, list | dict) and key not in ("reason", "reasons")]
    return agreed(v for entry in inner if (v := _in_json(entry, count, value, names)) is not None)


def _numbered_objects(entries: list[dict], value: Read, names: str) -> tuple | None:
    keys = ("step", "number", "instruction", "index", "id", "version")
    for key in (key for key in keys if all(key in entry for entry in entries)):
        numbers = [re.search(r"\d+", str(entry[key])) for entry in entries]
        if all(numbers):
            placed = {int(match[0]): entry for match, entry in zip(numbers, entries)}
            if sorted(placed) == list(range(1, len(entries) + 1)):
                entries = [placed[number] for number in sorted(placed)]
                break
            return None
    else:
        if all("rank" in entry or "place" in entry for entry in entries):
            raise Ambiguous
    return _whole([_of_json(entry, value, names) for entry in entries])


def _of_json(entry: Any, value: Read, names: str) -> Any:
    if isinstance(entry, dict):
        inner = {key: v for key, v in lower_keys(entry).items() if re.fullmatch(names, key.replace("_", " "))}
        return agreed(_of_json(v, value, names) for v in inner.values()) if inner else None
    if isinstance(entry, bool) or not isinstance(entry, int | float | str):
        return None
    return value(f"{entry:g}" if isinstance(entry, float) else str(entry))


def _whole(values: list) -> tuple | None:
    return None if None in values else tuple(values)


def _in_table(rows: list[list[str]], count: int, value: Read, names: str) -> tuple | None:
    if _RANK_HEAD.fullmatch(rows[0][0].strip()):
        if min(map(len, rows)) < 3:
            raise Ambiguous
        # By place, the best one first: the things' numbers are in the next column.
        rows = [rows[0][1:], *sorted((row[1:] for row in rows[1:]), key=lambda row: _number_of(row[0]) or 0)]
    if count > 1 and [_number_of(cell) for cell in rows[0][1:]] == list(range(1, count + 1)):
        rows = [list(column) for column in zip(*rows)]
    body = [row for row in rows if _number_of(row[0]) is not None]
    if [_number_of(row[0]) for row in body] != list(range(1, count + 1)) or not body or len(rows) - len(body) > 1:
        return None
    width = min(map(len, body))
    heads = [place for place, cell in enumerate(rows[0]) if 0 < place < width and re.fullmatch(names, cell.lower())]
    last = [place for place in heads if re.search(r"final|overall|total|average", rows[0][place].lower())]
    columns = last or heads or [place for place in range(1, width) if all(_fits(row[place], value) for row in body)]
    if len(columns) != 1:
        raise Ambiguous
    return _whole([value(row[columns[0]]) for row in body])


def _number_of(cell: str) -> int | None:
    match = re.fullmatch(rf"(?:(?:{_WORD})\s*)?#?(\d{{1,3}})[.):]?(?:\s*(?:步|番目?|단계))?", cell, re.IGNORECASE)
    return int(match[1]) if match else None


def _fits(cell: str, value: Read) -> bool:
    try:
        return value(cell) is not None
    except Ambiguous:
        return False


# ---- sections -------------------------------------------------------------------------------------------------------


def _sections(text: str, count: int, inside: Read, any_order: bool) -> Iterator[tuple | None]:
    """The values of each sequence of sections 1 to count; None for one in which a section has no value."""
    if not count:
        return
    headers = [h for h in _HEADER.finditer(text) if _is_header(text, h)]
    for is_named in (True, False):
        chosen = [h for h in headers if bool(h["word"] or h["hash"] or h["unit"]) == is_named]
        places = [(int(h["number"]), h.start(), h.end()) for h in chosen]
        yield from _sequences(text, places, count, inside, any_order)
    for line in text.split("\n"):
        pairs = [(int(m["number"] or m["bare"]), m.start(), m.end()) for m in _INLINE.finditer(without_emphasis(line))]
        if len(pairs) == count > 1:
            yield from _sequences(without_emphasis(line), pairs, count, inside, any_order)


def _unlisted(text: str, count: int) -> str:
    """The text without the numbers of a list whose lines name what they are about, in another order."""
    numbers = [int(match["number"]) for match in _LISTED.finditer(text)]
    if sorted(numbers) != list(range(1, count + 1)) or numbers == sorted(numbers):
        return text
    return _LISTED.sub("", text)


def _check_names(text: str, count: int) -> None:
    """Ambiguous where the lines of a list name what they are about by letters or words in another order."""
    words = ["one", "two", "three", "four"]
    names = [match["name"].lower() for match in _LISTED_NAME.finditer(text)]
    if count < 2 or len(names) != count:
        return
    numbers = [str(number) for number in range(1, count + 1)]
    in_order = ([chr(97 + n) for n in range(count)], words[:count], _PLACES[:count], numbers)
    if names not in in_order and len(set(names)) == count:
        raise Ambiguous


def _is_header(text: str, header: re.Match[str]) -> bool:
    """Whether something behind the number tells it from a value alone."""
    is_named = header["word"] or header["hash"] or header["separator"].strip()
    return bool(is_named) or text.startswith("(", header.end())


def _sequences(text: str, headers, count: int, inside: Read, any_order: bool) -> Iterator[tuple | None]:
    ends = [start for _, start, _ in headers[1:]] + [len(text)]
    contents = [text[start:end] for (_, _, start), end in zip(headers, ends)]
    numbers = [number for number, _, _ in headers]
    for number, content in zip(numbers, contents):
        if number == count + 1 and count in numbers and _inside(content, inside, is_last=True) is not None:
            raise Ambiguous  # it goes on behind the last one
    kept = [place for place, number in enumerate(numbers) if 1 <= number <= count]
    expected = list(range(1, count + 1))
    blocks = [kept[first : first + count] for first in range(0, len(kept), count)]
    corrected = [n for n, block in enumerate(blocks) if n and _CORRECTS.search(contents[block[0] - 1])]
    for block in blocks[corrected[-1] if corrected else 0 :]:
        shown = [numbers[place] for place in block]
        if shown != expected and not (any_order and sorted(shown) == expected):
            if any_order:
                yield _by_number([(numbers[place], contents[place]) for place in kept], expected, inside)
            return
        values = {numbers[p]: _inside(contents[p], inside, is_last=p == len(numbers) - 1) for p in block}
        yield _whole([values[number] for number in expected])


def _by_number(entries: list[tuple[int, str]], expected: list[int], inside: Read) -> tuple | None:
    """The values of sections of which some stand twice, with the same value."""
    values: dict[int, list] = {number: [] for number in expected}
    for place, (number, content) in enumerate(entries):
        values[number].append(_inside(content, inside, is_last=place == len(entries) - 1))
    return _whole([agreed(v for v in matched if v is not None) for matched in values.values()])


def _inside(content: str, inside: Read, *, is_last: bool) -> Any:
    """The value of a section; the last one may be followed by a closing paragraph, which says nothing about it."""
    pieces = re.split(r"\n\s*\n", content.strip())[:1] if is_last else []
    for piece in [*pieces, content.strip()]:
        matched = _value_or_none(piece, inside)
        if matched is not None:
            return matched
    return None


# ---- lines and lists ------------------------------------------------------------------------------------------------


def _pairs(text: str, count: int, value: Read) -> tuple | None:
    """The values of lines `1 7`, `2 8`, numbered in order."""
    lines = [match for line in content_lines(text) if (match := re.fullmatch(r"(\d{1,3})[ \t]+(\S+)", line))]
    if count < 2 or [int(match[1]) for match in lines] != list(range(1, count + 1)):
        return None
    return _whole([_value_or_none(match[2], value) for match in lines])


def _bare_lines(text: str, count: int, value: Read) -> tuple | None:
    """The only run of lines that are a value each, if it has `count` of them."""
    lines = [without_emphasis(line).strip() for line in content_lines(text)]
    bulleted = [re.match(r"[-•]\s+(?=[-+]?\d)", line) for line in lines]
    if any(bulleted) and any(re.match(r"[-•]\s+(?:0|[-+]\d|\d{2}|[2-9])|•", line) for line in lines):
        lines = [line[match.end() :] if match else line for line, match in zip(lines, bulleted)]
    elif any(match and match[0][0] == "-" for match in bulleted):
        raise Ambiguous
    values = [_value_or_none(re.sub(r"^\[+|\]+,?$|,$", "", line), value) for line in lines]
    runs, current = [], []
    for matched in [*values, None]:
        if matched is not None:
            current.append(matched)
        elif current:
            runs.append(tuple(current))
            current = []
    if not runs:
        return None
    if len(runs) == 1 and len(runs[0]) == count:
        return runs[0]
    if count > 1 and len([run for run in runs if len(run) > 1]) == 1 and len(runs[-1]) == count:
        return runs[-1]
    if any(len(run) > 1 for run in runs) or count == 1:
        raise Ambiguous
    return None


def _one_line(text: str, count: int, value: Read) -> tuple | None:
    """The values of the only line that is a list of `count` values, perhaps behind a word and a colon."""
    matched = []
    for line in content_lines(text):
        line = re.sub(r"^[^\d:+\[-]{1,40}(?::|\bare|\bis)\s*(?=[\[(+\d-])", "", without_emphasis(line).strip(" >#"))
        line = re.sub(r"^\[\[(?!\[)|\]\]$", "", line.strip(" ."))
        line = line.strip(" .").removeprefix("[").removeprefix("(").removesuffix("]").removesuffix(")")
        pieces = [piece for piece in re.split(r"\s*[,;|/]\s*|\s+", line) if piece]
        pieces = [] if re.search(r"[\[\]()]", line) else pieces
        if count > 1 and len(pieces) == count and not _NUMBERING.match(line):
            values = [_value_or_none(piece, value) for piece in pieces]
            matched += [tuple(values)] if None not in values else []
    return agreed(matched)


def _value_or_none(text: str, value: Read) -> Any:
    try:
        return value(text)
    except Ambiguous:
        return None
