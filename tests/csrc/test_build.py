"""The C++ library: built when missing or stale, once for many processes, with errors that say what to do."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import csrc

HERE = Path(csrc.__file__).parent


def copy(tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    for path in [HERE / "__init__.py", HERE / "pack.cpp"]:
        shutil.copy2(path, folder / path.name)
    return folder


def run(folder, code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_library_is_built_when_missing_stale_and_not_otherwise(tmp_path):
    folder = copy(tmp_path)
    code = "import csrc; csrc.build(); print(csrc.LIBRARY.stat().st_mtime_ns)"
    first = run(folder, code)
    assert first.returncode == 0, first.stderr
    assert run(folder, code).stdout == first.stdout
    os.utime(folder / "pack.cpp", ns=(2**62, 2**62))
    assert run(folder, "import csrc; print(csrc.is_current())").stdout == "False\n"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_library_is_built_once_by_processes_that_need_it_together(tmp_path):
    folder = copy(tmp_path)
    counter = tmp_path / "compiler"
    counter.write_text(f'#!/bin/sh\necho call >> {tmp_path}/calls\nexec g++ "$@"\n')
    counter.chmod(0o755)
    command = [sys.executable, "-c", "import csrc; csrc.build()"]
    environment = {**os.environ, "CXX": str(counter)}
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "call\n" and (folder / "libwizard.so").exists()


def test_build_without_compiler_or_with_broken_source_is_an_error(tmp_path):
    folder = copy(tmp_path)
    missing = run(folder, "import csrc; csrc.build()", CXX="no-such-compiler")
    assert "RuntimeError" in missing.stderr and "install g++" in missing.stderr
    (folder / "pack.cpp").write_text("this is not C++")
    broken = run(folder, "import csrc; csrc.build()")
    assert "expected a library, got exit" in broken.stderr and "pack.cpp" in broken.stderr
    assert not (folder / "libwizard.so").exists()


def test_library_declares_every_function_it_exports():
    library = csrc.library()
    for name in csrc._SIGNATURES:
        assert getattr(library, name).argtypes is not None
    symbols = csrc.LIBRARY.read_bytes()
    assert all(name.encode() in symbols for name in csrc._SIGNATURES)
    assert not hasattr(ctypes.CDLL(str(csrc.LIBRARY)), "wizard_nothing")


def test_check_turns_the_memory_status_into_an_error():
    assert csrc.check(3, "x") == 3
    with pytest.raises(MemoryError, match="packing: not enough memory"):
        csrc.check(csrc.MEMORY, "packing")


def test_a_library_is_old_once_a_header_beside_it_is_newer(tmp_path):
    source, header, library = (tmp_path / name for name in ("one.cpp", "one.h", "lib.so"))
    for second, path in enumerate((source, header, library)):
        path.write_text("")
        os.utime(path, (second, second))
    assert csrc.is_newer(library, [source])
    os.utime(header, (9, 9))
    assert not csrc.is_newer(library, [source])
