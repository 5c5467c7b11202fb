"""One run at a time writes to a store."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks; there a store is not guarded
    fcntl = None  # type: ignore[assignment]

from trak_dropout.store import StoreMismatchError

LOCK = "collecting.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[Path] = set()


class StoreInUseError(StoreMismatchError):
    """Another run is collecting into the store."""


class StoreLock:
    """An exclusive claim on a directory, which the operating system drops if the process dies.

    The file stays behind; only the lock on it counts, so nothing is left to clean up after a
    crash. Worker processes do not inherit it.

    Args:
        directory: what to claim; made if it is not there.

    Raises:
        StoreInUseError: another run has claimed it.
        OSError: the directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / LOCK
        if self._path in _held:  # such locks do not bind the process that has them
            raise StoreInUseError(_message(directory, "a collector of this process"))
        self._file = open(self._path, "a+")  # noqa: SIM115  # open for as long as it is held
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self._file.close()
            if error.errno not in _TAKEN:
                raise
            raise StoreInUseError(_message(directory, holder)) from None
        _held.add(self._path)
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()
            _held.discard(self._path)

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            facts = json.loads(self._file.read())
            return f"process {facts['pid']} on {facts['host']}"
        except (ValueError, KeyError):
            return "another process"


def _message(directory: Path, holder: str) -> str:
    return (
        f"save_dir={str(directory)!r} is being collected into by {holder}; "
        "give each run a save_dir of its own"
    )
