"""Counters and histograms of the server in the text format of Prometheus."""

import threading
from bisect import bisect_left
from collections.abc import Mapping

PREFIX = "wizard_"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HELP = {
    "requests_total": "Requests by route and status.",
    "disconnects_total": "Clients that disconnected before the end of their answer.",
    "failed_streams_total": "Streams that ended with an error.",
    "prompt_tokens_total": "Prompt tokens of accepted requests.",
    "generated_tokens_total": "Tokens sent to clients.",
    "tokens_drawn_total": "Tokens that the engine sampled.",
    "steps_total": "Steps of the engine.",
    "step_seconds_total": "Seconds of the engine's steps.",
    "preemptions_total": "Sequences that were preempted.",
    "graph_captures_total": "Captured CUDA graphs of decode steps.",
    "sequences_open": "Running and waiting sequences.",
    "sequences_running": "Running sequences.",
    "pages": "Pages of the key/value cache.",
    "pages_free": "Free pages of the key/value cache.",
    "first_token_seconds": "Time to a request's first token.",
    "request_seconds": "Time of a whole request.",
}


class Metrics:
    """Counters and histograms; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._histograms: dict[str, tuple[list[int], list[float]]] = {
            name: ([0] * (len(BUCKETS) + 1), [0.0]) for name in ("first_token_seconds", "request_seconds")
        }

    def count(self, name: str, **labels: str) -> None:
        """Increment a counter."""
        self._add(name, 1, labels)

    def add(self, name: str, amount: float) -> None:
        """Add to a counter."""
        self._add(name, amount, {})

    def _add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        key = f"{name}_total", tuple(sorted(labels.items()))
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Add a value to a histogram."""
        counts, total = self._histograms[name]
        with self._lock:
            counts[bisect_left(BUCKETS, seconds)] += 1
            total[0] += seconds

    def text(self, gauges: Mapping[str, float], totals: Mapping[str, float]) -> str:
        """All metrics, with gauges and counters of other objects, in the text format."""
        lines: list[str] = []
        with self._lock:
            counters = dict(self._counters) | {(name, ()): value for name, value in totals.items()}
            histograms = {name: (list(counts), total[0]) for name, (counts, total) in self._histograms.items()}
        for name in dict.fromkeys(name for name, _ in counters):
            lines += self._head(name, "counter")
            lines += [_line(name, dict(labels), value) for (other, labels), value in counters.items() if other == name]
        for name, value in gauges.items():
            lines += [*self._head(name, "gauge"), _line(name, {}, value)]
        for name, (counts, total) in histograms.items():
            lines += self._head(name, "histogram")
            so_far = 0
            for bound, number in zip((*map(str, BUCKETS), "+Inf"), counts):
                so_far += number
                lines.append(_line(f"{name}_bucket", {"le": bound}, so_far))
            lines += [_line(f"{name}_sum", {}, total), _line(f"{name}_count", {}, so_far)]
        return "\n".join(lines) + "\n"

    def _head(self, name: str, kind: str) -> list[str]:
        return [f"# HELP {PREFIX}{name} {HELP[name]}", f"# TYPE {PREFIX}{name} {kind}"]


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{PREFIX}{name}{'{' + inside + '}' if inside else ''} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
