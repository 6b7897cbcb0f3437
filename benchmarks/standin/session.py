"""Standing in for a GPU: tensors, torch.cuda and Triton's driver at once."""

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import csrc.cuda
from kernels.launch import Launch, observe

from ..launch_costs import cost_of
from .events import Event, Log
from .tensors import CudaMode, Devices, caller, cuda_tensors

ROOT = Path(__file__).resolve().parents[2]
# Bytes and number of the element types of descriptors, as Triton's compiler counts them.
DESCRIPTOR_TYPES = {"fp16": (2, 6), "bf16": (2, 10), "fp32": (4, 7)}
NVTX = ("range_push", "range_pop", "mark")
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}


def driver_library() -> Path:
    """The driver library, compiled where that has not been done yet.

    Raises:
        ValueError: no C compiler, or no triton.
    """
    try:
        import triton.backends.nvidia as nvidia
    except ImportError as error:
        raise ValueError(
            f"stand-in: expected triton with its NVIDIA backend, got {error}; pip install triton"
        ) from None
    source, include = Path(__file__).parent / "driver.c", Path(nvidia.__file__).parent / "include"
    name = hashlib.sha256(source.read_bytes() + str(include).encode()).hexdigest()[:16]
    target = ROOT / "build" / "standin" / name / "libcuda.so.1"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        command = [
            "gcc",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            f"-I{include}",
            str(source),
            "-o",
            str(made),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError("stand-in: expected a C compiler, found no gcc; install one") from None
        if done.returncode:
            raise ValueError(f"stand-in: gcc: {done.stderr.strip()[:500]}")
        os.replace(made, target)
    # Triton links its launchers against what it finds there.
    os.environ["TRITON_LIBCUDA_PATH"] = str(target.parent)
    return target


class FakeStream:
    """A stream, or an event, of a device that does everything at once."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True

    def record(self, stream: Any = None) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class HostGenerator(torch.Generator):
    """A generator of random numbers, on the host whatever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls)


def _take_data(target: torch.Tensor, source: torch.Tensor) -> None:
    target.data = source


class Cuda:
    """torch.cuda of a stand-in device; replaces its functions inside `patched`."""

    def __init__(self, log: Log, arch: int, multiprocessors: int, memory: int, name: str) -> None:
        self.log, self.arch, self.memory = log, arch, memory
        self.properties = SimpleNamespace(
            name=name,
            major=arch // 10,
            minor=arch % 10,
            total_memory=memory,
            multi_processor_count=multiprocessors,
            L2_cache_size=50 * 2**20,
            warp_size=32,
            max_threads_per_multi_processor=2048,
            shared_memory_per_block_optin=SHARED_MEMORY[arch],
        )

    def wait(self, what: str) -> None:
        self.log.add(Event("sync", what, launches=0, where=caller()))

    def functions(self) -> dict[str, Any]:
        """Name in torch.cuda -> what stands in for it."""
        log, wait = self.log, self.wait

        event_numbers = itertools.count()

        class StandInEvent(FakeStream):
            number = ""

            def record(self, stream: Any = None) -> None:
                self.number = str(next(event_numbers))
                log.add(Event("mark", self.number, launches=0))

            def synchronize(self) -> None:
                log.add(Event("wait", self.number, launches=0, where=caller()))

        class StandInStream(FakeStream):
            def record_event(self, event: Any = None) -> StandInEvent:
                event = event or StandInEvent()
                event.record()
                return event

            def synchronize(self) -> None:
                wait("stream")

        class Graph:
            def __init__(self, *args: Any, **options: Any) -> None:
                self.events: list[Event] = []

            def pool(self) -> tuple[int, int]:
                return (0, 0)

            def reset(self) -> None:
                self.events = []

            def replay(self) -> None:
                launches = sum(event.launches for event in self.events)
                log.add(Event("graph", "replay", launches=launches, replayed=tuple(self.events)))

        @contextmanager
        def graph(made: Graph, *args: Any, **options: Any) -> Iterator[None]:
            with log.capture() as events:
                yield
            made.events = list(events)

        stream, statistics = StandInStream(), {"allocated_bytes.all.peak": 0}
        return {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "_lazy_init": lambda: None,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: self.properties.name,
            "get_device_capability": lambda device=None: divmod(self.arch, 10),
            "get_device_properties": lambda device=None: self.properties,
            "mem_get_info": lambda device=None: (self.memory, self.memory),
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "max_memory_reserved": lambda device=None: 0,
            "memory_stats": lambda device=None: statistics,
            "reset_peak_memory_stats": lambda device=None: None,
            "synchronize": lambda device=None: wait("synchronize"),
            "current_stream": lambda device=None: stream,
            "default_stream": lambda device=None: stream,
            "Stream": StandInStream,
            "Event": StandInEvent,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 0),
            "is_bf16_supported": lambda *a: True,
            "is_current_stream_capturing": lambda: False,
            "manual_seed_all": lambda seed: None,
        }

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Inside the block, torch.cuda is this."""
        with ExitStack() as stack:
            for name, value in self.functions().items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            for owner, names in ((torch.cuda.profiler, ("start", "stop")), (torch.cuda.nvtx, NVTX)):
                for name in names:
                    stack.enter_context(mock.patch.object(owner, name, lambda *args, **options: None))
            stack.enter_context(mock.patch.object(torch, "Generator", HostGenerator))
            # What nvcc builds starts CUDA's own runtime: Triton's kernels of the same operations run instead.
            stack.enter_context(mock.patch.object(csrc.cuda, "library", lambda: None))
            # A module's parameters take other tensors' place by their data: weak references keep them from a swap.
            stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _take_data))
            yield


@contextmanager
def triton_driver(log: Log, *, compiles: bool, checks: bool) -> Iterator[None]:
    """Triton's own CUDA driver on the stand-in library; kernels are compiled, checked, or stopped at the launch."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler import compiler
    from triton.runtime import driver

    real = compiler.compile

    def compile(src: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        log.variants.setdefault(src.fn.__name__, []).append(variant_of(src, options or {}))
        if compiles:
            return real(src, target=target, options=options, **rest)
        if checks:
            check_types(src, target, options or {})
        return UncompiledKernel(src, target, options or {})

    before = driver._active
    instance = CudaDriver()
    instance.get_current_stream = lambda device: 0
    driver.set_active(instance)
    import triton.compiler

    try:
        with mock.patch.object(compiler, "compile", compile), mock.patch.object(triton.compiler, "compile", compile):
            yield
    finally:
        driver._active = before


def variant_of(src: Any, options: dict[str, Any]) -> tuple[str, str]:
    """(dtypes and constexprs that a launch asked for, what Triton made of its run-time numbers: divisibility, ones)."""
    declared = {p.name for p in src.fn.params if p.is_constexpr}
    names = src.fn.arg_names
    constants = {names[path[0]]: value for path, value in src.constants.items() if len(path) == 1}
    kinds = {n: str(kind) for n, kind in src.signature.items() if str(kind).startswith(("*", "tensordesc"))}
    absent = {n for n, value in constants.items() if value is None}
    asked = kinds, absent, {n: value for n, value in constants.items() if n in declared}, sorted(options.items())
    made = dict(src.attrs), {n: v for n, v in constants.items() if n not in declared and v is not None}
    return str(asked), str(made)


def check_types(src: Any, target: Any, options: dict[str, Any]) -> None:
    """Compile a kernel as far as its types go: Triton's intermediate form of it, for its arguments."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    src.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


def descriptors(src: Any) -> list[dict[str, Any]] | None:
    """What the compiler says of a kernel's tensor descriptors: rows of at most 128 bytes, swizzled by as many."""
    made = []
    for kind in src.signature.values():
        match = re.match(r"tensordesc<(\w+)\[([\d,\s]+)\]", kind) if isinstance(kind, str) else None
        if match:
            size, number = DESCRIPTOR_TYPES[match[1]]
            block_shape = [int(n) for n in match[2].split(",")]
            row = min(block_shape[-1] * size, 128)
            swizzle = {32: 1, 64: 2, 128: 3}[row]
            shape = [*block_shape[:-1], row // size]
            made.append(
                {"swizzle": swizzle, "elem_size": size, "elem_type": number, "block_size": shape, "fp4_padded": False}
            )
    return made or None


class UncompiledKernel:
    """What compiling a kernel would give, as far as its launch needs it; no machine code."""

    def __init__(self, src: Any, target: Any, options: dict[str, Any]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime import driver

        target = target or driver.active.get_current_target()
        assert isinstance(target, GPUTarget)
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options)).__dict__
        made = {
            "shared": 0,
            "name": src.fn.__name__,
            "global_scratch_size": 0,
            "global_scratch_align": 1,
            "profile_scratch_size": 0,
            "profile_scratch_align": 1,
            "tensordesc_meta": descriptors(src),
            "tmem_size": None,
        }
        self.metadata = SimpleNamespace(**(parsed | made))
        self.packed_metadata = backend.pack_metadata(self.metadata)
        self.name, self.src, self.function = src.fn.__name__, src, 1
        self.run = driver.active.launcher_cls(src, self.metadata)

    def launch_metadata(self, grid: Any, stream: Any, *args: Any) -> None:
        return None


def install() -> None:
    """Stand in for a GPU until the process ends: what `gpu_check --stand-in benchmarks.standin` calls."""
    _installed.enter_context(stand_in())


_installed = ExitStack()


@contextmanager
def stand_in(
    *,
    arch: int = 90,
    multiprocessors: int = 132,
    memory: int = 141 * 10**9,
    name: str = "NVIDIA H200",
    compiles: bool = False,
    checks: bool = False,
) -> Iterator[Log]:
    """Stand in for a GPU inside the block, in a process that does nothing else.

    Args:
        arch: compute capability as 10 major + minor.   memory: bytes that torch sees.   name: of the device.
        compiles: compile Triton kernels instead of stopping at their launch.   checks: compile them as far as their
            types go, which takes a tenth of the time.
    Yields:
        The log of what the device was asked to do.
    Raises:
        ValueError: no triton or no C compiler.
    """
    library = ctypes.CDLL(str(driver_library()), mode=ctypes.RTLD_GLOBAL)
    library.standin_device(arch, multiprocessors, SHARED_MEMORY[arch])
    log = Log()

    def on_launch(launch: Launch) -> None:
        cost = cost_of(launch)
        log.add(Event("triton", launch.kernel.__name__, bytes=cost.bytes, flops=cost.flops, launch=launch))

    with ExitStack() as stack:
        fake = stack.enter_context(cuda_tensors())
        stack.enter_context(Cuda(log, arch, multiprocessors, memory, name).patched())
        stack.enter_context(triton_driver(log, compiles=compiles, checks=checks))
        stack.enter_context(observe(on_launch))
        stack.enter_context(CudaMode(fake, log))
        stack.enter_context(Devices())
        yield log
