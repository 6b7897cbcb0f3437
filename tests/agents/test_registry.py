"""Agents by name."""

import pytest
from asking import ask, responses

from wizard_engine.agents import Cast, Ledger, Reply, make_agent, register, registered
from wizard_engine.runtime.process import Runtime


class RegisteredAgent:
    name, fingerprint = "fixed", "1"

    def respond(self, requests):
        return [Reply("yes") for _ in requests]


@pytest.fixture
def agent_name():
    register("test:fixed", RegisteredAgent)
    return "test:fixed"


def test_make_agent_finds_registered_names(agent_name, tmp_path):
    assert agent_name in registered()
    assert isinstance(make_agent(agent_name), RegisteredAgent)
    ledger = Ledger(tmp_path / "l.sqlite")
    assert responses(make_agent(agent_name), [ask("?")], ledger) == [Reply("yes")]
    assert ledger.counts() == {"fixed": {"answer": {"replies": 1, "failures": 0}}}


def test_cast_makes_each_agent_once_with_one_ledger(agent_name, tmp_path):
    cast = Cast(tmp_path / "l.sqlite", Runtime())
    agent = cast.agent(agent_name)
    assert cast.agent(agent_name) is agent and cast.scheduler.ledger is cast.ledger
    assert cast.optional(None) is None and cast.optional(agent_name) is agent
    replies = cast.conduct(lambda: cast.scheduler.run(cast.scheduler.each(agent, [ask("?")])))
    assert replies == [Reply("yes")] and cast.ledger.counts()["fixed"]["answer"]["replies"] == 1
    cast.close()
    assert not (tmp_path / "l.sqlite-wal").exists()


def test_make_agent_names_the_nearest(agent_name, tmp_path):
    with pytest.raises(ValueError, match="got 'test:fixd'; did you mean 'test:fixed'"):
        make_agent("test:fixd")
    with pytest.raises(ValueError, match="openai:MODEL@URL, or a directory holding a saved model, got"):
        make_agent(tmp_path)
