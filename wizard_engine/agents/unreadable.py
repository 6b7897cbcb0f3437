"""An agent none of whose first replies to a task can be used: the stage ends, instead of asking it until the end."""

from .protocol import Agent, ConcurrentAgent, Reply

# Requests of an agent and task, each with all its repeats, that give nothing before the stage ends.
FIRST_REQUESTS = 30


class FirstReplies:
    """Counts the requests of each agent and task whose replies were unreadable or cut, until one can be used.

    From then on the share of missing replies decides alone, at the end of the stage (see missing.check_missing).
    Calls that failed for another reason are none of them.

    Args:
        most: requests after which the stage ends; 0 for never.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        # None once a reply could be used.
        self._unread: dict[tuple[str, str], int | None] = {}

    def used(self, agent: Agent | ConcurrentAgent, task: str) -> None:
        """A reply could be read."""
        self._unread[agent.name, task] = None

    def unread(self, agent: Agent | ConcurrentAgent, task: str, reply: Reply, limit_option: str) -> None:
        """One request gave nothing, the last reply to it being `reply`.

        Args:
            limit_option: what raises the limit of the task's replies.
        Raises:
            ValueError: none of the first `most` gave anything.
        """
        unread = self._unread.get((agent.name, task), 0)
        if unread is None:
            return
        self._unread[agent.name, task] = unread + 1
        if unread + 1 != self.most:
            return
        ending = ", cut at its limit" if reply.is_cut else ""
        longer = f"raise {limit_option}, " if reply.is_cut else ""
        raise ValueError(
            f"replies of {agent.name} to {task!r}: expected some that can be read, got none in the first {self.most} "
            f"requests, such as {reply.text[:200]!r}{ending}; {longer}give another agent, mend its chat format, or "
            f"give a {task}.txt that it follows by --prompt-folder; --max-missing 1 goes on all the same"
        )
