"""Any OpenAI-compatible endpoint as an agent: concurrency limit, retries, token budget; the key is never logged."""

import asyncio
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Positive
from wizard_engine.runtime.text_lines import one_line, printable

from . import prompts
from .completions import Answer, read_answer, read_body, wrong_endpoint
from .prices import Price
from .protocol import Reply, Request
from .rate_limits import Gate, read_duration

PREFIX = "openai:"
MAX_ERROR = 300
TOKEN_LIMITS = ("auto", "max_tokens", "max_completion_tokens")
JSON_MODES = ("auto", "schema", "object", "no")
OWN_FIELDS = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stream", "n"}
# Upper bound of a message's tokens: its bytes plus this. It holds until the endpoint reports the usage.
OVERHEAD_TOKENS = 16


@dataclass(frozen=True)
class Options(Checked):
    """How an endpoint is called; set by `openai:MODEL@URL#name=value,...`.

    Attributes:
        concurrency: simultaneous calls.   requests_per_minute, tokens_per_minute: 0: learned from the endpoint.
        retries: of a call, after statuses 408, 429, 5xx, timeouts, lost connections.
        timeout: seconds for one try.   backoff: seconds before the first retry; doubled for each further one.
        max_wait: longest wait in seconds, also if the endpoint asks for more.
        budget: tokens of prompts and replies, over all runs with one ledger; 0 for no limit. A call that could exceed
            it is not made; a call that times out counts with its upper bound.
        price_in, price_out: of a million tokens of prompts and of replies.   max_cost: budget in the same currency.
        give_up: consecutive failed calls after which the agent makes no more.
        key_env: environment variable with the key.   seed, temperature: whether those of the requests are sent.
        token_limit: name under which the longest reply is sent: max_tokens, or max_completion_tokens; auto: the first,
            and the second for an endpoint that refuses it.
        json: how a verdict is asked for: "schema" or "object" for a response_format of that kind, "no" for text; auto:
            schema, or what is left where the endpoint refuses it.
        reasoning_effort: sent where it is not "".   extra_body: JSON object of further fields of every call.
        extras: "count": what a reply holds beside its text (reasoning, fields that are not known) is counted and named
            at the end; "error": such a reply is a failed call.
    """

    concurrency: Count[int] = 8
    requests_per_minute: NonNegative[float] = 0.0
    tokens_per_minute: NonNegative[float] = 0.0
    retries: NonNegative[int] = 6
    timeout: Positive[float] = 120.0
    backoff: NonNegative[float] = 1.0
    max_wait: NonNegative[float] = 60.0
    budget: NonNegative[int] = 0
    price_in: NonNegative[float] = 0.0
    price_out: NonNegative[float] = 0.0
    max_cost: NonNegative[float] = 0.0
    give_up: Count[int] = 32
    key_env: str = "OPENAI_API_KEY"
    seed: bool = True
    temperature: bool = True
    token_limit: str = "auto"
    json: str = "auto"
    reasoning_effort: str = ""
    extra_body: str = ""
    extras: str = "count"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backoff > self.max_wait:
            raise ValueError(f"backoff: expected at most max_wait={self.max_wait:g} seconds, got {self.backoff:g}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env: expected the name of an environment variable, got something else")
        choices = {"token_limit": TOKEN_LIMITS, "json": JSON_MODES, "extras": ("count", "error")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected {' or '.join(values)}, got {getattr(self, name)[:40]!r}")
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError("max_cost: expected price_in or price_out beside it, per million tokens, got none")
        _ = self.body

    @property
    def body(self) -> dict[str, Any]:
        """Further fields of every call.

        Raises:
            ValueError: extra_body is no JSON object, or has a field that the agent sets itself.
        """
        if not self.extra_body:
            return {}
        try:
            fields = json.loads(self.extra_body)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"extra_body: expected a JSON object, got {self.extra_body[:40]!r} ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"extra_body: expected a JSON object, got {self.extra_body[:40]!r}")
        own = sorted(OWN_FIELDS & set(fields))
        if own:
            raise ValueError(f"extra_body: expected fields that the agent does not set itself, got {', '.join(own)}")
        return fields

    @property
    def price(self) -> Price:
        """Of the endpoint's tokens."""
        return Price(self.price_in, self.price_out)

    @property
    def replying(self) -> dict[str, Any]:
        """The options that a reply depends on, where they are not the default."""
        names = ("reasoning_effort", "extra_body") + (("json",) if self.json != "auto" else ())
        return {name: getattr(self, name) for name in names if getattr(self, name)}


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
    for item in filter(None, _items(text)):
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ValueError(f"agent: expected options of {', '.join(kinds)}, got {name[:40]!r}")
        try:
            values[name] = value.lower() in ("1", "true", "yes") if kinds[name] is bool else kinds[name](value)
        except ValueError:
            raise ValueError(f"agent: {name}: expected {kinds[name].__name__}, got {value[:40]!r}") from None
    return values


def _items(text: str) -> list[str]:
    """The text cut at its commas, those in braces, brackets and quotes apart."""
    items, depth, start, quoted = [], 0, 0, False
    for place, sign in enumerate(text):
        if sign == '"' and text[place - 1 : place] != "\\":
            quoted = not quoted
        elif not quoted and sign in "{[":
            depth += 1
        elif not quoted and sign in "}]":
            depth -= 1
        elif sign == "," and not quoted and depth <= 0:
            items.append(text[start:place])
            start = place + 1
    return [*items, text[start:]]


class EndpointAgent:
    """A model behind an OpenAI-compatible endpoint.

    A call that fails after all retries is a Reply with an error, not an exception. Errors never contain the key.

    Args:
        model: its name at the endpoint.   base_url: of the API; None: OPENAI_BASE_URL, or that of OpenAI.
    Attributes:
        spent: tokens so far, those before this process included (see `resume`).   cost: likewise, in money.
        calls: tries.   retried: repeated tries.   failed, answered: calls without and with a reply.
        ended: why the agent makes no more calls (budget, refused key, model or option, endpoint down); "" while it
            does.   extras: what replies held beside their text, by name.
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
        identity = ["openai/1", base_url, model, *([self.options.replying] if self.options.replying else [])]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self._openai, self._base_url = openai, base_url
        self._key = os.environ.get(self.options.key_env, "")
        if not self._key and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"agent {self.name}: expected a key in {self.options.key_env}, got none; export it")
        self.concurrency, self.price = self.options.concurrency, self.options.price
        self.spent = self.calls = self.retried = self.failed = self.answered = 0
        self.cost = 0.0
        self._reserved = self._in_a_row = 0
        self._reserved_cost = 0.0
        self._token_limit = "max_tokens" if self.options.token_limit == "auto" else self.options.token_limit
        self._json = "schema" if self.options.json == "auto" else self.options.json
        self._stopped = self.ended = ""
        self.extras: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._client: Any = None
        self._gate: Gate | None = None

    @classmethod
    def from_spec(cls, spec: str) -> "EndpointAgent":
        """The agent of `openai:MODEL@URL#name=value,...`."""
        return cls(*parse_spec(spec))

    def resume(self, tokens_in: int, tokens_out: int) -> None:
        """Count what earlier processes spent towards the budget."""
        self.spent += tokens_in + tokens_out
        self.cost += self.price.of(tokens_in, tokens_out)

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, asked concurrently, in an event loop of its own."""

        async def ask() -> list[Reply]:
            try:
                return list(await asyncio.gather(*(self.reply(request) for request in requests)))
            finally:
                await self.aclose()

        return asyncio.run(ask())

    async def aclose(self) -> None:
        """Close the connections of this event loop; a later call opens others."""
        client, self._client, self._gate = self._client, None, None
        if client is not None:
            await client.close()

    def _open(self) -> Any:
        if self._client is None:
            options = self.options
            self._client = self._openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self._base_url, max_retries=0, timeout=options.timeout
            )
            self._gate = Gate(options.concurrency, options.requests_per_minute, options.tokens_per_minute)
        return self._client

    async def reply(self, request: Request) -> Reply:
        """The reply to one request."""
        self._open()
        try:
            messages = _messages(request)
        except ValueError as error:
            return self._no(str(error))
        bound = sum(len(m["content"].encode()) + OVERHEAD_TOKENS for m in messages), request.max_tokens
        began, call = time.monotonic(), _Try(request, messages, *bound)
        while call.outcome is None:
            await self._gate.enter(call.most)
            try:
                await self._try(call)
            finally:
                self._gate.leave()
            if call.outcome is None and call.wait:
                await asyncio.sleep(call.wait)
        tokens = {"tokens_in": call.tokens_in, "tokens_out": call.tokens_out}
        return replace(call.outcome, **tokens, seconds=time.monotonic() - began)

    async def _try(self, call: "_Try") -> None:
        """One try of a call; sets its outcome, or how long to wait before the next try."""
        refused = self._stopped or self._beyond_budget(call)
        if refused:
            call.outcome = self._no(refused)
            return
        cost = self.price.of(call.bound_in, call.bound_out)
        self._reserved, self._reserved_cost = self._reserved + call.most, self._reserved_cost + cost
        self.calls, self.retried = self.calls + 1, self.retried + bool(call.attempt)
        try:
            await self._send(call)
        finally:
            self._reserved, self._reserved_cost = self._reserved - call.most, self._reserved_cost - cost
        if call.outcome is not None:
            return
        call.attempt += 1
        if call.attempt > self.options.retries:
            self._in_a_row += 1
            # An endpoint that has never answered is given up sooner.
            most = self.options.give_up if self.answered else min(self.options.give_up, self.concurrency)
            if self._in_a_row >= most and not self._stopped:
                self._stop(f"{self._in_a_row} calls in a row failed, the last with: {call.error}")
            call.outcome = self._no(call.error)

    def _beyond_budget(self, call: "_Try") -> str:
        """Why a try could exceed a budget, beside the calls in flight; "" where it could not.

        Calls in flight may use less than they reserved; the call is refused without waiting for them.
        """
        options, before = self.options, f"; before that {call.error}" if call.error else ""
        if options.budget and self.spent + self._reserved + call.most > options.budget:
            self.ended = self._clean(
                f"budget: {self.spent} of {options.budget} tokens are spent, this may take {call.most}{before}"
            )
            return self.ended
        cost = self.price.of(call.bound_in, call.bound_out)
        if options.max_cost and self.cost + self._reserved_cost + cost > options.max_cost:
            self.ended = self._clean(
                f"budget: {self.cost:.4g} of {options.max_cost:g} is spent, this may take {cost:.4g}{before}"
            )
            return self.ended
        return ""

    async def _send(self, call: "_Try") -> None:
        call.wait = _wait_seconds(self.options, call.request, call.attempt)
        arguments = self._arguments(call.request, call.messages)
        try:
            async with asyncio.timeout(self.options.timeout):
                answer = await self._client.chat.completions.with_raw_response.create(**arguments)
        except TimeoutError:
            call.error = f"timeout: no answer within {self.options.timeout:g} seconds"
            # The endpoint may have generated, and billed, all of it.
            self._spend(call, call.bound_in, call.bound_out)
        except self._openai.APIStatusError as failed:
            call.error = f"status {failed.status_code}: {failed.message}"
            self._refusal(call, failed, arguments)
        except self._openai.OpenAIError as failed:
            # No connection.
            call.error = f"{type(failed).__name__}: {failed}"
        else:
            self._gate.learn(answer.headers)
            self._take(call, answer)

    def _refusal(self, call: "_Try", failed: Any, arguments: dict[str, Any]) -> None:
        """What follows from an answer with a status of its own."""
        headers = failed.response.headers
        self._gate.learn(headers)
        if failed.status_code in (400, 422) and self._adapt(failed, arguments):
            call.wait, call.attempt = 0.0, call.attempt - 1
        elif self._is_final(failed, call.error):
            call.outcome = self._no(call.error)
        elif failed.status_code in (429, 503):
            call.wait = _wait_seconds(self.options, call.request, call.attempt, headers.get("retry-after"))
            self._gate.slow_down(call.wait if headers.get("retry-after") else 0.0)

    def _adapt(self, failed: Any, arguments: dict[str, Any]) -> bool:
        """Whether the endpoint takes another name or form of an option, which is remembered."""
        said = f"{failed.message} {getattr(failed, 'body', None)}"
        if self.options.token_limit == "auto" and self._token_limit in arguments and "max_completion_tokens" in said:
            if self._token_limit == "max_tokens":
                self._token_limit = "max_completion_tokens"
            return True
        form = arguments.get("response_format", {}).get("type")
        if self.options.json == "auto" and form and re.search(r"response_format|json_schema|json_object|schema", said):
            lesser = "object" if form == "json_schema" else "no"
            if JSON_MODES.index(lesser) > JSON_MODES.index(self._json):
                self._json = lesser
            return True
        return False

    def _take(self, call: "_Try", response: Any) -> None:
        """The answer in a response of status 200; counts its tokens."""
        content = read_body(response.headers.get("content-type", ""), response.text)
        answer = content if isinstance(content, Answer) else read_answer(content, call.request.max_tokens)
        usage = content.get("usage") if isinstance(content, dict) else None
        tokens = [usage.get(f"{name}_tokens") if isinstance(usage, dict) else None for name in ("prompt", "completion")]
        if all(isinstance(number, int) and number >= 0 for number in tokens):
            self._spend(call, *tokens)
            if tokens[1] >= call.request.max_tokens and answer.text and answer.finish == "stop":
                answer = replace(answer, finish="length")
        elif answer.text:
            self._spend(call, call.bound_in, len(answer.text.encode()) + OVERHEAD_TOKENS)
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) and model and not _is_same_model(model, self.model):
            self.extras[f"model {model[:60]}"] += 1
        if answer.is_temporary:
            call.error = answer.error
            return
        self._gate.succeed()
        call.outcome = self._answered(answer)

    def _spend(self, call: "_Try", tokens_in: int, tokens_out: int) -> None:
        call.tokens_in, call.tokens_out = call.tokens_in + tokens_in, call.tokens_out + tokens_out
        self.spent += tokens_in + tokens_out
        self.cost += self.price.of(tokens_in, tokens_out)

    def _stop(self, why: str) -> None:
        self._stopped = self.ended = self._clean(why)

    def _is_final(self, failed: Any, error: str) -> bool:
        """Whether a retry would get the same status; an endpoint that refuses every call is asked no more."""
        status, body = failed.status_code, getattr(failed, "body", None)
        why = wrong_endpoint(status, failed.message, body, set(self._options()))
        if status in (401, 403):
            why = f"refuses the key of {self.options.key_env}"
        if why:
            self._stop(f"the endpoint {why} ({error})")
            return True
        if status in (408, 409, 425, 429) or status >= 500:
            return False
        # The endpoint refuses this request. It does not count as a failure in a row, because the endpoint works.
        self._refused[error] += 1
        if not self.answered and self._refused[error] >= self.options.give_up:
            self._stop(f"no call was answered, {self._refused[error]} were refused alike: {error}")
        return True

    def _answered(self, answer: Answer) -> Reply:
        """The reply to a call that the endpoint answered, if only with a reason."""
        self._in_a_row, self.answered = 0, self.answered + 1
        self.extras.update(answer.extras)
        if answer.error:
            return self._no(answer.error)
        if answer.extras and self.options.extras == "error":
            return self._no(f"extras: the reply also holds {', '.join(answer.extras)}")
        return Reply(answer.text, finish=answer.finish, reasoning=answer.reasoning)

    def _options(self) -> list[str]:
        """Names of the options that a request may carry."""
        names = ["model", self._token_limit, *self.options.body]
        names += ["reasoning_effort"] if self.options.reasoning_effort else []
        return names + [name for name in ("temperature", "seed") if getattr(self.options, name)]

    def _arguments(self, request: Request, messages: list[dict]) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            self._token_limit: request.max_tokens,
        }
        if self.options.temperature:
            arguments["temperature"] = request.temperature
        if request.top_p != 1:
            arguments["top_p"] = request.top_p
        if self.options.reasoning_effort:
            arguments["reasoning_effort"] = self.options.reasoning_effort
        if request.schema and self._json != "no":
            arguments["response_format"] = _response_format(self._json, request)
        if self.options.extra_body:
            arguments["extra_body"] = self.options.body
        if self.options.seed and request.temperature > 0:
            # 31 bits: every implementation accepts such seeds.
            arguments["seed"] = request.seed % 2**31
        return arguments

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


@dataclass
class _Try:
    """A call under way: what it may take, what went wrong so far, and its outcome."""

    request: Request
    messages: list[dict]
    bound_in: int
    bound_out: int
    attempt: int = 0
    wait: float = 0.0
    error: str = ""
    outcome: Reply | None = None
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def most(self) -> int:
        """Tokens that one try can take."""
        return self.bound_in + self.bound_out


def _response_format(mode: str, request: Request) -> dict[str, Any]:
    if mode == "object":
        return {"type": "json_object"}
    schema = {"name": request.task, "strict": True, "schema": json.loads(request.schema)}
    return {"type": "json_schema", "json_schema": schema}


def _is_same_model(given: str, asked: str) -> bool:
    """Whether a name in a reply is that of the model asked for; endpoints add dates and leave out owners."""
    first, second = given.lower(), asked.lower()
    return first in second or second in first or first.split("/")[-1] in second or second.split("/")[-1] in first


def _wait_seconds(options: Options, request: Request, attempt: int, retry_after: str | None = None) -> float:
    """Seconds before the next try: doubled for each attempt, with jitter; at least what the endpoint asks for."""
    # Jitter separates calls that failed together. It comes from the request's seed, so that a run is reproducible.
    wait = options.backoff * 2**attempt * random.Random(f"{request.seed}/{attempt}").uniform(0.5, 1.0)
    asked = read_duration(retry_after)
    if asked is not None:
        wait = max(wait, asked)
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
