"""Reader of evolved instructions."""

import re

from wizard_engine.runtime.text_lines import split_lines

from .cleaning import without_reasoning
from .text_replies import TextForm, find_text, is_heading, is_no_text, trimmed
from .wrapping import unfenced, without_closing

REWRITTEN_HEADING = "#Rewritten Instruction#:"
_NOUN = r"(?:instruction|prompt|question|task|problem|request|version)"
_NAME = (
    rf"(?:the\s+|my\s+)?(?:final(?:ly)?\s+)?(?:rewritten|re-written|evolved|revised|modified|updated|improved|new"
    rf"|harder|reworded|rephrased)"
    rf"\s+(?:and\s+\w+\s+)?{_NOUN}|rewritten|final (?:version|instruction|prompt)"
    r"|instrucción (?:reescrita|final|nueva|revisada)|umgeschriebene (?:anweisung|instruktion)|neue anweisung"
    r"|überarbeitete anweisung"
    r"|(?:instruction|consigne) (?:réécrite|finale|révisée)|nouvelle instruction|instrução (?:reescrita|revisada|final)"
    r"|istruzione (?:riscritta|rivista|finale)|(?:改写|重写|修改|改編|最终|新)(?:后)?的?(?:指令|提示|问题|版本)"
    r"|(?:書き直|書き換え|改訂)(?:した|し|後の|られた)?(?:指示|命令)|переписанная инструкция|новая инструкция"
    r"|(?:재작성|다시 작성|수정)된 (?:지시"
    r"|지시문|명령)"
)
_COMMENTARY = re.compile(
    r"\s*(?:sure\b|certainly\b|of course\b|okay\b|alright\b|absolutely\b|here(?:['’]s| is) (?:my|an?) (?:attempt"
    r"|try|rewrite|idea|suggestion)\b"
    r"|let['’]?s (?:start|begin|work|follow)|let me\b"
    r"|i(?:['’]ll| will| would|['’]ve| have| need to| can make| chose| think)\b|to (?:rewrite|make) (?:this|the)\b"
    r"|we (?:need|can|should)\b"
    r"|(?:\W*)step 1\b|the (?:given|original|rewritten) (?:instruction|prompt)\b|given instruction\b|\W*(?:plan"
    r"|analysis|operator|method)\W*:"
    r"|1[.)] (?:list|ways|read|possible)|ways to\b|possible ways\b|thank you\b|understood\b)",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"[\[<({][^\n]*\b(?:rewritten|instruction|insert|your|here|text)\b[^\n]*[\]>)}]|\.{3}|…|none|n/?a", re.IGNORECASE
)
# A first line that announces several instructions.
_ANNOUNCED = re.compile(
    r"[^\n]{0,60}\b(?:\d|two|three|four|five|six|some|several|a few|possible|alternative|different|dos|tres|deux|trois"
    r"|zwei|drei|mehrere)\b[^\n]{0,60}\b(?:rewrites?|versions?|versionen|versiones|options?|variants?|alternatives?|prompts?"
    r"|questions?|(?:instruction|consigne|instruccione|anweisung)(?:s|en)?)\b[^\n]{0,60}[:：]\s*\n",
    re.IGNORECASE,
)
_FORM = TextForm(
    _NAME,
    r"\b(?:instruction|prompt|rewrites?|rewritten|evolved|version|options?)\b|instrucción|anweisung|consigne"
    r"|instrução|istruzione|指令|指示|инструкци|지시",
    ("rewritten_instruction", "final_instruction", "evolved_instruction", "new_instruction", "rewritten_prompt")
    + ("rewritten", "instruction", "prompt", "result", "output"),
)


def read_evolved(text: str) -> str | None:
    """The new instruction, or None where a reply has none, or it cannot be told from what is said about it.

    The reply has the form of `text_replies`, with the name "Rewritten Instruction", "New Prompt" or the like. The line
    `#Rewritten Instruction#:` goes before all other headings: the instruction is what follows it. A reply without a
    heading that goes on about rewriting has no instruction.
    """
    content = unfenced(without_reasoning(text))
    bodies = _exact_bodies(content)
    if bodies:
        body = bodies[0] if len(set(bodies)) == 1 else None
        return body if body and not _PLACEHOLDER.fullmatch(body) else None
    matched = find_text(content, _FORM)
    if matched is None or _PLACEHOLDER.fullmatch(matched) or _is_list_of_several(content):
        return None
    return None if matched == content.strip() and _is_commentary(content, matched) else matched


def _exact_bodies(content: str) -> list[str]:
    """The texts behind the lines `#Rewritten Instruction#:`; behind a later heading that is called final."""
    bodies, lines = [], split_lines(content)
    places = [index for index, line in enumerate(lines) if _is_exact(line)]
    for place, end in zip(places, [*places[1:], len(lines)]):
        later = [
            i
            for i in range(place + 1, end)
            if is_heading(lines[i], _FORM) and re.search(r"\bfinal[^:：\n]*[:：]", lines[i], re.IGNORECASE)
        ]
        if later:
            matched = find_text("\n".join(lines[later[-1] : end]), _FORM)
        else:
            rest = lines[place].partition(REWRITTEN_HEADING)[2].lstrip("*_")
            matched = trimmed("\n".join([rest, *lines[place + 1 : end]]), _FORM)
        bodies += [matched] if matched else []
    return bodies


def _is_exact(line: str) -> bool:
    """Whether a line is the heading that was asked for, or ends a sentence and goes on with it."""
    head, heading, _ = line.partition(REWRITTEN_HEADING)
    return bool(heading) and (not head.strip(" \t*_>`") or bool(re.search(r"[.!?:*]\s*[*_]*$", head)))


def _is_list_of_several(content: str) -> bool:
    """Whether a reply is a line that announces several instructions, and a list of them that ends it."""
    announced = _ANNOUNCED.match(content)
    lines = [line for line in without_closing(content[announced.end() :]).split("\n") if line] if announced else []
    is_item = [re.match(r"\s*\W{0,3}(?:\d+[.):]|[-*•]|[A-H][.)])\s", line) for line in lines]
    return sum(map(bool, is_item)) > 1 and all(item or line[0].isspace() for item, line in zip(is_item, lines))


def _is_commentary(content: str, matched: str) -> bool:
    """Whether a text without a heading speaks about rewriting, and not as an instruction may."""
    if is_no_text(matched):
        return True
    about = re.search(r"rewritten instruction|#\s?(?:method|operator|given instruction)", content, re.IGNORECASE)
    return bool(_COMMENTARY.match(matched) or (about and not matched.startswith("#")))
