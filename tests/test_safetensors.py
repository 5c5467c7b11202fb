"""The safetensors files against the safetensors library, both ways."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import convnet

from trak_dropout._safetensors import load_tensors, save_tensors

TENSORS = {
    **{f"w {i}": t for i, t in enumerate(convnet().state_dict().values())},
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "half": torch.randn(3, 2).half(),
    "brain": torch.randn(4).bfloat16(),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "strided": torch.randn(4, 6).T,
    "long": torch.tensor([2**40]),
}


def check(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


def test_library_reads_ours(tmp_path: Path) -> None:
    save_tensors(tmp_path / "f", TENSORS)
    check(safetensors.torch.load_file(tmp_path / "f"), TENSORS)
    check(load_tensors(tmp_path / "f"), TENSORS)


def test_we_read_the_librarys(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    check(load_tensors(tmp_path / "f"), TENSORS)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_cut_files_are_refused(tmp_path: Path, keep: int) -> None:
    save_tensors(tmp_path / "f", TENSORS)
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut short|no safetensors"):
        load_tensors(tmp_path / "f")


def test_other_dtypes_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'c' has dtype torch.complex64"):
        save_tensors(tmp_path / "f", {"c": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "f").exists()
