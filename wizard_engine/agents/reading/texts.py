"""Readers of texts: improved answers, suggestions, reviews of failed cases, methods, and plain replies."""

import re

from wizard_engine.runtime.text_lines import one_line, split_lines

from .cleaning import json_values, lower_keys, without_emphasis, without_reasoning
from .instructions import REFUSAL
from .wrapping import named_value, unwrapped, without_closing, without_sections

_ANSWER_NOUN = r"(?:answers?|versions?|responses?|reply|solutions?|rewrite|explanation|text)"
_CHANGED = (
    r"(?:improved|rewritten|revised|better|enhanced|updated|new|refined|polished|expanded|corrected|unchanged|reworked"
    r"|more \w+(?: and \w+)?|clearer|shorter)"
)
_OPENING = re.compile(
    r"(?:(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|got it|understood|great)\b[ \t]*[,.!:]*\s*)?"
    rf"(?:(?:here|below)(?:['’]s| is| are)\b[^\n.:]{{0,60}}\b(?:{_CHANGED}|{_ANSWER_NOUN})\b[^\n]*?(?:[:.](?=\s"
    rf"|$)\s*|\n|$)"
    rf"|(?:this is|i have|i['’]ve)\b[^\n.:]{{0,60}}\b(?:{_CHANGED}\b[^\n.:]{{0,40}}\b{_ANSWER_NOUN}"
    rf"|{_ANSWER_NOUN}\b[^\n.:]{{0,60}}\b{_CHANGED}"
    rf"|(?:improved|rewritten|revised|updated)\b)\b[^\n]*?(?:[:.](?=\s|$)\s*|\n|$)"
    r"|(?:aquí (?:está|tienes)|hier ist|voici|ecco|aqui está|вот)\b[^\n:]{0,80}(?::\s*|\n)|以下是[^\n:：]{0,40}[:：]\s*"
    r"|(?:以下|こちら)が[^\n:：。]{0,40}[:：。]\s*)",
    re.IGNORECASE,
)
_LONE_OPENER = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely|got it|understood)\b[^\n]{0,12}\n\s*(?=\S)", re.IGNORECASE
)
_ANSWER_HEADING = re.compile(
    rf"[ \t]*[#*_＃]*[ \t]*(?:the )?(?:final )?(?:improved|rewritten|revised|new|better|enhanced"
    rf"|updated) {_ANSWER_NOUN}[ \t]*(?:"
    r"[#*_＃]*[ \t]*[:：][ \t]*[*_]*|[#*_＃]+[ \t]*(?=\n|$))\s*",
    re.IGNORECASE,
)
_NOTHING_TO_DO = re.compile(
    r"(?:no (?:further |other )?(?:changes?|improvements?|revisions?)\b[^\n.]{0,40}\b(?:needed|necessary|required"
    r"|possible)"
    r"|\balready (?:correct|good|perfect|optimal|complete|clear)|\b(?:cannot|can['’]t) be improved|nothing (?:can"
    r"|to|needs)\b[^\n.]{0,20}\bimprove)",
    re.IGNORECASE,
)
_ANSWER_KEYS = ("improved_answer", "rewritten_answer", "new_answer", "revised_answer", "answer", "response", "output")
_ANSWER_SECTIONS = ("quality", "suggestion", "instruction", "answer", "conversation so far", "reference answer")


def read_rewritten(text: str, before: str = "") -> str | None:
    """The rewritten answer without remarks about it; None for a reply that holds none.

    Args:
        before: the answer that was to be rewritten; repeated as it is, it is an answer, whatever it says.

        reply   = [opener] [remark] [heading] answer [closing] | JSON object with the answer, alone
        opener  = "Sure!" | "Certainly!" | ...     alone on the first line
        remark  = "Here is the improved answer:" | "I have revised the answer ..." | the like, also in another language
        heading = "#Improved Answer#:" | "**Revised answer:**" | ...
        answer  = text, perhaps in a fence without a language; it ends before a section of the prompt ("#Suggestion#:")
        closing = paragraph "Changes made: ..." | "This version ..." | "I have added ... " | the like

    "No changes are needed." alone and a refusal are no answers.
    """
    answer = without_remarks(text)
    is_short = len(answer) < 200 and one_line(answer) != one_line(before)
    if is_short and (_NOTHING_TO_DO.search(answer) or REFUSAL.match(answer)):
        return None
    return answer or None


def without_remarks(text: str) -> str:
    """The answer of a reply, see `read_rewritten`; "" where it has nothing but remarks."""
    content = without_reasoning(text)
    value = named_value(content, _ANSWER_KEYS) if content[:1] in "{`" else None
    if value is not None:
        return value
    answer = _headed(content)
    if answer is None:
        answer = content
        if opening := _OPENING.match(answer):
            answer = answer[opening.end() :].strip()
        elif opener := _LONE_OPENER.match(answer):
            answer = answer[opener.end() :].strip()
        if heading := _ANSWER_HEADING.match(answer):
            answer = answer[heading.end() :]
    answer = without_closing(without_sections(answer, _ANSWER_SECTIONS))
    return unwrapped(answer) if answer[:3] in ("```", "~~~") else answer


def _headed(content: str) -> str | None:
    """What follows the last line that is a heading of the answer."""
    lines = split_lines(content)
    for index in range(len(lines) - 1, -1, -1):
        match = _ANSWER_HEADING.match(lines[index])
        if match and re.search(r"[#*＃]", match[0]):
            return "\n".join([lines[index][match.end() :], *lines[index + 1 :]]).strip()
    return None


_SUGGESTION = re.compile(
    r"\s*(?:(?:sure|certainly|of course)\b[^\n:]{0,40}[!.,:]\s*)?(?:here(?:['’]s| is)[^\n:]{0,60}:\s*)?"
    r"[#*_＃\s]*(?:(?:one |my )?suggestions?|advice|sugerencia|vorschlag|建议|提案|제안|совет)[ \t]*"
    r"[#*_＃]*[ \t]*[:：][ \t*_]*",
    re.IGNORECASE,
)
_SUGGESTION_PREFACE = re.compile(
    r"\s*(?:(?:sure|certainly|of course)\b[^\n:]{0,40}[!.,]\s*)?here(?:['’]s| is)[^\n:]{0,80}:\s*", re.IGNORECASE
)


def read_suggestion(text: str) -> str | None:
    """The suggestion; None where there is none.

    reply = [preface] ["#Suggestion#:" | "Suggestion:" | ...] text | JSON object with the key "suggestion"
    """
    content = without_reasoning(text)
    value = named_value(content, ("suggestion", "advice", "feedback"))
    if value is None:
        begin = _SUGGESTION.match(content) or _SUGGESTION_PREFACE.match(content)
        value = unwrapped(
            without_sections(content[begin.end() if begin else 0 :], ("instruction", "answer", "better answer"))
        )
    return (
        None
        if REFUSAL.match(value) or re.fullmatch(r"\W*|(?:none|n/?a|no suggestions?)\W*", value, re.IGNORECASE)
        else value
    )


# ---- reviews --------------------------------------------------------------------------------------------------------

NO_FAILED_CASE = "No failed case."
_CASE = re.compile(
    r"^[\s>*#•_+-]{0,12}(?:\d{1,3}[.)]\s{1,4})?[*_`]{0,4}(?:failed )?(?:cases?|fall|casos?|cas|案例|用例|ケース|사례|случай)\s*#?"
    r"(?P<numbers>\d{1,4}(?:\s*(?:,|and|&|y|und|et)\s*(?:case\s*)?#?\d{1,4})*)[*_`]*\s*"
    r"(?:[:：.)|—–-]+|->|→|\(|$)\s*[*_`]*\s*(?P<reason>.*)$",
    re.IGNORECASE,
)
_NONE_FAILED = re.compile(
    r"\b(?:no (?:failed|failing|failure) cases?|no cases? (?:have |has )?failed|none (?:of the cases )?(?:have "
    r"|has )?failed|no failures?"
    r"|there (?:are|were) no failed|zero failed|all (?:the )?(?:\w+ )?cases (?:\w+ )?(?:evolved|succeeded|passed"
    r"|are (?:fine|correct|valid|ok)))"
    r"|没有失败|無失敗|失敗した(?:ケース|事例)は(?:ありません|ない)"
    r"|ning[uú]n caso fall|kein(?:e|er)? .{0,30}fehlgeschlagen|aucun cas",
    re.IGNORECASE,
)
_PASSED = re.compile(
    r"(?:no (?:failure|failures|problems?|issues?|errors?)|ok(?:ay)?|passed|fine|successful(?:ly evolved)?|valid"
    r"|not failed|did not fail|good"
    r"|well evolved)\b\W*$|^(?:no (?:failure|issue|problem)|passed|ok\b|not (?:a )?failed)",
    re.IGNORECASE,
)


def read_review(text: str) -> str | None:
    """The review of evolving cases as lines `Case N: reason`, or `No failed case.`; None where it is neither.

        reply = [preface] { case } [closing] | "No failed case." in some wording
              | JSON array of {"case": n, "reason": text}
        case  = ["-" | "1."] "Case" n (":" | "." | "-" | "(") reason, which goes on over the lines up to the next case

    Cases of which the reason says that they did not fail are left out. A reply that names failed cases and says that
    there are none is not read.
    """
    content = without_reasoning(text)
    cases, rest = _cases_of_json(content), ""
    if cases is None:
        cases, rest = _cases_of_lines(content)
    failed = {number: reason for number, reason in cases.items() if not _PASSED.search(reason)}
    says_none = bool(_NONE_FAILED.search(rest))
    if failed:
        return None if says_none else "\n".join(f"Case {number}: {reason}" for number, reason in failed.items())
    return NO_FAILED_CASE if says_none or cases else None


def _cases_of_json(content: str) -> dict[int, str] | None:
    values = [v for v in json_values(content) if isinstance(v, list | dict)] if content[:1] in "[{`" else []
    if len(values) != 1:
        return None
    items = values[0]
    if isinstance(items, dict):
        items = next((v for key, v in lower_keys(items).items() if isinstance(v, list)), [items])
    cases = {}
    for item in map(lower_keys, filter(lambda entry: isinstance(entry, dict), items)):
        number, reason = re.search(r"\d+", str(item.get("case", ""))), item.get("reason")
        if number is None or not isinstance(reason, str):
            return None
        cases[int(number[0])] = one_line(reason)
    return cases


def _cases_of_lines(content: str) -> tuple[dict[int, str], str]:
    """The reason of each case, and the text that is about none."""
    cases: dict[int, str] = {}
    rest: list[str] = []
    numbers: list[int] = []
    for line in split_lines(content):
        match = _CASE.match(line)
        if match:
            numbers = list(map(int, re.findall(r"\d+", match["numbers"])))
            reason = match["reason"].strip()
            reason = one_line(without_emphasis(reason)) if re.search(r"[*`_]", reason) else reason
        else:
            reason = one_line(without_emphasis(line).lstrip(" -•"))
        rest += [] if numbers else [line]
        for number in numbers:
            cases[number] = f"{cases.get(number, '')} {reason}".strip()
        if not line.strip() and numbers and cases[numbers[0]]:
            numbers = []
    return {number: reason for number, reason in cases.items() if reason}, "\n".join(rest)


# ---- methods --------------------------------------------------------------------------------------------------------

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
_METHOD_HEADING = re.compile(
    r"[ \t]*[#*_＃]+[ \t]*(?:new|improved|revised|updated) method[ \t]*[#*_＃]*[ \t]*[:：]?[*_]*\s*", re.IGNORECASE
)
_LIST = re.compile(r"\s*1[.)]\s+\S.*(?:\n\s*(?:\d+[.)]|[-*•])\s+\S.*)+\s*")


def read_method(text: str) -> str | None:
    """The new method, or None where there is none or it is blank.

        reply = { text, block } [text] | ["#New Method#:"] numbered list, alone | JSON object with the key "method"
        block = line of three or more backticks or tildes [name] , lines , line of as many

    Of several blocks the last counts: the last behind "new method", "revised method" or the like, else the last that is
    not called an example or the old one. A block that is not closed is none.
    """
    content = without_reasoning(text)
    blocks = _blocks(content)
    value = named_value(content, ("method", "new_method", "improved_method", "revised_method"))
    if value is not None:
        return value or None
    if blocks:
        new = [
            block
            for before, block in blocks
            if _NEW_METHOD.search(before) and not re.search(r"\bexample\b", before, re.IGNORECASE)
        ]
        rest = [block for before, block in blocks if not _OTHER_BLOCK.search(before)] or [block for _, block in blocks]
        return (new or rest)[-1] or None
    if "```" in content or "~~~" in content:
        inline = re.fullmatch(r"[^`]{0,80}```([^`\n]+)```\s*", content)
        return inline[1].strip() if inline else None
    heading = _METHOD_HEADING.match(content)
    listed = content[heading.end() :] if heading else content
    return listed.strip() if _LIST.fullmatch(listed) else None


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


def read_plain(text: str) -> str | None:
    """The reply without reasoning and special tokens; None where nothing remains."""
    return without_reasoning(text) or None


_SPEAKER = re.compile(
    r"\s*(?:#+\s*)?[*_]*(?:user|human|next message|nutzer|usuario|用户)[*_]*\s*[:：][*_]*\s*", re.IGNORECASE
)


def read_user(text: str) -> str | None:
    """The next message of a user, without the name in front of it and quotes around it; None where nothing remains."""
    content = without_reasoning(text)
    speaker = _SPEAKER.match(content)
    content = content[speaker.end() :] if speaker else content
    return unwrapped(re.sub(r"^[#＃]Next Message[#＃]:\s*", "", content)) or None
