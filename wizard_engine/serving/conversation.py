"""Messages of a chat request as the turns that the chat format has, and their ids."""

from collections.abc import Sequence
from typing import Any

from wizard_engine.data.chat import encode_begun, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import Tokenizer

from .protocol import RequestError, wrong

BETWEEN = "\n\n"


def turns(messages: Sequence[dict[str, Any]], *, joins: bool = True) -> list[Message]:
    """The messages as turns that alternate: several of one role in a row are one, and so are all system messages.

    Vicuna has one system text, at the beginning.

    Args:
        joins: False leaves every message as it is: a chat template says itself what it takes.
    Raises:
        RequestError: a message without a content, other than the assistant's.
    """
    system, others = [], []
    for index, message in enumerate(messages):
        text, role = _text(message, f"messages[{index}]"), message["role"]
        if not joins:
            others.append(("system" if role == "developer" else role, [text]))
        elif role in ("system", "developer"):
            system.append(text)
        elif others and others[-1][0] == role:
            others[-1][1].append(text)
        else:
            others.append((role, [text]))
    joined = [Message(role, BETWEEN.join(filter(None, texts))) for role, texts in others]
    return [Message("system", BETWEEN.join(system)), *joined] if system else joined


def encode_request(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], bool]:
    """Ids of the prompt, and whether the answer goes on in the middle of a text: that of an assistant turn at the end.

    Raises:
        ValueError: turns that the chat format cannot say.
    """
    if len(messages) > 1 and messages[-1].role == "assistant":
        is_begun = bool(messages[-1].content)
        return encode_begun(tokenizer, messages) if is_begun else encode_prompt(tokenizer, messages[:-1]), is_begun
    return encode_prompt(tokenizer, messages), False


def _text(message: dict[str, Any], path: str) -> str:
    """The text of a message; "" for an assistant without one."""
    content = message.get("content")
    if content is None and message["role"] != "assistant":
        if "content" in message:
            raise wrong(f"{path}.content", "string or array", None)
        missing = f"{path}.content"
        raise RequestError(400, f"{missing}: expected one, got none", param=missing, code="missing_field")
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
