"""Heartbeats of the ranks: errors of other ranks, and which rank is missing from a collective.

A thread of every rank posts its position to the store of the run. A rank that fails posts its error. The other ranks,
whose collectives fail or hang, report that error and exit. A rank whose collective waits too long reports which rank
has not arrived.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PERIOD_SECONDS = 0.5
# A rank without a post for this long has exited or is stopped.
SILENT_SECONDS = 3.0
# Time for the main thread to exit by itself after another rank has failed.
GRACE_SECONDS = 5.0
STORE_SECONDS = 300.0


class Heartbeat:
    """The heartbeat thread of this rank.

    Args:
        store: of the run.   timeout_seconds: longest step. After it and a grace period the rank reports which rank is
            missing and exits.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.store, self.rank, self.world_size, self.timeout_seconds = store, rank, world_size, timeout_seconds
        self._position: tuple[int, str, float, bool] = (0, "start", time.monotonic(), False)
        self._ended = threading.Event()
        self._beat = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="wizard watch")
        self._thread.start()

    def post_position(self, text: str, *, limited: bool = False) -> None:
        """Record the position of the main thread; `limited`: it must change within the timeout."""
        self._position = (self._position[0] + 1, text, time.monotonic(), limited)

    def fail(self, text: str) -> None:
        """Post an error to the other ranks; only the first error of a run is stored."""
        self._ended.set()
        try:
            self.store.compare_set("error", "", json.dumps({"rank": self.rank, "text": text}))
        except dist.DistError as error:
            print(f"[rank {self.rank}/{self.world_size}] the other ranks could not be told: {error}", file=sys.stderr)

    def failure(self) -> str:
        """The error that another rank posted, prefixed with that rank; "" without one."""
        try:
            if not self.store.check(["error"]):
                return ""
            error = json.loads(self.store.get("error"))
        except dist.DistError:
            return ""
        return "" if error["rank"] == self.rank else f"[rank {error['rank']}/{self.world_size}] {error['text']}"

    def explain(self) -> str:
        """Why a collective of this rank failed: the error of another rank, or the missing ranks; waits for either."""
        deadline = time.monotonic() + SILENT_SECONDS + 2 * PERIOD_SECONDS
        before = self._posts()
        while time.monotonic() < deadline:
            failure = self.failure()
            if failure:
                return failure
            time.sleep(PERIOD_SECONDS / 2)
        after = self._posts()
        silent = [r for r in range(self.world_size) if r != self.rank and after.get(r) == before.get(r)]
        if silent:
            return "; ".join(f"rank {r} is gone, or does not run: {self._stands(after, r)}" for r in silent)
        behind = min(post["mark"] for post in after.values()) if after else 0
        late = [r for r, post in after.items() if post["mark"] == behind and r != self.rank]
        return "; ".join(f"rank {r} did not come: {self._stands(after, r)}" for r in late) or "no rank is missing"

    def _stands(self, posts: dict[int, dict], rank: int) -> str:
        return f"last seen at {posts[rank]['text']}" if rank in posts else "never seen"

    def _posts(self) -> dict[int, dict]:
        posts = {}
        for rank in range(self.world_size):
            try:
                if self.store.check([f"mark/{rank}"]):
                    posts[rank] = json.loads(self.store.get(f"mark/{rank}"))
            except dist.DistError:
                return posts
        return posts

    def _work(self) -> None:
        while not self._ended.wait(PERIOD_SECONDS):
            count, text, since, limited = self._position
            self._beat += 1
            try:
                self.store.set(f"mark/{self.rank}", json.dumps({"mark": count, "text": text, "beat": self._beat}))
            except dist.DistError:
                return
            failure = self.failure()
            if failure:
                if not self._ended.wait(GRACE_SECONDS):
                    self._end(f"ended, for another rank failed: {failure}")
            elif limited and time.monotonic() - since > self.timeout_seconds + 2 * GRACE_SECONDS:
                self._end(f"{text}: waited more than {self.timeout_seconds:.0f} seconds; {self.explain()}")

    def _end(self, text: str) -> None:
        print(f"[rank {self.rank}/{self.world_size}] {text}", file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        """Stop the thread."""
        self._ended.set()
        self._thread.join()


def run_store(purpose: str) -> Any:
    """A new connection to the store at MASTER_ADDR, with a key prefix for the purpose and for this start of the run.

    torchrun keeps its store when it restarts the ranks. Without a new prefix they would read the addresses of
    the former ranks and wait for those.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_SECONDS),
    )
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"wizard/{restart}/{purpose}", store)
