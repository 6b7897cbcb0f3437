"""Chat with a checkpoint, in its own chat format: interactively, once, or over a file.

    python recipes/chat.py --model DIR
    python recipes/chat.py --model DIR --prompt "What is 12 times 12?"
    python recipes/chat.py --model DIR --prompts questions.jsonl --answers answers.jsonl

DIR is a model directory of this project or of Hugging Face (Mistral, Llama, Mixtral), WizardLM-2 7B's for example. The
format is Vicuna v1.1, that of WizardLM-2, or the directory's chat template where it has another one.
Commands of the interactive mode: /new, /retry, /system TEXT, /save FILE, /help, /quit.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from wizard_engine import runtime
from wizard_engine.data.chat import encode_prompt, use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.records import Message
from wizard_engine.data.row_fields import SYSTEM_COLUMNS, FieldReader, expect, without_nulls
from wizard_engine.data.text_files import keeping, read_lines, read_values
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.data.turns import read_turns, with_system
from wizard_engine.generation import generate
from wizard_engine.generation.allowed_ids import allowed_ids
from wizard_engine.generation.streaming import Streamer, stream_text
from wizard_engine.model import Transformer, load_model
from wizard_engine.model.loading import weights_dtype
from wizard_engine.runtime.files import naming, write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, PositiveShare, Seed, Temperature
from wizard_engine.runtime.text_lines import printable

HELP = """/new            forget the conversation
/retry          answer the last message again, with another seed
/system TEXT    another system prompt, for a new conversation; without TEXT the standard one
/save FILE      append the conversation to a JSONL file
/help           this list
/quit           leave; so do Ctrl-D, and Ctrl-C at the prompt
A line that ends in \\ goes on in the next; // begins a message with a slash. Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Config(Checked):
    """Chat with a checkpoint."""

    model: Path
    """Model directory."""
    prompt: str | None = None
    """Answer this one message, on stdout, and leave."""
    prompts: Path | None = None
    """File to answer: rows (.jsonl, .json, .parquet, also .gz) with `prompt` or `messages`, or a text with a message a
    line."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row of --prompts that cannot be read or does not fit: stop, or leave it out and say so."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields of --prompts that messages have no place for: an error of the row, or left out and counted."""
    answers: Path | None = None
    """Where the answers to --prompts go: JSONL with messages, finished and tokens, in the order of the file."""
    system: str | None = None
    """System prompt; default: the chat format's own, in Vicuna the one that WizardLM-2 was trained with."""
    chat_format: ChatFormatChoice = "auto"
    """auto is the directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a .jinja file."""
    temperature: Temperature[float] = 0.0
    """0 takes the likeliest token each time."""
    top_p: PositiveShare[float] = 1.0
    """Sample from the likeliest tokens whose probabilities add up to this."""
    top_k: NonNegative[int] = 0
    """Sample from this many likeliest tokens; 0: from all."""
    max_new_tokens: Count[int] = 1024
    """Longest answer, tokens."""
    seed: Seed[int] = 0
    batch_size: Count[int] = 16
    """Rows of --prompts that are answered together."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    stats: bool = False
    """Print tokens, tokens per second and the time to the first one on stderr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("--prompt, --prompts: expected one of them, got both")
        if (self.prompts is None) != (self.answers is None):
            raise ValueError("--prompts, --answers: expected both or none, got one")


class Chat:
    """A conversation with a model: messages, and how they are continued.

    Args:
        model, tokenizer: of one directory.   cfg: how to sample.   stderr: where notes go.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, cfg: Config, stderr: TextIO) -> None:
        self.tokenizer, self.cfg, self.stderr = tokenizer, cfg, stderr
        self.streamer = Streamer(model, tokenizer.eos_ids, allowed_ids=allowed_ids(tokenizer, model.config.vocab_size))
        self.system, self.seed = cfg.system, cfg.seed
        self.messages: list[Message] = []
        self.stats = ""

    @property
    def room(self) -> int:
        """Most tokens of a prompt: a quarter of the context is kept for the answer, less where it may be shorter."""
        positions = self.streamer.config.max_positions
        return positions - min(self.cfg.max_new_tokens, max(1, positions // 4))

    def conversation(self) -> list[Message]:
        """System message, where it is not the standard one, and turns."""
        return ([] if self.system is None else [Message("system", self.system)]) + self.messages

    def _prompt(self) -> list[int]:
        """Ids of the conversation, its oldest exchanges dropped until it fits."""
        dropped = 0
        while len(ids := encode_prompt(self.tokenizer, self.conversation())) > self.room:
            if len(self.messages) < 3:
                raise ValueError(f"message: expected at most {self.room} tokens with the system prompt, got {len(ids)}")
            self.messages = self.messages[2:]
            dropped += 1
        if dropped:
            print(f"[context full: the oldest {dropped} exchanges are forgotten]", file=self.stderr)
        return ids

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to a message; the conversation holds what was written, wherever it stops.

        Raises:
            ValueError: the message does not fit into the context; it is forgotten.
        """
        self.messages.append(Message("user", text))
        try:
            prompt = self._prompt()
        except ValueError:
            self.messages.pop()
            raise
        began, first, count, written = time.perf_counter(), 0.0, 0, ""

        def counted() -> Iterator[int]:
            nonlocal first, count
            for token in self.streamer.stream(prompt, **self._how(len(prompt))):
                first, count = first or time.perf_counter() - began, count + 1
                yield token

        try:
            for piece in stream_text(self.tokenizer, counted()):
                written += piece
                yield piece
        finally:
            self.messages.append(Message("assistant", written))
            seconds = time.perf_counter() - began
            self.stats = (
                f"[{count} tokens, {count / seconds:.1f} tokens/s, first after {first:.2f} s; prompt of {len(prompt)} "
                f"tokens, {self.streamer.reused} of them cached]"
            )

    def show(self, text: str, stdout: TextIO) -> None:
        """Write the answer to a message as it comes, then the figures where they are asked for."""
        show(self.answer(text), stdout)
        if self.cfg.stats:
            print(self.stats, file=self.stderr)

    def _how(self, prompt_tokens: int) -> dict:
        cfg = self.cfg
        room = self.streamer.config.max_positions - prompt_tokens
        return sampling(cfg) | {"max_new_tokens": min(cfg.max_new_tokens, room), "seed": self.seed}

    def retry(self) -> str:
        """The last message, taken back together with its answer, to be answered with another seed.

        Raises:
            ValueError: there is none.
        """
        if len(self.messages) < 2:
            raise ValueError("/retry: expected a message before it, got none")
        self.seed += 1
        text = self.messages[-2].content
        del self.messages[-2:]
        return text


def sampling(cfg: Config) -> dict:
    """Options of `generate` and `Streamer.stream`."""
    return {"temperature": cfg.temperature, "top_k": cfg.top_k or None, "top_p": None if cfg.top_p == 1 else cfg.top_p}


def show(deltas: Iterator[str], stdout: TextIO) -> None:
    """Write an answer as it comes; Ctrl-C ends it and keeps what was written."""
    clean = partial(printable, keep="\n\t") if stdout.isatty() else str
    try:
        for delta in deltas:
            stdout.write(clean(delta))
            stdout.flush()
    except KeyboardInterrupt:
        stdout.write(" [stopped]")
    finally:
        deltas.close()  # type: ignore[attr-defined]
    stdout.write("\n")
    stdout.flush()


def read_line(stdin: TextIO, stdout: TextIO, sign: str) -> str:
    """A line with its end; "" at the end of the input. At a terminal it can be edited, with a history."""
    if stdin is sys.stdin and stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        try:
            return input(sign) + "\n"
        except EOFError:
            return ""
    if stdin.isatty():
        stdout.write(sign)
        stdout.flush()
    return stdin.readline()


def read_message(stdin: TextIO, stdout: TextIO) -> str | None:
    """The next message; None at the end of the input or on Ctrl-C."""
    lines: list[str] = []
    try:
        while True:
            line = read_line(stdin, stdout, ". " if lines else "> ")
            if not line and not lines:
                return None
            text = line.rstrip("\n")
            lines.append(text.removesuffix("\\"))
            if not text.endswith("\\"):
                return "\n".join(lines).strip()
    except KeyboardInterrupt:
        return None


def command(chat: Chat, text: str) -> str | None:
    """Do what a line with a slash says; a message to answer, or None.

    Raises:
        ValueError: an unknown command, or one that cannot be done.
    """
    name, _, rest = text.partition(" ")
    if name == "/new":
        chat.messages = []
    elif name == "/retry":
        return chat.retry()
    elif name == "/system":
        chat.system, chat.messages = rest.strip() or None, []
    elif name == "/save":
        save(chat, rest.strip())
    elif name == "/help":
        print(HELP, file=chat.stderr)
    else:
        raise ValueError(f"{name}: expected one of /new, /retry, /system, /save, /help, /quit")
    return None


def save(chat: Chat, name: str) -> None:
    """Append the conversation to a file as a row that recipes/sft.py reads."""
    if not name or not chat.messages:
        raise ValueError("/save: expected a file name after a conversation, got none")
    row = {"messages": [{"role": m.role, "content": m.content} for m in chat.conversation()]}
    with naming(name, "the conversation is not saved"), open(name, "a+b") as file:
        file.seek(max(0, file.seek(0, 2) - 1))
        is_open_line = file.read() not in (b"", b"\n", b"\r")
        file.write((("\n" if is_open_line else "") + json.dumps(row, ensure_ascii=False) + "\n").encode())
    print(f"[saved: {name}]", file=chat.stderr)


def interact(chat: Chat, stdin: TextIO, stdout: TextIO) -> None:
    """Read messages and commands, write answers, until the input ends."""
    if stdin.isatty():
        print(f"{chat.cfg.model}; /help lists the commands", file=chat.stderr)
    while (text := read_message(stdin, stdout)) is not None:
        try:
            if text == "/quit":
                return
            if text.startswith("/") and not text.startswith("//"):
                text = command(chat, text) or ""
            if text:
                chat.show(text.removeprefix("/") if text.startswith("//") else text, stdout)
        except (ValueError, OSError) as error:
            print(f"chat: {printable(str(error))}", file=chat.stderr)


def read_prompts(cfg: Config, bad: list[str]) -> list[tuple[str, tuple[Message, ...]]]:
    """Conversations of --prompts, each ending with the user's message, with their places `path:line`.

    With --on-error skip the errors of the others are added to `bad`.

    Raises:
        ValueError: a row is no conversation that can be answered; names path:line.
    """
    path, prompts = cfg.prompts, []
    reader = FieldReader(cfg.unknown_fields)
    for line, value, error in _values(path):
        where = f"{path}:{line}"
        read = lambda value=value, error=error: _conversation(value, error, cfg.system, reader)  # noqa: E731
        prompts += [(where, turns) for turns in keeping(cfg.on_error, bad, read, f"{where}: ")]
    reader.report(path)
    if not prompts:
        raise ValueError(f"{path}:1: expected a message a line, got none")
    return prompts


def _values(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Line, value and error of each record, or of each line of a text."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    if suffixes[-1:] in ([".jsonl"], [".json"], [".parquet"]):
        return ((piece.line, piece.value, piece.error) for piece in read_values(path))
    return ((line, {"prompt": text}, None) for line, text in read_lines(path))


def _conversation(row: Any, error: str | None, system: str | None, reader: FieldReader) -> tuple[Message, ...]:
    if error is not None:
        raise ValueError(error)
    row = without_nulls(expect(row, dict, "record"))
    if not ("prompt" in row) ^ ("messages" in row):
        raise ValueError("expected prompt or messages, got a row without exactly one of them")
    name = "prompt" if "prompt" in row else "messages"
    reader.start()
    messages = with_system(read_turns(row[name], name, reader), row).messages
    reader.columns_of(row, (name, *SYSTEM_COLUMNS))
    reader.finish()
    if system is not None and messages[:1] and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return messages


def _fitting_prompts(cfg: Config, tokenizer: Tokenizer, limit: int, stderr: TextIO) -> tuple[list, list[list[int]]]:
    """Conversations of --prompts and their ids, fewer than `limit` each."""
    bad: list[str] = []

    def encode(turns: tuple[Message, ...]) -> list[int]:
        ids = encode_prompt(tokenizer, turns)
        if len(ids) >= limit:
            raise ValueError(f"expected below {limit} tokens, got {len(ids)}")
        return ids

    rows, prompts = [], []
    for where, turns in read_prompts(cfg, bad):
        for ids in keeping(cfg.on_error, bad, lambda turns=turns: encode(turns), f"{where}: "):
            rows.append(turns)
            prompts.append(ids)
    if bad:
        print(f"{cfg.prompts}: {len(bad)} rows left out; first: {bad[0]}", file=stderr)
    if not rows:
        raise ValueError(f"{cfg.prompts}:1: expected a prompt that fits, got none")
    return rows, prompts


def answer_file(model: Transformer, tokenizer: Tokenizer, cfg: Config, stderr: TextIO) -> None:
    """Answer every row of --prompts into --answers."""
    assert cfg.prompts is not None and cfg.answers is not None
    limit = model.config.max_positions
    rows, prompts = _fitting_prompts(cfg, tokenizer, limit, stderr)
    lines = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(rows), file=stderr, unit="row", disable=not stderr.isatty()) as bar:
        for start in range(0, len(order), cfg.batch_size):
            batch = order[start : start + cfg.batch_size]
            new = min(cfg.max_new_tokens, limit - max(len(prompts[i]) for i in batch))
            out = generate(
                model,
                [prompts[i] for i in batch],
                max_new_tokens=new,
                seed=cfg.seed + start,
                eos_ids=tokenizer.eos_ids,
                batch_size=cfg.batch_size,
                allowed_ids=allowed_ids(tokenizer, model.config.vocab_size),
                **sampling(cfg),
            )
            for i, tokens, finished in zip(batch, out.tokens, out.finished):
                answered = [*rows[i], Message("assistant", tokenizer.decode(tokens).strip())]
                turns = [{"role": m.role, "content": m.content} for m in answered]
                row = {"messages": turns, "finished": finished, "tokens": len(tokens)}
                lines[i] = json.dumps(row, ensure_ascii=False) + "\n"
            bar.update(len(batch))
    write_text(cfg.answers, "".join(lines))
    print(f"{len(lines)} answers: {cfg.answers}", file=stderr)


def main(
    cfg: Config, *, stdin: TextIO | None = None, stdout: TextIO | None = None, stderr: TextIO | None = None
) -> None:
    """Load the model and chat in the mode that the options ask for."""
    stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    rt = runtime.start(cfg.device)
    model, tokenizer = load_model(cfg.model, device=rt.device, dtype=weights_dtype(cfg.dtype, rt.device))
    if not isinstance(model, Transformer):
        raise ValueError(f"{cfg.model}: expected a language model, got a reward model; it cannot answer")
    use_chat_format(tokenizer, cfg.chat_format, vocab_size=model.config.vocab_size)
    model.eval().requires_grad_(False)
    if cfg.prompts is not None:
        answer_file(model, tokenizer, cfg, stderr)
        return
    chat = Chat(model, tokenizer, cfg, stderr)
    if cfg.prompt is not None:
        chat.show(cfg.prompt, stdout)
    else:
        interact(chat, stdin, stdout)


if __name__ == "__main__":
    launch(main, Config)
