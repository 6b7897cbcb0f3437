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


def _share_block_types() -> None:
    """Make each type of block once, and the fields of tensors that follow from it: the interpreter makes them at every
    operation, for a third of its time."""
    core = interpreter.tl.core
    block, tensor, semantic = core.block_type, core.tensor, interpreter.interpreter_semantic
    make_type, make_tensor, is_equal, broadcast = (
        block.__init__,
        tensor.__init__,
        block.__eq__,
        semantic.broadcast_impl_value,
    )
    types, shapes = {}, {}

    def key_of(element, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        return element.name, getattr(element, "address_space", None), sizes

    def new_type(cls, element=None, shape=()):
        return (types.get(key_of(element, shape)) if element is not None else None) or object.__new__(cls)

    def init_type(self, element_ty, shape):
        if "name" not in self.__dict__:
            make_type(self, element_ty, shape)
            key = key_of(element_ty, shape)
            self.shape = shapes.setdefault(key[-1], self.shape)
            types[key] = self

    def init_tensor(self, handle, type):
        if "of_tensors" not in type.__dict__:
            make_tensor(self, handle, type)
            type.of_tensors = self.numel, self.dtype, self.shape
        else:
            self.handle, self.type = handle, type
            self.numel, self.dtype, self.shape = type.of_tensors

    def broadcast_values(left, right):
        kinds = left.type.is_block(), right.type.is_block()
        if kinds == (False, False) or (kinds == (True, True) and left.type.shape is right.type.shape):
            return left, right
        return broadcast(left, right)

    block.__new__, block.__init__ = new_type, init_type
    block.__eq__ = lambda self, other: self is other or is_equal(self, other)
    tensor.__init__, semantic.broadcast_impl_value = init_tensor, broadcast_values


def _speed_interpreter_up() -> None:
    """Spare Triton's interpreter what changes no result, more than half of its time."""
    # Checks of integer overflow, which it computes in 64 bits and then drops: it asserts under `debug` alone.
    interpreter.interpreter_builder.options = replace(interpreter.InterpreterOptions(), sanitize_overflow=False)

    # A search of Triton's modules at every call of a device function: it replaces their builtins, and finds nothing to
    # replace until the launch has ended.
    builtins: dict[object, list[tuple[str, object]]] = {}

    def patch_builtin(module, builder, scope) -> None:
        if module not in builtins:
            builtins[module] = inspect.getmembers(module, interpreter.tl.core.is_builtin)
        if builtins[module] and interpreter.tl.core.is_builtin(getattr(module, builtins[module][0][0])):
            for name, member in builtins[module]:
                interpreter._patch_attr(module, name, member, builder, scope)

    # A table of all dtypes that it makes anew at every operation.
    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, interpreter.tl.block_type) else dtype
        if element.name not in np_dtypes:
            np_dtypes[element.name] = np_dtype(element)
        return np_dtypes[element.name]

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype
    _share_block_types()


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
