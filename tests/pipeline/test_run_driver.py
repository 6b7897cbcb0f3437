"""The driver: what is done, stale or left out, and why; one driver in a directory; stages in their own processes."""

import json
import shlex
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forked import run_python

from recipes import mix, progressive, sample
from wizard_engine.pipeline.commands import shown_commands, slurm_script
from wizard_engine.pipeline.driver import Driver
from wizard_engine.pipeline.graph import Node, with_paths
from wizard_engine.pipeline.plan import Plan
from wizard_engine.pipeline.preflight import check_run
from wizard_engine.pipeline.run_file import Launch, Rows, RunFile
from wizard_engine.runtime.process import Runtime

ROWS = [{"instruction": f"Name {n} things that are {'red' if n % 2 else 'blue'}.", "output": f"{n}."} for n in range(9)]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path):
    return RunFile(tmp_path / "run", quiet=True)


@pytest.fixture
def rows(tmp_path):
    return lines(tmp_path / "rows.jsonl", ROWS)


def chain(run, rows, share=1.0):
    """Three stages, each of which reads the one before, and one that reads none of them."""
    first = mix.Config((rows,), run.out / "first", shares=(share,), quiet=True)
    second = mix.Config((first.out / "rows.jsonl",), run.out / "second", quiet=True)
    third = sample.Config((second.out / "rows.jsonl",), run.out / "third", slices=1, quiet=True)
    other = mix.Config((rows,), run.out / "other", quiet=True)
    nodes = [Node(config.out.name, name, config) for name, config in (("mix", first), ("mix", second))]
    return [*nodes, Node("third", "sample", third, learns=third.data), Node("other", "mix", other)]


def driver(run, nodes):
    return progressive.driver_of(run, Runtime(), nodes)


def states(run, nodes):
    return {where: status.state for where, status in driver(run, nodes).statuses().items()}


def test_stages_run_once_and_go_on_where_they_were(run, rows):
    nodes = chain(run, rows)
    assert set(states(run, nodes).values()) == {"to run"}
    driver(run, nodes).run_all(["first"])
    assert states(run, nodes) == {"first": "done", "second": "to run", "third": "to run", "other": "to run"}
    driver(run, nodes).run_all()
    assert set(states(run, nodes).values()) == {"done"}
    times = {path: path.stat().st_mtime_ns for path in run.out.rglob("stage.json")}
    driver(run, nodes).run_all()
    assert len(times) == 4 and times == {path: path.stat().st_mtime_ns for path in run.out.rglob("stage.json")}


# Catches: a report that says of a stage under way that it is to run, or is written for stages that were done before.
def test_driver_says_what_each_stage_is_at_when_one_begins(run, rows):
    nodes, seen = chain(run, rows), []
    driver(run, nodes).run_all(["first"])
    for expected in (["second", "third", "other"], []):
        at_work = driver(run, nodes)
        at_work.began = lambda at_work=at_work: seen.append({w: s.state for w, s in at_work.known.items()})
        at_work.run_all()
        assert [next(where for where, state in of.items() if state == "running") for of in seen] == expected
        assert {status.state for status in at_work.known.values()} == {"done"}
        if seen:
            assert seen[1] == {"first": "done", "second": "done", "third": "running", "other": "to run"}
        seen.clear()
    skipping = driver(
        replace(run, on_empty="skip", out=run.out / "b"), chain(replace(run, out=run.out / "b"), rows, 0.0)
    )
    skipping.run_all()
    assert skipping.known["third"].state == "left out" and "no rows in" in skipping.known["third"].why


# Catches: a stage that begins without what it reads, or one that is left out with nothing said.
@pytest.mark.parametrize("on_empty", ["end", "skip"])
def test_stages_alone_need_those_that_they_read(run, rows, on_empty):
    run, nodes = replace(run, on_empty=on_empty), chain(run, rows)
    with pytest.raises(
        ValueError, match=r"only: .*got third reads first \(to run\), second \(to run\); run these first"
    ):
        driver(run, nodes).run_all(["third"])
    assert not [path for path in run.out.iterdir() if path.is_dir()]
    driver(run, nodes).run_all(["first"])
    with pytest.raises(ValueError, match=r"got third reads second \(to run\); run these first, or name them too"):
        driver(run, nodes).run_all(["other", "third"])
    assert states(run, nodes)["other"] == "to run"
    driver(run, nodes).run_all(["second", "third"])
    assert states(run, nodes) == {"first": "done", "second": "done", "third": "done", "other": "to run"}
    # Of other options, what is there is not what the run file says.
    changed = chain(run, rows, share=0.5)
    with pytest.raises(ValueError, match=r"got second reads first \(stale\)"):
        driver(run, changed).run_all(["second"], redo_stale=True)
    driver(run, changed).run_all(["first", "second"], redo_stale=True)
    # Who removes what a stage read needs it again.
    (run.out / "first" / "stage.json").unlink()
    with pytest.raises(ValueError, match=r"got second reads first \(to run\)"):
        driver(run, changed).run_all(["second"])


def test_stages_alone_do_without_those_that_have_no_rows(run, rows):
    empty = mix.Config((rows,), run.out / "empty", shares=(0.0,), quiet=True)
    taught = sample.Config((empty.out / "rows.jsonl",), run.out / "taught", slices=1, quiet=True)
    again = sample.Config((taught.out / "slice_1.jsonl",), run.out / "again", slices=1, quiet=True)
    last = mix.Config((again.out / "slice_1.jsonl",), run.out / "last", quiet=True)
    stands_for = {again.out / "slice_1.jsonl": taught.out / "slice_1.jsonl"}
    nodes = [
        Node("empty", "mix", empty),
        Node("taught", "sample", taught, learns=taught.data, stands_for={taught.out / "slice_1.jsonl": rows}),
        Node("again", "sample", again, learns=again.data, stands_for=stands_for),
        Node("last", "mix", last),
        Node("both", "mix", mix.Config((taught.out / "slice_2.jsonl", rows), run.out / "both", quiet=True)),
    ]
    run = replace(run, on_empty="skip")
    with pytest.raises(ValueError, match=r"got last reads empty \(to run\), taught \(to run\), again \(to run\)"):
        driver(run, nodes).run_all(["last"])
    driver(run, nodes).run_all(["empty"])
    driver(run, nodes).run_all(["last", "both"])
    for name in ("last", "both"):
        assert json.loads((run.out / name / "mix.json").read_text())["rows"] == len(ROWS)


# Catches: a changed option that overwrites what a run has made.
def test_what_has_become_stale_is_listed_and_kept(run, rows):
    driver(run, chain(run, rows)).run_all()
    changed, before = chain(run, rows, share=0.5), (run.out / "first" / "rows.jsonl").read_text()
    assert states(run, changed) == {"first": "stale", "second": "stale", "third": "stale", "other": "done"}
    with pytest.raises(
        ValueError, match=r"first \(config.shares .*1.0.* -> .*0.5.*\); second \(reads what first will wr"
    ):
        driver(run, changed).run_all()
    assert (run.out / "first" / "rows.jsonl").read_text() == before
    driver(run, changed).run_all(redo_stale=True)
    assert set(states(run, changed).values()) == {"done"}
    assert (run.out / "former" / "first.1" / "rows.jsonl").read_text() == before
    assert len((run.out / "first" / "rows.jsonl").read_text()) < len(before)


def test_a_stage_that_is_gone_leaves_the_others_open(run, rows):
    nodes = chain(run, rows)
    driver(run, nodes).run_all()
    (run.out / "first" / "stage.json").unlink()
    assert states(run, nodes) == {"first": "to run", "second": "depends", "third": "depends", "other": "done"}
    driver(run, nodes).run_all()
    assert set(states(run, nodes).values()) == {"done"}


def test_a_stage_without_rows_ends_the_run_or_is_left_out_with_the_cause(run, rows, tmp_path, capsys):
    nodes = chain(run, rows, share=0.0)
    with pytest.raises(ValueError, match=r"third: expected rows to learn from, got no rows in .*: second says: 0 of 0"):
        driver(run, nodes).run_all()
    instead = nodes[0].out / "rows.jsonl"
    third = replace(nodes[2], stands_for={run.out / "third" / "slice_1.jsonl": rows, run.out / "x" / "model": None})
    last = mix.Config((run.out / "third" / "slice_1.jsonl",), run.out / "last", quiet=True)
    never = mix.Config((run.out / "x" / "model",), run.out / "never", quiet=True)
    skipping = replace(run, on_empty="skip")
    done = driver(skipping, [*nodes[:2], third, Node("last", "mix", last), Node("never", "mix", never)])
    done.run_all()
    assert json.loads((last.out / "mix.json").read_text())["rows"] == len(ROWS) and not instead.read_text()
    assert list(done.left_out) == ["third", "never"] and not (run.out / "never").exists()
    assert "== third: left out: no rows in" in capsys.readouterr().out


# Catches: rows or a model of a stage that was left out, read all the same.
def test_what_reads_a_stage_that_was_left_out_reads_the_rest(run, rows):
    empty = mix.Config((rows,), run.out / "empty", shares=(0.0,), quiet=True)
    taught = sample.Config((empty.out / "rows.jsonl",), run.out / "taught", slices=1, quiet=True)
    both = mix.Config((taught.out / "slice_1.jsonl", rows), run.out / "both", shares=(1.0, 0.5), quiet=True)
    nodes = [Node("empty", "mix", empty), Node("taught", "sample", taught, learns=taught.data)]
    done = driver(replace(run, on_empty="skip"), [*nodes, Node("both", "mix", both)])
    done.run_all()
    assert list(done.left_out) == ["taught"]
    (line,) = json.loads((both.out / "mix.json").read_text())["files"]
    assert line["given"] == len(ROWS) and 0 < line["taken"] < len(ROWS)
    models = progressive.arena.Config(models=("a=run/x/model", "b=run/y/answers.jsonl#sampled"), out=Path("z"))
    moved = with_paths(models, {Path("run/x/model"): Path("run/w/model"), Path("run/y/answers.jsonl"): Path("q.jsonl")})
    assert moved.models == ("a=run/w/model", "b=q.jsonl#sampled")


# Catches: advice to pass an option that the run's command does not have.
def test_an_error_of_a_stage_has_its_name_and_says_where_its_options_stand(run, rows):
    def fail(text):
        def main(config):
            raise ValueError(text)

        node = replace(chain(run, rows)[0], table="pairs")
        Driver(replace(run, path=Path("my/run.toml")), Runtime(), [node], {"mix": main}, progressive.STAGE_OF).run_all()

    with pytest.raises(ValueError) as failed:
        fail("rows: too few; lower --hold-out, give --shares 1, or --else; lower --hold-out")
    told = "first: rows: too few; lower --hold-out, give --shares 1, or --else; lower --hold-out"
    assert str(failed.value) == f"{told}. In my/run.toml: hold-out of [pairs], shares of [pairs]"
    with pytest.raises(ValueError, match=r"^\[rank 1/2\] first: rows: expected one$"):
        fail("[rank 1/2] rows: expected one")
    with pytest.raises(ValueError, match=r"^first: expected its processes$"):
        fail("first: expected its processes")


def test_two_drivers_do_not_share_a_directory(run, rows):
    held = driver(run, chain(run, rows))
    script = (
        "import sys; from pathlib import Path; from wizard_engine.runtime.run_lock import RunLock\n"
        f"RunLock.take(Path({str(run.out)!r}))"
    )
    (run.out.parent / "second.py").write_text(script)
    with held.locked():
        done = run_python(run.out.parent / "second.py")
    assert "expected no other run in this directory, got one: process" in done.stderr


def test_commands_are_the_stages(run, rows, tmp_path):
    nodes = chain(run, rows)
    commands = shown_commands(run, nodes).splitlines()
    for command in commands:
        program, *words = shlex.split(command)
        done = run_python(*words)
        assert program == "python" and done.returncode == 0, done.stderr
    assert set(states(run, nodes).values()) == {"done"}
    script = slurm_script(replace(run, launch=Launch(nodes=16, processes=8, account="a")), nodes)
    path = tmp_path / "run.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert "#SBATCH --nodes=16" in script and "#SBATCH --gpus-per-node=8" in script and "--partition" not in script


def test_stages_have_processes_of_their_own(run, rows, tmp_path, monkeypatch):
    separate = replace(run, launch=Launch(separate_processes=True))
    driver(separate, chain(run, rows)[:1]).run_all()
    assert states(run, chain(run, rows))["first"] == "done"
    with monkeypatch.context() as patch:
        # A stage that is done gets none.
        patch.setattr(subprocess, "run", None)
        driver(separate, chain(run, rows)[:1]).run_all()
    broken = mix.Config((lines(tmp_path / "bad.jsonl", [{"x": 1}]),), run.out / "bad", quiet=True)
    with pytest.raises(ValueError, match=r"bad: expected its processes to end well, got exit status 1, for the reason"):
        driver(separate, [Node("bad", "mix", broken)]).run_all()
    # One that trains, on two ranks.
    several = replace(run, launch=Launch(separate_processes=True, processes=2))
    word = shown_commands(several, [Node("sft", "sft", progressive.sft.Config(broken.data, run.out / "sft"))])
    assert word.startswith("torchrun --nproc-per-node 2 --standalone recipes/sft.py")


def test_a_training_stage_is_started_on_all_nodes(tmp_path):
    run = RunFile(tmp_path / "run", launch=Launch(nodes=16, processes=8))
    config = progressive.sft.Config((tmp_path / "rows.jsonl",), tmp_path / "run" / "sft", model="7b")
    command = shown_commands(run, [Node("sft", "sft", config)])
    assert command.startswith(
        "torchrun --nproc-per-node 8 --nnodes 16 --rdzv-backend c10d --rdzv-endpoint "
        '"$MASTER_ADDR:29500" recipes/sft.py --data'
    )
    assert "\nsrun --nodes=16 --ntasks-per-node=1 torchrun" in slurm_script(run, [Node("sft", "sft", config)])


@pytest.fixture
def endpoint():
    """An endpoint that knows no models, and one address where nobody answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_everything_that_a_run_needs_is_looked_at_before_its_start(tmp_path, rows, endpoint):
    run = RunFile(tmp_path / "run", slices=1, stages=("evol_instruct", "sft"), rows=Rows(data=(rows,)), world=True)
    run = replace(
        run, agents=replace(run.agents, teacher=f"openai:m@{endpoint}", judge="openai:m@http://127.0.0.1:9/v1")
    )
    nodes = Plan(run, progressive.RECIPES, size="demo", has_answers=False).build().nodes
    with pytest.raises(
        ValueError, match=r"agent openai:m@http://127.0.0.1:9/v1: expected an endpoint that answers, got"
    ):
        check_run(run, nodes)
    answering = replace(run, agents=replace(run.agents, judge=""))
    check_run(answering, Plan(answering, progressive.RECIPES, size="demo", has_answers=False).build().nodes)
    absent = replace(answering, rows=replace(run.rows, data=(tmp_path / "none.jsonl",)))
    nodes = Plan(absent, progressive.RECIPES, size="demo", has_answers=False).build().nodes
    with pytest.raises(ValueError, match=r"analysis: expected a file or directory, got none at .*none.jsonl"):
        check_run(absent, nodes)


def test_a_limit_of_mixed_rows_draws_from_all_of_them_in_their_order(run, rows):
    texts = {}
    for limit in (3, 5, 50):
        out = mix.Config((rows,), run.out / str(limit), limit=limit, quiet=True).out
        assert mix.main(mix.Config((rows,), out, limit=limit, quiet=True))["rows"] == min(limit, len(ROWS))
        texts[limit] = (out / "rows.jsonl").read_text().splitlines()
    assert set(texts[3]) < set(texts[5]) < set(texts[50]) and texts[5] != texts[50][:5]
    assert texts[5] == [line for line in texts[50] if line in texts[5]]
