"""Files that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from trak_dropout._files import replacing, write_json


def test_replaces_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    assert [f.name for f in path.parent.iterdir()] == ["file"]


def test_json_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
