"""Agents that answer, evolve and judge: programs, checkpoints, endpoints; one protocol, and a ledger of every call."""

from .ledger import Call, Ledger, LedgeredAgent, request_key
from .protocol import Agent, Reply, Request
from .registry import Cast, make_agent, register, registered

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
