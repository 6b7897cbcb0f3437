"""Entries of the kernels' tables that a test of every entry takes."""

import torch

from kernels.configuration import table


def program(config: dict) -> dict:
    """What a configuration changes where the tests run: Triton's interpreter has no warps and no stages."""
    without = () if torch.cuda.is_available() else ("num_warps", "num_stages")
    return {name: value for name, value in config.items() if name not in without}


def distinct_entries(*names: str) -> list[tuple[int, dict]]:
    """(arch, class) of tables of the same classes: the first architecture of each program of all of them."""
    result = {}
    for entry in table(names[0]):
        key = entry["arch"], entry["class"]
        programs = [program(e["config"]) for name in names for e in table(name) if (e["arch"], e["class"]) == key]
        result.setdefault(str((entry["class"], programs)), key)
    return list(result.values())
