"""Reader of evolved instructions."""

import re

from wizard_engine.runtime.text_lines import split_lines

from .cleaning import without_reasoning
from .wrapping import REMARK_RULE, named_value, unwrapped, without_closing, without_sections

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
_HEADING = re.compile(
    rf"^[ \t]*(?:>[ \t]*)?(?:(?:\*\*|#+[ \t]*)?step[ \t]*\d+[ \t]*[:.)-]*[ \t]*"
    rf"|\d+[.)][ \t]+)?(?P<open>[#*_`＃\[ \t]*)(?:{_NAME})"
    r"(?P<close>[ \t]*[#*_`＃\]]*[ \t]*[:：]?[ \t]*[*_`#]*)(?P<rest>.*)$",
    re.IGNORECASE,
)
_FINAL_HEADING = re.compile(r"\bfinal|最终|finale?\b", re.IGNORECASE)
_PREFACE = re.compile(
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|got it|claro|por supuesto|natürlich|gerne|bien sûr|certo"
    r"|好的|当然|もちろん|네|конечно)\b[^\n:：]{0,80}|(?:here|below|this)(?:['’]s| is| are)\b[^\n:：]{0,120}"
    r"|aquí (?:está"
    r"|tienes)[^\n:：]{0,100}"
    r"|hier ist[^\n:：]{0,100}|voici[^\n:：]{0,100}|ecco[^\n:：]{0,100}|aqui está[^\n:：]{0,100}|以下是[^\n:：]{0,60}"
    r"|вот[^\n:：]{0,80}"
    r"|i(?:['’]ve| have)\b[^\n:：]{0,100}\b(?:rewritten|rewrote|evolved|revised)\b[^\n:：]{0,60})[:：][ \t*]*(?:\n|$)",
    re.IGNORECASE,
)
_COMMENTARY = re.compile(
    r"\s*(?:sure\b|certainly\b|of course\b|okay\b|alright\b|absolutely\b|here(?:['’]s| is| are)\b"
    r"|let['’]?s (?:start|begin|work|follow)|let me\b"
    r"|i(?:['’]ll| will| would|['’]ve| have| need to| can make| chose| think)\b|to (?:rewrite|make) (?:this|the)\b"
    r"|we (?:need|can|should)\b"
    r"|(?:\W*)step 1\b|the (?:given|original|rewritten) (?:instruction|prompt)\b|given instruction\b|\W*(?:plan"
    r"|analysis|operator|method)\W*:"
    r"|1[.)] (?:list|ways|read|possible)|ways to\b|possible ways\b|thank you\b|understood\b)",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\s*(?:i['’]?m (?:really |very )?sorry,? but|i(?:['’]m| am) (?:unable|not able) to"
    r"|(?:sorry,? )?(?:but )?i (?:can['’]?t|cannot|can not|won['’]t)"
    r" (?:assist|help|rewrite|fulfil|comply|provide|do that|complete|evolve|create)|as an ai\b"
    r"|unfortunately,? i (?:can|am)|i must decline"
    r"|lo siento,? pero|es tut mir leid|je suis désolé|抱歉|对不起|很抱歉|申し訳|죄송|извините|mi dispiace|desculpe)",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"[\[<({][^\n]*\b(?:rewritten|instruction|insert|your|here|text)\b[^\n]*[\]>)}]|\.{3}|…|none|n/?a", re.IGNORECASE
)
_KEYS = ("rewritten_instruction", "final_instruction", "evolved_instruction", "new_instruction", "rewritten_prompt",
         "rewritten", "instruction", "prompt", "result", "output")  # fmt: skip
_SECTIONS = ("operator", "method", "given instruction", "example")


def read_evolved(text: str) -> str | None:
    """The new instruction, or None where a reply has none, or it cannot be told from what is said about it.

        reply    = [preface] heading instruction [remark] | JSON object with it | preface ":" instruction [remark]
                 | instruction
        heading  = "#Rewritten Instruction#:", the last one in the reply; without one, a line "Rewritten Instruction:",
                   "**New Prompt**", "### Final instruction" or the like, also in another language
        instruction = text, perhaps in a fence, in quotes, in bold or quoted by ">"; it ends before a section of the
                   prompt ("#Method#:") or a remark
        remark   = paragraph that begins "Explanation:", "Changes:", "Note: I ...", "This version ..."; a rule before it

    A reply without a heading that goes on about rewriting, or refuses, has no instruction.
    """
    content = without_reasoning(text)
    body, is_marked = _body(content)
    if body is None:
        return None
    instruction = _instruction(body, is_marked)
    return None if not instruction or _PLACEHOLDER.fullmatch(instruction) else instruction


def _body(content: str) -> tuple[str | None, bool]:
    """The text with the instruction, and whether something says that it is one."""
    lines = split_lines(content)
    exact = _after_exact(lines)
    if exact is not None:
        return exact, True
    value = named_value(content, _KEYS)
    if value is not None:
        return value, True
    headed = _after_heading(lines)
    if headed is not None:
        return headed, True
    if REFUSAL.match(content):
        return None, False
    preface = _PREFACE.match(content)
    if preface:
        return content[preface.end() :], True
    return (None if _is_commentary(content) else content), False


def _after_exact(lines: list[str]) -> str | None:
    """What follows the last line `#Rewritten Instruction#:`, or a later one that is called final."""
    for index in range(len(lines) - 1, -1, -1):
        head, heading, rest = lines[index].partition(REWRITTEN_HEADING)
        if heading and (not head.strip() or re.search(r"[.!?:*]\s*[*_]*$", head)):
            later = [
                i for i in range(index + 1, len(lines)) if _is_heading(lines[i]) and _FINAL_HEADING.search(lines[i])
            ]
            if later:
                return _after_heading(lines[later[-1] :])
            return "\n".join([rest.lstrip("*_") if head.strip() else rest, *lines[index + 1 :]]).strip()
    return None


def _is_heading(line: str) -> bool:
    """Whether a line is a heading: marked as one (#, bold), ended by a colon, or nothing else on it and a mark."""
    match = _HEADING.match(line)
    if not match:
        return False
    has_colon = ":" in match["close"] or "：" in match["close"]
    is_marked = bool(re.search(r"[#*＃]", match["open"])) and (has_colon or not match["rest"].strip())
    return has_colon or is_marked


def _after_heading(lines: list[str]) -> str | None:
    """What follows the last heading that has something behind it."""
    for index in range(len(lines) - 1, -1, -1):
        if _is_heading(lines[index]):
            body = "\n".join([_HEADING.match(lines[index])["rest"], *lines[index + 1 :]]).strip()
            if body:
                return body
    return None


def _is_commentary(content: str) -> bool:
    """Whether a text without a heading speaks about rewriting, and not as an instruction may."""
    about = re.search(r"rewritten instruction|#\s?(?:method|operator|given instruction)", content, re.IGNORECASE)
    return bool(_COMMENTARY.match(content) or about)


def _instruction(body: str, is_marked: bool) -> str:
    """The instruction of a body without its wrapping, remarks and further sections of the prompt."""
    body = without_sections(body, _SECTIONS)
    body = unwrapped(without_closing(body))
    if not is_marked and REMARK_RULE.search(body):
        return ""
    return body
