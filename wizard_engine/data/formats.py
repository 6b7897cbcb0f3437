"""Turns one JSON object of a known data format into rows.

Every converter takes the object, without its null columns, and gives rows. Recognition is by the keys that are
present, see FORMATS at the end. What a format does not know goes through `row_fields`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .equations import ANNOTATION, step_label
from .preference_formats import (
    SIDES,
    alpaca_prompt,
    alpaca_turns,
    pair_content,
    read_alpaca_preference,
    read_pair,
    read_sharegpt_preference,
)
from .row_fields import SYSTEM_COLUMNS, FieldReader, expect, field, says_nothing, without_nulls
from .rows import Conversation, Message, Preference, Process, Row, brief, check_text
from .text_files import split_lines
from .turns import Turns, drop_leading, read_turns, refuse_weights, with_system

Reader = Callable[[dict, FieldReader], list[Row]]


class Format(NamedTuple):
    """A form of records: the kind of its rows, how it is recognised and read."""

    kind: str
    recognises: Callable[[dict], bool]
    read: Reader


def native_fields(record: dict, reader: FieldReader, *content: str) -> tuple[dict, dict]:
    """Attributes and lineage of a record in this project's format."""
    attributes = reader.columns_of(record, (*content, "lineage", *SYSTEM_COLUMNS))
    return attributes, expect(record.get("lineage", {}), dict, "lineage")


def keep_foreign_id(row: Row, record: dict) -> Row:
    """The row, with an id that is not its content hash kept as attributes["source_id"]."""
    if record.get("id", row.id) == row.id:
        return row
    return row.replace(attributes={"source_id": record["id"], **row.attributes})


def read_conversation(record: dict, reader: FieldReader) -> list[Row]:
    """{"messages": [{"role", "content"}]}, optionally with "weight" 0 or 1 in a message, and "system" """
    turns = with_system(read_turns(expect(record["messages"], list, "messages"), "messages", reader), record)
    fields = native_fields(record, reader, "messages")
    return [keep_foreign_id(Conversation(turns.messages, *fields, turns.answer_weights), record)]


def read_preference(record: dict, reader: FieldReader) -> list[Row]:
    """{"prompt": text or messages, "chosen": text, "rejected": text}, optionally with "system" """
    content = pair_content(record, read_turns(record["prompt"], "prompt", reader), reader)
    return [keep_foreign_id(Preference(*content, *native_fields(record, reader, "prompt", *SIDES)), record)]


def read_process(record: dict, reader: FieldReader) -> list[Row]:
    """{"prompt": text or messages, "steps": [text], "labels": [1 | 0 | -1]}, optionally with "system" """
    prompt = with_system(read_turns(record["prompt"], "prompt", reader), record)
    refuse_weights(prompt, reader)
    steps, labels = tuple(field(record, "steps", list)), tuple(field(record, "labels", list))
    fields = native_fields(record, reader, "prompt", "steps", "labels")
    return [keep_foreign_id(Process(prompt.messages, steps, labels, *fields), record)]


def read_sharegpt(record: dict, reader: FieldReader) -> list[Row]:
    """{"conversations": [{"from", "value"}]}, optionally with "system" """
    turns, dropped = drop_leading(read_turns(record["conversations"], "conversations", reader), reader)
    attributes = reader.rest(record, "conversations", *SYSTEM_COLUMNS)
    if dropped:
        attributes["dropped_leading_turns"] = dropped
    turns = with_system(turns, record)
    return [Conversation(turns.messages, attributes, weights=turns.answer_weights)]


def read_alpaca(record: dict, reader: FieldReader) -> list[Row]:
    """{"instruction", "output"}, optionally "input", "system" and "history" ([[question, answer], ...])"""
    messages = (*alpaca_turns(record).messages, Message("assistant", field(record, "output", str)))
    return [Conversation(messages, reader.rest(record, "instruction", "input", "output", "history", *SYSTEM_COLUMNS))]


def read_completion(record: dict, reader: FieldReader) -> list[Row]:
    """{"prompt", "completion"}, texts or messages, optionally with "system"; answers in the prompt are not trained"""
    prompt = with_system(read_turns(record["prompt"], "prompt", reader), record)
    prompt = Turns(prompt.messages, tuple(weight or 0 for weight in prompt.weights))
    completion = record["completion"]
    if isinstance(completion, str):
        answer = Turns((Message("assistant", completion),), (None,))
    else:
        answer = read_turns(completion, "completion", reader)
    turns = prompt.joined(answer)
    attributes = reader.rest(record, "prompt", "completion", *SYSTEM_COLUMNS)
    return [Conversation(turns.messages, attributes, weights=turns.answer_weights)]


def read_instances(record: dict, reader: FieldReader) -> list[Row]:
    """{"instruction", "instances": [{"input", "output"}]}, optionally with "system": one row per instance"""
    attributes = reader.rest(record, "instruction", "instances", *SYSTEM_COLUMNS)
    rows = []
    for index, instance in enumerate(expect(record["instances"], list, "instances")):
        where = f"instances[{index}]"
        for key, value in expect(instance, dict, where).items():
            if key not in ("input", "output") and not says_nothing(value):
                reader.refuse(f"{where}.{key}", value, "an instance has input and output")
        context = expect(instance.get("input") or "", str, where + ".input")
        question = Message("user", alpaca_prompt(field(record, "instruction", str), context))
        turns = with_system(Turns((question,), (None,)), record)
        answer = Message("assistant", field(instance, "output", str, where + "."))
        rows.append(Conversation((*turns.messages, answer), dict(attributes)))
    if not rows:
        raise ValueError("instances: expected at least one, got none")
    return rows


def question_turns(record: dict) -> Turns:
    """The question behind the record's system column."""
    return with_system(Turns((Message("user", field(record, "question", str)),), (None,)), record)


def read_question_answer(record: dict, reader: FieldReader) -> list[Row]:
    """{"question", "answer"} with <<a+b=c>> annotations, which leave the text and stay in attributes["annotated"]"""
    prompt, annotated = question_turns(record).messages, field(record, "answer", str)
    attributes = reader.rest(record, "question", "answer", *SYSTEM_COLUMNS)
    answer = ANNOTATION.sub("", annotated)
    if answer != annotated:
        attributes["annotated"] = annotated
    return [Conversation((*prompt, Message("assistant", answer)), attributes)]


def read_solutions(record: dict, reader: FieldReader) -> list[Row]:
    """{"question", "ground_truth", NAME: {"solution", "is_correct"}, ...}: one process row per named solution"""
    prompt = question_turns(record).messages
    names = [key for key, value in record.items() if isinstance(value, dict) and "solution" in value]
    others = reader.rest(record, "question", *names, *SYSTEM_COLUMNS)
    rows = []
    for name in names:
        solution = field(record[name], "solution", str, name + ".")
        check_text(solution, name + ".solution")
        lines = [line.strip() for line in split_lines(solution) if line.strip()]
        steps = tuple(ANNOTATION.sub("", line).strip() for line in lines)
        labels = tuple(step_label(line) for line in lines)
        attributes = {**others, "solver": name, "annotated": solution}
        attributes |= {key: value for key, value in record[name].items() if key != "solution"}
        rows.append(Process(prompt, steps, labels, attributes))
    return rows


def has_solutions(record: dict) -> bool:
    """Whether the record is a question, and some value an object with a solution in it."""
    if "question" not in record:
        return False
    return any([isinstance(value, dict) and "solution" in value for value in record.values()])


def has_pair(record: dict) -> bool:
    """Whether the record has one of two answers."""
    return "chosen" in record or "rejected" in record


def has_text_pair(record: dict) -> bool:
    """Whether the record is this project's own preference row: a prompt, and answers that are texts."""
    return (
        "prompt" in record and has_pair(record) and not any(isinstance(record.get(key), list | dict) for key in SIDES)
    )


def is_alpaca_pair(record: dict) -> bool:
    """Whether the record is an instruction with two answers."""
    return "instruction" in record and (has_pair(record) or isinstance(record.get("output"), list))


MESSAGES = Format("conversation", lambda record: "messages" in record, read_conversation)
# The first format that recognises the record reads it.
FORMATS = (
    Format("process", lambda record: "prompt" in record and ("steps" in record or "labels" in record), read_process),
    Format("preference", lambda record: "conversations" in record and has_pair(record), read_sharegpt_preference),
    Format("preference", has_text_pair, read_preference),
    Format("preference", is_alpaca_pair, read_alpaca_preference),
    Format("preference", has_pair, read_pair),
    MESSAGES,
    Format("conversation", lambda record: "conversations" in record, read_sharegpt),
    Format("conversation", lambda record: "instruction" in record and "instances" in record, read_instances),
    Format("conversation", lambda record: "instruction" in record, read_alpaca),
    Format("conversation", lambda record: "prompt" in record and "completion" in record, read_completion),
    Format("process", has_solutions, read_solutions),
    Format("conversation", lambda record: "question" in record, read_question_answer),
)


def convert(record: Any, reader: FieldReader, kind: str | None = None) -> tuple[str, list[Row]]:
    """The kind and the rows of one JSON object, not yet validated.

    Args:
        reader: takes the fields that the rows do not say.
        kind: of the rows that are wanted; a pair of answers with a column "messages" (UltraFeedback) is two kinds.
    Raises:
        ValueError: the object has the keys of no known format, or a field of another type or without a place.
    """
    record = without_nulls(expect(record, dict, "record"))
    form = next((form for form in FORMATS if form.recognises(record)), None)
    if form is None:
        raise ValueError(
            "record: expected messages, conversations, instruction + output, question + answer, prompt + completion, "
            "chosen + rejected, or prompt + steps + labels, got the fields "
            f"{', '.join(map(brief, record)) or 'none'}"
        )
    if kind == MESSAGES.kind and MESSAGES.recognises(record):
        form = MESSAGES
    reader.start()
    return form.kind, form.read(record, reader)
