"""Chat with an exported tiny model: interactive, once, over a file; and what is refused."""

import gzip
import io
import json
from dataclasses import replace

import pytest
import torch
from forked import ROOT, run_python

from recipes import chat, export_hf
from wizard_engine import world
from wizard_engine.data.chat import CHAT_ATOMS, encode_prompt
from wizard_engine.data.records import Message, read_rows
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation import generate
from wizard_engine.model import PRESETS, ScoringModel, Transformer, load_model, save_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An exported tiny mixture whose answers go on to their limit."""
    folder = tmp_path_factory.mktemp("models")
    rows = world.natural_corpus(50, 0)
    tokenizer = train_tokenizer([m.content for r in rows for m in r.messages], vocab_size=512, atoms=CHAT_ATOMS)
    model = Transformer(replace(PRESETS["tiny-mixtral"], vocab_size=tokenizer.vocab_size, init_std=0.2), seed=1)
    with torch.no_grad():
        model.head.weight[tokenizer.eos_id] = 0.0
    save_model(model, tokenizer, folder / "model")
    return export_hf.main(export_hf.Config(folder / "model", folder / "exported", quiet=True))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def talk(directory, text="", terminal=False, **options):
    """stdout and stderr of a chat with these lines typed."""
    kind = Terminal if terminal else io.StringIO
    streams = kind(text), kind(), io.StringIO()
    cfg = chat.Config(directory, **{"max_new_tokens": 7, "device": "cpu", **options})
    chat.main(cfg, stdin=streams[0], stdout=streams[1], stderr=streams[2])
    return streams[1].getvalue(), streams[2].getvalue()


def answer(directory, *messages, seed=0, **options):
    """What the model answers, by `generate` on the conversation's ids."""
    model, tokenizer = load_model(directory)
    roles = ("user", "assistant") if messages[0] is not None else ()
    turns = [Message(roles[i % 2], text) for i, text in enumerate(messages)]
    if options.get("system"):
        turns = [Message("system", options.pop("system")), *turns]
    options = {"max_new_tokens": 7, **{k: v for k, v in options.items() if k != "system"}}
    out = generate(model, [encode_prompt(tokenizer, turns)], eos_ids=tokenizer.eos_ids, seed=seed, **options)
    return tokenizer.decode(out.tokens[0]).strip()


# Catches: a conversation that forgets its turns; a prompt that is not the whole conversation's.
def test_multiple_turns_are_one_conversation(directory):
    first = answer(directory, "hello")
    second = answer(directory, "hello", first, "and now")
    assert talk(directory, "hello\nand now\n") == (f"{first}\n{second}\n", "")


def test_options_of_sampling_are_those_of_generate(directory):
    options = {"temperature": 0.9, "top_p": 0.9, "top_k": 20}
    out, _ = talk(directory, "hello\n", seed=5, **options)
    assert out == answer(directory, "hello", seed=5, **options) + "\n"


def test_commands(directory, tmp_path):
    first, fresh = answer(directory, "hello"), answer(directory, "again")
    other = answer(directory, "hello", system="Be brief.")
    file = tmp_path / "rows.jsonl"
    lines = ["hello", f"/save {file}", "/new", "again", "/system Be brief.", "hello", f"/save {file}", "/quit", "never"]
    out, notes = talk(directory, "\n".join(lines) + "\n")
    assert out == f"{first}\n{fresh}\n{other}\n" and notes == f"[saved: {file}]\n" * 2
    rows = read_rows(file, kind="conversation")
    assert [m.content for m in rows[0].messages] == ["hello", first]
    assert [m.role for m in rows[1].messages] == ["system", "user", "assistant"]
    out, notes = talk(directory, "/retry\n/what\n/save\n/save x\n/help\n//slash\nlong\\\nline\n")
    assert (
        out
        == f"{answer(directory, '/slash')}\n"
        + answer(directory, "/slash", answer(directory, "/slash"), "long\nline")
        + "\n"
    )
    assert "expected a message before it" in notes and "/what: expected one of /new" in notes
    assert notes.count("/save: expected a file name after a conversation") == 2 and "Ctrl-C stops an answer" in notes


def test_retry_takes_the_last_message_back_with_another_seed(directory):
    options = {"temperature": 1.0}
    out, _ = talk(directory, "hello\n/retry\n", seed=3, **options)
    expected = [answer(directory, "hello", seed=seed, **options) for seed in (3, 4)]
    assert out.splitlines() == "\n".join(expected).splitlines()


def test_one_message_once(directory):
    out, notes = talk(directory, prompt="hello", stats=True)
    assert out == answer(directory, "hello") + "\n"
    assert notes.startswith("[7 tokens, ") and "tokens/s, first after" in notes


def test_a_file_is_answered_in_its_order(directory, tmp_path):
    texts = ["a longer question than the others are", "b", "c and d"]
    source, out = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": texts[0]}, {"messages": [{"role": "user", "content": texts[1]}]}, {"prompt": texts[2]}]
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    talk(directory, prompts=source, answers=out, batch_size=2)
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in answered] == texts
    assert [row["messages"][1]["content"] for row in answered] == [answer(directory, text) for text in texts]
    assert [(row["tokens"], row["finished"]) for row in answered] == [(7, False)] * 3
    (tmp_path / "x.txt").write_text("\n".join(texts))
    talk(directory, prompts=tmp_path / "x.txt", answers=tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == out.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a message a line, got none"),
        ('{"prompt": "a"}\nnot json', r"x\.jsonl:2: json: expected a complete JSON value"),
        ("[1]", r"x\.jsonl:1: "),
        ('{"prompt": "a", "messages": []}', "exactly one"),
        ('{"messages": [{}]}', r"x\.jsonl:1: messages\[0\].role: expected"),
        ('{"prompt": 3}', r"x\.jsonl:1: prompt: expected a list, got int 3"),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
            r"messages\[0\].tool_calls: expected no",
        ),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"x\.jsonl:1: messages"),
        (json.dumps({"prompt": "x " * 600}), r"x\.jsonl:1: expected below 512 tokens"),
    ],
)
def test_a_broken_file_is_refused_by_its_line(directory, tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        talk(directory, prompts=tmp_path / "x.jsonl", answers=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_prompts_is_read_whatever_editor_wrote_it_and_bad_rows_are_left_out(directory, tmp_path):
    (tmp_path / "x.txt").write_bytes("hello\u2028there\r\n\r\nagain\r".encode("utf-16"))
    rows = [
        {"prompt": "hello\u2028there", "id": 7, "messages": None},
        {"prompt": [{"role": "user", "content": "again"}]},
    ]
    lines = [*(json.dumps(row) for row in rows), "{", json.dumps({"prompt": "x " * 600})]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\r".join(lines).encode("utf-8-sig")))
    for name, options in (("x.txt", {}), ("x.jsonl.gz", {"on_error": "skip"})):
        _, notes = talk(directory, prompts=tmp_path / name, answers=tmp_path / "out.jsonl", **options)
        answered = [
            json.loads(line)["messages"][0]["content"] for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]
        ]
        assert answered == ["hello\u2028there", "again"]
    assert "2 rows left out; first: " in notes and "x.jsonl.gz:3: json: " in notes
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "hello", "system": "Be brief."}))
    talk(directory, prompts=tmp_path / "s.jsonl", answers=tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["messages"][0] == {"role": "system", "content": "Be brief."}


def test_save_ends_an_open_last_line_first(directory, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}')
    talk(directory, f"hello\n/save {file}\n")
    assert [row.instruction for row in read_rows(file)] == ["a", "hello"]


def test_a_full_context_forgets_the_oldest_exchanges(directory):
    long = " ".join(["pens"] * 60)
    _, notes = talk(directory, f"{long}\n" * 7)
    assert "[context full: the oldest" in notes
    out, notes = talk(directory, " ".join(["pens"] * 3000) + "\nhello\n")
    assert "message: expected at most 505 tokens with the system prompt, got" in notes
    assert out == answer(directory, "hello") + "\n"


def test_a_terminal_gets_no_control_characters(monkeypatch):
    assert chat.printable("a\x1b[31m\tb\r\n\x07\x9bc\x00", keep="\n\t") == "a\\x1b[31m\tb\\r\n\\x07\\x9bc\\x00"
    out = Terminal()
    chat.show(iter_of("red \x1b[31m", "text"), out)
    assert out.getvalue() == "red \\x1b[31mtext\n"
    plain = io.StringIO()
    chat.show(iter_of("\x1b[31m"), plain)
    assert plain.getvalue() == "\x1b[31m\n"


def iter_of(*chunks):
    yield from chunks


def test_ctrl_c_keeps_what_was_written(directory, monkeypatch):
    def interrupted(tokenizer, tokens):
        next(tokens)
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_text", interrupted)
    model, tokenizer = load_model(directory)
    talked = chat.Chat(model, tokenizer, chat.Config(directory), io.StringIO())
    out = io.StringIO()
    chat.show(talked.answer("hello"), out)
    assert out.getvalue() == "half [stopped]\n" and talked.messages[-1] == Message("assistant", "half")


def test_the_prompt_sign_is_for_terminals(directory):
    out, notes = talk(directory, "hello\n", terminal=True)
    assert out == f"> {chat.printable(answer(directory, 'hello'))}\n> " and "/help lists the commands" in notes


def test_options_that_contradict_are_refused(directory, tmp_path):
    for options in (
        {"prompt": "a", "prompts": tmp_path, "answers": tmp_path},
        {"prompts": tmp_path},
        {"answers": tmp_path},
    ):
        with pytest.raises(ValueError, match="expected"):
            chat.Config(directory, **options)
    save_model(ScoringModel(load_model(directory)[0].config, 1), load_model(directory)[1], tmp_path / "reward")
    with pytest.raises(ValueError, match="expected a language model, got a reward model"):
        talk(tmp_path / "reward", prompt="x")


def run(*arguments, text=""):
    return run_python(ROOT / "recipes" / "chat.py", *arguments, text=text)


def test_the_command_line(directory):
    done = run("--model", directory, "--max-new-tokens", 7, text="hello\n/quit\n")
    assert done.returncode == 0 and done.stdout == answer(directory, "hello") + "\n", done.stderr
    missing = run("--model", directory / "nowhere", "--prompt", "x")
    assert missing.returncode == 1 and "expected a model directory with config.json" in missing.stderr
    wrong = run("--model", directory, "--temprature", "1")
    assert wrong.returncode == 2 and "the nearest is --temperature" in wrong.stderr
