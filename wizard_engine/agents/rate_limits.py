"""How many calls an endpoint takes at once and a minute: given, and learned from its headers and refusals."""

import asyncio
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Calls reach the endpoint a little later or sooner than each other: a minute, and what that may take.
WINDOW_SECONDS = 61.0
# Units that may be taken at once after a pause: those of so many seconds.
BURST_SECONDS = 5.0


@dataclass
class Taken:
    """Units taken at a time."""

    when: float
    amount: float


class Quota:
    """Units a minute: requests or tokens. No minute has more than its units, and they are spread over it.

    Args:
        per_minute: 0 for no limit.
    """

    def __init__(self, per_minute: float = 0.0) -> None:
        self.per_minute = per_minute
        self._taken: deque[Taken] = deque()
        self._sum = self._paid = 0.0

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; more than a minute's is let through when nothing else was taken."""
        if not self.per_minute:
            return 0.0
        while self._taken and self._taken[0].when + WINDOW_SECONDS <= now:
            self._sum -= self._taken.popleft().amount
        over, until = self._sum + amount - self.per_minute, 0.0
        for taken in self._taken:
            if over <= 0:
                break
            over, until = over - taken.amount, taken.when + WINDOW_SECONDS - now
        return max(0.0, until, self._paid - BURST_SECONDS - now)

    def take(self, amount: float, now: float) -> Taken:
        """Takes units."""
        if not self.per_minute:
            return Taken(float("-inf"), amount)
        self._taken.append(taken := Taken(now, amount))
        self._sum += amount
        self._paid = max(self._paid, now) + amount * 60 / self.per_minute
        return taken

    def correct(self, taken: Taken, amount: float) -> None:
        """So many units were taken in truth."""
        # What was taken more than a minute ago, or without a limit, is not counted any more.
        if self._taken and taken.when >= self._taken[0].when:
            self._sum += amount - taken.amount
            self._paid += (amount - taken.amount) * 60 / self.per_minute
        taken.amount = amount

    def learn(self, per_minute: float | None, remaining: float | None, now: float) -> None:
        """What an answer says of the limit: the smallest one counts, and others may have taken of it, too."""
        if per_minute and (not self.per_minute or per_minute < self.per_minute):
            self.per_minute = per_minute
        if per_minute and remaining is not None and per_minute - remaining > self._sum:
            self._taken.append(Taken(now, per_minute - remaining - self._sum))
            self._sum = per_minute - remaining


@dataclass
class Pass:
    """A call that the gate has let through."""

    began: float
    tokens: Taken


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
        self.requests, self.tokens = Quota(requests_per_minute), Quota(tokens_per_minute)
        self.not_before, self._slowed = 0.0, -1.0
        self._turn, self._changed, self._now = asyncio.Lock(), asyncio.Event(), asyncio.get_running_loop().time

    async def enter(self, tokens: int) -> Pass:
        """Wait until a call of at most so many tokens may start. `leave` must follow."""
        async with self._turn:
            while (wait := self._wait(tokens, self._now())) > 0:
                self._changed.clear()
                try:
                    async with asyncio.timeout(None if wait == float("inf") else wait):
                        await self._changed.wait()
                except TimeoutError:
                    continue
            self.running += 1
            now = self._now()
            self.requests.take(1, now)
            return Pass(now, self.tokens.take(tokens, now))

    def leave(self, call: Pass, tokens: int) -> None:
        """A call has ended, and took so many tokens."""
        self.running -= 1
        self.tokens.correct(call.tokens, tokens)
        self._changed.set()

    def _wait(self, tokens: int, now: float) -> float:
        if self.running >= max(1, int(self.allowed)):
            return float("inf")
        return max(self.not_before - now, self.requests.wait(1, now), self.tokens.wait(tokens, now), 0.0)

    def succeed(self) -> None:
        """A call was answered: one more may run at once after each round of answers."""
        self.allowed = min(self.most, self.allowed + 1 / max(1.0, self.allowed))

    def slow_down(self, call: Pass, seconds: float) -> None:
        """The endpoint refused a call for its rate, and asks to wait; refusals of one round count once."""
        now = self._now()
        if call.began >= self._slowed:
            self.allowed, self._slowed = max(1.0, self.allowed / 2), now
        self.not_before = max(self.not_before, now + seconds)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Read the limits of an answer's `x-ratelimit-*` headers."""
        now = self._now()
        for name, quota in (("requests", self.requests), ("tokens", self.tokens)):
            limit = _number(headers.get(f"x-ratelimit-limit-{name}"))
            remaining = _number(headers.get(f"x-ratelimit-remaining-{name}"))
            reset = read_duration(headers.get(f"x-ratelimit-reset-{name}"))
            quota.learn(limit, remaining, now)
            if remaining is not None and remaining < 1 and reset:
                self.not_before = max(self.not_before, now + min(reset, 60.0))


def read_duration(text: str | None) -> float | None:
    """Seconds of `7`, `0.5`, `20ms`, `6m0s`, `1h2m3s`; None for anything else."""
    if text is None:
        return None
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)
    parts = _DURATION.findall(text)
    is_duration = parts and _DURATION.sub("", text) == ""
    return sum(float(number) * _SECONDS[unit] for number, unit in parts) if is_duration else None


def read_retry_after(text: str | None) -> float | None:
    """Seconds of a `Retry-After` header: a duration, or the date until which to wait; None for anything else."""
    seconds = read_duration(text)
    if text is None or seconds is not None:
        return seconds
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\d+(\.\d+)?", text.strip(), re.ASCII) else None
