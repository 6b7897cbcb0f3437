"""Replies that are a text: found behind a heading or a preface, in JSON or a tag, and freed of what stands around it.

    reply    = JSON object with the text | "<name>" text "</name>" | [sections] heading body [empty heading]
             | preface body | body
    heading  = line "#Name#:" | "**Name:**" | "## Name" | "Name:"    the name of what was asked for, in some language
    preface  = "Here is the" name ":" | "Sure! ..." name ":" | ...
    body     = [speaker] text { closing } [next turn] [section of the prompt]
    text     = in a fence, quotes, bold, inline code or quoted by ">" as a whole, or plain
    closing  = last paragraphs that are remarks on the text, offers of help, scores or counts of words

Two headings with different texts, versions to choose from, refusals, promises, questions back, JSON without the text
and JSON that is cut have no reading.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from wizard_engine.runtime.text_lines import split_lines

from .cleaning import json_objects, without_reasoning
from .wrapping import unfenced, unwrapped, without_closing

_STEP = r"(?:(?:\*\*|#+[ \t]*)?step[ \t]*\d+[ \t]*[:.)-]*[ \t]*|\d+[.)][ \t]+)?"
_CUE = (
    r"(?:sure|certainly|of course|absolutely|okay|ok|great|got it|here|below|this|the|my|to|i|claro|por supuesto"
    r"|aquí|natürlich|gerne|hier"
    r"|bien sûr|voici|certo|ecco|aqui|вот|конечно)\b|以下|好的|当然|这是|下面|もちろん|こちら|네|다음은"
)
_EMOJI = r"[\U0001f300-\U0001faff\u2600-\u27bf\ufe0f]"
_NEXT_TURN = re.compile(
    r"^[ \t]*(?:(?:USER|ASSISTANT|HUMAN|Human)[ \t]?:|###[ \t]*(?:User|Assistant|Human|System)\b|<\|im_start\|>)",
    re.MULTILINE,
)
_SPEAKER = re.compile(r"\s*(?:\*\*)?\[?(?:assistant|ai|bot|model)\]?(?:\*\*)?[ \t]?[:：](?:\*\*)?\s*", re.IGNORECASE)
_PROMPT_HEADING = re.compile(r"^[ \t]*[#＃][ \t]?[A-Z][A-Za-z ]{2,28}[#＃][ \t]*[:：]", re.MULTILINE)
_ONLY_HEADINGS = re.compile(r"(?:\s*[#＃][^#＃\n]{1,30}(?:[#＃][ \t]*[:：]?)?[ \t]*(?:\n|$))+")
_VERSIONS = re.compile(
    r"^[ \t>*_#-]*(?:option|version|variant|variante|alternative|opción|choice|方案|选项"
    r"|版本)[ \t]*(?:\d|[A-C]\b|one|two)",
    re.IGNORECASE | re.MULTILINE,
)
_SEVERAL = re.compile(
    r"\b(?:two|three|four|five|some|several|a few|possible) (?:possible |different )?(?:rewrites|versions|options"
    r"|variants|alternatives|suggestions|messages)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\s*(?:i['’]?m (?:really |very |so )?sorry\b|(?:sorry,? (?:but )?)?i (?:can['’]?t|cannot|can not|won['’]t"
    r"|will not|am unable to|am not able to)"
    r" (?:assist|help|rewrite|fulfil|comply|provide|do that|complete|evolve|create|continue|expand|give|answer"
    r"|improve|write)"
    r"|i['’]d (?:rather|prefer) not|i would (?:rather|prefer) not|as an ai\b|unfortunately,? i (?:can|am)"
    r"|i must decline|i(?:['’]m| am) not able to"
    r"|lo siento|es tut mir leid|(?:je suis )?désolé|je ne peux pas|tut mir leid|(?:das|dabei|hierbei"
    r"|dazu) kann ich (?:leider )?nicht"
    r"|抱歉|对不起|很抱歉|我无法|申し訳|죄송|извините|к сожалению|mi dispiace"
    r"|desculpe|não posso|no puedo (?:ayudar|continuar))",
    re.IGNORECASE,
)
_ASKS_BACK = re.compile(
    r"\s*(?:could|can|would) you (?:please )?(?:share|tell me which|paste|provide|specify|clarify which|send)\b[^\n]*\?"
    r"|\s*(?:please (?:share|provide|paste)|i don['’]t see (?:a|an|any|the)\b|which of the two (?:answers"
    r"|suggestions|instructions|versions)\b|there (?:is"
    r"|seems to be) no (?:instruction|answer|conversation))",
    re.IGNORECASE,
)
_PROMISE = re.compile(
    r"\s*(?:(?:sure|certainly|of course|okay|absolutely|great)\b[,!. ]*)?(?:i['’]d be (?:happy|glad)"
    r"|i would be (?:happy|glad)|i can (?:give|help|do|write|rewrite)|i['’]ll (?:help|do|give)|i will (?:help|do"
    r"|give))\b[^\n.!?]*[.!]?\s*",
    re.IGNORECASE,
)


# Keys of JSON objects that speak about a text instead of holding it.
_ABOUT = {"quality", "operator", "status", "suggestion", "reason", "reasons", "explanation", "role", "error"}


@dataclass(frozen=True)
class TextForm:
    """What a task's text is called.

    Attributes:
        names: pattern of what headings call it.   nouns: pattern of what prefaces call it.
        keys: keys of JSON objects and names of tags that hold it.
        turns: pattern of the next turn behind it.
        is_single: whether a list is several texts to choose from.
        is_any_json: whether the text may be JSON with other keys.
    """

    names: str
    nouns: str
    keys: tuple[str, ...]
    turns: re.Pattern[str] = _NEXT_TURN
    is_single: bool = False
    is_any_json: bool = False

    @cached_property
    def heading(self) -> re.Pattern[str]:
        """A line that begins with a heading."""
        return re.compile(
            rf"^[ \t]*(?:>[ \t]*)?{_STEP}(?P<open>[#*_`＃\[ \t]*)(?:{self.names})"
            r"(?P<close>[ \t]*[#*_`＃\]]*[ \t]*[:：]?[ \t]*[*_`#]*)(?P<rest>.*)$",
            re.IGNORECASE,
        )

    @cached_property
    def preface(self) -> re.Pattern[str]:
        """The first words of a reply that announce the text."""
        return re.compile(
            rf"\s*(?:[^\n.!?:：]{{0,40}}[!.]\s+)?(?:{_CUE})[^\n:：]{{0,120}}(?:{self.nouns})[^\n:：]{{0,90}}"
            rf"(?:[:：][*_]{{0,2}}|!(?=\s*{_EMOJI}))\s*(?:{_EMOJI}\s*)*(?=\S)",
            re.IGNORECASE,
        )

    @cached_property
    def tag(self) -> re.Pattern[str]:
        """The text in a tag that is named after it."""
        return re.compile(rf"<({'|'.join(self.keys)})>\s*(.*?)\s*</\1>", re.IGNORECASE | re.DOTALL)


def find_text(reply: str, form: TextForm) -> str | None:
    """The text of a reply without all that stands around it; None where there is none, or several."""
    content = unfenced(without_reasoning(reply))
    body, is_marked = _body(content, form)
    if body is None:
        return None
    text = trimmed(body, form)
    if not text or _ONLY_HEADINGS.fullmatch(text) or _is_cut_json(text):
        return None
    if not is_marked and is_no_text(text):
        return None
    return None if _is_choice(text, form) else text


def trimmed(body: str, form: TextForm) -> str:
    """A body without its speaker, closings, next turn and further sections of the prompt, unwrapped."""
    body = body.strip()
    if speaker := _SPEAKER.match(body):
        body = body[speaker.end() :]
    turn = form.turns.search(body)
    body = body[: turn.start()] if turn and body[: turn.start()].strip() else body
    section = _PROMPT_HEADING.search(body)
    body = body[: section.start()] if section and body[: section.start()].strip() else body
    return unwrapped(without_closing(body.strip()))


def is_no_text(text: str) -> bool:
    """Whether a text is a refusal, a promise or a question back."""
    return bool(_REFUSAL.match(text) or _ASKS_BACK.match(text) or _PROMISE.fullmatch(text))


def _is_cut_json(text: str) -> bool:
    """Whether a text is the beginning of a JSON object."""
    return bool(re.match(r"\{\s*[\"'][\w ]+[\"']\s*:", text)) and not json_objects(text)


def _body(content: str, form: TextForm) -> tuple[str | None, bool]:
    """What holds the text, and whether something says so."""
    if content[:1] == "{" or re.match(r"[^\n{]{0,120}\n+(?:```\w*\s*)?\{\s*\"", content):
        matched = [value for item in json_objects(content) if (value := _value(item, form)) is not None]
        if matched:
            return (matched[0] if len(matched) == 1 else None), True
        if content[:1] == "{":
            objects = json_objects(content)
            is_itself = form.is_any_json and objects and not _ABOUT & set(objects[0])
            return (content if is_itself or not objects else None), True
    tagged = form.tag.findall(content)
    if tagged:
        return (tagged[-1][1] if len({text for _, text in tagged}) == 1 else None), True
    headed = _headed(split_lines(content), form)
    if headed is not None:
        return headed[0], True
    preface = None if is_no_text(content) else form.preface.match(content)
    if preface:
        return (None if _SEVERAL.search(preface[0]) else content[preface.end() :]), True
    return content, False


def _value(item: dict, form: TextForm) -> str | None:
    return next((item[key] for key in form.keys if isinstance(item.get(key), str)), None)


def is_heading(line: str, form: TextForm) -> bool:
    """Whether a line is a heading: it has a colon, or marks and nothing else."""
    match = form.heading.match(line)
    if not match:
        return False
    has_colon = ":" in match["close"] or "：" in match["close"]
    return has_colon or (bool(re.search(r"[#*＃]", match["open"])) and not match["rest"].strip())


def _headed(lines: list[str], form: TextForm) -> tuple[str | None] | None:
    """(the text behind the heading,), (None,) for several texts, None without a heading that has a text."""
    places = [index for index, line in enumerate(lines) if is_heading(line, form)]
    bodies = []
    for place, end in zip(places, [*places[1:], len(lines)]):
        body = "\n".join([form.heading.match(lines[place])["rest"], *lines[place + 1 : end]]).strip()
        bodies.append((place, trimmed(body, form)))
    filled = [(place, body) for place, body in bodies if body]
    if not filled:
        before = "\n".join(lines[: places[0]]).strip() if places else ""
        return (before or None,) if places else None
    last_place, last = filled[-1]
    is_final = re.search(r"\bfinal|最终|最終", lines[last_place], re.IGNORECASE)
    if is_final or len({body for _, body in filled}) == 1:
        return (last,)
    return (None,)


def _is_choice(text: str, form: TextForm) -> bool:
    """Whether a text is several ones to choose from."""
    if len(_VERSIONS.findall(text)) > 1:
        return True
    lines = [line for line in text.split("\n") if line.strip()]
    return form.is_single and len(lines) > 1 and all(re.match(r"\s*(?:\d+[.)]|[-*•])\s", line) for line in lines)
