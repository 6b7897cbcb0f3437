"""The command new-run: writes a commented run file for rows, a base model and teachers of your own."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from wizard_engine.runtime.files import write_text
from wizard_engine.runtime.ranges import Checked, Count
from wizard_engine.runtime.text_lines import printable

TEMPLATE = """\
# A run of the whole system. Check it:  python recipes/progressive.py {path} --dry-run
# Run it:                               python recipes/progressive.py {path}
# On several GPUs:                      torchrun --standalone --nproc-per-node 8 recipes/progressive.py {path}
# Every name: docs/recipes/progressive.md. Paths are relative to the folder that the command runs in.
out = {out}
seed = 0
slices = {slices}
# Leave stages out, or name one twice. Default: all nine, in this order.
stages = [
  "evol_instruct", "evol_answer", "co_teach",
  "sft", "self_teach", "stage_dpo", "instruction_reward", "process_reward", "rleif",
]
on-empty = "skip"           # a stage without rows is left out, with the reason; "end" ends the run

[rows]
data = {rows}
# Held-out rows: a file of them, or a number of rows to keep apart.
{held_out}
# Preference rows of your own for Stage-DPO, and how many of all pairs to keep apart for measuring:
# pairs = ["pairs.jsonl"]
# hold-out-pairs = 100
{questions}
on-error = "skip"           # rows that cannot be read or are too long are counted; "raise" stops at the first

[base]
model = {base}
# Learning rates and sizes follow the number of its parameters: 135M, 1B, 7B, 70B or 8x22B.
# size = "7B"

# Who does what: openai:MODEL@URL (its key in OPENAI_API_KEY), a model directory, reference:judge and
# reference:labeller (rows with answers that can be checked; nobody pays), or served:NAME (see below).
[agents]
teacher = {teacher}          # every role that is not named: evolver, answerer, judge, labeller, ranker, ...
rivals = {rivals}            # co-teaching compares our model with these
# judge = "openai:another-model@https://api.example.org/v1"
# labeller = "reference:labeller"

# A model of your own that the run serves while its stages ask for served:NAME.
# [served.big]
# model = "models/big"
# port = 8001

# Target shares of the rows' attributes (see recipes/analyze.py). Without a table rows are drawn as they are;
# [sample] uniform = ["topic"] gives all values of an attribute the same share.
# [targets]
# language = {{ en = 0.8, zh = 0.2 }}

# Shares of what earlier stages made in what later ones learn from, 0 to 1.
[mix]
self-taught = 1.0
self-teach = 1.0
evol-answer = 1.0
battles = 1.0

# Options of a stage, by the names of its recipe's command line, for all slices ...
# [sample]
# size = 6000               # rows drawn for all slices together; default: all
# [evol_instruct]
# optimise = {{ steps = 4 }}  # improve the evolving method; asks for at least 60 rows in a slice
# [sft]
# training = {{ epochs = 2 }}
# [rleif]
# rollout = {{ steps = 100 }}
# reward = {{ factors = ["instruction", "process"] }}

# ... or for one slice, and a finished directory in place of a stage.
# [slice_2.sft]
# training = {{ lr = 2e-6 }}
# [slice_1.evol_instruct]
# use = "runs/before/slice_1/evol_instruct"

# Stages in processes of their own, as on several nodes; --print-commands and --slurm write them out.
# [launch]
# separate-processes = true
# processes = 8
# nodes = 2
"""


@dataclass(frozen=True)
class Options(Checked):
    """Write a commented run file for the whole system on your own rows."""

    directory: Positional[Path]
    """Folder for run.toml; made if it is absent."""
    rows: tuple[Path, ...] = ()
    """Row files."""
    held_out: Path | None = None
    """Held-out rows; default: some are kept apart."""
    questions: Path | None = None
    """Two-turn questions in the form of MT-Bench."""
    base: Path | None = None
    """Model directory to start from."""
    teacher: str | None = None
    """Agent for every role, such as openai:MODEL@URL."""
    rivals: tuple[str, ...] = ()
    """Agents that co-teaching compares the model with; default: the teacher."""
    slices: Count[int] = 3
    """Slices of the rows."""


def run_text(options: Options) -> str:
    """The text of a run file."""
    folder = options.directory
    teacher = options.teacher or "openai:MODEL@https://api.example.org/v1"
    rows = [str(path) for path in options.rows] or ["rows.jsonl"]
    held_out = "hold-out = 200" if options.held_out is None else f"held-out = [{json.dumps(str(options.held_out))}]"
    questions = '# questions = "question.jsonl"     # two-turn questions in the form of MT-Bench'
    if options.questions is not None:
        questions = f"questions = {json.dumps(str(options.questions))}"
    return TEMPLATE.format(
        path=folder / "run.toml",
        out=json.dumps(str(folder / "run")),
        slices=options.slices,
        rows=json.dumps(rows),
        held_out=held_out,
        questions=questions,
        base=json.dumps(str(options.base or "models/base")),
        teacher=json.dumps(teacher),
        rivals=json.dumps(list(options.rivals) or [teacher]),
    )


def write_run_file(options: Options) -> Path:
    """Write the file, and return its path.

    Raises:
        ValueError: there is one.   OSError: the folder cannot be written.
    """
    path = options.directory / "run.toml"
    if path.exists():
        raise ValueError(f"{path}: expected no run file yet, got one; choose another folder, or edit that file")
    options.directory.mkdir(parents=True, exist_ok=True)
    write_text(path, run_text(options))
    return path


def main(options: Options) -> int:
    """Run the command; 1 after an error in one line."""
    try:
        path = write_run_file(options)
    except (ValueError, OSError) as error:
        print(f"new-run: error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(f"done: {path}; check it with: python recipes/progressive.py {path} --dry-run")
    return 0
