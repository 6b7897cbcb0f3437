"""A compile cache made ahead: keys of the real just-in-time compiler, a second process that compiles nothing, and what
is said about a cache that does not fit."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import COMPILING, ROOT, run_python
from triton import knobs
from triton.backends.nvidia import compiler as nvidia

from benchmarks import compile_cache, launch_sources, tune_processes
from benchmarks.compile_cache import Manifest
from kernels import configuration

# Losses and samples at once: pointers, None, divisible and odd numbers, texts among the constants.
SOURCE = """
import os, sys, torch
from pathlib import Path
from types import SimpleNamespace
from benchmarks import compile_cache, jit_requests, launch_forms, launch_sources

def toy(arch):
    for table in ("gae", "dpo"):
        for case in launch_forms.cases(table, arch):
            yield launch_forms.launch_of(case)

launch_sources.TABLES, launch_sources.SOURCES = {"toy": toy}, ("toy", "broken")
child = "sys.exit(launch_sources.main())"
launch_sources.COMMAND = (sys.executable, "-c", os.environ["TOY"] + child)
"""
SECOND = """
from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime import build
print(compile_cache.use(Path(sys.argv[1])))
events, builds, plain = [], [], build._build
knobs.compilation.listener = lambda *, cache_hit, **_: events.append(cache_hit)
build._build = lambda *arguments, **options: builds.append(1) or plain(*arguments, **options)
with jit_requests.ahead(90):
    for launch in [*toy(90)][int(sys.argv[2]):]:
        kernel = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
        if jit_requests.has_launchers():
            with jit_requests.unloaded():
                driver.CudaLauncher(kernel.src, kernel.metadata)
print(f"compiled {events.count(False)}, loaded {events.count(True)}, built {len(builds)}")
"""
MAKE = "sys.exit(compile_cache.main(sys.argv[1:]))"


def run(code, *arguments, source=SOURCE):
    """A fresh process with the compiler, not the interpreter."""
    environment = {name: value for name, value in COMPILING.items() if name != "TRITON_CACHE_DIR"}
    return run_python("-c", source + code, *arguments, environment=environment | {"TOY": source}, timeout=300)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the toy source's kernels, and what was printed about it."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    done = run(MAKE, "--out", folder, "--workers", "1", "--source", "toy")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def copied(cache, tmp_path):
    """The cache under another path."""
    return Path(shutil.copytree(cache[0], tmp_path / "elsewhere"))


@pytest.fixture(autouse=True)
def former_cache(monkeypatch, tmp_path):
    """`use` sets a variable: take it back."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "former"))
    return str(tmp_path / "former")


def test_every_table_is_among_the_launches():
    names = {launch.kernel.__name__ for source in launch_sources.TABLES.values() for launch in source(90)}
    assert {f"{name}_kernel" for name in configuration.kernels()} - names == set()


def test_second_process_compiles_nothing(cache):
    manifest = Manifest.read(cache[0])
    done = run(SECOND, cache[0], 0)
    assert f"compiled 0, loaded {manifest.kernels}, built 0" in done.stdout, done.stdout + done.stderr
    assert manifest.kernels == 5 and manifest.bytes < 500_000
    assert f"{manifest.kernels} kernels" in cache[1] and f"{manifest.kernels} kernels" in done.stdout.splitlines()[0]


def test_cache_keeps_what_loading_reads(cache):
    kept = {path.suffix for path in cache[0].glob("*/*")}
    assert kept <= {".cubin", ".json", ".so"} and ".cubin" in kept
    assert Manifest.read(cache[0]).bytes == sum(path.stat().st_size for path in cache[0].glob("*/*"))


def test_moved_cache_says_so_and_is_used(cache, copied):
    """Its indices hold absolute paths: without new ones a launch would find nothing, or the old place's files."""
    for path in copied.glob("*/*.json"):
        path.write_text(path.read_text().replace(str(cache[0]), "/nowhere"))
    done = run(SECOND, copied, 0)
    assert "compiled 0, loaded 5, built 0" in done.stdout, done.stdout + done.stderr
    assert f"made for the path {cache[0]}, indices written anew for {copied}" in done.stdout
    assert Manifest.read(copied).path == str(copied)
    assert "indices" not in compile_cache.use(copied)


def test_missing_kernel_is_compiled_and_counted(copied):
    """The counters of the second process count."""
    victim = next(copied.glob("*/gae_kernel.cubin")).parent
    shutil.rmtree(victim)
    done = run(SECOND, copied, 0)
    assert "compiled 1, loaded 4" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_compile_missing_compiles_only_missing_kernels(copied):
    for name in ("gae", "dpo"):
        shutil.rmtree(next(copied.glob(f"*/{name}_kernel.cubin")).parent)
    code = """
compile_cache.use(Path(sys.argv[1]))
for seconds in (300, 300):
    print(compile_cache.compile_missing(['toy'], 90, time.monotonic() + seconds, workers=1))
"""
    done = run("import time" + code, copied)
    output, again = done.stdout.splitlines()
    assert output.startswith("3 of 5 kernels cached, 2 compiled ahead in ") and "0 failed, 0 not reached" in output
    assert again.startswith("5 of 5 kernels cached, 0 compiled ahead"), done.stderr


def test_source_that_fails_or_hangs_costs_only_itself(monkeypatch):
    """Catches: a source that holds up the others, or processes that go on behind the deadline."""
    code = """
import json, sys, time
if sys.argv[1] == "broken":
    sys.exit("no such layer")
for folder in "aab":
    print("noise\\nrequest: " + json.dumps(dict(module="m", name="k", arch=90, data="", folder=folder)), flush=True)
time.sleep(600 * (sys.argv[1] == "endless"))
"""
    monkeypatch.setattr(launch_sources, "COMMAND", (sys.executable, "-c", code))
    asked = launch_sources.Asked(["broken", "right"], 90)
    assert [request.folder for request in asked] == ["a", "b"] and asked.failed == ["broken: no such layer"]
    asked.close()
    began = time.monotonic()
    asked = launch_sources.Asked(["endless"], 90, began + 3)
    assert [request.folder for request in asked] == ["a", "b"]
    asked.close()
    assert time.monotonic() - began < 60 and asked.failed == []
    assert all(process.poll() is not None for process in asked._processes)


@pytest.mark.slow
def test_training_step_on_the_stand_in_asks_for_its_kernels(monkeypatch):
    """Catches: a form that the step launches and no source knows; one layer asks for as much as two."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-m", "benchmarks.launch_sources", "training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [line.removeprefix("request: ") for line in done.stdout.splitlines() if line.startswith("request: ")]
    names = {json.loads(line)["name"] for line in lines}
    needed = ("adamw", "attention_backward_kv", "grad_norm", "linear_logprob_dlogits", "rms_norm_backward", "rope")
    assert {f"{name}_kernel" for name in needed} <= names, done.stderr[-2000:]
    assert 15 <= len(lines) <= 30


@pytest.mark.slow
def test_kernel_that_does_not_compile_is_named(tmp_path):
    source = SOURCE.replace(
        "            yield launch_forms.launch_of(case)",
        '            yield replace(launch_forms.launch_of(case), options={"BLOCK": 3, "num_warps": 4})',
    ).replace('"gae", "dpo"', '"gae",')
    source = "from dataclasses import replace\n" + source
    done = run(MAKE, "--out", tmp_path / "cache", "--workers", "1", "--source", "toy", source=source)
    assert done.returncode == 1 and "gae_kernel: " in done.stderr, done.stdout + done.stderr
    assert "1 failed" in done.stdout and Manifest.read(tmp_path / "cache").kernels == 0
    assert "never finished" in compile_cache.use(tmp_path / "cache")


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("triton", "3.0.0", "made by triton 3.0.0, not "),
        ("source", "abc", "made of source abc, not "),
        ("toolchain", "abc", "made by toolchain abc, not "),
        ("arch", 80, "made for arch 80, not 90"),
        ("python", "3.8.1", "made by python 3.8.1, not "),
    ],
)
def test_cache_that_does_not_fit_is_not_used(copied, former_cache, name, value, text):
    replace(Manifest.read(copied), **{name: value}).write(copied)
    said = compile_cache.use(copied)
    assert f"{copied} not used, it was {text}" in said and said.endswith("kernels are compiled anew")
    assert os.environ["TRITON_CACHE_DIR"] == former_cache
    with pytest.raises(ValueError, match=f"expected a new folder or this machine's cache, {copied} was {text}"):
        compile_cache.make(copied, 90)


def test_cache_that_fits_is_used(cache):
    assert compile_cache.use(cache[0]).startswith("compile cache: 5 kernels")
    assert os.environ["TRITON_CACHE_DIR"] == str(cache[0].resolve())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"triton": "3.6.0"}'])
def test_manifest_that_is_none_is_named(tmp_path, former_cache, text):
    assert "expected the manifest of a compile cache" in compile_cache.use(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text(text)
    assert "expected the manifest of a compile cache" in compile_cache.use(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == former_cache


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--arch", "91"], "--arch: expected some of 80, 86, 90, 100, got 91; the nearest is 90"),
        (["--source", "trainig"], "--source: expected some of operations, training, decoding, recipes"),
        (["--workers", "0"], "--workers: expected 1 or more, got 0"),
        (["--worker", "2"], "--worker: expected a known option, got an unknown one; the nearest is --workers"),
    ],
)
def test_command_line_errors_name_what_is_expected(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _fails(["--out", str(tmp_path / "cache"), *arguments], text, capsys)
    assert not (tmp_path / "cache").exists()


def _fails(arguments, text, capsys):
    with pytest.raises(SystemExit) as ended:
        compile_cache.main(arguments)
    assert ended.value.code == 2 and text in capsys.readouterr().err


def test_missing_compilers_are_named(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path / "cache")]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _fails(arguments, "expected the compiler, got TRITON_INTERPRET in the environment; unset it", capsys)
    monkeypatch.delenv("TRITON_INTERPRET")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        _fails(arguments, "expected triton to be installed, found none; pip install triton", capsys)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.NvidiaTool, "from_path", staticmethod(lambda path: None))
        patch.setattr(nvidia.CUDABackend, "hash", lambda self: knobs.nvidia.ptxas.path)
        _fails(arguments, "ptxas: expected Triton's assembler for sm_90, got Cannot find ptxas", capsys)
    monkeypatch.setenv("PATH", str(tmp_path))
    _fails(arguments, "found neither gcc nor clang", capsys)
    assert not (tmp_path / "cache").exists()


def test_folder_with_other_files_is_not_changed(cache, copied, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "file"):
        _fails(["--out", str(path)], "expected a new folder or a compile cache", capsys)
    _fails(["--out", str(copied)], f"made for the path {cache[0]}", capsys)
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert json.loads((copied / "manifest.json").read_text())["path"] == str(cache[0])


def test_binary_of_a_cache_made_ahead_is_measured_without_its_ptx(monkeypatch):
    """A variant whose spills nobody can read is still worth running."""
    monkeypatch.setattr(tune_processes, "read", lambda cubin, arch: (0, 99, 16, ()))
    monkeypatch.setattr(tune_processes, "assembler_log", lambda *_: "8 bytes spill stores, 4 bytes spill loads")
    compiled = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=1024))
    measured = {"registers": 99, "shared_bytes": 1024, "group_registers": 0}
    assert tune_processes.resources(compiled, 90, {}) == measured
    compiled.asm["ptx"] = "text"
    assert tune_processes.resources(compiled, 90, {}) == measured | {"spill_bytes": 12}
