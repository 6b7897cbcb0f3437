"""Seeded, resumable order of packed samples, the same for any number of ranks."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .packing import bin_members, check_lengths, pack
from .shuffle import seeded_order

Pack = np.ndarray


class Loader:
    """Yields for each step the packs of sample indices that this rank trains on.

    Each epoch: seeded shuffle of the samples, windows of `window` samples, best-fit packing inside a window, seeded
    shuffle of the packs. A step uses the next `packs_per_step` packs, across epochs. Rank r gets packs r,
    r + world_size, ... of them. The packs of a step do not depend on `world_size`.

    If the last step has too few packs, packs of several samples are split until there are enough. If it has fewer
    samples than packs, some ranks get fewer packs, possibly none.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        capacity: int,
        packs_per_step: int,
        seed: int,
        epochs: float | None = None,
        rank: int = 0,
        world_size: int = 1,
        window: int = 4096,
    ) -> None:
        """Plans the steps.

        Args:
            lengths: (N,) tokens of each sample in a pack, each in [1, capacity].
            capacity: most tokens of a pack.
            packs_per_step: packs of one step over all ranks; a multiple of world_size.
            seed: of the order, 0 or more.
            epochs: passes over the samples; a fraction uses that fraction of the last pass's packs. None: endless, and
                `steps` is None.
            window: samples packed together; 0: all samples of an epoch.
        Raises:
            ValueError: an argument outside its range, or a length outside [1, capacity].
        """
        self.lengths = check_lengths(lengths, capacity)
        self.capacity, self.packs_per_step, self.seed, self.epochs = capacity, packs_per_step, seed, epochs
        self.rank, self.world_size, self.window = rank, world_size, window
        self._check()
        self._epoch, self._start, self._step = 0, 0, 0
        self._cache: tuple[int, list[Pack]] | None = None
        self._indices: np.ndarray | None = None
        self._order = self._fingerprint()
        self.steps = self._total()

    def __iter__(self) -> Iterator[list[Pack]]:
        """Yields this rank's packs of each remaining step: lists of (n,) int64 arrays of sample indices."""
        while self.steps is None or self._step < self.steps:
            packs = self._next_step()
            self._indices = np.concatenate(packs)
            yield packs[self.rank :: self.world_size]

    def __len__(self) -> int:
        """Number of remaining steps; TypeError for an endless loader."""
        if self.steps is None:
            raise TypeError("a loader with epochs=None has no length")
        return self.steps - self._step

    def global_step_indices(self) -> np.ndarray:
        """Samples of the step that was yielded last, over all ranks: (n,) int64.

        Raises:
            ValueError: no step has been yielded yet.
        """
        if self._indices is None:
            raise ValueError("global_step_indices: expected a step to be under way, got none yet; iterate first")
        return self._indices

    def state(self) -> dict[str, Any]:
        """JSON state; after `load_state` the loader yields the step after the last one."""
        return {"step": self._step, "epoch": self._epoch, "pack": self._start, "order": self._order}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues exactly at a state; world_size, rank and epochs may differ. `steps` counts those done and to come.

        Raises:
            ValueError: the state belongs to other samples or other settings.
        """
        if state["order"] != self._order:
            raise ValueError(
                f"loader state: expected order {self._order}, got {state['order']}; resume with the same samples, "
                "capacity, packs_per_step, seed and window"
            )
        if self.epochs is not None and self._packs_from(state["epoch"], state["pack"]) < 0:
            raise ValueError(
                f"loader state: expected a position within {self.epochs:g} epochs, got pack {state['pack']} of epoch "
                f"{state['epoch']} (from 0), step {state['step']}; raise epochs"
            )
        self._step, self._epoch, self._start = state["step"], state["epoch"], state["pack"]
        self._indices = None
        self.steps = self._total()

    def _check(self) -> None:
        for name, low in (("packs_per_step", 1), ("seed", 0), ("rank", 0), ("world_size", 1), ("window", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}; raise it")
        if not len(self.lengths):
            raise ValueError("lengths: expected at least one sample, got none; give samples to load")
        if self.epochs is not None and not (0 < self.epochs < math.inf):
            raise ValueError(f"epochs: expected a number above 0, got {self.epochs}; leave it out to go on for ever")
        if self.rank >= self.world_size:
            raise ValueError(f"rank: expected less than world_size {self.world_size}, got {self.rank}")
        if self.packs_per_step % self.world_size:
            raise ValueError(
                f"world_size must divide packs_per_step: packs_per_step={self.packs_per_step}, "
                f"world_size={self.world_size}; choose a multiple of {self.world_size}"
            )

    def _total(self) -> int | None:
        """Steps done, and those that the packs from this position on make."""
        if self.epochs is None:
            return None
        return self._step + math.ceil(self._packs_from(self._epoch, self._start) / self.packs_per_step)

    def _packs_from(self, epoch: int, start: int) -> int:
        """Packs from a position to the end of the last epoch; below 0 behind it."""
        end = math.ceil(self.epochs)
        return sum(len(self._packs(later)) for later in range(epoch, end)) - start - max(0, epoch - end)

    def _packs(self, epoch: int) -> list[Pack]:
        """Packs of an epoch in their seeded order, [] after the last epoch; the last result is cached."""
        epochs_left = math.inf if self.epochs is None else self.epochs - epoch
        if epochs_left <= 0:
            return []
        if self._cache is None or self._cache[0] != epoch:
            self._cache = epoch, self._whole_epoch(epoch)
        packs = self._cache[1]
        return packs if epochs_left >= 1 else packs[: max(1, round(epochs_left * len(packs)))]

    def _whole_epoch(self, epoch: int) -> list[Pack]:
        samples = seeded_order(len(self.lengths), self.seed, epoch, 0)
        window = self.window or len(samples)
        packs: list[Pack] = []
        for start in range(0, len(samples), window):
            group = samples[start : start + window]
            packs += [group[members] for members in bin_members(pack(self.lengths[group], self.capacity))]
        return [packs[index] for index in seeded_order(len(packs), self.seed, epoch, 1)]

    def _next_step(self) -> list[Pack]:
        """The packs of the next step over all ranks; advances the position."""
        packs: list[Pack] = []
        while len(packs) < self.packs_per_step and (epoch_packs := self._packs(self._epoch)[self._start :]):
            taken = epoch_packs[: self.packs_per_step - len(packs)]
            packs += taken
            self._start += len(taken)
            # Of the whole pass: a last one that is a fraction may be given its rest later.
            if self._start >= len(self._cache[1]):
                self._epoch, self._start = self._epoch + 1, 0
        self._step += 1
        return split_packs(packs, self.packs_per_step)

    def _fingerprint(self) -> str:
        settings = f"{self.capacity} {self.packs_per_step} {self.seed} {self.window}"
        return hashlib.sha256(settings.encode() + self.lengths.tobytes()).hexdigest()[:16]


def split_packs(packs: list[Pack], count: int) -> list[Pack]:
    """Cuts the pack of most samples in two (the first of equal ones) until there are `count`, or none can be cut."""
    packs = list(packs)
    while len(packs) < count:
        largest = max(range(len(packs)), key=lambda index: (len(packs[index]), -index))
        if len(packs[largest]) < 2:
            break
        half = len(packs[largest]) // 2
        packs[largest : largest + 1] = [packs[largest][:half], packs[largest][half:]]
    return packs
