"""Turns one JSON object of a known data format into rows.

Every converter takes the object and gives rows; keys that it does not know are kept as attributes. Recognition is by
the keys that are present, see FORMATS at the end.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from .rows import Conversation, Message, Preference, Process, Row, brief, check_text

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": "user",
    "tool": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
}
ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
ARITHMETIC: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def expect(value: Any, kind: type, name: str) -> Any:
    """`value`, or ValueError when it is not of `kind` (bool is no int here)."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {list: "a list", dict: "an object", str: "text"}.get(kind, kind.__name__)
        raise ValueError(f"{name}: expected {words}, got {type(value).__name__} {brief(value)}")
    return value


def field(record: dict, key: str, kind: type, name: str = "") -> Any:
    """record[key] of the type `kind`; ValueError names a key that is missing or of another type."""
    if key not in record:
        raise ValueError(f"{name}{key}: expected {kind.__name__}, got no such field")
    return expect(record[key], kind, name + key)


def rest(record: dict, *known: str) -> dict[str, Any]:
    """Attributes of a record in another format: `attributes`, then every key outside `known`; "id" as "source_id"."""
    attributes = dict(record["attributes"]) if isinstance(record.get("attributes"), dict) else {}
    for key, value in record.items():
        if key not in (*known, "attributes"):
            attributes.setdefault("source_id" if key == "id" else key, value)
    return attributes


def role_messages(value: Any, name: str) -> tuple[Message, ...]:
    """Messages of a list of {"role", "content"} objects; a plain text is one user turn."""
    if isinstance(value, str):
        return (Message("user", value),)
    turns = [expect(turn, dict, f"{name}[{index}]") for index, turn in enumerate(expect(value, list, name))]
    return tuple(
        Message(field(turn, "role", str, f"{name}[{index}]."), field(turn, "content", str, f"{name}[{index}]."))
        for index, turn in enumerate(turns)
    )


def sharegpt_messages(value: Any, name: str) -> tuple[tuple[Message, ...], int]:
    """Messages of a list of {"from", "value"} objects, and how many leading turns were dropped.

    A system turn at the start stays; turns of others before the first human turn are dropped.
    """
    messages = []
    for index, turn in enumerate(expect(value, list, name)):
        where = f"{name}[{index}]"
        speaker = field(expect(turn, dict, where), "from", str, where + ".")
        if speaker not in SHAREGPT_ROLES:
            raise ValueError(f"{where}.from: expected one of {', '.join(SHAREGPT_ROLES)}, got {brief(speaker)}")
        messages.append(Message(SHAREGPT_ROLES[speaker], field(turn, "value", str, where + ".")))
    system = messages[:1] if messages and messages[0].role == "system" else []
    body = messages[len(system) :]
    dropped = next((index for index, message in enumerate(body) if message.role == "user"), len(body))
    return tuple(system + body[dropped:]), dropped


def native_fields(record: dict, content: tuple[str, ...]) -> tuple[dict, dict]:
    """Attributes and lineage of a record in this project's format."""
    attributes = dict(expect(record.get("attributes", {}), dict, "attributes"))
    lineage = expect(record.get("lineage", {}), dict, "lineage")
    for key, value in record.items():
        if key not in (*content, "id", "attributes", "lineage"):
            attributes.setdefault(key, value)
    return attributes, lineage


def keep_foreign_id(row: Row, record: dict) -> Row:
    """The row, with an id that is not its content hash kept as attributes["source_id"]."""
    if record.get("id", row.id) == row.id:
        return row
    return row.replace(attributes={"source_id": record["id"], **row.attributes})


def read_conversation(record: dict) -> list[Row]:
    """{"messages": [{"role", "content"}]}"""
    messages = role_messages(expect(record["messages"], list, "messages"), "messages")
    return [keep_foreign_id(Conversation(messages, *native_fields(record, ("messages",))), record)]


def read_preference(record: dict) -> list[Row]:
    """{"prompt": text or messages, "chosen": text, "rejected": text}"""
    prompt = role_messages(record["prompt"], "prompt")
    answers = field(record, "chosen", str), field(record, "rejected", str)
    row = Preference(prompt, *answers, *native_fields(record, ("prompt", "chosen", "rejected")))
    return [keep_foreign_id(row, record)]


def read_process(record: dict) -> list[Row]:
    """{"prompt": text or messages, "steps": [text], "labels": [1 | 0 | -1]}"""
    prompt = role_messages(record["prompt"], "prompt")
    steps, labels = tuple(field(record, "steps", list)), tuple(field(record, "labels", list))
    return [
        keep_foreign_id(Process(prompt, steps, labels, *native_fields(record, ("prompt", "steps", "labels"))), record)
    ]


def read_sharegpt(record: dict) -> list[Row]:
    """{"conversations": [{"from", "value"}]}, optionally with "system" """
    messages, dropped = sharegpt_messages(record["conversations"], "conversations")
    if isinstance(record.get("system"), str) and record["system"] and messages[:1] and messages[0].role != "system":
        messages = (Message("system", record["system"]), *messages)
    attributes = rest(record, "conversations", "system", "lineage")
    if dropped:
        attributes["dropped_leading_turns"] = dropped
    return [Conversation(messages, attributes)]


def read_sharegpt_preference(record: dict) -> list[Row]:
    """{"conversations": [{"from", "value"}], "chosen": {"from", "value"} or text, "rejected": likewise}"""
    prompt, dropped = sharegpt_messages(record["conversations"], "conversations")
    answers = []
    for key in ("chosen", "rejected"):
        value = record.get(key)
        answers.append(field(value, "value", str, key + ".") if isinstance(value, dict) else field(record, key, str))
    attributes = rest(record, "conversations", "chosen", "rejected")
    if dropped:
        attributes["dropped_leading_turns"] = dropped
    return [Preference(prompt, *answers, attributes)]


def alpaca_prompt(instruction: str, context: str) -> str:
    """Instruction and input as one user turn."""
    return f"{instruction}\n{context}".strip() if context.strip() else instruction


def read_alpaca(record: dict) -> list[Row]:
    """{"instruction", "output"}, optionally "input", "system" and "history" ([[question, answer], ...])"""
    turns = []
    if record.get("system"):
        turns.append(Message("system", field(record, "system", str)))
    for index, pair in enumerate(expect(record.get("history") or [], list, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}]: expected [question, answer], got {brief(pair)}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    context = expect(record.get("input") or "", str, "input")
    turns.append(Message("user", alpaca_prompt(field(record, "instruction", str), context)))
    turns.append(Message("assistant", field(record, "output", str)))
    return [Conversation(tuple(turns), rest(record, "instruction", "input", "output", "system", "history"))]


def read_instances(record: dict) -> list[Row]:
    """{"instruction", "instances": [{"input", "output"}]}: one row per instance"""
    rows = []
    for index, instance in enumerate(expect(record["instances"], list, "instances")):
        where = f"instances[{index}]"
        context = expect(expect(instance, dict, where).get("input") or "", str, where + ".input")
        question = Message("user", alpaca_prompt(field(record, "instruction", str), context))
        answer = Message("assistant", field(instance, "output", str, where + "."))
        rows.append(Conversation((question, answer), rest(record, "instruction", "instances")))
    if not rows:
        raise ValueError("instances: expected at least one, got none")
    return rows


def read_question_answer(record: dict) -> list[Row]:
    """{"question", "answer"} with <<a+b=c>> annotations, which leave the text and stay in attributes["annotated"]"""
    question, annotated = field(record, "question", str), field(record, "answer", str)
    attributes = rest(record, "question", "answer")
    answer = ANNOTATION.sub("", annotated)
    if answer != annotated:
        attributes["annotated"] = annotated
    return [Conversation((Message("user", question), Message("assistant", answer)), attributes)]


def read_solutions(record: dict) -> list[Row]:
    """{"question", "ground_truth", NAME: {"solution", "is_correct"}, ...}: one process row per named solution"""
    prompt = (Message("user", field(record, "question", str)),)
    names = [key for key, value in record.items() if isinstance(value, dict) and "solution" in value]
    rows = []
    for name in names:
        solution = field(record[name], "solution", str, name + ".")
        check_text(solution, name + ".solution")
        lines = [line.strip() for line in solution.splitlines() if line.strip()]
        steps = tuple(ANNOTATION.sub("", line).strip() for line in lines)
        labels = tuple(step_label(line) for line in lines)
        attributes = {**rest(record, "question", *names), "solver": name, "annotated": solution}
        attributes |= {key: value for key, value in record[name].items() if key != "solution"}
        rows.append(Process(prompt, steps, labels, attributes))
    return rows


def step_label(line: str) -> int:
    """1 when every <<a+b=c>> equation of a line holds, -1 when one does not, 0 when it has none that can be read.

    The right side may be rounded or cut to the decimals it shows (10/3=3.33), an integer must be exact.
    """
    verdicts = [verdict for text in ANNOTATION.findall(line) if (verdict := equation_holds(text)) is not None]
    return 0 if not verdicts else (1 if all(verdicts) else -1)


def equation_holds(text: str) -> bool | None:
    """Whether an equation such as "3*4=12" is true; None when it is no equation of numbers."""
    left, *others = text.split("=")
    if not others:
        return None
    values = [arithmetic(side) for side in (left, *others)]
    if any(value is None for value in values):
        return None
    decimals = len(others[-1].strip().rpartition(".")[2]) if "." in others[-1] else 0
    stated = values[-1]
    slack = (10.0**-decimals if decimals else 0.0) + 1e-9 * max(1.0, abs(stated))
    return all(abs(value - stated) <= slack for value in values)


def arithmetic(text: str) -> float | None:
    """Value of an expression of numbers, + - * / and brackets ("$", "," and "%" as people write them), else None."""
    plain = re.sub(r"[$,_\s]", "", text)
    plain = re.sub(r"(\d+\.?\d*|\.\d+)%", r"(\1/100)", plain)
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)
    if not re.fullmatch(r"[\d.+\-*/()]{1,200}", plain) or "**" in plain or "//" in plain:
        return None
    try:
        return evaluate(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def evaluate(node: ast.expr) -> float | None:
    """Value of a parsed arithmetic expression, None when it holds anything else."""
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = evaluate(node.operand)
        return value if value is None or isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = evaluate(node.left), evaluate(node.right)
        return None if left is None or right is None else ARITHMETIC[type(node.op)](left, right)
    return None


def has_solutions(record: dict) -> bool:
    """Whether some value of the record is an object with a solution in it."""
    return "question" in record and any(isinstance(value, dict) and "solution" in value for value in record.values())


# The first format whose keys are all present reads the record.
FORMATS: tuple[tuple[str, Callable[[dict], bool], Callable[[dict], list[Row]]], ...] = (
    ("process", lambda record: "prompt" in record and ("steps" in record or "labels" in record), read_process),
    (
        "preference",
        lambda record: "conversations" in record and ("chosen" in record or "rejected" in record),
        read_sharegpt_preference,
    ),
    (
        "preference",
        lambda record: "prompt" in record and ("chosen" in record or "rejected" in record),
        read_preference,
    ),
    ("conversation", lambda record: "messages" in record, read_conversation),
    ("conversation", lambda record: "conversations" in record, read_sharegpt),
    ("conversation", lambda record: "instruction" in record and "instances" in record, read_instances),
    ("conversation", lambda record: "instruction" in record, read_alpaca),
    ("process", has_solutions, read_solutions),
    ("conversation", lambda record: "question" in record, read_question_answer),
)


def convert(record: Any) -> tuple[str, list[Row]]:
    """The kind and the rows of one JSON object, not yet validated.

    Raises:
        ValueError: the object has the keys of no known format, or a field of another type.
    """
    for kind, recognises, read in FORMATS:
        if recognises(expect(record, dict, "record")):
            return kind, read(record)
    raise ValueError(
        "record: expected messages, prompt + chosen + rejected, prompt + steps + labels, instruction + output, "
        f"conversations, or question + answer, got the fields {', '.join(map(brief, record)) or 'none'}"
    )
