"""One agent on several ranks: each rank answers its share of the requests, all of them get all replies."""

from collections.abc import Sequence

from wizard_engine.runtime.object_collectives import gather_objects

from .protocol import Agent, Reply, Request


class SplitAgent:
    """Divides requests over the ranks of a process group and gathers the replies in order.

    Every rank must make the same calls with the same requests, so that the work around the agent runs the same on all
    of them. Equal requests are asked once.

    Args:
        agent: this rank's own.
        rank, world_size: this rank's place.
    """

    def __init__(self, agent: Agent, rank: int, world_size: int) -> None:
        self.agent, self.rank, self.world_size = agent, rank, world_size
        self.name, self.fingerprint = agent.name, agent.fingerprint

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, on every rank."""
        unique = list(dict.fromkeys(requests))
        mine = self.agent.respond(unique[self.rank :: self.world_size])
        replies: dict[Request, Reply] = {}
        for rank, part in enumerate(gather_objects([(reply.text, reply.error) for reply in mine])):
            replies.update(zip(unique[rank :: self.world_size], (Reply(*reply) for reply in part), strict=True))
        return [replies[request] for request in requests]
