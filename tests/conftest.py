"""Fixtures that every part shares."""

import os
from pathlib import Path

import pytest
import torch

# Triton kernels run in its interpreter where there is no GPU; what compiles them starts a process without this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors of tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data files (WIZARD_DATA, or ../shared/data beside the checkout); skips where it is absent."""
    root = Path(os.environ.get("WIZARD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data absent: set WIZARD_DATA to a folder like {root}")
    return root
