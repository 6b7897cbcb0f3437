"""How many calls an endpoint takes at once and a minute: given, and learned from its headers and refusals."""

import asyncio
import re
import time
from collections.abc import Mapping

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Calls that may start at once after a pause, as a share of a minute's.
BURST = 1 / 12


class Bucket:
    """Units a minute: requests or tokens. A unit taken comes back within a minute, at a steady rate.

    Args:
        per_minute: 0 for no limit.
    """

    def __init__(self, per_minute: float = 0.0) -> None:
        self.per_minute, self.level, self.when = per_minute, per_minute * BURST, time.monotonic()

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; more than the bucket holds is let through when it is full."""
        if not self.per_minute:
            return 0.0
        rate, full = self.per_minute / 60, max(1.0, self.per_minute * BURST)
        self.level, self.when = min(full, self.level + (now - self.when) * rate), now
        return max(0.0, (min(amount, full) - self.level) / rate)

    def take(self, amount: float) -> None:
        """Takes units, beyond what is there if need be."""
        if self.per_minute:
            self.level -= amount

    def limit(self, per_minute: float) -> None:
        """Learn the limit, unless a smaller one was given or learned."""
        if per_minute > 0 and (not self.per_minute or per_minute < self.per_minute):
            self.level = min(self.level, per_minute * BURST) if self.per_minute else per_minute * BURST
            self.per_minute = per_minute


class Gate:
    """Lets calls to an endpoint through, first come first served.

    After a refusal for its rate (`slow_down`) every call waits as long as the endpoint asks, and half as many run at
    once; each success gives back a part. Belongs to one event loop.

    Args:
        concurrency: calls at once, at most.
        requests_per_minute, tokens_per_minute: 0: as many as the endpoint's headers say, or without a limit.
    """

    def __init__(self, concurrency: int, requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0) -> None:
        self.most, self.allowed, self.running = concurrency, float(concurrency), 0
        self.requests, self.tokens = Bucket(requests_per_minute), Bucket(tokens_per_minute)
        self.not_before = 0.0
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()

    async def enter(self, tokens: int) -> None:
        """Wait until a call of so many tokens may start. `leave` must follow."""
        async with self._turn:
            while (wait := self._wait(tokens, time.monotonic())) > 0:
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), None if wait == float("inf") else wait)
                except TimeoutError:
                    continue
            self.running += 1
            self.requests.take(1)
            self.tokens.take(tokens)

    def leave(self) -> None:
        """A call has ended."""
        self.running -= 1
        self._changed.set()

    def _wait(self, tokens: int, now: float) -> float:
        if self.running >= max(1, int(self.allowed)):
            return float("inf")
        return max(self.not_before - now, self.requests.wait(1, now), self.tokens.wait(tokens, now), 0.0)

    def succeed(self) -> None:
        """A call was answered: one more may run at once after each round of answers."""
        self.allowed = min(self.most, self.allowed + 1 / max(1.0, self.allowed))

    def slow_down(self, seconds: float) -> None:
        """The endpoint refused a call for its rate."""
        now = time.monotonic()
        # Refusals of one burst count once.
        if now >= self.not_before:
            self.allowed = max(1.0, self.allowed / 2)
        self.not_before = max(self.not_before, now + seconds)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Read the limits of an answer's `x-ratelimit-*` headers."""
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            limit = _number(headers.get(f"x-ratelimit-limit-{name}"))
            remaining = _number(headers.get(f"x-ratelimit-remaining-{name}"))
            reset = read_duration(headers.get(f"x-ratelimit-reset-{name}"))
            if limit:
                bucket.limit(limit)
            if remaining is not None and remaining < 1 and reset:
                self.not_before = max(self.not_before, time.monotonic() + min(reset, 60.0))


def read_duration(text: str | None) -> float | None:
    """Seconds of `7`, `0.5`, `20ms`, `6m0s`, `1h2m3s`; None for anything else."""
    if text is None:
        return None
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = _DURATION.findall(text)
    return (
        sum(float(number) * _SECONDS[unit] for number, unit in parts)
        if _DURATION.sub("", text) == "" and parts
        else None
    )


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\d+(\.\d+)?", text.strip()) else None
