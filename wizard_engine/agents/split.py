"""One agent on several ranks: requests are sharded over the ranks, and every rank gets all replies."""

from collections.abc import Sequence

from wizard_engine.runtime.object_collectives import gather_objects

from .protocol import Agent, Reply, Request


class SplitAgent:
    """Shards requests over the ranks of the process group and gathers the replies in order.

    Every rank must make the same calls with the same requests. Equal requests are asked once.

    Args:
        agent: the agent of this rank.
        rank, world_size: of the process group.
    """

    def __init__(self, agent: Agent, rank: int, world_size: int) -> None:
        self.agent, self.rank, self.world_size = agent, rank, world_size
        self.name, self.fingerprint = agent.name, agent.fingerprint

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, on every rank."""
        unique = list(dict.fromkeys(requests))
        mine = self.agent.respond(unique[self.rank :: self.world_size])
        replies: dict[Request, Reply] = {}
        for rank, part in enumerate(gather_objects([(reply.text, reply.error, reply.finish) for reply in mine])):
            replies.update(zip(unique[rank :: self.world_size], (Reply(*reply) for reply in part), strict=True))
        return [replies[request] for request in requests]
