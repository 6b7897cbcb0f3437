"""Reader of scores: `[[7]] [[4.5]]` of a judge of two answers, `[[7.5]]` of a judge of one."""

import re
from itertools import pairwise
from typing import NamedTuple

from .asides import check_order, is_hypothetical, without_hypotheses
from .cleaning import (
    Ambiguous,
    agreed,
    content_lines,
    json_objects,
    json_values,
    lower_keys,
    plain,
    tables,
    without_emphasis,
)
from .numbers import FINAL, OTHER_SCALE, SCALE, SCORE, SCORE_WORD, read_score, with_digits

_MARK = re.compile(r"\[\[\s*([^\[\]\n]{1,60}?)\s*\]\](?:\s*/\s*10(?![\d.]))?")
_NESTED = re.compile(r"\[\[([^\[\],]{1,20})\]\s*,?\s*\[([^\[\],]{1,20})\]\]")
_NAME = (
    r"(?:(?:answer|assistant|response|reply|model|solution|option|candidate|antwort|respuesta|réponse|risposta|resposta"
    r"|ответ|回答|答案|答|답변|답|score|scores|rating|points)(?:\s+(?:for|of|to|from))?(?:\s+(?:answer|response|assistant))?)"
)
_LETTER = r"(?<![A-Za-z0-9])(?P<side>[AB])(?![A-Za-z0-9'’])"
_BEHIND_NAME = r"(?:['’]s)?(?:\s*(?:的|の|의))?"
_FILLER = (
    rf"(?:(?:final|overall|total|{SCORE_WORD}|is|i (?:would )?(?:give|award)|gets?|only|just|receives?|earns?|deserves?"
    r"|at|an?|of|to|with|ist|es|est|erhält|obtiene|是|为|は|得到?)\b|[:=|>→~(\[\"'-]|\s){0,24}"
)
_SIDE_BEFORE = re.compile(rf"{_LETTER}{_BEHIND_NAME}{_FILLER}$", re.IGNORECASE)
_EXAMPLE = re.compile(r"\b(?:form|format|example|e\.g\.|such as|template|as in)\b[^\n]*$", re.IGNORECASE)
_CORRECTS = re.compile(
    r"\b(?:wait|correct(?:ed|ion)|on reflection|reconsider\w*|revis\w+|mistake|actually|changed my mind|instead"
    r"|final|overall)\b|更正|修正|訂正",
    re.IGNORECASE,
)
_WINNER = re.compile(
    r"\b(?:answer|assistant|response)\s+(?P<winner>[AB])\s+(?:is|was|gives|wins|remains)\b\s*(?:clearly |therefore "
    r"|overall |thus )?"
    r"(?:the )?(?:better|best|winner|superior|stronger|preferable)(?: (?:answer|one|response|choice"
    r"|overall))*\s*(?=[.!;\n]|$)",
    re.IGNORECASE,
)
_OTHER_SIDE = re.compile(r"(?<![A-Za-z])[C-F]\W{1,6}$")
_ORDINALS = {"a": "A", "b": "B", "1": "A", "2": "B", "first": "A", "second": "B"}


class _Mark(NamedTuple):
    """A score in double brackets: the answer it names, its value (None where it is out of form), where it stands."""

    side: str | None
    value: float | None
    start: int
    end: int


def read_scores(text: str, count: int) -> tuple[float, ...] | None:
    """`count` scores from 1 to 10 (two: of answers A and B); None with fewer of them or one out of range.

        reply   = JSON object with scores | marks | table | statements
        marks   = mark { separator mark }           the only group of `count`, or the last one where it ends the reply
                                                    alone on its line or behind "final", "overall", ...
        mark    = "[[" [name (":" | "=")] score "]]" ["/10"] | "[[" score ", " score "]]" | "\\boxed{" score "}"
        pair    = name separator score ... name separator score | a last line of two scores alone
        single  = ("overall" | "final") ["score"] (":" | "is") score | "score" (":" | "is" | "of") score
                | score "/10" | score alone, as last line or first
        name    = ["Answer" | "Response" | "Score" | ...] ("A" | "B")

    Scores that name their answers may stand in any order. Where a kind of statement gives two readings, such as a list
    of criteria without an overall score, the reply has none. JSON objects go before marks, and
    marks before everything else.
    """
    text = plain(text)
    try:
        values = _from_objects(text, count) or _marked(text, count)
        values = values or _from_lists(text, count) or _from_tables(text, count)
        if values is None:
            values = _stated_pair(text) if count == 2 else _stated(text) if count == 1 else None
    except Ambiguous:
        return None
    return values


# ---- marks ----------------------------------------------------------------------------------------------------------


def _marked(text: str, count: int) -> tuple[float, ...] | None:
    text = _NESTED.sub(r"[[\1]] [[\2]]", text)
    marks = [mark for match in _MARK.finditer(text) for mark in _marks_of(text, match, count)]
    if not marks:
        return None
    if any(_OTHER_SIDE.search(text[max(0, mark.start - 30) : mark.start]) for mark in marks):
        raise Ambiguous
    marks = [mark for mark in marks if not _is_example(text, mark) and not is_hypothetical(text, mark.start, mark.end)]
    if len(marks) == 1 == len(list(_MARK.finditer(text))) and count == 2 and marks[0].value is not None:
        return _pair_in_mark(text)
    if not marks:
        raise Ambiguous
    groups = [_once(group, count) for group in _groups(text, marks)]
    fitting = [group for group in groups if len(group) == count]
    if len(marks) == count:
        chosen = marks
    elif len(groups) == 1 and len(groups[0]) == count:
        chosen = groups[0]
    elif len({tuple(mark[:2] for mark in group) for group in fitting}) == 1 and max(map(len, groups)) == count > 1:
        chosen = fitting[0]
    elif fitting and fitting[-1] is groups[-1] and _is_final(text, fitting[-1]):
        chosen = fitting[-1]
        others = [group for group in fitting[:-1] if _is_alone(text, group)]
        if others and not _CORRECTS.search(text[others[-1][-1].end : chosen[0].start]):
            raise Ambiguous
    else:
        raise Ambiguous
    values = _ordered(chosen)
    if count == 2 and None in (chosen[0].side, chosen[1].side):
        check_order(text, chosen[0].start, chosen[-1].end)
    _check_prose(_MARK.sub("", text), values)
    return values


def _check_prose(text: str, values: tuple[float, ...]) -> None:
    """Ambiguous where the prose plainly states other scores, or another winner."""
    lines = [without_emphasis(line).replace("#", "") for line in content_lines(text)]
    if len(values) == 1:
        stated = [read_score(match["score"]) for line in lines for match in _GIVEN.finditer(line)]
        if any(score not in (None, *values) for score in stated):
            raise Ambiguous
        return
    named = _named(lines)
    winners = {match["winner"].upper() for line in lines for match in _WINNER.finditer(line)}
    leader = "A" if values[0] > values[1] else "B" if values[1] > values[0] else None
    if (named is not None and named != values) or (leader and winners and leader not in winners):
        raise Ambiguous


def _is_example(text: str, mark: _Mark) -> bool:
    """Whether a mark is the prompt's own example, announced as the form."""
    return mark.value in (7, 4.5, 7.5) and bool(_EXAMPLE.search(text[max(0, mark.start - 60) : mark.start]))


def _pair_in_mark(text: str) -> tuple[float, ...] | None:
    """The two scores of a single mark `[[7,4]]`: one number would leave one answer without a score."""
    match = re.fullmatch(r"(\d{1,2}),(\d{1,2})", next(_MARK.finditer(text))[1])
    if match is None:
        raise Ambiguous
    return _all([read_score(match[1]), read_score(match[2])])


def _marks_of(text: str, match: re.Match[str], count: int) -> list[_Mark]:
    inside = without_emphasis(match[1])
    if not re.search(r"\d", inside):
        return []
    pieces = re.split(r"\s*[;|&]\s*|\s*,\s+|\s+(?:and|y|und|et|и)\s+|\s+(?=[AB]\b)|(?<=\d)\s+(?=\d)", inside)
    if count == 1 and len(pieces) > 1:
        return [_Mark(None, None, match.start(), match.end())]
    marks = []
    for piece in pieces:
        named = re.match(rf"(?:{_NAME}\s*)?{_LETTER}\s*[:=]?\s*(?=[\d+])", piece, re.IGNORECASE)
        worded = re.match(rf"(?:\w+\s+)?{SCORE_WORD}\s*[:=]\s*", piece, re.IGNORECASE)
        begin = named or worded
        side = named["side"].upper() if named else _side_before(text, match.start()) if len(pieces) == 1 else None
        value = read_score(piece[begin.end() if begin else 0 :])
        marks.append(_Mark(side, value, match.start(), match.end()))
    return marks


def _side_before(text: str, position: int) -> str | None:
    line = without_emphasis(text[max(0, position - 80) : position].rpartition("\n")[2])
    match = _SIDE_BEFORE.search(line)
    return match["side"].upper() if match else None


def _groups(text: str, marks: list[_Mark]) -> list[list[_Mark]]:
    """Marks with nothing between them but separators and the names of answers."""
    groups = [[marks[0]]]
    for before, mark in pairwise(marks):
        between = without_emphasis(text[before.end : mark.start])
        name = rf"[\s,;|/&.-]*(?:and|y|und|et|и|vs\.?)?\s*(?:(?:{_NAME}\s*)?{_LETTER}{_BEHIND_NAME}{_FILLER})?\s*"
        if re.fullmatch(name, between, re.IGNORECASE):
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def _once(group: list[_Mark], count: int) -> list[_Mark]:
    """A group without the repetitions of its first `count` marks."""
    said = [mark[:2] for mark in group]
    is_repeated = len(said) % count == 0 and said == said[:count] * (len(said) // count)
    return group[-count:] if is_repeated else group


def _is_final(text: str, group: list[_Mark]) -> bool:
    """Whether a group says so, or stands alone in the last lines."""
    line = text[text.rfind("\n", 0, group[0].start) + 1 : group[0].start]
    ends = not re.search(r"\w", text[group[-1].end :])
    return (ends and (_is_alone(text, group) or bool(re.search(r"\bno,\W*$", line)))) or bool(FINAL.search(line))


def _is_alone(text: str, group: list[_Mark]) -> bool:
    """Whether nothing but names of answers stands before a group on its line."""
    line = text[text.rfind("\n", 0, group[0].start) + 1 : group[0].start]
    return not re.search(r"\w", re.sub(rf"{_NAME}|{SCORE_WORD}|\b[AB]\b", "", line, flags=re.IGNORECASE))


def _ordered(marks: list[_Mark]) -> tuple[float, ...]:
    values, sides = [mark.value for mark in marks], [mark.side for mark in marks]
    if None in values or (len(marks) == 2 and sides[0] is not None and sides[0] == sides[1]):
        raise Ambiguous
    if len(marks) == 2 and (sides[0] == "B" or sides[1] == "A"):
        if sides != ["B", "A"]:
            raise Ambiguous
        values = values[::-1]
    return tuple(values)


# ---- JSON and tables ------------------------------------------------------------------------------------------------


def _from_objects(text: str, count: int) -> tuple[float, ...] | None:
    return agreed(v for item in json_objects(text) if (v := _in_object(item, count)) is not None)


def _from_lists(text: str, count: int) -> tuple[float, ...] | None:
    """The last list of two scores."""
    lists = [v for v in json_values(text) if isinstance(v, list) and len(v) == 2] if count == 2 else []
    pairs = [tuple(map(_number, pair)) for pair in lists if not isinstance(pair[0], list)]
    if any(None not in pair for pair in pairs):
        check_order(text, text.find("["), text.rfind("]") + 1)
    return next((pair for pair in reversed(pairs) if None not in pair), None)


def _number(value) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, dict):
        inner = lower_keys(value)
        return agreed(n for key in ("score", "rating", "overall", "final_score") if (n := _number(inner.get(key))))
    return read_score(f"{value:g}" if isinstance(value, float) else str(value))


def _in_object(item: dict, count: int) -> tuple[float, ...] | None:
    for key in ("scores", "ratings", "final_scores", "verdict", "evaluation", "result"):
        inner = item.get(key)
        if isinstance(inner, dict) and (values := _in_object(lower_keys(inner), count)) is not None:
            return values
        if isinstance(inner, list) and len(inner) == count:
            return _all(map(_number, inner))
    if count == 1:
        for keys in (("final_score", "overall_score", "overall", "final_rating"), ("score", "rating", "grade")):
            present = [item[key] for key in keys if key in item]
            if present:
                return _all([agreed(map(_number, present))])
        return None
    sides: dict[str, list] = {"A": [], "B": []}
    for key, value in item.items():
        match = re.fullmatch(rf"(?:{_NAME}_?|score_)?(a|b|1|2)(?:_?(?:score|rating))?|(a|b)", key, re.IGNORECASE)
        if match and isinstance(value, int | float | str | dict):
            sides[_ORDINALS[(match[1] or match[2]).lower()]].append(_number(value))
    if not sides["A"] or not sides["B"]:
        return None
    return _all([agreed(v for v in sides[side] if v is not None) for side in "AB"])


def _all(values) -> tuple[float, ...]:
    values = tuple(values)
    if None in values:
        raise Ambiguous
    return values


def _from_tables(text: str, count: int) -> tuple[float, ...] | None:
    matched = []
    for rows in tables(text):
        values = _pair_of_table(rows) if count == 2 else _single_of_table(rows) if count == 1 else None
        matched += [values] if values is not None else []
    return agreed(matched)


def _pair_of_table(rows: list[list[str]]) -> tuple[float, ...] | None:
    """Scores by a column for each answer (the overall row, or the only one), or by a row for each answer."""
    columns = {_side_of_cell(cell): place for place, cell in enumerate(rows[0]) if _side_of_cell(cell)}
    if len(columns) == 2:
        lines = [row for row in rows[1:] if len(row) > max(columns.values())]
        final = [row for row in lines if FINAL.search(row[0])]
        chosen = final or lines
        if len(chosen) == 1:
            return _all(read_score(chosen[0][columns[side]]) for side in "AB")
        return None
    column = next((place for place, cell in enumerate(rows[0]) if FINAL.search(cell)), None)
    sides: dict[str, float | None] = {}
    for row in rows:
        side = _side_of_cell(row[0])
        scores = [row[column]] if column is not None and column < len(row) else row[1:]
        numeric = [v for cell in scores if (v := read_score(cell)) is not None]
        if side and len(numeric) == 1:
            sides[side] = numeric[0]
    return _all(sides[side] for side in "AB") if set(sides) == {"A", "B"} else None


def _side_of_cell(cell: str) -> str | None:
    match = re.fullmatch(rf"(?:{_NAME}\s*)?(A|B|1|2|first|second)(?: score| answer)?", cell.strip(), re.IGNORECASE)
    return _ORDINALS[match[1].lower()] if match else None


def _single_of_table(rows: list[list[str]]) -> tuple[float, ...] | None:
    named = [row for row in rows if len(row) > 1 and re.search(SCORE_WORD, row[0], re.IGNORECASE)]
    final = [row for row in rows if len(row) > 1 and FINAL.search(row[0])] or (named if len(named) == 1 else [])
    scores = [v for row in final for cell in row[1:] if (v := read_score(cell)) is not None]
    return (agreed(scores),) if scores else None


# ---- statements in words --------------------------------------------------------------------------------------------

_BEHIND_PLAIN = r"(?=\s*(?:$|[,;)|\]]|\.\s*$|\s[-–—]\s|\s*\(|and\b|vs\b|while\b|y\b|und\b|et\b|и\b|[Bb]:))"
_NAMED_SCORE = re.compile(
    rf"(?:(?P<name>{_NAME})\s*(?:#\s*)?(?P<long>A|B|1|2)|(?P<ordinal>first|second) (?:answer|response)"
    rf"|{_LETTER}){_BEHIND_NAME}(?P<filler>{_FILLER})(?P<score>{SCORE})",
    re.IGNORECASE | re.MULTILINE,
)
_ADJACENT = re.compile(
    rf"{_LETTER}\s*[:=(]?\s*(?P<first>{SCORE})\)?[\s,;|/&-]*(?:and|y|und|et|и)?\s*"
    rf"{_LETTER.replace('side', 'other')}\s*[:=(]?\s*(?P<second>{SCORE})",
    re.IGNORECASE,
)
_BARE_PAIR = re.compile(
    rf"[(\[]*(?P<first>{SCORE})[)\]]*\s*(?:[,;|&]\s|[;|&]|\s|(?<=\])(?=\[)|(?:and|vs\.?|y|und|et"
    rf"|и)\s)\s*[(\[]*(?P<second>{SCORE})[)\]]*\.?",
    re.IGNORECASE,
)


def _stated_pair(text: str) -> tuple[float, ...] | None:
    lines = [with_digits(without_emphasis(line).replace("#", "")) for line in content_lines(text)]
    lines = [without_hypotheses(line) for line in lines if not _OTHER_QUANTITY.match(line)]
    for chosen in ([line for line in lines if FINAL.search(line)], lines):
        pairs = [pair for line in chosen for match in _ADJACENT.finditer(line) if (pair := _adjacent(match))]
        if pairs:
            return agreed(pairs)
    named = _named(lines)
    named = named or _in_sections(lines) or _for_both(lines)
    if named is not None:
        return named
    for line in lines[-1:]:
        line = re.sub(rf"^(?:final |overall )?(?:{SCORE_WORD})\s*[:=]?\s*", "", line.strip(" #>-"), flags=re.IGNORECASE)
        match = _BARE_PAIR.fullmatch(line.strip())
        if match:
            return _all([read_score(match["first"]), read_score(match["second"])])
    return None


def _in_sections(lines: list[str]) -> tuple[float, ...] | None:
    """Scores in the paragraphs that begin with the names of the answers."""
    sections: dict[str, list[str]] = {}
    side = None
    for line in lines:
        match = re.match(rf"\W*{_NAME}\s*(?P<side>[AB12])\b(?=\s*(?:[:.-]|$))[\s:.-]*", line, re.IGNORECASE)
        if match:
            side = _ORDINALS[match["side"].lower()]
            if side in sections:
                return None
            sections[side] = []
        if side:
            sections[side].append(line[match.end() :] if match else line)
    if set(sections) != {"A", "B"}:
        return None
    values = [_of_kind(sections[side], (_FINAL_SCORE, _WORDED_SCORE)) for side in "AB"]
    return None if None in values else tuple(values)


def _for_both(lines: list[str]) -> tuple[float, ...] | None:
    """The score that both answers get, where no other one is stated."""
    matched = [read_score(match["score"]) for line in lines for match in _BOTH.finditer(line)]
    scaled = [match for line in lines for match in _SCALED_SCORE.finditer(line)]
    return (matched[0],) * 2 if len(matched) == 1 == len(scaled) and matched[0] is not None else None


def _adjacent(match: re.Match[str]) -> tuple[float, ...]:
    sides = match["side"].upper(), match["other"].upper()
    if sides[0] == sides[1]:
        raise Ambiguous
    values = _all([read_score(match["first"]), read_score(match["second"])])
    return values if sides[0] == "A" else values[::-1]


def _named(lines: list[str]) -> tuple[float, ...] | None:
    """Scores from statements that name one answer each."""
    sides: dict[str, list[tuple[bool, float | None]]] = {"A": [], "B": []}
    for line in lines:
        for match in _NAMED_SCORE.finditer("" if _OTHER_QUANTITY.match(line) else line):
            if _is_of_criterion(line, match):
                raise Ambiguous
            side = _ORDINALS[(match["long"] or match["ordinal"] or match["side"]).lower()]
            is_scaled = bool(re.search(rf"{SCALE}$", match["score"], re.IGNORECASE))
            is_worded = bool(re.search(SCORE_WORD, match["filler"] + (match["name"] or ""), re.IGNORECASE))
            is_bare = not match["name"] and not match["ordinal"] and not re.search(r"[:=(|>→]|\w", match["filler"])
            ends = re.compile(_BEHIND_PLAIN).match(line, match.end())
            if not is_bare and (is_scaled or is_worded or (ends and not re.search(r"\bis\b", match["filler"]))):
                sides[side].append((bool(FINAL.search(line[: match.end()])), read_score(match["score"])))
    if not sides["A"] or not sides["B"]:
        return None
    chosen = [[value for is_final, value in sides[side] if is_final] for side in "AB"]
    if not all(chosen):
        chosen = [[value for _, value in sides[side]] for side in "AB"]
    return _all(agreed(values) for values in chosen)


def _is_of_criterion(line: str, match: re.Match[str]) -> bool:
    """Whether a score is the first of several by criteria: `A: 8/10 for accuracy, 6/10 for clarity`."""
    if FINAL.search(match[0]) or not _FOR_CRITERION.match(line, match.end()):
        return False
    following = _NAMED_SCORE.search(line, match.end())
    rest = line[match.end() : following.start() if following else len(line)]
    return bool(_SCALED_SCORE.search(rest)) or len(_FOR_CRITERION.findall(rest)) > 1


_FOR_CRITERION = re.compile(
    r"\s*\(?(?:for|on|in|regarding|für|en|pour)\s+(?!the (?:answer|response)|this|its? )\w", re.IGNORECASE
)
# Numbers of answers that are no scores: "Rank: A: 2, B: 1".
_OTHER_QUANTITY = re.compile(
    r"\W*(?:number of |total )?(?:[^\W\d]+ )?(?:rank(?:ing|s)?|places?|positions?|mistakes|errors|faults|issues|length"
    r"|words|sentences|steps|count)(?: count)?\s*(?:\([^()]*\)\s*)?(?:[:=]|\s[-–—])",
    re.IGNORECASE,
)
_IS = r"(?:\s+(?=\d)|\s*(?:[:=|>→-]|is|of|at|ist|es|est|è|é|是|为|は|:)+\s*(?:a\s+|an\s+)?)"
_FINAL_WORD = (
    r"(?:\b(?:final|overall|verdict|gesamt\w*|globale?|итог\w*)\b|总分|总体|综合|最终"
    r"|总评|総合|最終|합계|총점|최종|종합)"
)
_FINAL_SCORE = re.compile(
    rf"(?:{_FINAL_WORD}(?:\s*(?:{SCORE_WORD}|assessment|answer|mark|verdict))?|(?:{FINAL.pattern})\s*{SCORE_WORD})"
    rf"(?:\s*\((?:out of|/)\s*10\)|\s*\(1-10\))?{_IS}(?P<score>{SCORE}){_BEHIND_PLAIN}",
    re.IGNORECASE,
)
_WORDED_SCORE = re.compile(
    rf"(?:^|(?<=[\s(#\"]))(?:{SCORE_WORD})(?:\s+(?:for|of)\s+(?:this|the)\s+(?:answer|response|reply)\b)?"
    rf"(?:\s*\((?:out of 10|/10|1-10)\))?(?:{_IS}|\s+(?:it|this|the answer|this answer)(?:\s+(?:an?|as|at))?\s+|\s+)"
    rf"(?P<score>{SCORE}){_BEHIND_PLAIN}",
    re.IGNORECASE,
)
_SCALED_SCORE = re.compile(rf"(?P<score>{SCORE.replace(f'{SCALE}*', f'{SCALE}+')})", re.IGNORECASE)
_CRITERION = re.compile(r"[^\W\d]{3,}[^:\n]{0,30}[:=]\s*$")


_GIVEN = re.compile(
    rf"\b(?:give|award|rate)\s+(?:it|this|the answer|this answer|this response)\s+(?:at\s+|with\s+)?"
    rf"(?:an?\s+(?:(?:very )?(?:solid|strong|clear|high|low|good|great|fair|decent|firm|generous|weak|full)\s+)?)?"
    rf"(?P<score>{SCORE})",
    re.IGNORECASE,
)
_BOTH = re.compile(
    rf"\b(?:both|each)\b[^\n.\d]{{0,40}}(?P<score>{SCORE.replace(f'{SCALE}*', f'{SCALE}+')})", re.IGNORECASE
)


def _of_kind(lines: list[str], patterns: tuple[re.Pattern[str], ...]) -> float | None:
    """The score of the first kind of statement that the lines have."""
    for pattern in patterns:
        matched = [match for line in lines for match in pattern.finditer(line) if not _is_beside(line, match)]
        if matched:
            return _all([agreed(read_score(match["score"]) for match in matched)])[0]
    return None


# What is said of a number out of ten that is no score: a share of things, another scale, a score that was not given.
_SHARE = re.compile(
    r"\s*(?:of\s+(?:the|its|all)\s+)?(?:steps?|facts?|claims?|points|questions?|items?|sentences?|cases?|tests?)?\s*"
    r"(?:are|is|were|was|would)\b",
    re.IGNORECASE,
)
_BESIDE = re.compile(
    r"(?:\b(?:confidence|certainty|difficulty|maximum|max)\b[^.\n\d]{0,20}"
    rf"|\b(?:maximum|max\.?|minimum|min\.?|highest|lowest|best|top|perfect|full|possible)(?: possible)? {SCORE_WORD}"
    r"(?: possible)?\W{0,3}(?:is|are|of|would be)?\W{0,3}(?:an?\s+)?"
    r"|\b(?:not|would (?:get|be|have|deserve|earn))\s+(?:an?\s+)?)$",
    re.IGNORECASE,
)


def _is_beside(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start("score") - 60) : match.start("score")]
    return bool(_BESIDE.search(before) or _SHARE.match(text, match.end()))


def _stated(text: str) -> tuple[float, ...] | None:
    if OTHER_SCALE.search(text):
        return None
    lines = [without_hypotheses(with_digits(without_emphasis(line).strip(" #>"))) for line in content_lines(text)]
    whole = "\n".join(lines)
    stated = _of_kind(lines, (_FINAL_SCORE, _WORDED_SCORE, _GIVEN))
    if stated is not None:
        return (stated,)
    scaled = [match["score"] for match in _SCALED_SCORE.finditer(whole) if not _is_beside(whole, match)]
    if scaled:
        return _all([agreed(map(read_score, scaled))])
    edges = {line.strip("()[] ") for line in (lines[:1] + lines[-1:])}
    bare = [value for line in edges if (value := read_score(line)) is not None]
    return (agreed(bare),) if bare else None
