"""Learning-rate schedules as functions of the step."""

import math


def cosine_with_warmup(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Learning rate of 0-based `step`: linear to `peak` over `warmup` steps, then a cosine to `floor * peak`.

    Args:
        peak: highest rate.   warmup, total: optimizer steps.   floor: share of the peak left at the end, 0 to 1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
