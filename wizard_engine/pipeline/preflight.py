"""What is looked at before the first stage: rows, base model, agents, disk; every finding names what to change."""

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from wizard_engine.agents.endpoint import PREFIX, EndpointAgent
from wizard_engine.agents.registry import registered
from wizard_engine.data.records import Conversation, Preference, Reject, read_files, scan_rows
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.evaluation.accuracy import are_checkable
from wizard_engine.model import ModelDirectory
from wizard_engine.model.vocabulary import check_family, check_vocabulary
from wizard_engine.parallel.mesh import resolve

from .answer_checks import check_answers
from .disk import GIB, Disk, disk_bytes, disk_of_run
from .graph import Node, paths_of
from .learning import size_of
from .run_file import RunFile

# Rows of a file that are looked at.
LOOKED_AT = 50
ENDPOINT_SECONDS = 10.0


def size_of_base(run: RunFile) -> str:
    """The row of the table of learning rates: the run's, or by the number of the base model's parameters."""
    if run.base.size is not None:
        return run.base.size
    if run.base.model is None:
        return "demo"
    if not run.base.model.is_dir():
        raise ValueError(f"base.model: expected a model directory, got {run.base.model}; name one that is there")
    with ModelDirectory(run.base.model) as directory:
        return size_of(directory.parameter_count, is_mixture=bool(directory.config.experts))


def has_answers(run: RunFile) -> bool:
    """Whether nine in ten held-out rows have an answer that can be checked; of the embedded world's all have.

    Raises:
        ValueError: rows that cannot be read.
    """
    files = run.rows.held_out or (run.rows.data if run.rows.hold_out else ())
    if not files:
        return run.world
    try:
        rows, _ = read_files(files, on_error=run.rows.on_error, unknown_fields=run.rows.unknown_fields)
    except ValueError as error:
        if run.rows.on_error == "skip":
            raise
        raise ValueError(f'{error}; or leave such rows out with on-error = "skip" in [rows]') from error
    step = max(1, len(rows) // LOOKED_AT)
    return are_checkable([row.answer for row in rows[::step] if isinstance(row, Conversation)])


def check_files(run: RunFile) -> None:
    """Look at the run's own row files and base model, before its graph is made.

    Raises:
        ValueError: every one that is not there, and files with rows of another kind.
    """
    rows = run.rows
    files = [("rows.data", path, Conversation) for path in rows.data]
    files += [("rows.held-out", path, Conversation) for path in rows.held_out]
    files += [("rows.pairs", path, Preference) for path in rows.pairs]
    files += [("rows.held-out-pairs", path, Preference) for path in rows.held_out_pairs]
    findings = [found for name, path, kind in files if (found := _unfit(run, name, path, kind))]
    # Commands are printed, and costs told, where a base model whose size is given is not at hand.
    is_needed = run.base.size is None and run.base.model is not None and run.out not in run.base.model.parents
    if is_needed and not run.base.model.is_dir():
        findings.append(f"base.model: expected a model directory, got {run.base.model}; name one that is there")
    if findings:
        raise ValueError("; ".join(findings))


def _unfit(run: RunFile, name: str, path: Path, kind: type[Conversation] | type[Preference]) -> str | None:
    """What is wrong with a file of rows, by the first that can be read."""
    if run.out in path.parents:
        return None
    if not path.is_file():
        return f"{name}: expected a file, got {'a folder' if path.is_dir() else 'none'} at {path}"
    rows = scan_rows(path, unknown_fields="count", allow_empty=True)
    first = next((row for row in rows if not isinstance(row, Reject)), None)
    if first is None or isinstance(first, kind):
        return None
    kinds = {Conversation: ("conversations", "rows.data"), Preference: ("preference rows", "rows.pairs")}
    got, place = kinds.get(type(first), ("process rows", "recipes/reward.py"))
    return f"{name}: expected {kinds[kind][0]}, got {got} in {path}; they belong to {place}"


def check_ranks(nodes: Sequence[Node], ranks: int) -> None:
    """Look at whether every stage's steps can be divided over the ranks.

    Raises:
        ValueError: every table of a run file that has a number to change.
    """
    findings = dict.fromkeys(finding for node in nodes for finding in _undivided(node, ranks))
    if findings:
        raise ValueError("; ".join(findings))


def _undivided(node: Node, ranks: int) -> Iterator[str]:
    for group, name in (("training", "packs_per_step"), ("rollout", "prompts_per_step")):
        count = getattr(getattr(node.config, group, None), name, None)
        if count is None:
            continue
        try:
            shape = resolve(node.config.mesh, ranks)
        except ValueError as error:
            yield f"{node.table}: {error}"
            return
        data = shape.replicate * shape.dp_shard
        if count % data:
            option = f"{node.table}.{group}.{name.replace('_', '-')}"
            yield f"{option}: expected a multiple of {data}, the ranks that take rows of their own, got {count}"


def check_run(run: RunFile, nodes: Sequence[Node]) -> None:
    """Look at everything that a run needs; at its disk as far as that is known without a forecast of the stages' steps.

    Raises:
        ValueError: every finding, each with what to change; nothing was started.
    """
    findings = [*_files(run, nodes), *_base(run), *_agents(run, nodes)]
    # Rows are looked at where all files are there.
    findings += [] if findings else check_answers(run, nodes)
    if findings:
        raise ValueError("; ".join(findings))
    check_disk(run, disk_of_run(run, nodes, size_of_base(run)))


def _files(run: RunFile, nodes: Sequence[Node]) -> Iterator[str]:
    """Files and directories that no stage makes and that are not there."""
    made = {node.out for node in nodes}
    seen = set()
    for node in nodes:
        for path in paths_of(node.config):
            is_made = path in made or not made.isdisjoint(path.parents) or run.out in path.parents
            if not is_made and path not in seen and not path.exists() and path.suffix:
                seen.add(path)
                yield f"{node.where}: expected a file or directory, got none at {path}"


def _base(run: RunFile) -> Iterator[str]:
    """A base model without tokenizer, or with that of another family of models."""
    if run.base.model is None:
        return
    try:
        with ModelDirectory(run.base.model) as directory:
            tokenizer = load_tokenizer(run.base.model)
            check_vocabulary(tokenizer, directory.config, run.base.model)
            check_family(tokenizer, directory.config, run.base.model)
    except (ValueError, OSError) as error:
        yield f"base.model: {error}"


def specs_of(nodes: Sequence[Node]) -> dict[str, str]:
    """Agent -> the first stage that asks it."""
    specs: dict[str, str] = {}
    for node in nodes:
        agents = getattr(node.config, "agents", None)
        values = list(vars(agents).values()) if agents is not None else []
        values += [getattr(node.config, "judge", None)]
        for value in values:
            for spec in value if isinstance(value, tuple) else (value,):
                if spec:
                    specs.setdefault(spec, node.where)
    return specs


def _agents(run: RunFile, nodes: Sequence[Node]) -> Iterator[str]:
    """Agents that are not there, and endpoints that do not answer."""
    ports = [f"@http://127.0.0.1:{model.port}/" for model in run.served.values()]
    addresses: dict[str, str] = {}
    for spec, where in specs_of(nodes).items():
        if spec.startswith(PREFIX):
            try:
                agent = EndpointAgent.from_spec(spec)
            except ValueError as error:
                yield f"{where}: {error}"
                continue
            if not any(port in spec for port in ports):
                addresses.setdefault(agent.base_url, spec)
        elif spec not in registered() and "/" not in spec and not Path(spec).is_dir():
            known = "a known name, a model directory or an endpoint (openai:MODEL@URL)"
            yield f"{where}: agent: expected {known}, got {spec!r}"
    for url, spec in addresses.items():
        if (error := _unreachable(url)) is not None:
            yield f"agent {spec}: expected an endpoint that answers, got {error}"


def _unreachable(url: str) -> str | None:
    """Why an address does not answer; a status of any kind is an answer."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/models", timeout=ENDPOINT_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"{getattr(error, 'reason', error)}"


def check_disk(run: RunFile, disk: Mapping[str, Disk]) -> None:
    """Look at whether the run's directory has room for what its stages write.

    Raises:
        ValueError: it has not.
    """
    needed = disk_bytes(disk)
    place = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{run.out}: expected {needed / GIB:.1f} GiB for models and checkpoints, got {free / GIB:.1f} GiB free; "
            "choose another --out, or fewer checkpoints with training.save-every and training.keep-last"
        )
