"""Progress of reading and writing models."""

import torch.distributed as dist
from tqdm import tqdm

# Seconds before a bar appears: small models are done by then.
DELAY_SECONDS = 2.0


def byte_bar(description: str, total: int) -> tqdm:
    """A bar of bytes on stderr, on rank 0 alone and only in a terminal; a context manager, moved by `update(bytes)`."""
    is_other_rank = dist.is_initialized() and dist.get_rank() != 0
    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        leave=False,
        delay=DELAY_SECONDS,
        disable=True if is_other_rank else None,
    )
