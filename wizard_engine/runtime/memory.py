"""Memory use of this process."""

import resource

import torch


def peak_memory_gib(device: torch.device | str) -> float:
    """Largest memory so far, GiB: allocated on a GPU, the process's resident set on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
