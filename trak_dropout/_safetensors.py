"""Reading and writing tensors in the safetensors format.

The format is a JSON header and raw little-endian bytes, so these few lines spare the core
install a fifth dependency; the tests hold them against the ``safetensors`` library both ways.
Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trak_dropout._files import replacing

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if sys.byteorder != "little":  # the bytes below are copied as they lie in memory
    raise ImportError("trak_dropout stores tensors on little-endian machines only")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """Raise TypeError if a tensor's dtype is not one of safetensors'."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, which appears whole or not at all.

    Args:
        path: the file.
        tensors: name to tensor, of any shape and device.

    Raises:
        TypeError: a tensor's dtype is not one of safetensors'.
    """
    check_storable(tensors)
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if len(flat):  # an empty one may have strides with which it cannot be viewed
                file.write(flat.view(torch.uint8).numpy().data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        path: the file.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{path} is cut short or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
            if 8 + length + end > size or end - start != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{path} is cut short: tensor {name!r} does not fit")
            file.seek(8 + length + start)
            data = torch.empty(entry["shape"], dtype=dtype)
            file.readinto(data.reshape(-1).view(torch.uint8).numpy().data)
            tensors[name] = data
    return tensors
