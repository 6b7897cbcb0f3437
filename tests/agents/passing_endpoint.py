"""A scripted endpoint whose replies pass: whole, readable, different from each other, with tokens of its own count."""

import hashlib
import random
import re

from fake_endpoint import answer

from wizard_engine.agents import prompts


def task_of(text):
    """The task and the fields of a prompt; "answer" for a text that no template made."""
    for task in prompts.TASKS:
        try:
            return task, prompts.parse(task, text)
        except ValueError:
            continue
    return "answer", {}


def words(rng, least, most):
    count = rng.randint(least, most)
    return " ".join(rng.choice(("oak", "river", "stone", "cloud", "field", "lantern")) for _ in range(count))


def passing_text(body):
    """The reply to a request as an endpoint gets it."""
    text = body["messages"][-1]["content"]
    key = f"{body['model']}\0{body.get('seed')}\0" + "\0".join(m["content"] for m in body["messages"])
    rng = random.Random(hashlib.sha256(key.encode()).digest())
    task, fields = task_of(text)
    number = rng.randrange(10**9)
    if task == "evolve":
        return f"{fields['instruction']} Also for {number}, {words(rng, 8, 12)}."
    if task == "rewrite":
        return f"{fields['answer']} {words(rng, 3, 6)} {number}"
    if task == "judge":
        scores = (1 + hashlib.sha256(fields[f"answer_{which}"].encode()).digest()[0] % 10 for which in "ab")
        return f"{words(rng, 15, 20)} " + " ".join(f"[[{score}]]" for score in scores)
    if task == "label":
        return "\n".join("1" for line in fields["answer_steps"].splitlines() if line.strip())
    if task == "rank":
        count = len(re.findall(r"(?m)^\d+\. ", fields["instructions"]))
        return "\n".join(f"{place}: {1 + (number + place) % 9}" for place in range(1, count + 1))
    fixed = {
        "compare": "Not Equal",
        "diagnose": '{"failures": []}',
        "rate": f"{words(rng, 10, 14)} [[{1 + number % 10}]]",
    }
    return fixed.get(task) or f"{words(rng, 25, 35)} {number}"


def counted(body, text, finish="stop"):
    """The endpoint's answer with a usage that follows from the texts, in no simple way."""
    tokens_in = sum(7 + len(message["content"]) // 3 for message in body["messages"])
    return answer(text, finish=finish) | {
        "usage": {"prompt_tokens": tokens_in, "completion_tokens": 2 + 2 * len(text.split())}
    }


def passing(body, _):
    """Behaviour of a Fake endpoint."""
    return counted(body, passing_text(body))
