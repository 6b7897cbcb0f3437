"""Any OpenAI-compatible endpoint as an agent: concurrency limit, retries, token budget; the key is never logged."""

import asyncio
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Positive
from wizard_engine.runtime.text_lines import one_line, printable

from . import prompts
from .completions import Answer, read_answer, wrong_endpoint
from .protocol import Reply, Request

PREFIX = "openai:"
MAX_ERROR = 300
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
# Upper bound of a message's tokens: its bytes plus this. It holds until the endpoint reports the usage.
OVERHEAD_TOKENS = 16
_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Options(Checked):
    """How an endpoint is called; set by `openai:MODEL@URL#name=value,...`.

    Attributes:
        concurrency: simultaneous calls.   retries: of a call, after statuses 408, 429, 5xx, timeouts, lost connections.
        timeout: seconds for one try.   backoff: seconds before the first retry; doubled for each further one.
        max_wait: longest wait in seconds, also if the endpoint asks for more.
        budget: tokens of prompts and replies in one process, 0 for no limit. A call that could exceed it is not made; a
            call that times out counts with its upper bound.
        give_up: consecutive failed calls after which the agent makes no more.
        key_env: environment variable with the key.   seed, temperature: whether those of the requests are sent.
        token_limit: name under which the longest reply is sent: max_tokens, or max_completion_tokens.
        extras: "count": what a reply holds beside its text (reasoning, fields that are not known) is counted and named
            at the end; "error": such a reply is a failed call.
    """

    concurrency: Count[int] = 8
    retries: NonNegative[int] = 6
    timeout: Positive[float] = 120.0
    backoff: NonNegative[float] = 1.0
    max_wait: NonNegative[float] = 60.0
    budget: NonNegative[int] = 0
    give_up: Count[int] = 32
    key_env: str = "OPENAI_API_KEY"
    seed: bool = True
    temperature: bool = True
    token_limit: str = "max_tokens"
    extras: str = "count"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backoff > self.max_wait:
            raise ValueError(f"backoff: expected at most max_wait={self.max_wait:g} seconds, got {self.backoff:g}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env: expected the name of an environment variable, got something else")
        for name, values in (("token_limit", TOKEN_LIMITS), ("extras", ("count", "error"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected {' or '.join(values)}, got {getattr(self, name)[:40]!r}")


def parse_spec(spec: str) -> tuple[str, str | None, Options]:
    """Model, address and options of `openai:MODEL`, `openai:MODEL@URL` or `openai:MODEL@URL#name=value,...`.

    Raises:
        ValueError: no model, an invalid address or one with a key in it, an unknown option or value.
    """
    rest, _, settings = spec.removeprefix(PREFIX).partition("#")
    match = re.fullmatch(r"(.*?)@([a-z]+:.*)", rest)
    model, url = match.groups() if match else (rest, "")
    if not model:
        raise ValueError(f"agent: expected {PREFIX}MODEL or {PREFIX}MODEL@URL, got no model")
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"agent: expected an address such as http://127.0.0.1:8000/v1 behind {model}@")
        if parts.username or parts.password or parts.query:
            raise ValueError("agent: expected an address without a key in it; keys come from the environment alone")
    return model, url.rstrip("/") or None, Options(**_settings(settings))


def _settings(text: str) -> dict[str, Any]:
    kinds = {field.name: type(field.default) for field in fields(Options)}
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ValueError(f"agent: expected options of {', '.join(kinds)}, got {name[:40]!r}")
        try:
            values[name] = _switch(value) if kinds[name] is bool else kinds[name](value)
        except ValueError:
            kind = "yes or no" if kinds[name] is bool else kinds[name].__name__
            raise ValueError(f"agent: {name}: expected {kind}, got {value[:40]!r}") from None
    return values


def _switch(text: str) -> bool:
    """True or False of a word for it; ValueError for another."""
    if text.lower() not in _SWITCHES:
        raise ValueError
    return _SWITCHES[text.lower()]


class EndpointAgent:
    """A model behind an OpenAI-compatible endpoint.

    A call that fails after all retries is a Reply with an error, not an exception. Errors never contain the key.

    Args:
        model: its name at the endpoint.   base_url: of the API; None: OPENAI_BASE_URL, or that of OpenAI.
    Attributes:
        spent: tokens so far.   calls: tries.   retried: repeated tries.   failed, answered: calls without and with a
            reply.   ended: why the agent makes no more calls (budget, refused key, model or option, endpoint down); ""
            while it does.   extras: what replies held beside their text, by name.
    """

    def __init__(self, model: str, base_url: str | None = None, options: Options | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError(f"agent: expected the openai client, got {error}; pip install -e '.[endpoint]'") from None
        self.options = options or Options()
        self.model = model
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        parts = urlsplit(base_url)
        self.name = f"{model}@{parts.hostname}" + (f":{parts.port}" if parts.port else "")
        self.fingerprint = hashlib.sha256(json.dumps(["openai/1", base_url, model]).encode()).hexdigest()[:16]
        self._openai, self._base_url = openai, base_url
        self._key = os.environ.get(self.options.key_env, "")
        if not self._key and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"agent {self.name}: expected a key in {self.options.key_env}, got none; export it")
        self.spent = self.calls = self.retried = self.failed = self.answered = 0
        self._reserved = self._in_a_row = 0
        self._stopped = self.ended = ""
        self.extras: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    @classmethod
    def from_spec(cls, spec: str, *, ranks: int = 1) -> "EndpointAgent":
        """The agent of `openai:MODEL@URL#name=value,...`; concurrency and budget are divided over the ranks."""
        model, url, options = parse_spec(spec)
        if ranks > 1:
            budget = max(1, options.budget // ranks) if options.budget else 0
            options = replace(options, concurrency=max(1, options.concurrency // ranks), budget=budget)
        return cls(model, url, options)

    @property
    def batch_size(self) -> int:
        """Calls of one ledger transaction: few, so that an interrupted run loses little."""
        return 4 * self.options.concurrency

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, asked concurrently."""
        replies = asyncio.run(self._respond(requests))
        if self._in_a_row and not self.answered:
            self._stopped = self._stopped or f"no call was answered, the last one: {replies[-1].error}"
        self.ended = self.ended or self._stopped
        return replies

    async def _respond(self, requests: Sequence[Request]) -> list[Reply]:
        gate = asyncio.Semaphore(self.options.concurrency)
        async with self._openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self._base_url, max_retries=0, timeout=self.options.timeout
        ) as client:
            return list(await asyncio.gather(*(self._one(client, gate, request) for request in requests)))

    async def _one(self, client: Any, gate: asyncio.Semaphore, request: Request) -> Reply:
        async with gate:
            try:
                messages = _messages(request)
            except ValueError as error:
                return self._no(str(error))
            most = sum(len(m["content"].encode()) + OVERHEAD_TOKENS for m in messages) + request.max_tokens
            if self._stopped:
                return self._no(self._stopped)
            if self._is_spent(most):
                # Calls in flight may use less than they reserved; this call is refused without waiting for them.
                self.ended = f"budget: {self.spent} of {self.options.budget} tokens are spent, this may take {most}"
                return self._no(self.ended)
            self._reserved += most
            try:
                return await self._tries(client, request, messages, most)
            finally:
                self._reserved -= most

    def _is_spent(self, more: int) -> bool:
        """Whether fewer than `more` tokens remain of the budget after those reserved by calls in flight."""
        return bool(self.options.budget) and self.spent + self._reserved + more > self.options.budget

    async def _tries(self, client: Any, request: Request, messages: list[dict], most: int) -> Reply:
        """The reply to a request; `most` is the upper bound of its tokens per try."""
        error = ""
        for attempt in range(self.options.retries + 1):
            if attempt:
                if self._is_spent(0):
                    error = f"budget: {self.spent} of {self.options.budget} tokens are spent; before that {error}"
                    self.ended = self._clean(error)
                    break
                self.retried += 1
            self.calls += 1
            # Without a Retry-After header the wait depends on the attempt alone.
            wait = _wait_seconds(self.options, request, attempt)
            try:
                async with asyncio.timeout(self.options.timeout):
                    completion = await client.chat.completions.create(**self._arguments(request, messages))
            except TimeoutError:
                error = f"timeout: no answer within {self.options.timeout:g} seconds"
                # The endpoint may have generated, and billed, all of it.
                self.spent += most
            except self._openai.APIStatusError as failed:
                error = f"status {failed.status_code}: {failed.message}"
                if self._is_final(failed, error):
                    return self._no(error)
                wait = _wait_seconds(self.options, request, attempt, failed.response.headers.get("retry-after"))
            except self._openai.OpenAIError as failed:
                # No connection, or a body that the client cannot parse.
                error = f"{type(failed).__name__}: {failed}"
            except (ValueError, TypeError, AttributeError) as failed:
                # Proxies return pages of HTML with status 200; the client then fails in its own parsing.
                error = f"no answer: the client cannot read what came ({type(failed).__name__})"
            else:
                answer = self._read(completion, request)
                if not answer.is_temporary:
                    return self._answered(answer)
                error = answer.error
            if attempt < self.options.retries:
                await asyncio.sleep(wait)
        self._in_a_row += 1
        if self._in_a_row >= self.options.give_up and not self._stopped:
            self._stopped = self._clean(f"{self._in_a_row} calls in a row failed, the last with: {error}")
        return self._no(error)

    def _is_final(self, failed: Any, error: str) -> bool:
        """Whether a retry would get the same status; an endpoint that refuses every call is asked no more."""
        status, body = failed.status_code, getattr(failed, "body", None)
        why = wrong_endpoint(status, failed.message, body, set(self._options()))
        if status in (401, 403):
            why = f"refuses the key of {self.options.key_env}"
        if why:
            self._stopped = self._clean(f"the endpoint {why} ({error})")
            return True
        if status in (408, 409, 425, 429) or status >= 500:
            return False
        # The endpoint refuses this request. It does not count as a failure in a row, because the endpoint works.
        self._refused[error] += 1
        if not self.answered and self._refused[error] >= self.options.give_up:
            self._stopped = self._clean(f"no call was answered, {self._refused[error]} were refused alike: {error}")
        return True

    def _answered(self, answer: Answer) -> Reply:
        """The reply to a call that the endpoint answered, if only with a reason."""
        self._in_a_row, self.answered = 0, self.answered + 1
        self.extras.update(answer.extras)
        if answer.error:
            return self._no(answer.error)
        if answer.extras and self.options.extras == "error":
            return self._no(f"extras: the reply also holds {', '.join(answer.extras)}")
        return Reply(answer.text, finish=answer.finish)

    def _options(self) -> list[str]:
        """Names of the options that a request may carry."""
        names = ["model", self.options.token_limit]
        return names + [name for name in ("temperature", "seed") if getattr(self.options, name)]

    def _arguments(self, request: Request, messages: list[dict]) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            self.options.token_limit: request.max_tokens,
        }
        if self.options.temperature:
            arguments["temperature"] = request.temperature
        if self.options.seed and request.temperature > 0:
            # 31 bits: every implementation accepts such seeds.
            arguments["seed"] = request.seed % 2**31
        return arguments

    def _read(self, completion: Any, request: Request) -> Answer:
        """The answer in a completion; counts its tokens."""
        answer = read_answer(completion, request.max_tokens)
        usage = getattr(getattr(completion, "usage", None), "total_tokens", None)
        if isinstance(usage, int) and usage >= 0:
            self.spent += usage
        elif answer.text:
            self.spent += len(answer.text.encode()) + OVERHEAD_TOKENS
        return answer

    def notes(self) -> list[str]:
        """Lines for the end of a run: what the replies held beside their text, and was not used."""
        if not self.extras:
            return []
        named = ", ".join(f"{printable(one_line(name))} ({count})" for name, count in sorted(self.extras.items()))
        return [f"agent {printable(self.name)}: not used of {self.answered} replies: {named}"]

    def _no(self, error: str) -> Reply:
        self.failed += 1
        return Reply("", self._clean(error))

    def _clean(self, text: str) -> str:
        """An error in one short line, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return printable(one_line(text)[:MAX_ERROR]) or "unknown"


def _wait_seconds(options: Options, request: Request, attempt: int, retry_after: str | None = None) -> float:
    """Seconds before the next try: doubled for each attempt, with jitter; at least what the endpoint asks for."""
    # Jitter separates calls that failed together. It comes from the request's seed, so that a run is reproducible.
    wait = options.backoff * 2**attempt * random.Random(f"{request.seed}/{attempt}").uniform(0.5, 1.0)
    if retry_after is not None and re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        wait = max(wait, float(retry_after))
    return min(wait, options.max_wait)


def _messages(request: Request) -> list[dict[str, str]]:
    """The messages sent to the endpoint: the conversation, or for task "user" a prompt that asks for its next turn.

    Raises:
        ValueError: a conversation for "user" that does not end with the assistant's turn.
    """
    if request.task == "user":
        if not request.messages or request.messages[-1].role != "assistant":
            raise ValueError("task 'user': expected a conversation that ends with an assistant turn")
        text = prompts.render("user", history=prompts.dialogue(request.messages))
        return [{"role": "user", "content": text}]
    return [{"role": message.role, "content": message.content} for message in request.messages]
