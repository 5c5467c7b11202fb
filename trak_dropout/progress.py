"""What a long computation has done so far, for another process to go on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from trak_dropout._files import write_json
from trak_dropout._safetensors import load_tensors, save_tensors
from trak_dropout._version import __version__

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing keeps two processes from doing the same at once
    fcntl = None  # type: ignore[assignment]

PREFIX = ".unfinished_"
_LOCK, _INPUTS = "lock", "inputs.json"
_SECONDS = 30.0


class Progress:
    """A folder of intermediate results, each written whole or not at all.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, float] = {}

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return what was last kept under a name, if anything."""
        file = self.folder / f"{name}.safetensors"
        self._written[name] = time.monotonic()
        return load_tensors(file) if file.is_file() else None

    def due(self, name: str, seconds: float | None = None) -> bool:
        """Whether so much time has passed since it was loaded or kept that it is worth keeping."""
        seconds = _SECONDS if seconds is None else min(seconds, _SECONDS)
        return time.monotonic() - self._written[name] >= seconds

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in place of those before."""
        save_tensors(self.folder / f"{name}.safetensors", tensors)
        self._written[name] = time.monotonic()

    def drop(self, name: str) -> None:
        """Forget what is kept under a name."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)


def fingerprint(file: Path, *about: Any) -> list[Any]:
    """What tells a file from others that once had its name, as JSON values."""
    stat = file.stat()
    return [str(file), stat.st_size, stat.st_mtime_ns, *about]


@contextmanager
def unfinished(
    root: Path,
    kind: str,
    inputs: Sequence[list[Any]],
    arguments: Any,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Progress]:
    """Open the progress of a computation, of an interrupted one where there is any.

    The folder goes when the computation ends, by a result or because its inputs are refused, and
    stays when it is interrupted, killed, or out of memory or disk. Folders whose inputs have
    changed since are removed.

    Args:
        root: the store's directory. Where it cannot be written, progress is kept in a temporary
            directory, and lost when interrupted.
        kind: what is computed, a plain word.
        inputs: the `fingerprint` of each file read.
        arguments: JSON values on which the result depends otherwise.
        rank: number of the process, of those that share the computation.
        world: how many there are.

    Yields:
        The progress.
    """
    text = json.dumps([__version__, kind, inputs, arguments], sort_keys=True)
    mine = f"{PREFIX}{kind}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = root / f"{mine}_{rank}of{world}"
    lock = None
    with contextlib.suppress(OSError):
        for other in root.glob(f"{PREFIX}*"):
            if not other.name.startswith(mine) and _is_stale(other):
                _remove(other)
        lock = _taken(folder)
    if lock is None:  # not writable, or the same computation runs elsewhere
        with tempfile.TemporaryDirectory(prefix="trak_dropout_") as temporary:
            yield Progress(Path(temporary))
        return
    try:
        write_json(folder / _INPUTS, inputs)
        yield Progress(folder)
    except ValueError:  # what it read is refused, so going on would help nobody
        lock.close()
        _remove(folder)
        raise
    except BaseException:
        lock.close()
        raise
    lock.close()
    for left in root.glob(f"{mine}_*"):
        _remove(left)


def _is_stale(folder: Path) -> bool:
    """Whether the files that a computation read have changed since."""
    try:
        inputs = json.loads((folder / _INPUTS).read_text())
        return any(fingerprint(Path(name))[1:] != about[:2] for name, *about in inputs)
    except (OSError, ValueError):
        return True


def _remove(folder: Path) -> None:
    """Remove a folder unless some process has it."""
    lock = _lock(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _taken(folder: Path) -> BinaryIO | None:
    """Make a folder and take it for this process, if no other has it."""
    for _ in range(3):
        folder.mkdir(exist_ok=True)
        lock = _lock(folder)
        if lock is None:
            return None
        # Another process may have removed the folder between making it and taking it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock.fileno()).st_ino == (folder / _LOCK).stat().st_ino:
                return lock
        lock.close()
    return None


def _lock(folder: Path) -> BinaryIO | None:
    """Take a folder for this process, if no other has it."""
    try:
        file = (folder / _LOCK).open("wb")
    except OSError:
        return None
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
    return file
