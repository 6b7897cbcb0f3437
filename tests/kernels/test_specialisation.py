"""One compiled variant of a kernel, whatever the number of tokens, sequences, pages or programs."""

import pytest
import torch
from forked import COMPILING, ROOT, run_python

from kernels.launch import record

SCRIPT = ROOT / "tests" / "kernels" / "specialisation.py"
PLANTED = """
import sys
from kernels import {module}
sys.path.insert(0, {folder!r})
import specialisation
{module}.{kernel}.params[{number}].do_not_specialize = False
specialisation.configuration.kernels = lambda: [{table!r}]
sys.exit(specialisation.main())
"""


def test_run_time_numbers_make_no_variants():
    done = run_python(SCRIPT, environment=COMPILING)
    # catches: slots of the attention kernels specialised (every form of three kernels named).
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    count, _, kernels = done.stdout.split()[0], *done.stdout.split()[2:4]
    assert int(count) >= 400 and int(kernels) >= 30, done.stdout


@pytest.mark.parametrize(
    ("module", "kernel", "table", "number", "name"),
    [
        ("_rms_norm", "rms_norm_forward_kernel", "rms_norm_forward", 6, "rows"),
        ("_decode_attention", "decode_attention_kernel", "decode_attention", 9, "batch"),
    ],
)
def test_specialised_count_is_named(module, kernel, table, number, name):
    folder = str(SCRIPT.parent)
    code = PLANTED.format(module=module, kernel=kernel, table=table, number=number, folder=folder)
    done = run_python("-c", code, environment=COMPILING)
    assert done.returncode == 1, done.stderr[-2000:]
    assert all(line.endswith(f": {name}") for line in done.stdout.splitlines()[:-1] if "tokens" not in line)
    assert f": {name}" in done.stdout


def test_whole_numbers_of_options_are_floats_to_the_kernels():
    from kernels._dpo import dpo_grads
    from kernels._ppo import ppo_grads

    values, marks = torch.empty(64, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")
    with record() as made:
        ppo_grads(
            values,
            values,
            values,
            values,
            values,
            clip=(1, 1),
            dual_clip=3,
            reference=values,
            kl=1,
            kl_estimator="k3",
            entropy_bonus=0,
            sampled=values,
            importance_cap=2,
        )
        dpo_grads(
            values,
            values,
            marks,
            torch.empty(4, device="meta"),
            beta=1,
            num_pairs=2,
            variant="sigmoid",
            label_smoothing=0,
            mean=False,
            nll_scale=1,
        )
    kinds = [[type(x) for x in launch.arguments if not isinstance(x, torch.Tensor)] for launch in made]
    # catches: a coefficient of 0 or 1 handed on as an integer, which makes variants of the kernel.
    assert kinds == [[int, int, *[float] * 6], [int, *[float] * 4]]
