"""What the ranks of a run know of each other beside their collectives: errors, and who is missing.

Every rank posts where it stands to the store that started the run, from a thread of its own. A rank that fails posts
its error; the others, whose collectives end or wait, say which rank failed and why, and end. A rank whose collective
waited too long says who has not come.
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
# A rank that has not posted for so long is gone, or does not run.
SILENT_SECONDS = 3.0
# What a rank waits for its main thread to end by itself once another has failed.
GRACE_SECONDS = 5.0
STORE_SECONDS = 300.0


class Watch:
    """This rank's thread and its view of the others.

    Args:
        store: of the run.   timeout_seconds: longest step; beyond it, plus a grace, the rank says who is missing and
            ends.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.store, self.rank, self.world_size, self.timeout_seconds = store, rank, world_size, timeout_seconds
        self._mark: tuple[int, str, float, bool] = (0, "start", time.monotonic(), False)
        self._ended = threading.Event()
        self._beat = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name="wizard watch")
        self._thread.start()

    def mark(self, text: str, *, limited: bool = False) -> None:
        """The main thread has come to a place; `limited`: it must leave it within the timeout."""
        self._mark = (self._mark[0] + 1, text, time.monotonic(), limited)

    def fail(self, text: str) -> None:
        """Tell the others of an error; the first one of a run stands."""
        self._ended.set()
        try:
            self.store.compare_set("error", "", json.dumps({"rank": self.rank, "text": text}))
        except dist.DistError as error:
            print(f"[rank {self.rank}/{self.world_size}] the other ranks could not be told: {error}", file=sys.stderr)

    def failure(self) -> str:
        """The first error that another rank posted, with that rank in front; "" where there is none."""
        try:
            if not self.store.check(["error"]):
                return ""
            error = json.loads(self.store.get("error"))
        except dist.DistError:
            return ""
        return "" if error["rank"] == self.rank else f"[rank {error['rank']}/{self.world_size}] {error['text']}"

    def explain(self) -> str:
        """Why a collective of this rank failed: another's error, or who did not come; waits for both to show."""
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
            count, text, since, limited = self._mark
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
        """End the thread."""
        self._ended.set()
        self._thread.join()


def run_store(purpose: str) -> Any:
    """A connection of its own to the store at MASTER_ADDR, whose keys belong to a purpose and this start of the run.

    torchrun keeps its store when it starts the ranks again: without keys of their own they would find the addresses of
    the ranks before them, and wait for those.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=timedelta(seconds=STORE_SECONDS),
    )  # fmt: skip
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"wizard/{restart}/{purpose}", store)
