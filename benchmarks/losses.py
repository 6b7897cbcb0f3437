"""A language model's head and its loss, forward and backward, in fp32: one node from hidden states against full logits.

`full logits` is the cheapest form by hand that holds the (T, V) matrix once and turns it into its gradient in place;
`autograd` is F.cross_entropy on the same matrix. `two passes` is the loss made of `linear_logprob`, whose backward
makes the logits anew. Every variant's gradients are checked against those of `full logits` before it is timed.

    python -m benchmarks losses
    python -m benchmarks.losses --tokens 16384 --words 128000 --width 1024      # this size, with peak memory
"""

import argparse
import gc
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleave
from kernels.cross_entropy import cross_entropy
from kernels.dpo import dpo
from kernels.linear_logprob import linear_logprob
from kernels.ppo import ppo

PEER = None
ROWS_AT_A_TIME = 64


class Head:
    """Hidden states and weights of a head, targets, and the gradients that a step leaves."""

    def __init__(self, tokens: int, vocab_size: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
        self.weight = (torch.randn(vocab_size, width, generator=generator) * width**-0.5).requires_grad_()
        self.targets = torch.randint(vocab_size, (tokens,), generator=generator)
        self.weights = torch.ones(tokens)
        self.other = -torch.rand(tokens, generator=generator) * 10
        half = max(1, tokens // 2)
        self.marks = torch.tensor([0, half, tokens], dtype=torch.int32)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Take the gradients away."""
        grads = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        return grads

    def one_node(self) -> None:
        """cross_entropy: gradients in the forward."""
        cross_entropy(
            self.hidden, self.weight, self.targets, self.weights, num_tokens=len(self.targets)
        ).loss.backward()

    def two_passes(self) -> None:
        """linear_logprob: the backward makes the logits anew."""
        (-linear_logprob(self.hidden, self.weight, self.targets)[0].mean()).backward()

    def autograd(self) -> None:
        """F.cross_entropy of all logits."""
        F.cross_entropy(self.hidden @ self.weight.T, self.targets).backward()

    @torch.no_grad()
    def full_logits(self) -> None:
        """All logits at once, turned into their gradient in place."""
        logits = self.hidden @ self.weight.T
        for rows in logits.split(ROWS_AT_A_TIME):
            rows.sub_(rows.logsumexp(-1, keepdim=True)).exp_()
        logits[torch.arange(len(self.targets)), self.targets] -= 1
        logits /= len(self.targets)
        self.hidden.grad, self.weight.grad = logits @ self.weight, logits.T @ self.hidden

    def dpo(self) -> None:
        """One pair as long as the row."""
        dpo(
            self.hidden,
            self.weight,
            self.targets,
            self.weights,
            self.marks,
            torch.tensor([-5e4, -5e4]),
            beta=0.1,
            num_pairs=1,
        ).loss.backward()

    def ppo(self) -> None:
        """Clipped surrogate with entropy and a divergence."""
        ppo(
            self.hidden,
            self.weight,
            self.targets,
            self.other,
            self.other,
            clip=0.2,
            num_tokens=len(self.targets),
            reference=self.other,
            kl=0.1,
            entropy=0.01,
        ).loss.backward()


VARIANTS: dict[str, Callable[[Head], None]] = {
    "one node": Head.one_node,
    "two passes": Head.two_passes,
    "full logits": Head.full_logits,
    "autograd": Head.autograd,
    "dpo": Head.dpo,
    "ppo": Head.ppo,
}
SAME = ("one node", "two passes", "autograd")


def check_same(head: Head, names: list[str]) -> None:
    """AssertionError where a variant's gradients are not those of `full logits`."""
    head.full_logits()
    expected = head.gradients()
    for name in names:
        VARIANTS[name](head)
        for grad, right in zip(head.gradients(), expected):
            off = float((grad - right).norm() / right.norm())
            assert off < 1e-4, f"{name}: gradients are off by {off:.1e}"


def timed(tokens: int, vocab_size: int, width: int, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row per variant, with its ratio to full logits."""
    head = Head(tokens, vocab_size, width)
    check_same(head, [name for name in names if name in SAME])

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            VARIANTS[name](head)
            head.gradients()

        return run

    return interleave(
        "losses",
        {name: step(name) for name in names},
        items=tokens,
        unit="tokens/s",
        repeats=repeats,
        shape=f"T={tokens} V={vocab_size} D={width} fp32",
        peer="full logits",
    )


def _resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (largest so far) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _measure_peak(tokens: int, vocab_size: int, width: int, name: str, threads: int, answers: Any) -> None:
    torch.set_num_threads(threads)
    small = Head(8, 64, width)
    VARIANTS[name](small)
    head = Head(tokens, vocab_size, width)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _resident("VmRSS")
    VARIANTS[name](head)
    kept = sum(x.numel() * x.element_size() for x in head.gradients())
    answers.put(_resident("VmHWM") - before - kept)


def peak_bytes(tokens: int, vocab_size: int, width: int, name: str) -> int | None:
    """Largest memory of a step besides inputs and gradients, measured in a process of its own; None if it was killed.

    Source: VmHWM of /proc/self/status (Linux), reset after the inputs are there.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    arguments = (tokens, vocab_size, width, name, torch.get_num_threads(), answers)
    process = context.Process(target=_measure_peak, args=arguments)
    process.start()
    process.join()
    return answers.get() if process.exitcode == 0 else None


def run(*, quick: bool = False, peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the benchmark, each with its peak memory besides inputs and gradients, MiB."""
    shape = (256, 2048, 64) if quick else (2048, 32000, 1024)
    rows = timed(*shape, list(VARIANTS), 2 if quick else 5)
    for row in rows:
        row["peak_mib"] = peak_bytes(*shape, row["variant"]) / 2**20
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Time and peak memory of one size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=(__doc__ or "").split("\n\n")[0])
    for name, default in (("tokens", 16384), ("words", 128000), ("width", 1024), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        metavar="NAME",
        default=list(VARIANTS)[:3],
        help=f"of {', '.join(VARIANTS)}; default: the first three",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="JSON lines")
    options = parser.parse_args(arguments)
    from benchmarks.__main__ import environment, line_of

    shape = (options.tokens, options.words, options.width)
    peaks = {name: peak_bytes(*shape, name) for name in options.variants}
    rows = timed(*shape, options.variants, options.repeats) if options.repeats else []
    for row in rows:
        peak = peaks[row["variant"]]
        row["peak_mib"] = None if peak is None else peak / 2**20
        print(line_of(row) + f"   peak {row['peak_mib']:,.0f} MiB besides inputs and gradients")
    if options.json:
        options.json.write_text("".join(json.dumps(environment() | row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
