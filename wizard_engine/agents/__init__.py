"""Who answers, evolves and judges: programs and checkpoints behind one protocol, with a ledger of every call."""

from wizard_engine.agents.ledger import Call, Ledger, LedgeredAgent, request_key
from wizard_engine.agents.protocol import Agent, Reply, Request
from wizard_engine.agents.registry import Cast, make_agent, register, registered

__all__ = [
    "Agent",
    "Call",
    "Cast",
    "Ledger",
    "LedgeredAgent",
    "Reply",
    "Request",
    "make_agent",
    "register",
    "registered",
    "request_key",
]
