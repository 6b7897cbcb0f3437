"""Who answers, evolves and judges: programs and checkpoints behind one protocol, with a ledger of every call."""

from wizard_engine.agents.protocol import Agent, Reply, Request

__all__ = ["Agent", "Reply", "Request"]
