"""Asks an agent through a scheduler, as a recipe does, and agents that a test can look into."""

from wizard_engine.agents import Reply, Request, Scheduler
from wizard_engine.data.records import Message


def responses(agent, requests, ledger=None, **options):
    """Replies in the order of the requests."""
    scheduler = Scheduler(ledger, quiet=True, **options)
    return scheduler.run(scheduler.each(agent, requests))


def ask(text, seed=0, task="answer", **settings):
    return Request(task, (Message("user", text),), seed=seed, **settings)


def texts(replies):
    return [reply.text for reply in replies]


class Echo:
    """Repeats the last message; fails where it holds the word fail; remembers what it was asked."""

    def __init__(self, name="echo", fingerprint="1", fail="fail"):
        self.name, self.fingerprint, self.fail, self.batches = name, fingerprint, fail, []

    def respond(self, requests):
        self.batches.append([request.messages[-1].content for request in requests])
        return [self._reply(request) for request in requests]

    def _reply(self, request):
        text = request.messages[-1].content
        if self.fail and self.fail in text:
            return Reply("half a rep", error="timed out")
        return Reply(f"{text}/{request.seed}/{len(self.batches)}")


class Instant(Echo):
    """The same, without a batch."""

    is_instant, converses = True, False
