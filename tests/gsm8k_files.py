"""A folder in the layout that the real run on GSM8K reads, with rows of this project's own in its formats."""

import json
from itertools import product

FILES = (
    "gsm8k/train.jsonl",
    "gsm8k/test.jsonl",
    "mt_bench/question.jsonl",
    "mt_bench/reference_answer_gpt-4.jsonl",
    "preferences/dpo_en.json",
)
PROBLEM = "{who} has {a} jars with 4 {what} each and sells 5 {what}. How many {what} are left for {who}?"
WORKED = "There are {a}*4 = <<{a}*4={b}>>{b} {what}.\n{b}-5 = <<{b}-5={c}>>{c} are left.\n#### {c}"
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus")
THINGS = {"train": ("coins", "nuts", "beads", "shells", "pins", "seeds"), "test": ("stones", "plums")}


def write_files(folder):
    """Files in the layout of the real ones, with rows in their formats."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, things in THINGS.items():
        lines = []
        for a, (who, what) in enumerate(product(NAMES, things), start=6):
            words = {"who": who, "what": what, "a": a, "b": 4 * a, "c": 4 * a - 5}
            lines.append(json.dumps({"question": PROBLEM.format(**words), "answer": WORKED.format(**words)}) + "\n")
        (folder / f"gsm8k/{name}.jsonl").write_text("".join(lines))
    questions = [{"question_id": n, "category": "math", "turns": [f"{n} + 1?", "And 2 more?"]} for n in (81, 82)]
    (folder / FILES[2]).write_text("".join(json.dumps(line) + "\n" for line in questions))
    right = {"question_id": 81, "choices": [{"index": 0, "turns": ["81 + 1 = 82", "82 + 2 = 84"]}]}
    (folder / FILES[3]).write_text(json.dumps(right) + "\n")
    pairs = [
        {
            "conversations": [{"from": "human", "value": f"Say {n}."}],
            "chosen": {"from": "gpt", "value": f"{n}."},
            "rejected": {"from": "gpt", "value": "No."},
        }
        for n in range(20)
    ]
    (folder / FILES[4]).write_text(json.dumps(pairs))
    return folder
