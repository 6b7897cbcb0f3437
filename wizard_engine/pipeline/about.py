"""What the report of a run of one's own says beside the files of its stages: its graph, agents and base model."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wizard_engine.agents.endpoint_options import PREFIX, parse_spec
from wizard_engine.agents.prices import Price, read_prices
from wizard_engine.agents.registry import name_of
from wizard_engine.evaluation.report import Details
from wizard_engine.evaluation.run_facts import model_facts

from .driver import Driver
from .graph import Node, Status, parents
from .overview import measures_of, rejected_rows
from .plan import Plan
from .run_file import RunFile

# Roles that a recipe's configuration names beside its table of agents.
ROLES = ("judge", "tagger")


def about(run: RunFile, plan: Plan, driver: Driver) -> Details:
    """The report's own facts of a run, while it goes on or after it."""
    states = {where: status.state for where, status in driver.known.items()}
    left_out = sum(state == "left out" for state in states.values())
    rows = ", ".join(path.name for path in run.rows.data)
    base = run.base.model.name if run.base.model else "a base model"
    more = f", {left_out} of them left out" if left_out else ""
    open_stages = sum(states.get(node.where) not in ("done", "left out") for node in plan.nodes)
    state = f" Not finished: {open_stages} stages are not done." if open_stages else ""
    text = f"{base} on {rows}, {run.slices} slices, {len(plan.nodes)} stages{more}, seed {run.seed}.{state}"
    text += f" Measured: {'; '.join(measures_of(run, plan))}."
    facts: Details = {
        "run": {"name": "/".join(run.out.parts[-2:]), "text": text, "figures": []},
        "graph": [_stage(node, plan.nodes, driver.known.get(node.where, Status("to run"))) for node in plan.nodes],
        "agents": list(agents_of(run, plan.nodes)),
        "starts": starts(plan),
        "command": f"python recipes/progressive.py {run.path} --seed {run.seed}",
    }
    if not open_stages:
        config_of = {node.where: node.config for node in plan.nodes}
        facts["prompts"] = getattr(config_of.get("arena"), "prompts", None)
        facts["held_out_files"] = getattr(config_of.get(f"slice_{run.slices}/rleif"), "held_out", ())
    if run.base.model is not None:
        facts["base"] = {"model": run.base.model.name, **model_facts(run.base.model)}
    return facts


def _stage(node: Node, nodes: Sequence[Node], status: Status) -> dict[str, Any]:
    """A stage for the drawn graph."""
    why = "" if status.state == "to run" else status.why or rejected_rows(node.out)
    state = "to run" if status.state == "depends" else status.state
    return {"stage": node.where, "state": state, "why": why, "reads": parents(node, nodes)}


def agents_of(run: RunFile, nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
    """Every agent that the stages name: its name in ledgers, spec, roles, and price of a million tokens."""
    roles: dict[str, dict[str, None]] = {}
    for node in nodes:
        for role, spec in _named(node.config):
            roles.setdefault(spec, {})[role] = None
    prices = read_prices(run.prices) if run.prices is not None else {}
    # One agent may be named with other options in another stage: the ledgers know one.
    by_name: dict[str, dict[str, Any]] = {}
    for spec, of_spec in roles.items():
        name, price = name_of(spec), _price(spec, prices)
        shown = str(Path(spec).relative_to(run.out).parent) if Path(spec).is_relative_to(run.out) else spec
        entry = by_name.setdefault(name, {"agent": name, "spec": shown.partition("#")[0], "roles": [], "price": price})
        entry["roles"] += [role for role in of_spec if role not in entry["roles"]]
        entry["price"] = entry["price"] or price
    yield from by_name.values()


def _named(config: Any) -> Iterator[tuple[str, str]]:
    """(role, spec) of a stage's configuration."""
    cast = getattr(config, "agents", None)
    named = list(vars(cast).items()) if dataclasses.is_dataclass(cast) else []
    named += [(role, getattr(config, role, None)) for role in ROLES]
    named += [("compared", spec.partition("=")[2]) for spec in getattr(config, "models", ()) if ".jsonl" not in spec]
    for role, value in named:
        for spec in value if isinstance(value, tuple) else (value,):
            if spec:
                yield role, str(spec)


def _price(spec: str, prices: dict[str, Price]) -> list[float] | None:
    """Of a million tokens of prompts and of replies; None where nothing says it."""
    if not spec.startswith(PREFIX):
        return None
    model, _, options = parse_spec(spec)
    price = options.price if options.price != Price() else prices.get(model)
    return None if price is None else [price.tokens_in, price.tokens_out]


def starts(plan: Plan) -> dict[tuple[int, str], tuple[int, str]]:
    """(slice, stage) of every learning stage -> those of the model that it starts from."""
    start_of = {node.where: str(getattr(node.config, "model", "")) for node in plan.nodes}
    # The model that a slice starts from is its "base".
    of_model = {(t, str(model)): (t, name) for t, name, _, model in plan.measured}
    found = {}
    for t, name, _, _ in plan.measured:
        start = of_model.get((t, start_of.get(f"slice_{t}/{name}", "")))
        if start is not None:
            found[t, name] = start
    return found
