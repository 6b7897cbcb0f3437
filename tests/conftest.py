"""Fixtures that every part shares."""

import functools
import inspect
import os
import ssl
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

# Before torch is imported, and for every process that a test starts: two workers and several ranks share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton kernels run in its interpreter where there is no GPU; what compiles them starts a process without this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.runtime import interpreter

# Every HTTP client reads the certificates of the system, 50 ms of CPU time; tests ask this machine alone.
ssl.create_default_context = functools.cache(ssl.create_default_context)

# Tensors of tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


def _speed_interpreter_up() -> None:
    """Spare Triton's interpreter what changes no result, half of its time."""
    # Checks of integer overflow, which it computes in 64 bits and then drops: it asserts under `debug` alone.
    interpreter.interpreter_builder.options = replace(interpreter.InterpreterOptions(), sanitize_overflow=False)

    # A search of Triton's modules at every call of a device function: it replaces their builtins, and finds nothing to
    # replace until the launch has ended.
    search = interpreter._patch_builtin
    names: dict[object, list[str]] = {}

    def is_patched(module) -> bool:
        if module not in names:
            names[module] = [name for name, _ in inspect.getmembers(module, interpreter.tl.core.is_builtin)]
        return not names[module] or not interpreter.tl.core.is_builtin(getattr(module, names[module][0]))

    def patch_builtin(module, *rest) -> None:
        if not is_patched(module):
            search(module, *rest)

    # A table of all dtypes that it makes anew at every operation.
    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, interpreter.tl.block_type) else dtype
        if element.name not in np_dtypes:
            np_dtypes[element.name] = np_dtype(element)
        return np_dtypes[element.name]

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype


_speed_interpreter_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `every(n)`, leave each nth case to `make test`, and mark the others slow."""
    cases: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is None:
            continue
        test = item.nodeid.partition("[")[0]
        if cases[test] % marker.args[0]:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data files (WIZARD_DATA, or ../shared/data beside the checkout); skips where it is absent."""
    root = Path(os.environ.get("WIZARD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data absent: set WIZARD_DATA to a folder like {root}")
    return root
