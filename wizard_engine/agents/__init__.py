"""Agents that answer, evolve and judge: programs, checkpoints, endpoints; one protocol, one scheduler, and a ledger of
every call."""

from .calls import Calls, Limits
from .ledger import Call, Ledger, request_key
from .protocol import Agent, ConcurrentAgent, Reply, Request
from .registry import Cast, make_agent, register, registered
from .scheduler import Scheduler

__all__ = [
    "Agent",
    "Call",
    "Calls",
    "Cast",
    "ConcurrentAgent",
    "Ledger",
    "Limits",
    "Reply",
    "Request",
    "Scheduler",
    "make_agent",
    "register",
    "registered",
    "request_key",
]
