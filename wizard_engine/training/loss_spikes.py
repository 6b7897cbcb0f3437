"""Detection of loss spikes."""

import math
import statistics
from collections import deque

# Window of losses that define the mean, and the fewest that suffice.
SPIKE_WINDOW, SPIKE_LEAST = 128, 32


class Spikes:
    """Detects losses far above the mean of those before. All ranks see the same losses and return the same."""

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether a step's loss is a spike; one that is not joins the window."""
        if self.sigmas > 0 and len(self.losses) >= SPIKE_LEAST:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            if loss > mean + self.sigmas * deviation:
                return True
        if self.sigmas > 0 and math.isfinite(loss):
            self.losses.append(loss)
        return False
