"""What notebooks show of stores, projectors and influences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Classifier, loader, mlp, train_set, trainer
from torch import nn

import trak_dropout as td
from trak_dropout._html import as_bytes, describe_html
from trak_dropout.lightning import GradientCollector
from trak_dropout.ranking import TopInfluences


def test_texts_are_escaped() -> None:
    text = describe_html("<a>", {"<b>": "<c>"}, ["<d>"], [["<e>"]])
    assert not any(f"<{letter}>" in text for letter in "acde")
    assert "&lt;e&gt;" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e6, "2.0 MB"), (4e15, "4000.0 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert as_bytes(count) == text


@pytest.mark.parametrize("scheme", ["dropout", "unit_dropout", "weighted_dropout"])
def test_projector_counts_what_it_keeps(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    projector = td.DropoutProjector.from_model(model, 32, proj_type=scheme, fold=4)
    if scheme == "weighted_dropout":
        assert "not calibrated yet" in projector._repr_html_()
        projector.calibrate(torch.randn(50, projector.grad_dim))
    # The independent way: which single coordinates come out at all?
    kept = np.zeros(projector.grad_dim, dtype=bool)
    for start in range(0, projector.grad_dim, 100):
        unit = torch.eye(projector.grad_dim)[start : start + 100]
        kept[start : start + 100] = projector.project(unit, 3).any(1).numpy()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    ends = np.cumsum(list(sizes.values()))
    counted = projector.kept(3)
    for name, part in zip(sizes, np.split(kept, ends[:-1]), strict=True):
        assert counted[name] == part.sum()
    text = projector._repr_html_()
    assert "<td>0.weight</td><td>30x20</td><td>600</td>" in text
    assert f"<td>{projector.kept()['0.weight']}</td>" in text
    assert "128 B" in text


def test_store_and_influences(tmp_path: Path) -> None:
    collector = GradientCollector(tmp_path / "<store>", proj_dim=64)
    trainer(callbacks=[collector]).fit(Classifier(mlp()), loader(train_set(), shuffle=True))
    text = collector.store._repr_html_()
    assert "&lt;store&gt;" in text
    assert "<td>1</td><td>1</td><td>12</td><td>yes</td>" in text
    assert "76.8 kB as float32" in text
    collector.store.add_targets("test", loader(train_set(30)), progress=False)
    found = td.top_influences(collector.store, "test", 10)
    indices, values = found
    assert isinstance(found, TopInfluences)
    assert found.indices is indices
    text = found._repr_html_()
    assert f"<td>{indices[3, 0]} ({values[3, 0]:.3g})</td>" in text
    assert text.count("<tr>") == 21
