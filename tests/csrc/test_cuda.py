"""The CUDA library: built by nvcc for three architectures, 16-byte vectors in its machine code; skipped without it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import csrc.cuda

HERE = Path(csrc.cuda.__file__).parent
needs_nvcc = pytest.mark.skipif(csrc.cuda.compiler() is None, reason="nvcc is absent")


@pytest.fixture(scope="module")
def listing():
    """Machine code of the library, by architecture."""
    knobs = pytest.importorskip("triton", reason="triton, whose wheel brings cuobjdump, is absent").knobs
    assert csrc.cuda.library() is not None
    printed = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-sass", str(csrc.cuda.LIBRARY)], capture_output=True, text=True, check=True
    )
    sections = re.split(r"arch = (sm_\w+)", printed.stdout)
    return {arch: body for arch, body in zip(sections[1::2], sections[2::2]) if "permute_rows" in body}


# Catches: rows copied in 4 or 8 bytes; an architecture left out of the build.
@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_rows_are_copied_in_16_byte_vectors(listing, arch):
    code = listing[arch]
    assert len(re.findall(r"LDG\.E\.128", code)) >= 4 and len(re.findall(r"STG\.E\.128", code)) >= 4
    assert not re.search(r"STG\.E(\.64)? |STL|LDL", code)


@needs_nvcc
def test_library_takes_no_rows_without_a_device():
    assert csrc.cuda.library().wizard_permute_rows(None, None, None, 0, 8, 8, 2, None) == 0


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_of_cuda_is_an_error():
    status = csrc.cuda.library().wizard_permute_rows(None, None, None, 1, 1, 1, 1, None)
    with pytest.raises(RuntimeError, match="wizard_permute_rows: expected CUDA to return 0, got error"):
        csrc.cuda.check(status, "wizard_permute_rows")


def in_a_copy(tmp_path, code, **environment):
    """Python code run where csrc is a fresh copy without a library."""
    shutil.copytree(HERE.parent, tmp_path / "csrc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "nowhere"), **environment},
    )


def test_without_nvcc_there_is_no_library(tmp_path):
    result = in_a_copy(tmp_path, "import csrc.cuda; print(csrc.cuda.library())", NVCC="no-such-nvcc")
    assert result.stdout == "None\n", result.stderr


def test_a_failing_nvcc_is_an_error_with_its_output(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho this is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    result = in_a_copy(tmp_path, "import csrc.cuda; csrc.cuda.library()", NVCC=str(broken))
    assert "expected a library, got exit 3" in result.stderr and "this is broken" in result.stderr
    assert not (tmp_path / "csrc" / "cuda" / "libwizard_cuda.so").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (300, 6144), (77, 4104)])
def test_library_copies_what_the_reference_copies(rows, width, dtype):
    from kernels.expert_permute import permute, permute_reference

    x = torch.randn(rows, width, device="cuda").to(dtype)
    index = torch.randperm(2 * rows, device="cuda").int()
    assert torch.equal(permute(x, index, 2), permute_reference(x, index, 2))
