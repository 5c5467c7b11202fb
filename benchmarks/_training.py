"""Training, and models trained on subsets, kept on disk."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
from _settings import Setting, take
from torch import Tensor, nn
from tqdm import tqdm

THIRDS = 3  # checkpoints that a training leaves
SEVERAL = f", {THIRDS} checkpoints"  # ends the names of methods that take all of them


def stages_of(name: str) -> tuple[str, int]:
    """Return a method's name without `SEVERAL`, and how many checkpoints of a training it takes."""
    method = name.removesuffix(SEVERAL)
    return method, 1 if method == name else THIRDS


def train(setting: Setting, rows: Tensor, seed: int) -> nn.Module:
    """Train a model on some of the training samples.

    Args:
        setting: the setting.
        rows: numbers of the samples to train on.
        seed: of initialization and order.

    Returns:
        The model, in evaluation mode.
    """
    return _stages(setting, rows, seed, [setting.epochs])[-1]


def _stages(setting: Setting, rows: Tensor, seed: int, ends: list[int]) -> list[nn.Module]:
    """Train, and return the model as it is after some numbers of epochs."""
    torch.manual_seed(seed)
    model = setting.model().train()
    device = setting.train[0].device
    model.to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], setting.rate)
    kept = []
    for epoch in range(1, ends[-1] + 1):
        for batch in rows[torch.randperm(len(rows))].split(setting.batch_size):
            optimizer.zero_grad()
            setting.losses(model, take(setting.train, batch.to(device))).mean().backward()
            optimizer.step()
        if epoch in ends:
            kept.append(copy.deepcopy(model).eval())
    return kept


def trained(setting: Setting, seed: int, cache: Path) -> nn.Module:
    """The model trained on everything with a seed, from the cache where it is there."""
    return checkpoints(setting, seed, cache, 1)[0]


def checkpoints(setting: Setting, seed: int, cache: Path, count: int = THIRDS) -> list[nn.Module]:
    """The last of the checkpoints that one training leaves, after each third of its epochs.

    Args:
        setting: the setting; everything is trained on.
        seed: of the training.
        cache: where they are kept.
        count: how many of the last.

    Returns:
        Models in evaluation mode, the fully trained one last.
    """
    file = _file(setting, seed, cache)
    if not file.is_file():
        ends = [max(1, round(setting.epochs * i / THIRDS)) for i in range(1, THIRDS + 1)]
        models = _stages(setting, torch.arange(setting.n), seed, ends)
        frozen = {name for name, p in models[0].named_parameters() if not p.requires_grad}
        states = [
            {name: value for name, value in model.state_dict().items() if name not in frozen}
            for model in models
        ]
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(states, file)
        return models[-count:]
    found = []
    for state in torch.load(file, weights_only=True)[-count:]:  # tensors, written above
        torch.manual_seed(seed)
        model = setting.model()
        model.load_state_dict(state, strict=False)
        found.append(model.to(setting.train[0].device).eval())
    return found


def _file(setting: Setting, seed: int, cache: Path) -> Path:
    labels = setting.train[-1].cpu().numpy()
    tag = hashlib.sha1(labels.tobytes()).hexdigest()[:8]  # flipped labels make another model
    name = setting.name.replace(" ", "_").replace(",", "")
    return cache / f"{name}-{setting.n}-{setting.epochs}-{tag}-{seed}-thirds.pt"


def halves(setting: Setting, count: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train on random halves; return which samples each held, and its outputs on the targets.

    Args:
        setting: the setting.
        count: of the halves.
        cache: where outputs are kept, ten halves at a time.

    Returns:
        Masks ``(count, n)`` and outputs ``(count, m)``.
    """
    n, m = setting.n, len(setting.targets[0])
    file = cache / f"{setting.name}-{n}-{m}-{setting.epochs}.npz"
    masks, outputs = np.zeros((0, n), dtype=bool), np.zeros((0, m))
    if file.is_file():
        kept = np.load(file)
        masks, outputs = kept["masks"][:count], kept["outputs"][:count]
    for i in tqdm(range(len(masks), count), desc=f"{setting.name}: halves", leave=False):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 + i))
        model = train(setting, order[: n // 2], seed=1000 + i)
        with torch.no_grad():
            output = setting.output(model, setting.targets).double().cpu().numpy()
        mask = np.zeros(n, dtype=bool)
        mask[order[: n // 2].numpy()] = True
        masks, outputs = np.vstack([masks, mask]), np.vstack([outputs, output])
        if i % 10 == 9 or i == count - 1:
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, masks=masks, outputs=outputs)
    return masks, outputs
