"""`InfluenceNetwork`: the influence of one example on another, from embeddings of both."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import ArrayLike, NDArray
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn

from trak_dropout._checks import check_integer
from trak_dropout._random import random_states_kept
from trak_dropout._safetensors import load_tensors, save_tensors
from trak_dropout.largest import PIECE, Largest
from trak_dropout.surrogate.batches import Pairs, Rectangles
from trak_dropout.surrogate.support import ExtrapolationWarning, Support

Architecture = Literal["concat", "product"]
FORMAT_VERSION = 1
_BLOCK_FLOATS = 2**20  # of intermediate values in prediction: small enough for caches
_TARGETS = 128
_ENCODED = 4096
_CLIP = 10.0  # deviations: beyond, a column says no more than that it is large


class InfluenceNetwork(pl.LightningModule):
    """Predicts the influence of a source (training) example on a target from their embeddings.

    ``architecture="concat"`` is the paper's: two layers on the concatenation of both embeddings,
    ``hidden_dim`` ReLU units and one output, ``(2 d + 2) hidden_dim + 1`` parameters: 205 001 for
    embeddings of 1024 and 100 units, as the paper states. ``"product"`` is ours: two layers for
    each side, whose outputs, ``rank`` of them, are multiplied and summed, as influence itself is a
    product of a source's and a target's gradient. Predicting all pairs is then a matrix product.

    The influences are standardised, and each column of the embeddings. A `LightningModule`, so that
    `fit` takes a Trainer with loggers, callbacks and devices of your choice.

    Source: NN-CIFT (arXiv 2502.09969).

    Args:
        embedding_dim: d, the number of columns of embeddings.
        hidden_dim: number of hidden units.
        architecture: ``"concat"`` or ``"product"``.
        rank: number of products, with ``"product"``.
        ensemble: number of networks from different initial weights, trained side by side on the
            same batches; predictions are their mean.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is below 1, or the architecture is neither.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_dim: int = 100,
        *,
        architecture: Architecture = "concat",
        rank: int = 32,
        ensemble: int = 1,
    ) -> None:
        super().__init__()
        if architecture not in ("concat", "product"):
            raise ValueError(f"architecture must be 'concat' or 'product', got {architecture!r}")
        self.embedding_dim = check_integer("embedding_dim", embedding_dim, minimum=1)
        self.hidden_dim = check_integer("hidden_dim", hidden_dim, minimum=1)
        self.architecture: Architecture = architecture
        self.rank = check_integer("rank", rank, minimum=1)
        self.ensemble = check_integer("ensemble", ensemble, minimum=1)
        sizes = (self.ensemble, self.embedding_dim, self.hidden_dim)
        net = _Concat(*sizes) if architecture == "concat" else _Product(*sizes, self.rank)
        self.net = net.float()  # whatever torch.set_default_dtype says
        self.net.reset(0)
        self.summary: dict[str, Any] = {}
        self._scales: dict[str, Tensor] = {}
        self._support: dict[str, Support] = {}
        self._learning: dict[str, float] = {"learning_rate": 3e-3, "ranking": 0.0}
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._errors: list[Tensor] = []
        self._losses: list[Tensor] = []

    @property
    def num_parameters(self) -> int:
        """Number of weights, of all networks of the ensemble."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    # --- learning --------------------------------------------------------------------------

    def fit(
        self,
        source_embeddings: ArrayLike | Tensor,
        target_embeddings: ArrayLike | Tensor,
        influences: ArrayLike | Tensor,
        *,
        pairs: ArrayLike | Tensor | None = None,
        seed: int = 0,
        max_epochs: int = 20,
        batch_size: int | tuple[int, int] = 1024,
        learning_rate: float = 3e-3,
        ranking: float = 0.0,
        validation: float = 0.1,
        patience: int = 3,
        trainer: pl.Trainer | None = None,
    ) -> InfluenceNetwork:
        """Learn from influences of sampled pairs, anew, whatever was learnt before.

        The same seed, data and machine give the same network; global random states are left as
        they were.

        Args:
            source_embeddings: of the sampled training examples, ``(n, d)``.
            target_embeddings: of the sampled targets, ``(m, d)``.
            influences: ``(n, m)``; or ``(p,)``, those of ``pairs``. Leave pairs without a value out
                by giving ``pairs``: NaN is refused.
            pairs: row and column of each influence, integers ``(p, 2)``.
            seed: seed of initial weights, batches and the validation split.
            max_epochs: passes over the pairs at most.
            batch_size: pairs in a batch. (The paper takes 64, with a learning rate of 1e-4.) Or
                ``(sources, targets)``: all pairs of so many sources with so many targets make a
                batch, for which each example is encoded once; many times faster where a whole
                matrix of influences is given, and the way to learn from millions of pairs.
            learning_rate: Adam's.
            ranking: weight of a ranking loss beside the squared error: logistic, on the difference
                between a pair and another with the same target.
            validation: share of the sources and of the targets whose pairs are held out to tell
                when to stop, and which epoch's weights to keep; 0 trains on all pairs for
                ``max_epochs``.
            patience: epochs without improvement on held-out pairs before training stops.
            trainer: a Trainer to use instead; its ``max_epochs`` and callbacks hold then. It may
                monitor ``train_loss`` and ``val_loss``.

        Returns:
            The network. ``summary`` holds the number of pairs and epochs, and the mean squared
            error on held-out pairs relative to their variance around the mean of the rest.

        Raises:
            TypeError: an integer argument is none.
            ValueError: shapes do not match, a value is NaN or infinite, there are no pairs, all
                influences are equal, a number is out of range, or training diverged.
        """
        seed = check_integer("seed", seed, minimum=0)
        check_integer("max_epochs", max_epochs, minimum=1)
        shape = _batch_shape(batch_size, pairs is None)
        check_integer("patience", patience, minimum=1)
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
        if not (math.isfinite(ranking) and ranking >= 0):
            raise ValueError(f"ranking must not be below 0, got {ranking!r}")
        if not 0 <= validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {validation!r}")
        source = self._embeddings("source_embeddings", source_embeddings)
        target = self._embeddings("target_embeddings", target_embeddings)
        index, values = _pairs(influences, pairs, len(source), len(target))
        generator = torch.Generator().manual_seed(seed)
        known = _known(index, *values.shape)
        held = _held_out(index, known, values.shape, validation, generator)
        kept = values[~held]
        if not bool((kept != kept[0]).any()):
            held = torch.zeros_like(held)  # whatever varies was held out
            kept = values.flatten()
        mean, scale = kept.mean(), kept.std(correction=0)
        if float(values.min()) == float(values.max()) or not float(scale) > 0:
            raise ValueError(
                f"influences are all equal ({float(kept[0]):g}); there is nothing to learn"
            )
        if not float(values.abs().max()) <= torch.finfo(torch.float32).max:
            raise ValueError("influences leave the range of float32; scale them down")
        self.cpu()
        self._scales = {
            "influences": torch.stack([mean, scale]),
            "source": _column_scales(source[known[0]]),
            "target": _column_scales(target[known[1]]),
        }
        source, target = self._standardised("source", source), self._standardised("target", target)
        self._support = {
            "source": Support.of(source[known[0]], generator),
            "target": Support.of(target[known[1]], generator),
        }
        standard = ((values - mean) / scale).float()
        self.net.reset(seed)
        self._learning = {"learning_rate": float(learning_rate), "ranking": float(ranking)}
        self._best, self._errors, self._losses = None, [], []
        order = torch.Generator().manual_seed(seed)
        checking = None
        if index is None and shape is not None:
            rectangles = Rectangles(source, target, standard)
            rows, columns = (torch.nonzero((~held).any(1 - axis)).flatten() for axis in (0, 1))
            training = rectangles.shuffled(rows, columns, shape, order)
            if bool(held.any()):
                checking = rectangles.outside(rows, columns)
        else:
            assert isinstance(batch_size, int)
            if index is None:
                index = torch.cartesian_prod(*known)
                held, standard = held.flatten(), standard.flatten()
            training = Pairs(source, target, index[~held], standard[~held], ranking > 0).shuffled(
                batch_size, order
            )
            if bool(held.any()):
                checking = Pairs(source, target, index[held], standard[held], False).in_order()
        with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            if trainer is None:
                with _quiet():
                    stop = [EarlyStopping("val_loss", patience=patience)] if checking else []
                    trainer = _trainer(max_epochs, list(stop))
                    trainer.fit(self, training, checking)
            else:
                trainer.fit(self, training, checking)
        if self._best is not None:
            self.net.load_state_dict(self._best[1])
        finite = self._best is None or math.isfinite(self._best[0])
        if not (finite and all(bool(w.isfinite().all()) for w in self.net.parameters())):
            self._scales = {}
            raise ValueError(f"training diverged: learning_rate={learning_rate!r} is too large")
        self._finish(trainer.current_epoch, values.numel(), int(held.sum()), standard[held])
        return self

    def _finish(self, epochs: int, pairs: int, held: int, values: Tensor) -> None:
        """Let go of the Trainer and say how it went."""
        self.trainer = None
        self.cpu().eval()
        error = None
        if self._best is not None:
            error = self._best[0] / float(values.square().mean())
        self._best, self._errors = None, []
        self.summary = {
            "pairs": pairs,
            "held_out_pairs": held,
            "epochs": epochs,
            "held_out_error": error,
        }
        if error is not None and error >= 1:
            warnings.warn(
                f"on held-out pairs the mean squared error is {error:.2f} times that of predicting "
                "the mean: the embeddings say nothing of these influences, or there are too few "
                "pairs. Take a larger share, other embeddings (with labels, for instance), or "
                "architecture='product'",
                stacklevel=3,
            )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error, and the ranking loss where asked for."""
        if len(batch) == 3:
            loss = self._rectangle_loss(*batch)
        else:
            left, right = self._encoded(batch)
            found = self.net.pairs(left, right)
            loss = (found - batch[4]).square().mean(1).sum()
            if self._learning["ranking"]:
                other = self.net.pairs(self.net.encode_source(batch[5]), right)
                loss = loss + self._ranking_loss(found - other, batch[4] - batch[6])
        self._losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch; to log every step would take longer than the step."""
        self.log("train_loss", torch.stack(self._losses).mean() / self.ensemble)
        self._losses = []

    def transfer_batch_to_device(
        self, batch: list[Tensor], device: torch.device, dataloader_idx: int
    ) -> list[Tensor]:
        """Move a batch; Lightning's own way looks into every collection there is."""
        return [part.to(device) for part in batch]

    def _rectangle_loss(self, source: Tensor, target: Tensor, values: Tensor) -> Tensor:
        """The loss of all pairs of some sources with some targets."""
        found = self.net.grid(*self.net.encode(source, target))
        loss = (found - values).square().mean((1, 2)).sum()
        if self._learning["ranking"]:  # sources come in random order: the next one is another
            apart, order = found - found.roll(1, 1), values - values.roll(1, 0)
            loss = loss + self._ranking_loss(apart.flatten(1), order.flatten())
        return loss

    def _ranking_loss(self, apart: Tensor, wanted: Tensor) -> Tensor:
        """Logistic loss of predicted differences ``(ensemble, b)``, by the sign of true ones."""
        order = torch.sign(wanted)
        ranked = nn.functional.softplus(-order * apart) * order.abs()
        return self._learning["ranking"] * ranked.mean(1).sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Squared error of the mean of the ensemble."""
        if len(batch) == 3:
            found = self.net.grid(*self.net.encode(batch[0], batch[1])).mean(0)
        else:
            found = self.net.pairs(*self._encoded(batch)).mean(0)
        self._errors.append((found - batch[-1]).square().flatten())

    def _encoded(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Encodings of both sides of a batch's pairs; each example is encoded once."""
        left = self.net.encode_source(batch[0]).index_select(1, batch[1])
        return left, self.net.encode_target(batch[2]).index_select(1, batch[3])

    def on_validation_epoch_end(self) -> None:
        """Keep the best weights so far."""
        error = float(torch.cat(self._errors).mean())
        self._errors = []
        self.log("val_loss", error)
        if not self.trainer.sanity_checking and (self._best is None or error < self._best[0]):
            state = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
            self._best = (error, state)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the paper."""
        return torch.optim.Adam(self.net.parameters(), self._learning["learning_rate"])

    # --- predicting ------------------------------------------------------------------------

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Predict for embeddings ``(b, d)`` of b sources and b targets, ``(b,)``."""
        self._check_fitted()
        sides = self.net.encode(
            self._standardised("source", source), self._standardised("target", target)
        )
        return self._restored(self.net.pairs(*sides).mean(0))

    def predict(
        self,
        source_embeddings: ArrayLike | Tensor,
        target_embeddings: ArrayLike | Tensor,
        *,
        return_std: bool = False,
    ) -> Any:
        """Predict the influence of every source on every target.

        Args:
            source_embeddings: ``(n, d)``.
            target_embeddings: ``(m, d)``.
            return_std: return the spread over the ensemble, too.

        Returns:
            float32 ``(n, m)``, in the units of the influences learnt from; with ``return_std`` also
            their standard deviation over the ensemble, float32 ``(n, m)``.

        Raises:
            RuntimeError: the network has not been fitted.
            ValueError: shapes do not match, a value is NaN or infinite, or ``return_std`` is asked
                of a single network.

        Warns:
            ExtrapolationWarning: embeddings lie far from those trained on.
        """
        if return_std and self.ensemble < 2:
            raise ValueError("return_std needs an ensemble: InfluenceNetwork(..., ensemble=5)")
        source, target = self._ready(source_embeddings, target_embeddings)
        if not return_std:
            return _Encodings(self, source, target).rows(slice(None))
        result = np.empty((len(source), len(target)), dtype=np.float32)
        spread = np.empty_like(result)
        for rows, columns, found in self._predictions(source, target):
            result[rows, columns] = self._restored(found.mean(0)).cpu().numpy()
            deviation = found.std(0, correction=0).double() * self._scales["influences"][1]
            spread[rows, columns] = deviation.float().cpu().numpy()
        return result, spread

    def predict_top_k(
        self,
        source_embeddings: ArrayLike | Tensor,
        target_embeddings: ArrayLike | Tensor,
        k: int,
        *,
        harmful: bool = False,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the sources with the largest predicted influence on each target.

        The matrix of all predictions never exists: only the best so far are kept.

        Args:
            source_embeddings: ``(n, d)``.
            target_embeddings: ``(m, d)``.
            k: how many for each target.
            harmful: the most negative ones instead.

        Returns:
            Numbers of sources, int64, and predicted influences, float32, both ``(m, k)``, best
            first, equal ones by number.

        Raises:
            RuntimeError: the network has not been fitted.
            TypeError: ``k`` is no integer.
            ValueError: ``k`` is not between 1 and n, or as for `predict`.

        Warns:
            ExtrapolationWarning: embeddings lie far from those trained on.
        """
        source, target = self._ready(source_embeddings, target_embeddings)
        if check_integer("k", k, minimum=1) > len(source):
            raise ValueError(f"k={k} is above the number of sources, {len(source)}")
        sign = -1.0 if harmful else 1.0
        tops: dict[int, Largest] = {}
        for rows, columns, found in self._predictions(source, target):
            few, count = columns.stop - columns.start, rows.stop - rows.start
            top = tops.setdefault(columns.start, Largest(few, k, self.device))
            best = sign * self._restored(found.mean(0)).T
            padded = best.new_full((few, -(-count // PIECE) * PIECE), -torch.inf)
            padded[:, :count] = best
            top.add(padded, rows.start)
        settled = [top.settle() for top in tops.values()]
        values = torch.cat([best for best, _ in settled]).cpu().numpy()
        indices = torch.cat([numbers for _, numbers in settled]).cpu().numpy()
        return indices, np.float32(sign) * values

    def _ready(self, source: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Checked, standardised embeddings; warns of those far from what was trained on."""
        self._check_fitted()
        ready = []
        for side, given in (("source", source), ("target", target)):
            name = f"{side}_embeddings"
            rows = self._standardised(side, self._embeddings(name, given))
            complaint = self._support[side].complaint(name, rows)
            if complaint:
                warnings.warn(complaint, ExtrapolationWarning, stacklevel=3)
            ready.append(rows.to(self.device))
        return ready[0], ready[1]

    def _predictions(self, source: Tensor, target: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Standardised predictions ``(ensemble, rows, columns)``, a block at a time."""
        with torch.no_grad():
            left, right = _encoded_rows(self.net, source, target)
            for first in range(0, len(target), _TARGETS):
                columns = slice(first, min(first + _TARGETS, len(target)))
                width = self.ensemble * (columns.stop - columns.start)
                step = max(1, _BLOCK_FLOATS // (width * self.net.values_per_pair * PIECE)) * PIECE
                for start in range(0, len(source), step):
                    rows = slice(start, min(start + step, len(source)))
                    yield rows, columns, self.net.grid(left[:, rows], right[:, columns])

    # --- keeping ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the network to a file in the safetensors format; nothing is pickled.

        Args:
            path: the file, which appears whole or not at all.

        Raises:
            RuntimeError: the network has not been fitted.
        """
        self._check_fitted()
        settings = {
            "format_version": FORMAT_VERSION,
            "embedding_dim": self.embedding_dim,
            "hidden_dim": self.hidden_dim,
            "architecture": self.architecture,
            "rank": self.rank,
            "ensemble": self.ensemble,
            "summary": self.summary,
        }
        text = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        save_tensors(
            Path(path),
            {
                "settings": text,
                **{f"net.{name}": value for name, value in self.net.state_dict().items()},
                **{f"scales.{name}": value for name, value in self._scales.items()},
                **self._support["source"].to_tensors("support.source"),
                **self._support["target"].to_tensors("support.target"),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> InfluenceNetwork:
        """Read a network that `save` wrote; it predicts to the bit what that one did.

        Args:
            path: the file.

        Returns:
            The network, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no whole file of a network, or of another format version.
        """
        tensors = load_tensors(Path(path))
        try:
            settings = json.loads(bytes(tensors["settings"].tolist()))
            version = settings.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format_version {version}, this version of trak_dropout reads "
                    f"{FORMAT_VERSION}"
                )
            summary = settings.pop("summary")
            network = cls(**settings)
            network.net.load_state_dict(_with_prefix(tensors, "net."))
            network._scales = _with_prefix(tensors, "scales.")
            network._support = {
                side: Support.from_tensors(f"support.{side}", tensors)
                for side in ("source", "target")
            }
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} holds no InfluenceNetwork: {error}") from error
        network.summary = summary
        return network.eval()

    # --- inside ----------------------------------------------------------------------------

    def _check_fitted(self) -> None:
        if not self._scales:
            raise RuntimeError("this InfluenceNetwork has learnt nothing yet: call fit, or load")

    def _embeddings(self, name: str, given: Any) -> Tensor:
        rows = _numbers(name, given).float()
        if rows.ndim != 2 or rows.shape[1] != self.embedding_dim or not len(rows):
            raise ValueError(
                f"{name} must be of shape (n, {self.embedding_dim}) with n > 0, as embedding_dim="
                f"{self.embedding_dim} says, got {tuple(rows.shape)}"
            )
        bad: list[int] = []
        if not bool(torch.isfinite(rows.sum())):  # else there is none, and no need to look at each
            bad = torch.nonzero(~torch.isfinite(rows).all(1)).flatten().tolist()
        if bad:
            raise ValueError(f"{name}: rows {bad[:10]} are NaN or infinite")
        return rows

    def _standardised(self, side: str, rows: Tensor) -> Tensor:
        mean, scale = self._scales[side].to(rows.device)
        return (rows - mean).div_(scale).clamp_(-_CLIP, _CLIP)

    def _restored(self, found: Tensor) -> Tensor:
        mean, scale = self._scales["influences"].to(found.device)
        return (found.double() * scale + mean).float()


class PredictedInfluences:
    """The matrix of a network's predictions, of which rows are computed when they are asked for.

    Args:
        network: a fitted network.
        source_embeddings: ``(n, d)``.
        target_embeddings: ``(m, d)``.
    """

    def __init__(
        self,
        network: InfluenceNetwork,
        source_embeddings: ArrayLike | Tensor,
        target_embeddings: ArrayLike | Tensor,
    ) -> None:
        self._encodings = _Encodings(network, *network._ready(source_embeddings, target_embeddings))
        self.shape = self._encodings.shape

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Rows by a slice, or by an array of their numbers: float32 ``(r, m)``."""
        return self._encodings.rows(
            rows if isinstance(rows, slice) else torch.from_numpy(np.array(rows))
        )


class _Encodings:
    """What a network makes of either side, a few numbers for each example, and their products."""

    def __init__(self, network: InfluenceNetwork, source: Tensor, target: Tensor) -> None:
        self._net = network.net
        self._scales = network._scales["influences"].tolist()
        with torch.no_grad():
            self._left, self._right = _encoded_rows(network.net, source, target)
        self.shape = (len(source), len(target))

    def rows(self, which: slice | Tensor) -> NDArray[np.float32]:
        """Predictions of some sources for all targets, float32 ``(r, m)``."""
        mean, scale = self._scales
        with torch.no_grad():
            left = self._left[:, which]
            result = torch.empty(left.shape[1], self.shape[1], dtype=torch.float32)
            step = max(1, _BLOCK_FLOATS // self.shape[1])
            for start in range(0, len(result), step):
                some = left[:, start : start + step]
                self._net.fill(result[start : start + step], some, self._right, scale, mean)
        return result.numpy()


def _encoded_rows(net: _Network, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Encode both sides, some rows at a time."""
    left = torch.cat([net.encode_source(some) for some in torch.split(source, _ENCODED)], 1)
    return left, torch.cat([net.encode_target(some) for some in torch.split(target, _ENCODED)], 1)


class _Network(nn.Module):
    """Networks of an ensemble, side by side: each side is encoded, then both are combined."""

    values_per_pair: int

    def reset(self, seed: int) -> None:
        """Draw initial weights, member by member, from seeds that follow each other."""
        for name, parameter in self.named_parameters():
            for member, values in enumerate(parameter.data):
                # As nn.Linear: uniform, by the number of inputs.
                bound = 1 / math.sqrt(self.inputs(name))
                draws = torch.Generator().manual_seed(_mixed(seed, member, name))
                values.uniform_(-bound, bound, generator=draws)

    def inputs(self, name: str) -> int:
        """Number of inputs of the layer that a parameter belongs to."""
        raise NotImplementedError

    def encode_source(self, source: Tensor) -> Tensor:
        """Encode sources ``(b, d)``: ``(ensemble, b, width)``."""
        raise NotImplementedError

    def encode_target(self, target: Tensor) -> Tensor:
        """Encode targets ``(b, d)``: ``(ensemble, b, width)``."""
        raise NotImplementedError

    def encode(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both sides."""
        return self.encode_source(source), self.encode_target(target)

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Combine encodings one by one: ``(ensemble, b)``."""
        raise NotImplementedError

    def grid(self, left: Tensor, right: Tensor) -> Tensor:
        """Combine all with all: ``(ensemble, rows, columns)``."""
        raise NotImplementedError

    def fill(self, result: Tensor, left: Tensor, right: Tensor, scale: float, shift: float) -> None:
        """Write ``shift`` plus ``scale`` times the mean over the ensemble, ``(rows, columns)``."""
        size = max(1, _BLOCK_FLOATS // (len(left) * _TARGETS * self.values_per_pair))
        for first in range(0, result.shape[1], _TARGETS):
            some = right[:, first : first + _TARGETS]
            for start in range(0, len(result), size):
                found = self.grid(left[:, start : start + size], some).mean(0).double()
                block = result[start : start + size, first : first + _TARGETS]
                block.copy_(found * scale + shift)


class _Concat(_Network):
    """Two layers on the concatenation; its first layer is a sum of one for each side."""

    def __init__(self, ensemble: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.values_per_pair = 2 * hidden_dim
        self.source = nn.Parameter(torch.empty(ensemble, embedding_dim, hidden_dim))
        self.target = nn.Parameter(torch.empty(ensemble, embedding_dim, hidden_dim))
        self.hidden_bias = nn.Parameter(torch.empty(ensemble, hidden_dim))
        self.output = nn.Parameter(torch.empty(ensemble, hidden_dim))
        self.output_bias = nn.Parameter(torch.empty(ensemble, 1))

    def inputs(self, name: str) -> int:
        _, d, hidden = self.source.shape
        return hidden if name.startswith("output") else 2 * d

    def encode_source(self, source: Tensor) -> Tensor:
        return source @ self.source + self.hidden_bias[:, None]

    def encode_target(self, target: Tensor) -> Tensor:
        return target @ self.target

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        hidden = (left + right).relu()
        return (hidden @ self.output[:, :, None])[..., 0] + self.output_bias

    def grid(self, left: Tensor, right: Tensor) -> Tensor:
        hidden = (left[:, :, None] + right[:, None]).relu_()
        return (hidden @ self.output[:, None, :, None])[..., 0] + self.output_bias[:, None]


class _Product(_Network):
    """Two layers for each side, and the product of what they return."""

    def __init__(self, ensemble: int, embedding_dim: int, hidden_dim: int, rank: int) -> None:
        super().__init__()
        self.values_per_pair = 1
        for side in ("source", "target"):
            hidden = torch.empty(ensemble, embedding_dim, hidden_dim)
            self.register_parameter(side, nn.Parameter(hidden))
            self.register_parameter(f"{side}_bias", nn.Parameter(torch.empty(ensemble, hidden_dim)))
            output = torch.empty(ensemble, hidden_dim, rank)
            self.register_parameter(f"{side}_output", nn.Parameter(output))
            self.register_parameter(
                f"{side}_output_bias", nn.Parameter(torch.empty(ensemble, rank))
            )

    def inputs(self, name: str) -> int:
        _, d, hidden = self.get_parameter("source").shape
        return hidden if "output" in name else d

    def encode_source(self, source: Tensor) -> Tensor:
        return self._encode("source", source)

    def encode_target(self, target: Tensor) -> Tensor:
        return self._encode("target", target)

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(-1) / math.sqrt(left.shape[-1])

    def grid(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right.transpose(1, 2) / math.sqrt(left.shape[-1])

    def fill(self, result: Tensor, left: Tensor, right: Tensor, scale: float, shift: float) -> None:
        # One product: members of the ensemble side by side, and a column of ones for the shift.
        by = scale / (len(left) * math.sqrt(left.shape[-1]))
        a = nn.functional.pad(left.transpose(0, 1).flatten(1), (0, 1), value=1.0)
        b = nn.functional.pad(right.transpose(0, 1).flatten(1) * by, (0, 1), value=shift)
        if result.device == a.device:
            torch.mm(a, b.T, out=result)
        else:
            result.copy_(a @ b.T)

    def _encode(self, side: str, rows: Tensor) -> Tensor:
        weights = self.get_parameter
        hidden = (rows @ weights(side) + weights(f"{side}_bias")[:, None]).relu()
        return hidden @ weights(f"{side}_output") + weights(f"{side}_output_bias")[:, None]


def _batch_shape(batch_size: Any, whole: bool) -> tuple[int, int] | None:
    """Sources and targets of a batch, or None where it is a number of pairs."""
    if not isinstance(batch_size, tuple | list):
        check_integer("batch_size", batch_size, minimum=1)
        return None
    if len(batch_size) != 2:
        raise ValueError(f"batch_size must be pairs, or (sources, targets), got {batch_size!r}")
    if not whole:
        raise ValueError("batch_size=(sources, targets) needs a matrix of influences, not pairs")
    sources, targets = (check_integer("batch_size", size, minimum=1) for size in batch_size)
    return sources, targets


def _pairs(influences: Any, pairs: Any, n: int, m: int) -> tuple[Tensor | None, Tensor]:
    """Row and column of each influence, ``(p, 2)``, and influences in float64, ``(p,)``.

    Without ``pairs``, None and ``(n, m)``.
    """
    values = _numbers("influences", influences).double()
    index: Tensor | None = None
    if pairs is None:
        if values.shape != (n, m):
            raise ValueError(
                f"influences must be of shape ({n}, {m}), sources by targets, got "
                f"{tuple(values.shape)}; for single pairs give pairs=(p, 2) and influences (p,)"
            )
    else:
        index = _numbers("pairs", pairs)
        if index.dtype.is_floating_point and index.numel():
            raise ValueError(f"pairs must be integers, got {index.dtype}")
        if values.ndim != 1 or index.shape != (len(values), 2):
            raise ValueError(
                f"pairs must be of shape (p, 2) and influences of (p,), got {tuple(index.shape)} "
                f"and {tuple(values.shape)}"
            )
        index = index.long()
        if len(index) and (
            int(index.min()) < 0 or bool((index.max(0).values >= torch.tensor([n, m])).any())
        ):
            raise ValueError(f"pairs must lie within {n} sources and {m} targets")
    if not values.numel():
        raise ValueError("influences: there are no pairs to learn from")
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"influences: {bad} of {values.numel()} are NaN or infinite; leave out pairs without a "
            "value by giving pairs"
        )
    return index, values


def _known(index: Tensor | None, *shape: int) -> list[Tensor]:
    """Which sources and which targets have influences."""
    if index is None:
        return [torch.arange(size) for size in shape]
    return [torch.unique(index[:, axis]) for axis in (0, 1)]


def _held_out(
    index: Tensor | None,
    known: list[Tensor],
    shape: torch.Size,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Which pairs to validate on: those of some sources or of some targets that are held out."""
    sides = []
    for some in known:
        out = torch.zeros(int(some.max()) + 1, dtype=torch.bool)
        order = some[torch.randperm(len(some), generator=generator)]
        if share and len(some) > 2:
            out[order[: max(1, round(share * len(some)))]] = True
        sides.append(out)
    rows, columns = sides
    if index is None:
        held = rows[:, None] | columns[None]
    else:
        held = rows[index[:, 0]] | columns[index[:, 1]]
    # Too few pairs to do without any, such as those of a diagonal.
    if int((~held).sum()) < max(2, held.numel() // 2):
        return torch.zeros(shape, dtype=torch.bool)
    return held


def _column_scales(rows: Tensor) -> Tensor:
    """Mean and deviation of each column, ``(2, d)``; one where a column does not vary."""
    mean, scale = rows.double().mean(0), rows.double().std(0, correction=0)
    varies = scale > 1e-6 * (mean.abs() + scale.max())
    return torch.stack([mean, torch.where(varies, scale, torch.ones_like(scale))]).float()


def _numbers(name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        if given.is_complex():
            raise ValueError(f"{name} must be real numbers, got {given.dtype}")
        return given.detach().cpu()
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be an array of numbers, got {array.dtype}")
    shared = array.flags.writeable and array.flags.c_contiguous
    return torch.from_numpy(array if shared else np.array(array))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _mixed(seed: int, member: int, name: str) -> int:
    """A seed for each member and parameter, of any seed's size."""
    entropy = [seed, member, *name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def _trainer(max_epochs: int, callbacks: list[Any]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners and hints to itself."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
