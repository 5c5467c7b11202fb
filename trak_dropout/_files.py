"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends well.

    Until then, and after an exception or a crash, ``path`` is what it was.

    Args:
        path: the file to replace.

    Yields:
        A binary file beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` with ``content`` as JSON.

    Args:
        path: the file.
        content: what JSON can hold; NaN and infinities are refused.
    """
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode())
