"""Fixtures that every part shares."""

import inspect
import os
from collections import Counter
from pathlib import Path

import pytest

# Before torch is imported, and for every process that a test starts: two workers and several ranks share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton kernels run in its interpreter where there is no GPU; what compiles them starts a process without this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.runtime import interpreter

# Tensors of tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


def _list_builtins_once() -> None:
    """Spare the interpreter a search of Triton's modules at every call of a device function, a fifth of its time.

    It replaces the builtins of a module, and finds nothing to replace until the launch has ended.
    """
    search = interpreter._patch_builtin
    names: dict[object, list[str]] = {}

    def patch_builtin(module, *rest) -> None:
        if module not in names:
            names[module] = [name for name, _ in inspect.getmembers(module, interpreter.tl.core.is_builtin)]
        if names[module] and interpreter.tl.core.is_builtin(getattr(module, names[module][0])):
            search(module, *rest)

    interpreter._patch_builtin = patch_builtin


_list_builtins_once()


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
