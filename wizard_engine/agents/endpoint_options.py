"""How an endpoint is called: the options of `openai:MODEL@URL#name=value,...`."""

import json
import os
import re
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Positive

from .prices import Price

PREFIX = "openai:"
TOKEN_LIMITS = ("auto", "max_tokens", "max_completion_tokens")
JSON_MODES = ("auto", "schema", "object", "no")
OWN_FIELDS = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stream", "n"}
_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


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


def endpoint_name(model: str, url: str | None) -> str:
    """Name of an endpoint's model in ledgers and messages: `MODEL@HOST:PORT`."""
    parts = urlsplit(base_url_of(url))
    return f"{model}@{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def base_url_of(url: str | None) -> str:
    """The address of an API: the one of a spec, OPENAI_BASE_URL, or that of OpenAI."""
    return url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"


def replying_spec(spec: str) -> str:
    """An agent's spec without the options that change no reply: limits, budgets, prices; in one order.

    Of another spec than an endpoint's, all of it.

    Raises:
        ValueError: as for parse_spec.
    """
    if not spec.startswith(PREFIX):
        return spec
    model, url, options = parse_spec(spec)
    default = Options()
    sent = ("seed", "temperature", "reasoning_effort", "extra_body", "json", "extras")
    values = {name: getattr(options, name) for name in sent if getattr(options, name) != getattr(default, name)}
    if options.extra_body:
        values["extra_body"] = json.dumps(options.body, sort_keys=True)
    settings = ",".join(f"{name}={value}" for name, value in values.items())
    return f"{PREFIX}{model}" + (f"@{url}" if url else "") + (f"#{settings}" if settings else "")


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
    try:
        return model, url.rstrip("/") or None, Options(**_settings(settings))
    except ValueError as error:
        # A command line has several agents.
        raise ValueError(f"agent {model[:60]}: {error}") from None


def _settings(text: str) -> dict[str, Any]:
    kinds = {field.name: type(field.default) for field in fields(Options)}
    values: dict[str, Any] = {}
    for item in filter(None, _items(text)):
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ValueError(f"expected options of {', '.join(kinds)}, got {name[:40]!r}")
        try:
            values[name] = _switch(value) if kinds[name] is bool else kinds[name](value)
        except ValueError:
            kind = {bool: "yes or no", int: "a whole number", float: "a number"}[kinds[name]]
            raise ValueError(f"{name}: expected {kind}, got {value[:40]!r}") from None
    return values


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCHES:
        raise ValueError(text)
    return _SWITCHES[text.lower()]


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
