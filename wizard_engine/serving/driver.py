"""A thread that runs the generation engine for many clients, and ranks that repeat its commands.

Client threads only append to an inbox. The engine thread alone touches the engine, once between two steps, so that the
engine needs no locks.
"""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.engine import Engine
from wizard_engine.generation.failures import described
from wizard_engine.generation.scheduler import Reason, Sampling
from wizard_engine.generation.scheduler import Sequence as EngineSequence
from wizard_engine.generation.scoring import prompt_logprobs
from wizard_engine.generation.streaming import ShownToken, TextStream
from wizard_engine.parallel.mesh import Axis

# Without work, rank 0 still broadcasts an empty command list this often (seconds), so that the collective in which the
# other ranks wait does not time out.
HEARTBEAT = 30.0


@dataclass
class Piece:
    """The result of one step for one choice of a job.

    Attributes:
        choice: number of the choice.   text: text that no later token can change.   token, logprob, top: the new token,
            its log-probability (nats) and the most likely tokens.   reason: why the choice ended, in its last piece.
        error: what failed, where the reason is "error".
        shown: tokens whose text has been given out, where the job keeps them.
    """

    choice: int
    text: str
    token: int | None = None
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)
    reason: Reason | None = None
    error: str = ""
    shown: list[ShownToken] = field(default_factory=list)


Scores = tuple[list[float], list[list[tuple[int, float]]]]


@dataclass(eq=False)
class Job:
    """A prompt to be continued n times.

    Attributes:
        deliver: called by the driver's thread with the pieces of each step.   stop: strings that end a choice.
        strip, continues: of the text, as `TextStream`.   keeps_tokens: report which tokens have been given out.
        score: likeliest tokens to report in the place of each of the prompt's; None: do not score it.
        generates: continue the prompt; otherwise it is only scored.   scores: log-probabilities of the prompt, as
            `prompt_logprobs`, before the first piece.
        open: choices that have not ended.   cached: prompt tokens whose keys and values were in the cache.
    """

    prompt: list[int]
    sampling: Sampling
    n: int
    deliver: Callable[[list[Piece]], None]
    stop: tuple[str, ...] = ()
    strip: bool = True
    continues: bool = False
    keeps_tokens: bool = False
    score: int | None = None
    generates: bool = True
    scores: Scores | None = None
    sequences: list[EngineSequence] = field(default_factory=list)
    streams: list[TextStream] = field(default_factory=list)
    open: int = 0
    cached: int = 0
    came: float = field(default_factory=time.monotonic)


class QueueFull(Exception):
    """The driver has no room for more sequences, or it stops."""


class Driver:
    """Runs an engine in its own thread.

    If the model is sharded over ranks, rank 0 of the axis has a driver and `follow` repeats its commands on the others.

    Args:
        max_jobs: most sequences that run or wait.   axis: the ranks that the model is sharded over.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, max_jobs: int, axis: Axis | None = None) -> None:
        self.engine, self.tokenizer, self.max_jobs, self.axis = engine, tokenizer, max_jobs, axis or Axis()
        self._wake = threading.Condition()
        self._inbox: deque[tuple[str, Job]] = deque()
        self._jobs: dict[int, tuple[Job, int]] = {}
        # Commands to share after the next step: ends of sequences whose job failed on this rank alone.
        self._late: list[tuple] = []
        self._unscored: deque[Job] = deque()
        self._beginning: list[Job] = []
        self._open, self._ends, self.error = 0, False, ""
        self.step_seconds = self.steps = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def open(self) -> int:
        """Sequences that have not ended."""
        return self._open

    def submit(self, job: Job) -> None:
        """Continue a job's prompt.

        Raises:
            QueueFull: no room for its sequences, or the driver stops.   ValueError: as `Engine.add`.
        """
        self.engine.check(job.prompt, job.sampling)
        with self._wake:
            if self._ends or self.error:
                raise QueueFull(self.error or "the server is about to end")
            if self._open + job.n > self.max_jobs:
                raise QueueFull(f"{self._open} sequences run and wait, at most {self.max_jobs} are taken")
            self._open += job.n
            job.open = job.n
            self._inbox.append(("add", job))
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job that no client waits for; its pages are freed before the next step."""
        with self._wake:
            self._inbox.append(("cancel", job))
            self._wake.notify()

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Accept no more jobs, wait up to `drain_seconds` for running ones, and stop the thread."""
        with self._wake:
            self._ends = True
            self._wake.notify()
            self._wake.wait_for(lambda: not self._open, drain_seconds)
            self._inbox.append(("end", None))  # type: ignore[arg-type]
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            # Every waiting client gets an answer; the process stays up so that /health reports the failure.
            self.error = f"{type(error).__name__}: {error}"
            with self._wake:
                waiting = {id(job): job for job, _ in self._jobs.values()}
                waiting |= {id(job): job for what, job in self._inbox if what == "add"}
                waiting |= {id(job): job for job in (*self._unscored, *self._beginning)}
                self._open = 0
                self._wake.notify_all()
            for job in waiting.values():
                _deliver(job, [Piece(i, "", reason="cancelled") for i in range(job.n)])
            raise

    def _turn(self) -> bool:
        """Apply the inbox and make one step; False at the end."""
        with self._wake:
            timeout = HEARTBEAT if self.axis.size > 1 else None
            self._wake.wait_for(lambda: self._inbox or self._unscored or self.engine.has_work, timeout)
            inbox, self._inbox = list(self._inbox), deque()
        added = [job for what, job in inbox if what == "add"]
        dropped = {id(job): job for what, job in inbox if what == "cancel"}
        # A job that was cancelled in the same turn is not added at all.
        self._beginning = beginning = self._admitted([job for job in added if id(job) not in dropped], dropped)
        commands: list[tuple[tuple, Job | None]] = []
        for job in beginning:
            if job.score is not None:
                commands.append((("score", job.prompt, job.score), job))
            elif job.generates:
                commands.append((("add", job.prompt, job.sampling, job.n), job))
        for job in dropped.values():
            running = [sequence for sequence in job.sequences if sequence.reason is None]
            commands += [(("finish", sequence.number, "cancelled"), None) for sequence in running]
        commands += [(("end",), None) for what, _ in inbox if what == "end"]
        shared([command for command, _ in commands], self.axis)
        for command, job in commands:
            if command[0] == "end":
                return False
            made = apply(self.engine, command)
            if command[0] == "add":
                self._begin(job, made)
            elif command[0] == "score":
                self._scored(job, made)
        self._go_on(beginning)
        self._beginning = []
        for job in dropped.values():
            self._dropped(job)
        self._step()
        return True

    def _admitted(self, jobs: list[Job], dropped: dict[int, Job]) -> list[Job]:
        """Jobs to begin in this turn: of those whose prompt is to be scored, one."""
        unscored = (*self._unscored, *(job for job in jobs if job.score is not None))
        self._unscored = deque(job for job in unscored if id(job) not in dropped)
        admitted = [job for job in jobs if job.score is None]
        return [*admitted, self._unscored.popleft()] if self._unscored else admitted

    def _scored(self, job: Job, scores: Scores | Exception) -> None:
        """Keep the scores of a job's prompt, or end the job with the reason why there are none."""
        if isinstance(scores, Exception):
            self._fail(job, scores)
        else:
            job.scores = scores

    def _go_on(self, jobs: list[Job]) -> None:
        """End the jobs that are done with their scores; others begin in the next turn."""
        for job in jobs:
            if job.open and not job.generates:
                self._dropped(job)
                _deliver(job, [Piece(i, "", reason="length") for i in range(job.n)])
            elif job.open and job.score is not None:
                job.score = None
                with self._wake:
                    self._inbox.appendleft(("add", job))

    def _begin(self, job: Job, made: list[EngineSequence] | Exception) -> None:
        if isinstance(made, Exception):
            return self._fail(job, made)
        job.sequences = made
        for choice, sequence in enumerate(made):
            self._jobs[sequence.number] = job, choice
        how = {"strip": job.strip, "continues": job.continues, "keeps_tokens": job.keeps_tokens}
        try:
            job.streams = [TextStream(self.tokenizer, job.stop, **how) for _ in made]
        # Whatever a job's own text or callback raises is that job's error.
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job that has no piece yet."""
        self._abandon(job)
        _deliver(job, [Piece(i, "", reason="error", error=described(error)) for i in range(job.n)])

    def _abandon(self, job: Job) -> None:
        """Remove the open choices of a job and end their sequences on all ranks."""
        self._late += [("finish", s.number, "cancelled") for s in job.sequences if s.number in self._jobs]
        self._dropped(job)

    def _dropped(self, job: Job) -> None:
        """Remove the open choices of a cancelled job."""
        for sequence in job.sequences:
            self._jobs.pop(sequence.number, None)
        gone, job.open = job.open, 0
        self._closed(gone)

    def _step(self) -> None:
        began = time.perf_counter()
        grown = self.engine.step()
        self.step_seconds += time.perf_counter() - began
        self.steps += 1
        pieces: dict[int, tuple[Job, list[Piece]]] = {}
        # Stop strings are known on this rank only: the other ranks get the sequences that they end as commands.
        stopped, self._late = self._late, []
        for sequence in grown:
            if sequence.number not in self._jobs:
                continue
            job, choice = self._jobs[sequence.number]
            try:
                piece = _piece(job, choice, sequence)
            # As in `_begin`.
            except Exception as error:
                piece = Piece(choice, "", reason="error", error=described(error))
            if piece.reason is not None and sequence.reason is None:
                stopped.append(("finish", sequence.number, "cancelled" if piece.reason == "error" else "stop"))
            pieces.setdefault(id(job), (job, []))[1].append(piece)
        shared(stopped, self.axis)
        for command in stopped:
            apply(self.engine, command)
        for job, job_pieces in pieces.values():
            ended = [piece for piece in job_pieces if piece.reason is not None]
            for piece in ended:
                del self._jobs[job.sequences[piece.choice].number]
            job.open -= len(ended)
            self._closed(len(ended))
            if not _deliver(job, job_pieces):
                self._abandon(job)

    def _closed(self, count: int) -> None:
        if count:
            with self._wake:
                self._open -= count
                self._wake.notify_all()


def _piece(job: Job, choice: int, sequence: EngineSequence) -> Piece:
    """The piece of a sequence's last token, or of its failure."""
    if sequence.reason == "error":
        return Piece(choice, "", reason="error", error=sequence.error)
    stream, token = job.streams[choice], sequence.ids[-1]
    if sequence.steps == 1 and choice == 0:
        job.cached = sequence.cached
    is_end = token in sequence.sampling.eos_ids
    text = "" if is_end else stream.push(token)
    reason = "stop" if stream.stopped else sequence.reason
    if reason is not None and not stream.stopped:
        # The stream holds text back while it may be part of a stop string or of a character.
        text += stream.end()
    shown = stream.shown_tokens(is_last=reason is not None) if job.keeps_tokens else []
    reason = "stop" if stream.stopped else reason
    top = sequence.top[-1] if sequence.sampling.top_logprobs and sequence.top else []
    return Piece(choice, text, token, sequence.logprobs[-1], top, reason, shown=shown)


def _deliver(job: Job, pieces: list[Piece]) -> bool:
    """Whether the pieces were delivered: the event loop of a client that has disconnected may be closed already."""
    # As in `Driver._begin`.
    with contextlib.suppress(Exception):
        job.deliver(pieces)
        return True
    return False


def shared(commands: list[tuple], axis: Axis) -> list[tuple]:
    """The first rank's commands, on every rank of an axis."""
    if axis.size > 1:
        box: list[Any] = [commands]
        dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
        return box[0]
    return commands


def apply(engine: Engine, command: Sequence[Any]) -> list[EngineSequence] | Scores | Exception | None:
    """Apply a command; returns the sequences of an "add", the scores of a "score", or what it raised."""
    try:
        if command[0] == "add":
            return engine.add(command[1], command[2], n=command[3])
        if command[0] == "score":
            return _scores(engine, command[1], command[2])
    # As in `Driver._begin`; every rank gets it.
    except Exception as error:
        return error
    if command[0] == "finish":
        scheduler = engine.scheduler
        waiting = (*scheduler.running, *scheduler.waiting)
        for sequence in (*waiting, *(follower for leader in waiting for follower in leader.followers)):
            if sequence.number == command[1]:
                engine.finish(sequence, command[2])
                break
    return None


def _scores(engine: Engine, prompt: list[int], top: int) -> Scores:
    """`prompt_logprobs` of a prompt.

    Raises:
        ValueError: they are no numbers.
    """
    logprobs, tops = prompt_logprobs(engine.model, prompt, top=top)
    if any(map(math.isnan, logprobs)):
        raise ValueError("logits: expected numbers for the prompt, got NaN; look for them in the model's weights")
    return logprobs, tops


def follow(engine: Engine, axis: Axis) -> None:
    """Repeat the commands of rank 0's driver until it ends. The order of broadcasts and steps is that of `_turn`."""
    while True:
        for command in shared([], axis):
            if command[0] == "end":
                return
            apply(engine, command)
        engine.step()
        for command in shared([], axis):
            apply(engine, command)
