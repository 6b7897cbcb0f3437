"""Keys under which Triton looks up what a launch needs: those of run-time numbers of any size should be one.

As a script, without TRITON_INTERPRET: a line for each launch form whose key changes, then how many were looked at.
"""

import sys
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import launch_forms
from benchmarks.launch_forms import Case, cases, launch_of
from kernels import configuration
from kernels.launch import Launch

ARCH = 90
BACKEND = make_backend(GPUTarget("cuda", ARCH, 32))
# 1 is a value of its own to Triton, and so is what 16 divides.
SIZES = (1, 4096, 4097, 4099)
binders: dict[Any, Any] = {}


def key(launch: Launch) -> str:
    """What Triton tells compiled variants of a kernel apart by: types, alignment and values of its arguments."""
    kernel = launch.kernel
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialisation, options = binders[kernel](*launch.arguments, **launch.options)
    return f"{specialisation} {options}"


def int_arguments(launch: Launch) -> dict[str, int]:
    """The run-time integers of a launch, by name."""
    names = [parameter.name for parameter in launch.kernel.params if not parameter.is_constexpr]
    return {name: x for name, x in zip(names, launch.arguments, strict=True) if type(x) is int}


def replaced(launch: Launch, name: str, value: int) -> Launch:
    """The launch with another number in one place."""
    names = [parameter.name for parameter in launch.kernel.params if not parameter.is_constexpr]
    arguments = tuple(value if n == name else x for n, x in zip(names, launch.arguments))
    return Launch(launch.kernel, launch.grid, arguments, launch.options)


def specialised(launch: Launch) -> list[str]:
    """The counts of a launch that make variants: every integer but strides, which a model's sizes fix."""
    result = []
    for name in int_arguments(launch):
        if not name.startswith("stride") and len({key(replaced(launch, name, n)) for n in SIZES}) > 1:
            result.append(name)
    return result


def changing(case: Case) -> list[str]:
    """The sizes of a row, in tokens, at which a form has another key than at the first: strides and constants too."""
    keys = {}
    before = launch_forms.TOKENS
    try:
        for launch_forms.TOKENS in SIZES:
            keys[launch_forms.TOKENS] = key(launch_of(case))
    finally:
        launch_forms.TOKENS = before
    return [f"{n} tokens" for n in SIZES if keys[n] != keys[4096]]


def violations(case: Case) -> Iterator[str]:
    """What makes variants of a form."""
    for what in specialised(launch_of(case)) + changing(case):
        yield f"{case.label}: {what}"


def main() -> int:
    """Prints what makes variants; returns the exit status."""
    chosen = [case for table in sorted(configuration.kernels()) for case in cases(table, ARCH)]
    result = [line for case in chosen for line in violations(case)]
    print(*result, f"{len(chosen)} forms of {len({case.table for case in chosen})} kernels", sep="\n")
    return bool(result)


if __name__ == "__main__":
    sys.exit(main())
