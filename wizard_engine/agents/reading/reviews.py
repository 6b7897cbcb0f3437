"""Reader of reviews: which evolving cases failed, and why."""

import re

from wizard_engine.runtime.text_lines import one_line, split_lines

from .cleaning import Ambiguous, json_values, lower_keys, tables, without_reasoning

NO_FAILED_CASE = "No failed case."
_NAME = r"(?:failed )?(?:cases?|fall|casos?|cas|caso|案例|用例|ケース|사례|случай)"
_CASE = re.compile(
    rf"^[^\w\n]{{0,12}}(?:\d{{1,3}}[.)]\s{{1,4}})?[^\w\n]{{0,6}}{_NAME}\s?[#(\[]?"
    r"(?P<numbers>\d{1,4}(?:\s?(?:,|and|&|y|und|et)\s?(?:case\s)?#?\d{1,4}){0,20})[)\]]?[*_`]{0,4}\s?"
    r"(?:[:：.)|—–-]+|->|→|\(|$)\s*[*_`]{0,4}\s*(?P<reason>.*)$",
    re.IGNORECASE,
)
_INNER_CASE = re.compile(rf"[;；]\s*(?={_NAME} ?\d{{1,4}}\s?[:：])", re.IGNORECASE)
_NONE_FAILED = re.compile(
    r"(?<!reply `)(?<!reply )(?<!if )\b(?:no (?:failed|failing|failure) cases?|no cases? (?:have |has )?failed"
    r"|none (?:of (?:the|these) (?:\w+ )?cases )?(?:have |has )?"
    r"failed|no failures?|there (?:are|were) no failed|zero failed"
    r"|all (?:of )?(?:the )?(?:\w+ )?cases (?:\w+ )?(?:evolved|succeeded|passed|are (?:fine|correct|valid|ok|sound)))"
    r"|没有失败|沒有失敗|無失敗|失敗した(?:ケース|事例)は(?:ありません|ない)|ning[uú]n caso"
    r"|kein(?:e|er)? .{0,30}(?:fehlgeschlagen|fall)"
    r"|aucun cas|nessun caso|nenhum caso|실패한 (?:사례|경우)(?:가|는)? 없|нет неудачных|ни один",
    re.IGNORECASE,
)
_PASSED = re.compile(
    r"(?:no (?:failure|failures|problems?|issues?|errors?)|ok(?:ay)?|passed|fine|successful(?:ly evolved)?|valid"
    r"|not failed|did not fail"
    r"|good|sound|evolved (?:well|correctly|fine|properly)|well evolved|correct)\W*$|^(?:no (?:failure|issue"
    r"|problem)|passed|ok\b|not (?:a )?failed|fine\b)",
    re.IGNORECASE,
)
_COPIED = re.compile(r"^\s*(?:Stage \d+\s*:|Response:|#+ ?(?:Method|Trajectory) ?#)", re.MULTILINE)


def read_review(text: str, cases: int = 10_000) -> str | None:
    """The review of evolving cases as lines `Case N: reason`, or `No failed case.`; None where it is neither.

        reply = [preface] { case } [closing] | "No failed case." in some wording | table of numbers and reasons
              | JSON array of {"case": n, "reason": text} | JSON object {"1" | "Case 1": reason}
        case  = ["-" | "1."] "Case" n (":" | "." | "-" | "(") reason, which goes on over the lines behind it

    Cases of which the reason says that they did not fail are left out. A case beyond the last one, with two reasons or
    with none, a copied trajectory, and failed cases beside the word that there are none: not read.

    Args:
        cases: how many there are.
    """
    content = re.sub(r"</?failed_cases>", "", without_reasoning(text), flags=re.IGNORECASE).strip()
    if _COPIED.search(content):
        return None
    try:
        matched, rest = _cases(content)
    except Ambiguous:
        return None
    if any(not 1 <= number <= cases for number in matched):
        return None
    failed = {number: reason for number, reason in matched.items() if not _PASSED.search(reason)}
    says_none = bool(_NONE_FAILED.search(rest)) and len([line for line in rest.split("\n") if line.strip()]) <= 4
    if failed:
        return None if says_none else "\n".join(f"Case {number}: {reason}" for number, reason in failed.items())
    return NO_FAILED_CASE if says_none or matched else None


def _cases(content: str) -> tuple[dict[int, str], str]:
    """The reason of each case, and the text that is about none."""
    values = json_values(content) if content[:1] in "[{`" else []
    if len(values) == 1:
        return _of_json(values[0])
    for rows in tables(content):
        numbered = [row for row in rows if re.fullmatch(rf"(?:{_NAME} ?)?\d{{1,4}}", row[0], re.IGNORECASE)]
        if numbered and len(rows) - len(numbered) <= 1:
            return _distinct((int(re.search(r"\d+", row[0])[0]), row[1]) for row in numbered if len(row) == 2), ""
    return _of_lines(_INNER_CASE.sub("\n", content))


def _of_json(value: list | dict) -> tuple[dict[int, str], str]:
    if isinstance(value, dict):
        keys = lower_keys(value)
        lists = [item for item in keys.values() if isinstance(item, list)]
        numbers = {key: re.fullmatch(r"(?:case_?)?(\d{1,4})", key) for key in keys}
        if keys and all(numbers.values()) and all(isinstance(item, str) for item in keys.values()):
            return _distinct((int(numbers[key][1]), item) for key, item in keys.items()), ""
        value = lists[0] if len(lists) == 1 else [value]
    if not value:
        return {}, NO_FAILED_CASE
    pairs = []
    for item in value:
        keys = lower_keys(item) if isinstance(item, dict) else {}
        number, reason = re.search(r"\d+", str(keys.get("case", keys.get("number", "")))), keys.get("reason")
        if number is None or not isinstance(reason, str):
            raise Ambiguous
        pairs.append((int(number[0]), reason))
    return _distinct(pairs), ""


def _distinct(pairs) -> dict[int, str]:
    """Number -> reason; Ambiguous for a number with two reasons, or a blank one."""
    matched: dict[int, str] = {}
    for number, reason in pairs:
        reason = one_line(reason)
        if not reason or matched.setdefault(number, reason) != reason:
            raise Ambiguous
    return matched


def _of_lines(content: str) -> tuple[dict[int, str], str]:
    pairs: list[tuple[list[int], str]] = []
    rest: list[str] = []
    is_open = is_headed = False
    for line in split_lines(content):
        match = _CASE.match(line)
        if match:
            pairs.append((list(map(int, re.findall(r"\d+", match["numbers"]))), _plain(match["reason"])))
            is_open, is_headed = True, line.lstrip().startswith("#")
        elif is_open and line.strip():
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]} {_plain(line)}".strip())
        else:
            is_open = is_open and not pairs[-1][1] and is_headed
            rest.append(line)
    if pairs and re.search(r"\bCase\s*$", pairs[-1][1]):
        raise Ambiguous
    return _distinct((number, reason) for numbers, reason in pairs for number in numbers), "\n".join(rest)


def _plain(reason: str) -> str:
    return re.sub(r"\*\*|__|`", "", reason).strip().removeprefix("- ").removeprefix("• ")
