"""Fixtures that every part shares."""

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

# Tensors of tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


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
