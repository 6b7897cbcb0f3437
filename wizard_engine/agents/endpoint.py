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
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from wizard_engine.runtime.text_lines import one_line, printable

from . import prompts
from .bounded_body import BodyTooLarge, bounded
from .completions import Answer, read_answer, read_body, read_usage, wrong_endpoint
from .endpoint_options import JSON_MODES, PREFIX, Options, base_url_of, endpoint_name, parse_spec
from .prices import Price
from .protocol import Reply, Request
from .rate_limits import Gate, Pass, read_retry_after

__all__ = ["PREFIX", "EndpointAgent", "Options", "parse_spec"]

MAX_ERROR = 300
# Failed calls in a row, at least, that end an endpoint which has never answered.
FIRST_CALLS = 8
# Upper bound of a message's tokens: its bytes plus this. It holds until the endpoint reports the usage.
OVERHEAD_TOKENS = 16


class EndpointAgent:
    """A model behind an OpenAI-compatible endpoint.

    A call that fails after all retries is a Reply with an error, not an exception. Errors never contain the key.

    Args:
        model: its name at the endpoint.   base_url: of the API; None: OPENAI_BASE_URL, or that of OpenAI.
    Attributes:
        spent: tokens so far, those before this process included (see `resume`).   cost: likewise, in money.
        calls: tries.   retried: repeated tries.   failed, answered: calls without and with a reply.
        ended: why the agent makes no more calls (budget, refused key, model or option, endpoint down); "" while it
            does.   extras: what replies held beside their text, by name.   models: other models that replies name.
    """

    def __init__(self, model: str, base_url: str | None = None, options: Options | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError(f"agent: expected the openai client, got {error}; pip install -e '.[endpoint]'") from None
        self.options = options or Options()
        self.model = model
        self.name, self.base_url = endpoint_name(model, base_url), base_url_of(base_url)
        identity = ["openai/1", self.base_url, model, *([self.options.replying] if self.options.replying else [])]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self._openai = openai
        self._key = os.environ.get(self.options.key_env, "")
        if not self._key and urlsplit(self.base_url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"agent {self.name}: expected a key in {self.options.key_env}, got none; export it")
        self.concurrency, self.price = self.options.concurrency, self.options.price
        self.spent = self.calls = self.retried = self.failed = self.answered = 0
        self.cost = 0.0
        self._reserved = self._in_a_row = 0
        self._reserved_cost = 0.0
        self._token_limit = "max_tokens" if self.options.token_limit == "auto" else self.options.token_limit
        self._json = "schema" if self.options.json == "auto" else self.options.json
        # Whether a verdict was answered in this form: no other is tried then for a call that is refused.
        self._has_form = False
        self._stopped = self.ended = ""
        self.extras: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._client: Any = None
        self._gate: Gate | None = None

    @classmethod
    def from_spec(cls, spec: str) -> "EndpointAgent":
        """The agent of `openai:MODEL@URL#name=value,...`."""
        return cls(*parse_spec(spec))

    def set_price(self, price: Price | None = None) -> None:
        """Take the price of the model, unless its spec gave one.

        Raises:
            ValueError: the spec has a budget in money, and nothing says what tokens cost.
        """
        if price is not None and not (self.price.tokens_in or self.price.tokens_out):
            self.price = price
        if self.options.max_cost and not (self.price.tokens_in or self.price.tokens_out):
            raise ValueError(
                f"agent {self.name}: max_cost: expected what tokens cost beside it, got nothing; give price_in and "
                "price_out per million tokens, or --prices FILE"
            )

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

    def _open(self) -> Gate:
        if self._client is None:
            self._freed = asyncio.Event()
            options = self.options
            # Its class sets the client's usual limits and keep-alive.
            http_class = self._openai.DefaultAsyncHttpxClient
            http = http_class(timeout=options.timeout, event_hooks={"response": [bounded(http_class)]})
            self._client = self._openai.AsyncOpenAI(
                api_key=self._key or "none",
                base_url=self.base_url,
                max_retries=0,
                timeout=options.timeout,
                http_client=http,
            )
            self._gate = Gate(options.concurrency, options.requests_per_minute, options.tokens_per_minute)
        return self._gate

    async def reply(self, request: Request) -> Reply:
        """The reply to one request."""
        gate = self._open()
        try:
            messages = _messages(request)
        except ValueError as error:
            return self._no(str(error))
        bound = sum(len(m["content"].encode("utf-8", "replace")) + OVERHEAD_TOKENS for m in messages)
        began, call = time.monotonic(), _Try(request, messages, bound, request.max_tokens)
        while call.outcome is None:
            call.gate_pass, before = await gate.enter(call.most), call.tokens
            try:
                await self._try(call)
            finally:
                gate.leave(call.gate_pass, call.tokens - before)
            if call.outcome is None and call.wait:
                await asyncio.sleep(call.wait)
        tokens = {"tokens_in": call.tokens_in, "tokens_out": call.tokens_out}
        return replace(call.outcome, **tokens, seconds=round(time.monotonic() - began, 3))

    async def _try(self, call: "_Try") -> None:
        """One try of a call; sets its outcome, or how long to wait before the next try."""
        while (refused := self._stopped or self._beyond_budget(call)) and self._reserved and not self._stopped:
            # The calls in flight may use less than they reserved.
            await self._freed.wait()
        if refused:
            self.ended = self._clean(refused)
            call.outcome = self._no(refused)
            return
        cost = self.price.of(call.bound_in, call.bound_out)
        self._reserved, self._reserved_cost = self._reserved + call.most, self._reserved_cost + cost
        self.calls, self.retried = self.calls + 1, self.retried + bool(call.attempt)
        try:
            await self._send(call)
        finally:
            self._reserved, self._reserved_cost = self._reserved - call.most, self._reserved_cost - cost
            freed, self._freed = self._freed, asyncio.Event()
            freed.set()
        if call.outcome is not None:
            return
        call.attempt += 1
        if call.attempt > self.options.retries:
            self._fail(call)

    def _fail(self, call: "_Try") -> None:
        """No try of a call was answered; too many such calls in a row end the agent."""
        self._in_a_row += 1
        # An endpoint that has never answered is given up sooner.
        most = self.options.give_up if self.answered else min(self.options.give_up, max(FIRST_CALLS, self.concurrency))
        if self._in_a_row >= most and not self._stopped:
            self._stop(f"{self._in_a_row} calls in a row failed, the last with: {call.error}")
        call.outcome = self._no(call.error)

    def _beyond_budget(self, call: "_Try") -> str:
        """Why a try could exceed a budget, beside the calls in flight; "" where it could not."""
        options, before = self.options, f"; before that {call.error}" if call.error else ""
        if options.budget and self.spent + self._reserved + call.most > options.budget:
            return f"budget: {self.spent} of {options.budget} tokens are spent, this may take {call.most}{before}"
        cost = self.price.of(call.bound_in, call.bound_out)
        if options.max_cost and self.cost + self._reserved_cost + cost > options.max_cost:
            return f"budget: {self.cost:.4g} of {options.max_cost:g} is spent, this may take {cost:.4g}{before}"
        return ""

    async def _send(self, call: "_Try") -> None:
        call.wait = _wait_seconds(self.options, call.request, call.attempt)
        arguments = self._arguments(call)
        try:
            async with asyncio.timeout(self.options.timeout):
                answer = await self._client.chat.completions.with_raw_response.create(**arguments)
        except (TimeoutError, self._openai.APITimeoutError):
            call.error = f"timeout: no answer within {self.options.timeout:g} seconds"
            # The endpoint may have generated, and billed, all of it.
            self._spend(call, call.bound_in, call.bound_out)
        except BodyTooLarge as failed:
            call.error = f"too large: {failed}"
        except self._openai.APIStatusError as failed:
            call.error = f"status {failed.status_code}: {failed.message}"
            self._refusal(call, failed, arguments)
        except self._openai.OpenAIError as failed:
            # No connection, or an answer that HTTP cannot read.
            cause = f" ({failed.__cause__})" if str(failed.__cause__ or "") else ""
            call.error = f"{type(failed).__name__}: {failed}{cause}"
        else:
            self._gate.learn(answer.headers)
            self._take(call, answer)

    def _refusal(self, call: "_Try", failed: Any, arguments: dict[str, Any]) -> None:
        """What follows from an answer with a status of its own."""
        headers = failed.response.headers
        self._gate.learn(headers)
        if failed.status_code in (400, 422) and self._adapt(failed, arguments, call):
            call.wait, call.attempt = 0.0, call.attempt - 1
        elif self._is_final(failed, call.error):
            call.outcome = self._no(call.error)
        elif failed.status_code in (429, 503):
            call.wait = _wait_seconds(self.options, call.request, call.attempt, headers.get("retry-after"))
            self._gate.slow_down(call.gate_pass, call.wait if headers.get("retry-after") else 0.0)

    def _adapt(self, failed: Any, arguments: dict[str, Any], call: "_Try") -> bool:
        """Whether the endpoint takes another name or form of an option, which is remembered."""
        said = f"{failed.message} {getattr(failed, 'body', None)}"
        if self.options.token_limit == "auto" and "max_tokens" in arguments and "max_completion_tokens" in said:
            self._token_limit = "max_completion_tokens"
            return True
        form = arguments.get("response_format", {}).get("type")
        if self.options.json != "auto" or not form:
            return False
        lesser = "object" if form == "json_schema" else "no"
        if re.search(r"response_format|json_schema|json_object|schema", said):
            if JSON_MODES.index(lesser) > JSON_MODES.index(self._json):
                self._json = lesser
            return True
        # It does not say what it refuses. That is the form if the same call is answered without it, see _take.
        call.form = "" if self._has_form else lesser
        return bool(call.form)

    def _take(self, call: "_Try", response: Any) -> None:
        """The answer in a response of status 200; counts its tokens."""
        content = read_body(response.headers.get("content-type", ""), response.content)
        answer = content if isinstance(content, Answer) else read_answer(content, call.request.max_tokens)
        usage = read_usage(content)
        if usage:
            self._spend(call, *usage)
            if usage[1] >= call.request.max_tokens:
                answer = _cut(answer, call.request.max_tokens)
        elif answer.text:
            self._spend(call, call.bound_in, len(answer.text.encode()) + OVERHEAD_TOKENS)
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) and model and not _is_same_model(model, self.model):
            self.models[model[:60]] += 1
        if answer.is_temporary:
            call.error = answer.error
            return
        if isinstance(content, Answer):
            call.error = answer.error
            self._fail(call)
            return
        self._gate.succeed()
        if call.request.schema and not self._has_form:
            self._json, self._has_form = call.form or self._json, True
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
        if not self.answered:
            self._refused[error] += 1
            if self._refused[error] >= self.options.give_up:
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

    def _arguments(self, call: "_Try") -> dict[str, Any]:
        request, form = call.request, call.form or self._json
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": call.messages,
            self._token_limit: request.max_tokens,
        }
        if self.options.temperature:
            arguments["temperature"] = request.temperature
        if request.top_p != 1:
            arguments["top_p"] = request.top_p
        if self.options.reasoning_effort:
            arguments["reasoning_effort"] = self.options.reasoning_effort
        if request.schema and form != "no":
            arguments["response_format"] = _response_format(form, request)
        if self.options.extra_body:
            arguments["extra_body"] = self.options.body
        if self.options.seed and request.temperature > 0:
            # 31 bits: every implementation accepts such seeds.
            arguments["seed"] = request.seed % 2**31
        return arguments

    def notes(self) -> list[str]:
        """Lines for the end of a run: what the replies held beside their text, and was not used."""
        lines = []
        if self.extras:
            lines.append(f"not used of {self.answered} replies: {_numbered(self.extras)}")
        if self.models:
            lines.append(
                f"of {self.answered} replies, some name another model than {self.model}: {_numbered(self.models)}"
            )
        return [f"agent {printable(self.name)}: {printable(line)}" for line in lines]

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

    gate_pass: Pass | None = None
    # Of the verdict, other than the endpoint's: after a refusal that names nothing.
    form: str = ""

    @property
    def most(self) -> int:
        """Tokens that one try can take."""
        return self.bound_in + self.bound_out

    @property
    def tokens(self) -> int:
        """Tokens that all tries took so far."""
        return self.tokens_in + self.tokens_out


def _response_format(mode: str, request: Request) -> dict[str, Any]:
    if mode == "object":
        return {"type": "json_object"}
    schema = {"name": request.task, "strict": True, "schema": json.loads(request.schema)}
    return {"type": "json_schema", "json_schema": schema}


def _numbered(names: Counter[str]) -> str:
    return ", ".join(f"{one_line(name)} ({count})" for name, count in sorted(names.items()))


def _cut(answer: Answer, limit: int) -> Answer:
    """An answer that took all of its tokens, whatever the endpoint says of its end."""
    if answer.error.startswith("no text"):
        return replace(answer, error=f"length: all of max_tokens={limit} was spent before the answer began")
    return replace(answer, finish="length")


def _is_same_model(given: str, asked: str) -> bool:
    """Whether a name in a reply is that of the model asked for; endpoints add dates and leave out owners."""
    first, second = (name.lower().rstrip("/").split("/")[-1] for name in (given, asked))
    short, long = sorted((first, second), key=len)
    return long.startswith(short) and re.fullmatch(r"([-:@_.](latest|\d[\d.-]*))*", long[len(short) :]) is not None


def _wait_seconds(options: Options, request: Request, attempt: int, retry_after: str | None = None) -> float:
    """Seconds before the next try: doubled for each attempt, with jitter; at least what the endpoint asks for."""
    # Jitter separates calls that failed together. It comes from the request's seed, so that a run is reproducible.
    wait = options.backoff * 2**attempt * random.Random(f"{request.seed}/{attempt}").uniform(0.5, 1.0)
    asked = read_retry_after(retry_after)
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
