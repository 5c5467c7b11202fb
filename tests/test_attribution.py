"""Scores of new targets from a store that the callback wrote."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import loader, target_set
from test_lightning import fit
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from trak import TRAKer
from transformers import BatchEncoding

from trak_dropout import plugin
from trak_dropout.attribution import to_device
from trak_dropout.gradients import BatchError


@pytest.mark.parametrize("columns", [48, 400])  # 400 columns of 300 samples: the dual form
def test_several_dampings_are_those_one_by_one(tmp_path: Path, columns: int) -> None:
    collector, _, _ = fit(tmp_path, proj_dim=columns)
    dampings = [0.01, "auto", 2]
    targets = loader(target_set())
    together = collector.store.attribute(targets, damping=dampings, progress=False)
    assert together.shape == (3, 300, 20)
    assert together.dtype == np.float32
    for damping, scores in zip(dampings, together, strict=True):
        one = collector.attribute(targets, damping=damping, progress=False)
        np.testing.assert_allclose(scores, one, atol=1e-4 * np.abs(one).max())
    for wrong, words in (([], "empty list"), ([0.1, -1], "damping must be"), (True, "damping")):
        with pytest.raises(ValueError, match=words):
            collector.store.attribute(targets, damping=wrong, progress=False)
    number = collector.store.attribute(targets, damping=np.float32(2), progress=False)
    np.testing.assert_array_equal(number, one)


def test_traker_scores_the_targets_that_were_added(tmp_path: Path) -> None:
    collector, module, _ = fit(tmp_path, proj_dim=48)
    store, targets = collector.store, loader(target_set())
    store.add_targets("added", targets, progress=False)
    traker = TRAKer(
        module, "image_classification", 300, str(store.save_dir), device="cpu",
        use_half_precision=False, **plugin(module, 48),
    )  # fmt: skip
    traker.finalize_features()
    scores = np.array(traker.finalize_scores("added"))
    expected = store.attribute(targets, progress=False)
    np.testing.assert_allclose(scores, expected, atol=1e-6 * np.abs(expected).max())
    images, labels = next(iter(targets))
    with pytest.raises(BatchError, match="no targets in its batches"):
        store.add_targets("none", [(images[:0], labels[:0])], progress=False)


def test_batches_of_all_kinds_move_to_the_device() -> None:
    tensor, device = torch.ones(2), torch.device("meta")
    encoded = BatchEncoding({"ids": tensor})
    for batch in (tensor, [tensor, "a"], (tensor,), {"ids": tensor, "more": [tensor]}, encoded):
        moved = to_device(nn.Linear(1, 1), batch, device)
        assert type(moved) is type(batch)
        leaves = tree_leaves(dict(moved) if isinstance(moved, Mapping) else moved)
        assert {leaf.device for leaf in leaves if isinstance(leaf, Tensor)} == {device}
