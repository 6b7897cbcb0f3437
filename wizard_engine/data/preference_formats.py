"""Preference rows as people publish them: texts, lists of messages, ShareGPT, Alpaca pairs, Human/Assistant text.

An answer (`chosen`, `rejected`) is a text, one message, or a list of messages that ends with it. A list holds the whole
conversation, or continues the prompt if it begins with an assistant turn.
"""

import re

from .row_fields import SYSTEM_COLUMNS, FieldReader, expect, field
from .rows import Message, Preference, Row, brief
from .turns import Turns, drop_leading, read_turn, read_turns, refuse_weights, with_system

SIDES = ("chosen", "rejected")
_NO_TURNS = Turns((), ())
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def alpaca_prompt(instruction: str, context: str) -> str:
    """Instruction and input as one user turn."""
    return f"{instruction}\n{context}".strip() if context.strip() else instruction


def alpaca_turns(record: dict) -> Turns:
    """History, instruction and input of an Alpaca record behind its system column."""
    messages: list[Message] = []
    for index, pair in enumerate(expect(record.get("history", []), list, "history")):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history[{index}]: expected [question, answer], got {brief(pair)}")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    context = expect(record.get("input", ""), str, "input")
    messages.append(Message("user", alpaca_prompt(field(record, "instruction", str), context)))
    return with_system(Turns(tuple(messages), (None,) * len(messages)), record)


def read_pair(record: dict, reader: FieldReader) -> list[Row]:
    """{"chosen", "rejected"}, maybe "prompt" (text or messages) or "question", and "system" """
    if "question" in record and "prompt" not in record:
        prompt = Turns((Message("user", field(record, "question", str)),), (None,))
        return [_row(record, prompt, ("question",), reader)]
    prompt = read_turns(record["prompt"], "prompt", reader) if "prompt" in record else _NO_TURNS
    return [_row(record, prompt, ("prompt",), reader)]


def read_sharegpt_preference(record: dict, reader: FieldReader) -> list[Row]:
    """{"conversations": [{"from", "value"}], "chosen": {"from", "value"} or text, "rejected": likewise}"""
    prompt, dropped = drop_leading(read_turns(record["conversations"], "conversations", reader), reader)
    row = _row(record, prompt, ("conversations",), reader)
    return [row.replace(attributes=row.attributes | {"dropped_leading_turns": dropped}) if dropped else row]


def read_alpaca_preference(record: dict, reader: FieldReader) -> list[Row]:
    """{"instruction", "chosen", "rejected"} or {"instruction", "output": [chosen, rejected]}, with Alpaca's columns"""
    known: tuple[str, ...] = ("instruction", "input", "history")
    if isinstance(record.get("output"), list):
        if len(record["output"]) != 2:
            raise ValueError(f"output: expected a text, or [chosen, rejected], got {brief(record['output'])}")
        chosen, rejected = record["output"]
        record = {key: value for key, value in record.items() if key != "output"}
        record |= {"chosen": chosen, "rejected": rejected}
    return [_row(record, alpaca_turns(record), known, reader)]


def _row(record: dict, prompt: Turns, known: tuple[str, ...], reader: FieldReader) -> Preference:
    """The row of a prompt and the record's two answers, other columns as attributes."""
    content = pair_content(record, prompt, reader)
    attributes = reader.rest(record, *known, *SIDES, *SYSTEM_COLUMNS)
    if "messages" in attributes and attributes["messages"] in (record["chosen"], record["rejected"]):
        del attributes["messages"]
    return Preference(*content, attributes)


def pair_content(record: dict, prompt: Turns, reader: FieldReader) -> tuple[tuple[Message, ...], str, str]:
    """The turns before the answers, behind the record's system column, and the two answers.

    Raises:
        ValueError: an answer is none, or the two do not answer the same turns.
    """
    has_prompt = bool(prompt.messages) or "prompt" in record
    sides = [_side(record, key, has_prompt, reader) for key in SIDES]
    prompts = [with_system(_joined(prompt, inside, key), record) for key, (inside, _) in zip(SIDES, sides)]
    if prompts[0].messages != prompts[1].messages:
        raise ValueError("rejected: expected the turns of chosen up to the last answer, got other turns before it")
    refuse_weights(prompts[0], reader)
    return prompts[0].messages, sides[0][1], sides[1][1]


def _side(record: dict, key: str, has_prompt: bool, reader: FieldReader) -> tuple[Turns, str]:
    """The turns that an answer brings along, and the answer."""
    if key not in record:
        raise ValueError(f"{key}: expected text, a message or a list of messages, got no such field, or null")
    value = record[key]
    if isinstance(value, str):
        return (_NO_TURNS, value) if has_prompt else _spoken(value, key)
    if isinstance(value, dict):
        message, weight = read_turn(value, key, reader)
        turns = Turns((message,), (weight,))
    else:
        turns = read_turns(value, key, reader)
    if not turns.messages or turns.messages[-1].role != "assistant":
        got = turns.messages[-1].role if turns.messages else "no turns"
        raise ValueError(f"{key}: expected the last turn to be 'assistant', got {got!r}")
    if turns.weights[-1] == 0:
        reader.refuse(f"{key}[{len(turns.messages) - 1}].weight", 0, "the answers of a preference row are trained")
    return Turns(turns.messages[:-1], turns.weights[:-1]), turns.messages[-1].content


def _spoken(text: str, key: str) -> tuple[Turns, str]:
    """Turns and answer of a text that goes "Human: ... Assistant: ..." (Anthropic HH)."""
    pieces = _SPEAKER.split(text.strip())
    if len(pieces) < 5 or pieces[0].strip() or pieces[1] != "Human" or pieces[-2] != "Assistant":
        raise ValueError(
            f"{key}: expected a column prompt beside it, a list of messages, or text that begins with 'Human:' and "
            f"ends with an answer behind 'Assistant:', got {brief(text)}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [Message(roles[speaker], content.strip()) for speaker, content in zip(pieces[1::2], pieces[2::2])]
    return Turns(tuple(messages[:-1]), (None,) * (len(messages) - 1)), messages[-1].content


def _joined(prompt: Turns, inside: Turns, key: str) -> Turns:
    """The turns before an answer: the prompt, the turns that the answer's list holds, or one behind the other."""
    if not inside.messages or not prompt.messages:
        return inside if inside.messages else prompt
    if inside.messages[0].role == "assistant":
        return prompt.joined(inside)
    system, said = _apart(inside.messages)
    own_system, asked = _apart(prompt.messages)
    is_one = len(asked) == 1 and asked[0] in said
    if (said != asked and not is_one) or (system and own_system and system != own_system):
        raise ValueError(
            f"{key}: expected a list of messages that begins with the prompt, got {brief(said[0].content)}"
        )
    return inside if system or not own_system else Turns((*own_system, *said), (None, *inside.weights))


def _apart(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system message, if there is one, and the turns behind it."""
    start = 1 if messages[0].role == "system" else 0
    return messages[:start], messages[start:]
