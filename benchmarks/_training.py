"""Training, and models trained on subsets, kept on disk."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from _settings import Setting, take
from torch import Tensor, nn
from tqdm import tqdm


def train(setting: Setting, rows: Tensor, seed: int) -> nn.Module:
    """Train a model on some of the training samples.

    Args:
        setting: the setting.
        rows: numbers of the samples to train on.
        seed: of initialization and order.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = setting.model().train()
    device = setting.train[0].device
    model.to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], setting.rate)
    for _ in range(setting.epochs):
        for batch in rows[torch.randperm(len(rows))].split(setting.batch_size):
            optimizer.zero_grad()
            setting.losses(model, take(setting.train, batch.to(device))).mean().backward()
            optimizer.step()
    return model.eval()


def trained(setting: Setting, seed: int, cache: Path) -> nn.Module:
    """The model trained on everything with a seed, from the cache where it is there."""
    file = _file(setting, seed, cache)
    if not file.is_file():
        started = time.perf_counter()
        model = train(setting, torch.arange(setting.n), seed)
        seconds = time.perf_counter() - started
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        state = {name: value for name, value in model.state_dict().items() if name not in frozen}
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"state": state, "seconds": seconds}, file)
        return model
    torch.manual_seed(seed)
    model = setting.model()
    kept = torch.load(file, weights_only=True)  # tensors and a number, written above
    model.load_state_dict(kept["state"], strict=False)
    return model.to(setting.train[0].device).eval()


def training_seconds(setting: Setting, seed: int, cache: Path) -> float:
    """How long the training of a cached model took."""
    return torch.load(_file(setting, seed, cache), weights_only=True)["seconds"]


def _file(setting: Setting, seed: int, cache: Path) -> Path:
    labels = setting.train[-1].cpu().numpy()
    tag = hashlib.sha1(labels.tobytes()).hexdigest()[:8]  # flipped labels make another model
    name = setting.name.replace(" ", "_").replace(",", "")
    return cache / f"{name}-{setting.n}-{setting.epochs}-{tag}-{seed}.pt"


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
