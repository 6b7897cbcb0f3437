"""Readers of improved answers, suggestions, users' messages and plain replies; their form is that of `text_replies`."""

import re

from wizard_engine.runtime.text_lines import one_line

from .cleaning import without_reasoning
from .text_replies import TextForm, find_text, is_no_text
from .wrapping import unfenced

_ANSWER_NOUN = r"(?:answers?|versions?|responses?|reply|solutions?|rewrite|explanation|text)"
_CHANGED = (
    r"(?:improved|rewritten|revised|better|enhanced|updated|new|refined|polished|expanded|corrected|unchanged|reworked"
    r"|more \w+(?: and \w+)?|clearer|shorter)"
)
_ABOUT_ANSWER = rf"(?:{_CHANGED}\b[^\n.:]{{0,40}}\b{_ANSWER_NOUN}|{_ANSWER_NOUN}\b[^\n.:]{{0,60}}\b{_CHANGED})"
_OPENING = re.compile(
    r"(?:(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|got it|understood|great)\b[ \t]*[,.!:]*\s*)?"
    rf"(?:(?:here|below)(?:['’]s| is| are)\b[^\n.:]{{0,60}}\b{_ABOUT_ANSWER}\b[^\n]*?(?:[:.](?=\s|$)\s*|\n|$)"
    rf"|(?:here|below)(?:['’]s| is)\b[^\n.:]{{0,40}}\b{_ANSWER_NOUN}\b[^\n.:]{{0,40}}:[ \t]*\n\s*"
    rf"|(?:this is|i have|i['’]ve)\b[^\n.:]{{0,60}}\b(?:{_ABOUT_ANSWER}"
    rf"|(?:improved|rewritten|revised|updated)\b)\b[^\n]*?(?:[:.](?=\s|$)\s*|\n|$)"
    r"|(?:aquí (?:está|tienes)|hier ist|voici|ecco|aqui está|вот)\b[^\n:]{0,60}(?:respuesta|antwort|réponse"
    r"|risposta|resposta"
    r"|versi[oó]n|fassung|versione|versão|ответ|вариант)[^\n:]{0,40}(?::\s*|\n)"
    r"|以下是[^\n:：]{0,30}(?:回答|答案|版本)[^\n:：]{0,10}[:：]\s*"
    r"|(?:以下|こちら)が[^\n:：。]{0,30}(?:回答|答え)[^\n:：。]{0,10}[:：。]\s*)",
    re.IGNORECASE,
)
_LONE_OPENER = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely|got it|understood)\b[^\n]{0,12}\n\s*(?=\S)", re.IGNORECASE
)
_NOTHING_TO_DO = re.compile(
    r"(?:no (?:further |other )?(?:changes?|improvements?|revisions?)\b[^\n.]{0,40}\b(?:needed|necessary|required"
    r"|possible)"
    r"|\balready (?:correct|good|perfect|optimal|complete|clear)|\b(?:cannot|can['’]t) be improved|nothing (?:can"
    r"|to|needs)\b[^\n.]{0,20}\bimprove)",
    re.IGNORECASE,
)
_ANSWER = TextForm(
    rf"(?:the )?(?:final )?(?:improved|rewritten|revised|new|better|enhanced|updated) {_ANSWER_NOUN}"
    r"|(?:改进|改善|修改|优化)(?:后|了)?的?(?:回答|答案)|改善(?:された|した|後の)?(?:回答|答え)|개선된 답변"
    r"|улучшенный ответ"
    r"|(?:respuesta|resposta) (?:mejorada|melhorada)|verbesserte antwort|réponse améliorée|risposta migliorata",
    rf"\b(?:{_CHANGED}\b[^\n]{{0,40}}\b{_ANSWER_NOUN}|{_ANSWER_NOUN}\b[^\n]{{0,40}}\b{_CHANGED}|rewrite)\b|unchanged"
    r"|respuesta mejorada|verbesserte|améliorée|migliorata|melhorada|改进|改善|улучшенн|개선",
    ("improved_answer", "rewritten_answer", "new_answer", "revised_answer", "answer", "response", "output"),
    is_any_json=True,
)


def read_rewritten(text: str, before: str = "") -> str | None:
    """The rewritten answer without remarks about it; None for a reply that holds none.

    The reply has the form of `text_replies`, with the name "Improved Answer" or the like. Before the answer may stand
    an opener alone on its line ("Sure!") and a remark ("Here is the improved answer:", "I have revised it ...").
    "No changes are needed." alone is no answer.

    Args:
        before: the answer that was to be rewritten; repeated as it is, it is an answer, whatever it says.
    """
    answer = without_remarks(text)
    if one_line(answer) != one_line(before) and (
        is_no_text(answer) or (len(answer) < 200 and _NOTHING_TO_DO.search(answer))
    ):
        return None
    return answer or None


def without_remarks(text: str) -> str:
    """The answer of a reply, see `read_rewritten`; "" where it has nothing but remarks."""
    content = unfenced(without_reasoning(text))
    if opening := _OPENING.match(content):
        content = content[opening.end() :]
    elif opener := _LONE_OPENER.match(content):
        content = content[opener.end() :]
    if is_no_text(content.strip()):
        return content.strip()
    return find_text(content, _ANSWER) or ""


_SUGGESTION = TextForm(
    r"(?:one |my |the )?suggestions?|advice|sugerencia|vorschlag|建议|提案|제안|совет|предложение|suggerimento|sugestão"
    r"|conseil",
    r"\b(?:suggest(?:ions?|ed)?|advice|following|sugerencia|vorschlag|suggestion|suggerimento|sugestão|conseil)\b"
    r"|建议|提案|제안|совет|предложени",
    ("suggestion", "advice", "feedback"),
)
_NO_SUGGESTION = re.compile(
    r"(?:none|n/?a|no suggestions?(?: (?:needed|necessary))?)\W*|[^\n]*\b(?:same|equal) quality\b[^\n]*"
    r"|[^\n]*\b(?:nothing (?:to change|needs)|no changes? (?:is|are)? ?(?:needed|necessary))\b[^\n]*",
    re.IGNORECASE,
)


def read_suggestion(text: str) -> str | None:
    """The suggestion; None where there is none.

    The reply has the form of `text_replies`, with the name "Suggestion" or the like; two headings in a row are one.
    """
    matched = find_text(text, _SUGGESTION)
    if matched and is_heading_again(matched):
        matched = find_text(matched, _SUGGESTION)
    return None if matched is None or _NO_SUGGESTION.fullmatch(matched) else matched


def is_heading_again(text: str) -> bool:
    """Whether a suggestion begins with its name."""
    return bool(_SUGGESTION.heading.match(text.split("\n")[0]) and re.match(r"[^\n]{0,30}[:：]", text))


_USER_TURN = re.compile(
    r"^[ \t]*(?:#{1,4}[ \t]*)?[*_\[]*(?:user|assistant|human|bot|ai|utilisateur|usuario|usuário|nutzer|benutzer"
    r"|assistent|asistente"
    r"|пользователь|ассистент|用户|助手|ユーザー|アシスタント|사용자"
    r"|어시스턴트)[*_\]]*(?:[ \t]?[:：]|[ \t]*$)|<\|im_start\|>",
    re.IGNORECASE | re.MULTILINE,
)
_USER_NAME = re.compile(
    r"\s*(?:#{1,4}[ \t]*)?[*_\[]*(?:user|human|utilisateur|usuario|usuário|nutzer|benutzer|пользователь|用户|ユーザー"
    r"|사용자)[*_\]]*"
    r"(?:[ \t]?[:：][*_]*|[ \t]*(?=\n))\s*|<\|im_start\|>user\s",
    re.IGNORECASE,
)
_MESSAGE = TextForm(
    r"(?:the )?(?:user['’]s )?next (?:user )?(?:message|turn)|下一条(?:用户)?消息|次のメッセージ|다음 메시지"
    r"|следующее сообщение"
    r"|nächste nachricht|prochain message|(?:siguiente|próximo) mensaje|próxima mensagem|prossimo messaggio",
    r"\b(?:message|follow-up|question|nachricht|mensaje|mensagem|messaggio|turn)\b|消息|メッセージ|메시지|сообщение",
    ("message", "next_message", "user_message", "content", "user", "question"),
    _USER_TURN,
    is_single=True,
)


def read_user(text: str) -> str | None:
    """The next message of a user; None where there is none.

    The reply has the form of `text_replies`, with the name "Next Message"; the user's name may stand before it. What
    the assistant says next is left out; a reply that is the assistant's turn alone has no message.
    """
    text = re.sub(r"^\s*<\|im_start\|>user\s", "", text)
    content = without_reasoning(text)
    if re.match(r"\s*(?:#+\s*)?[*_\[]*(?:assistant|助手|アシスタント)[*_\]]*\s*(?:[:：]|\n)", content, re.IGNORECASE):
        return None
    if name := _USER_NAME.match(content):
        content = content[name.end() :]
    matched = find_text(content, _MESSAGE)
    return (
        None if matched is None or re.match(r"(?:as an ai|i don['’]t have a next)", matched, re.IGNORECASE) else matched
    )


def read_plain(text: str) -> str | None:
    """The reply without reasoning and special tokens; None where nothing remains."""
    return without_reasoning(text) or None
