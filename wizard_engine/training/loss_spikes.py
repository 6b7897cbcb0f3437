"""Losses that stand out of those before them."""

import math
import statistics
from collections import deque

# Losses that a spike is measured against, and the fewest that say what is usual.
SPIKE_WINDOW, SPIKE_LEAST = 128, 32


class Spikes:
    """Which losses stand out of those before them. It sees the same numbers on every rank, and says the same."""

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether a step's loss is a spike; one that is not becomes part of what is usual."""
        if self.sigmas > 0 and len(self.losses) >= SPIKE_LEAST:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            if loss > mean + self.sigmas * deviation:
                return True
        if self.sigmas > 0 and math.isfinite(loss):
            self.losses.append(loss)
        return False
