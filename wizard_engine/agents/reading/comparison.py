"""Reader of comparisons: `Equal` or `Not Equal`."""

import re

from .cleaning import Ambiguous, agreed, content_lines, json_objects, plain, tables, without_emphasis

_NOT = r"not[ -]?equal|non[ -]equal|unequal|not (?:exactly |entirely |fully |completely |quite |truly |really )equal"
_PHRASES = {
    True: [
        "equal",
        "igual",
        "iguales",
        "iguais",
        "égal",
        "egal",
        "égaux",
        "égales",
        "gleich",
        "uguale",
        "uguali",
        "равны",
        "равно",
        "равные",
        "равен",
        "gelijk",
        "相等",
        "相同",
        "等同",
        "等しい",
        "同等",
        "同じ",
        "같음",
        "같다",
        "동일",
        "동일함",
    ],
    False: [
        *[
            "unequal",
            "desigual",
            "desiguales",
            "desiguais",
            "inégal",
            "inégaux",
            "ungleich",
            "disuguale",
            "disuguali",
            "неравны",
            "неравно",
        ],
        *["不相等", "不相同", "不等", "不等同", "不同", "等しくない", "異なる", "다름", "다르다", "ongelijk"],
        *("no igual", "no iguales", "no son iguales", "não igual", "não iguais", "não são iguais", "non égal"),
        *("non égaux", "pas égal", "pas égaux", "nicht gleich", "non uguale", "non uguali", "не равны", "не равно"),
        *("no es igual", "no son igual", "não é igual", "não são igual", "n'est pas égal", "ce n'est pas égal"),
        *("ne sont pas égales", "elles ne sont pas égales", "non è uguale", "non sono uguali", "ist nicht gleich"),
        *("sie sind nicht gleich", "sind nicht gleich", "pas égales", "non sono uguale"),
        *("niet gelijk", "同等ではない", "同じではない", "같지 않음", "같지 않다", "동일하지 않음"),
    ],
}
_EXACT = {phrase: verdict for verdict, phrases in _PHRASES.items() for phrase in phrases}
_ANY = re.compile(rf"(?P<no>\b(?:{_NOT})\b)|(?P<yes>\bequal\b)")
_LABEL = (
    r"(?:verdict|answer|result|conclusion|decision|judge?ment|overall|final|assessment|determination"
    r"|veredicto|veredito|conclusión|respuesta|resultado|urteil|ergebnis|antwort|fazit|verdetto|risultato|conclusione"
    r"|verdict final|réponse|conclusão|resposta|结论|判断|结果|判定|答案|結論|回答|вердикт|вывод|ответ"
    r"|결론|판정|결과|판단"
    r"|therefore|thus|hence|so|daher|also|deshalb|por (?:lo )?tanto|donc|quindi|portanto|因此|所以|したがって"
    r"|따라서|поэтому|итак)"
)
_SEPARATOR = r"\s?(?:(?:is|are|[:=|>→#-]|es|ist|est|è|é|是|为|は)\s?){1,8}"
_LABELLED = re.compile(
    rf"(?P<label>(?:\b(?:final|overall|my)\s+)?{_LABEL}(?:\s+final)?)(?:{_SEPARATOR}|\s+)(?:that\s+)?"
    rf"(?:they are\s+|the (?:two )?instructions are\s+)?[\"'“(\[]*(?P<phrase>{_NOT}|equal)\b(?P<tail>.*)$"
)
_SENTENCE = re.compile(
    r"(?:(?:so|therefore|thus|hence|overall|however|but|still|in conclusion|in summary|to conclude|as a result"
    r"|consequently|accordingly)\b[, ]*)?"
    r"(?:(?:i|we) (?:conclude|judge|find|say|would say|think|believe) (?:that )?)?"
    r"(?:they|it|these|both|the two|both of them|these two|the instructions|both instructions|the two instructions"
    r"|these instructions|these two instructions|the first and (?:the )?second instructions?|the prompts"
    r"|the two prompts"
    r"|the (?:second|two) (?:one|ones|instruction))"
    rf" (?:are|is) (?:therefore |thus |hence )?[\"']?(?P<phrase>{_NOT}|equal)[\"']?(?P<tail>.*)"
)
_CHOICE = re.compile(
    r"(?:(?:so|therefore|thus|hence|overall|in conclusion)\b[, ]*)?(?:i|we)(?:['’]d| would)? (?:choose|pick|select|say"
    r"|answer|reply|judge|vote(?: for)?|opt for|go with|went with|decide (?:on|for)|settle on)(?: that it is)?[: ]{1,3}"
    rf"[\"'“(\[]*(?P<phrase>{_NOT}|equal)\b[\"'”)\]]*(?P<tail>.*)"
)
# Not a verdict: behind one, it says how far from the other one it is.
_NEARLY = re.compile(
    r"[(,;–—-]?\s*\(?\b(?:(?:al)?though|but|albeit|even if|if)?\s*(?:they (?:are|come)\s+|it is\s+)?"
    r"(?:nearly|almost|roughly|close to|not far from|very close to)\s+(?:being\s+)?equal\)?"
)
_FINAL = re.compile(r"final|overall|conclusion|fazit|结论|結論|결론|вывод|conclus")
# Words that make a sentence a condition, a question or a report of the rules.
_ANSWERED = re.compile(
    r"(?<!not )(?<!non-)\bequal\b[\s:?=*\"'`–—-]{1,8}(?:no|false)\b\W*$", re.IGNORECASE | re.MULTILINE
)
_IDLE = re.compile(r"\b(?:if|unless|whether|would|could|might|may|should|when|reply with|either)\b|\?")
_LIMITED = re.compile(
    r"\b(?:but|however|except|although|though|only|apart|or|in|until|to|yet|while|whereas|regarding|about|nor)\b|/"
)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？])")
_MARKED = re.compile(r"\*\*([^*]{1,40})\*\*|\[\[([^\[\]]{1,40})\]\]|`([^`]{1,40})`|__([^_]{1,40})__")
_REASONED = re.compile(rf"(?P<phrase>{_NOT}|equal)\s*(?P<mark>[:,;(—–]|-\s|because\b|since\b|as\b)\s*(?P<tail>\S.*)")


def read_equal(text: str) -> bool | None:
    """True for `Equal`, False for `Not Equal`, None where a reply says neither, or both.

        reply    = JSON object with verdict | units
        unit     = line or sentence, stripped of Markdown; one with a condition, a question or both phrases says nothing
        verdict  = phrase alone in a unit | label (":" | "is" | ...) phrase [reason]
                 | [[phrase]] | **phrase** | `phrase`
                 | "they are" phrase [reason] | phrase (":" | "," | "-" | "because") reason, first or last of the units
        phrase   = "Equal" | "Not Equal" | "Unequal" | the same in another language, alone in its unit
        label    = "Verdict" | "Answer" | "Conclusion" | ...; one with "final" or "overall" goes before all others

    All verdicts of a reply must agree. `Equal` with a limit behind it ("equal in length", "equal, but") says nothing.
    """
    text = re.sub(r"\b([Tt]hey|[Ii]t)['’](?:re|s)\b", r"\1 is", text)
    text = re.sub(r"\b(?:are|is)n['’]t\b", "are not", re.sub(r"(?i)\b(not)\s*\n\s*(equal)\b", r"\1 \2", plain(text)))
    text = _ANSWERED.sub("Not Equal", text)  # "Equal: No"
    try:
        from_json = agreed(v for item in json_objects(text) if (v := _in_object(item)) is not None)
        return _in_text(text) if from_json is None else from_json
    except Ambiguous:
        return None


def _in_object(item: dict) -> bool | None:
    for key in ("final_verdict", "verdict", "answer", "result", "decision", "judgment", "judgement", "conclusion"):
        if isinstance(item.get(key), str):
            return _alone(item[key])
    for key in ("equal", "is_equal", "are_equal", "equals"):
        if isinstance(item.get(key), bool):
            return item[key]
    return None


def _in_text(text: str) -> bool | None:
    final, verdicts = [], []
    for table in tables(text):
        for cells in table:
            if len(cells) > 1 and re.fullmatch(rf"(?:final |overall )?{_LABEL}", cells[0].lower()):
                final += [v for v in (_alone(cells[-1]),) if v is not None]
    for unit, is_edge in _units(text):
        matched = _in_unit(unit, is_edge)
        if matched is not None:
            (final if matched[1] else verdicts).append(matched[0])
    chosen = agreed(final)
    return agreed(verdicts) if chosen is None else chosen


def _units(text: str) -> list[tuple[str, bool]]:
    """Sentences of the lines, and whether a unit begins the first line, or is or begins the last one."""
    lines = [line for line in content_lines(text) if line.count("|") < 3]
    units = []
    for number, line in enumerate(lines):
        for place, sentence in enumerate(_SENTENCE_END.split(line)):
            units.append((sentence, place == 0 and number in (0, len(lines) - 1)))
    return units


_EDGES = " .!\"'“”‘’«»()[]{}<>#|~,;-–—=✓✗≠→。"


def _alone(text: str) -> bool | None:
    """The verdict that a text is, and nothing else; a translation may follow in parentheses."""
    bare = re.sub(r"[\s_]+", " ", without_emphasis(text).lower()).strip(_EDGES)
    parts = [part.strip(" \"'") for part in re.split(r"[()/]", bare) if part.strip(" \"'")]
    verdicts = [False if re.fullmatch(_NOT, part) else _EXACT.get(part) for part in parts]
    return verdicts[0] if verdicts and verdicts.count(verdicts[0]) == len(verdicts) else None


def _in_unit(unit: str, is_edge: bool) -> tuple[bool, bool] | None:
    """(verdict, whether it is called final) of one unit."""
    alone = (
        None
        if unit.rstrip(" *").endswith(":")
        else _alone(re.sub(r"^(?:[-*•>]|\d+[.)]|(?:so|thus|therefore|hence),)\s+", "", unit, flags=re.IGNORECASE))
    )
    if alone is not None:
        return alone, False
    line = re.sub(r"\s+", " ", without_emphasis(unit).lower()).strip(" #>|\"'")
    label, _, rest = line.partition(":")
    if rest and re.search(rf"{_LABEL}\W*$", label) and _alone(rest) is not None and not _IDLE.search(line):
        return bool(_alone(rest)), bool(_FINAL.search(label))
    if re.search(rf"\b(?:{_NOT})\b", line):
        line = _NEARLY.sub("", line)
        if _alone(line) is False:
            return False, False
    said = {match.lastgroup for match in _ANY.finditer(line)}
    line = line.replace("would say", "say").replace("would conclude", "conclude")
    if len(said) > 1 or _IDLE.search(line):
        return None
    for pattern in (_LABELLED, _SENTENCE, _CHOICE, *([_REASONED] if is_edge else [])):
        match = pattern.search(line) if pattern is _LABELLED else _last_match(pattern, line)
        if match and said and (said == {"no"} or not _LIMITED.search(_up_to_reason(match["tail"]))):
            return "yes" in said, bool(_FINAL.search(match.groupdict().get("label") or ""))
    reasoned = re.match(r"([^:,;.(]{2,30})[:,;(]\s*\S(.*)", line) if is_edge and not said else None
    if reasoned and _alone(reasoned[1]) is not None:
        return bool(_alone(reasoned[1])), False
    marked = [_alone(next(filter(None, match.groups()))) for match in _MARKED.finditer(unit)]
    verdict = agreed(v for v in marked if v is not None)
    return None if verdict is None else (verdict, False)


def _last_match(pattern: re.Pattern[str], line: str) -> re.Match[str] | None:
    """The match at the beginning of a sentence, or of a clause that draws its conclusion."""
    starts = [
        0,
        *(
            m.end()
            for m in re.finditer(
                r"[,;—–-] ?(?:and |which means (?:that )?)?(?=(?:so|therefore|thus|hence|they) )", line
            )
        ),
    ]
    return next((match for start in starts if (match := pattern.match(line, start))), None)


def _up_to_reason(tail: str) -> str:
    """The rest of a sentence up to what begins its reason."""
    return re.split(r"\b(?:because|since|as|given that)\b|[:—–(]", tail)[0]
