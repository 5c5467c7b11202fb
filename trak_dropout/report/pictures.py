"""Thumbnails, many to an image, so that thousands of them load at once and stay small."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST = 96
COLUMNS = 20
_PIXEL_ART = 32


@dataclass(frozen=True)
class Sheets:
    """Pictures side by side in few images.

    Args:
        tile: width and height of a thumbnail, in pixels.
        columns: thumbnails in a row, and rows in a sheet.
        sheets: each as a ``data:`` address.
    """

    tile: int
    columns: int
    sheets: tuple[str, ...]

    @classmethod
    def of(cls, pictures: Sequence[NDArray[np.uint8]]) -> Sheets:
        """Put pictures into sheets, in their order.

        Args:
            pictures: gray ``(height, width)`` or color ``(height, width, 3)``, of any sizes; larger
                ones than a thumbnail are scaled down, smaller ones centered.

        Returns:
            The sheets.
        """
        tile = min(LARGEST, max((max(p.shape[:2]) for p in pictures), default=1))
        per_sheet = COLUMNS**2
        sheets = []
        for start in range(0, len(pictures), per_sheet):
            some = pictures[start : start + per_sheet]
            rows = -(-len(some) // COLUMNS)
            sheet = Image.new("RGBA", (COLUMNS * tile, rows * tile))
            for i, picture in enumerate(some):
                image = Image.fromarray(picture)
                image.thumbnail((tile, tile))
                corner = (tile - image.width) // 2, (tile - image.height) // 2
                sheet.paste(
                    image, (i % COLUMNS * tile + corner[0], i // COLUMNS * tile + corner[1])
                )
            buffer = io.BytesIO()
            # Small pictures are shown pixel by pixel: every one counts.
            sheet.save(buffer, "webp", lossless=tile <= _PIXEL_ART, quality=80)
            encoded = base64.b64encode(buffer.getvalue()).decode()
            sheets.append(f"data:image/webp;base64,{encoded}")
        return cls(tile, COLUMNS, tuple(sheets))

    @property
    def pixelated(self) -> bool:
        """Whether thumbnails are so small that they are shown pixel by pixel."""
        return self.tile <= _PIXEL_ART
