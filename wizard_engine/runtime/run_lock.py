"""The lock of a run directory: one run at a time writes to it, and a second one is told who that is."""

import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from pathlib import Path

from .files import naming

NAME = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Of this process: a run that failed in it does not keep its next run out.
_held: dict[Path, "RunLock"] = {}


class RunLock:
    """An flock on OUT/.lock, which says who holds it: process, host, since when.

    The system frees it when the process ends, however it ends. It holds for all processes that share the file system.
    Under torchrun rank 0 takes it for all ranks: ranks end with their torchrun.
    """

    def __init__(self, directory: Path, descriptor: int | None) -> None:
        self.directory, self._descriptor = directory, descriptor

    @classmethod
    def take(cls, directory: Path) -> "RunLock":
        """The lock of a directory, which is made if it is not there; the one that this process has, if it has one.

        Raises:
            ValueError: another process has it; names the process.   OSError: the file cannot be written.
        """
        directory = Path(directory)
        with naming(directory / NAME, "the run has not begun"):
            directory.mkdir(parents=True, exist_ok=True)
            key = directory.resolve()
            if key not in _held:
                _held[key] = cls(key, _locked(directory))
        return _held[key]

    def release(self) -> None:
        """Free the directory and remove the file; a second call does nothing."""
        if _held.get(self.directory) is self:
            del _held[self.directory]
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        # Removed while it is held: whoever waits for this file sees that it is no longer the directory's.
        if _is_current(descriptor, self.directory / NAME):
            (self.directory / NAME).unlink(missing_ok=True)
        os.close(descriptor)


def _locked(directory: Path) -> int | None:
    """Descriptor of the locked file; None where the file system has no locks."""
    path = directory / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(descriptor, path):
                _say_who(descriptor)
                return descriptor
        except BlockingIOError:
            text = _holder(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"{directory}: expected no other run in this directory, got one: {text}; wait until it ends, stop it, "
                "or choose another --out"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            print(f"{path}: this file system has no locks: a second run here is not noticed", file=sys.stderr)
            return None
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _say_who(descriptor: int) -> None:
    since = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, TypeError, KeyError):
        return "a process that has not said who it is"


def _forget_in_child() -> None:
    """A forked child has copies of the descriptors, which would keep the locks of a parent that was killed."""
    for lock in _held.values():
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
