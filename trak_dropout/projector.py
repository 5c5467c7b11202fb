"""`DropoutProjector`: a mask behind TRAK's projector interface."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trak.projectors import AbstractProjector, ProjectionType

from trak_dropout._checks import check_integer, check_model
from trak_dropout._html import as_bytes, describe_html
from trak_dropout.gradients.factors import FactoredGradient, FactoredGradients
from trak_dropout.masks import (
    DEFAULT_FOLD,
    Layout,
    Mask,
    check_dimensions,
    check_scheme,
    check_statistics,
    draw_mask,
)
from trak_dropout.scaling import StorageScales
from trak_dropout.statistics import GradientStatistics
from trak_dropout.taking import Plan, Shares

_LOG = logging.getLogger(__name__)
_Block = Tensor | FactoredGradient

# Arguments with which TRAK builds its own projectors and for which a mask has no use.
_TRAK_ARGUMENTS = frozenset({"max_batch_size", "block_size", "model_id"})
_KEPT_NOWHERE = (
    ". No store keeps these statistics: a projector in another process, to score these features "
    "say, calibrates anew, and its columns mean nothing beside these. Use trak_dropout.plugin, "
    "whose store keeps them, or save projector.statistics[None].to_tensors() and give "
    "statistics.GradientStatistics.from_tensors(...) to projector.set_statistics there"
)


class NonFiniteGradientError(ValueError):
    """A kept gradient coordinate is NaN or infinite, or leaves the range of the output dtype.

    Args:
        message: what is wrong and what to do.
        samples: positions in the batch of the samples concerned.
    """

    def __init__(self, message: str, samples: list[int]) -> None:
        super().__init__(message)
        self.samples = samples


class DropoutProjector(AbstractProjector):
    """Keeps a random subset of the gradient's coordinates instead of multiplying with a matrix.

    A drop-in for TRAK's projectors. Nothing of the size of a projection matrix exists, the work
    is linear in the number of coordinates kept, and gradients are never concatenated. Like
    TRAK's, the projection is not divided by ``sqrt(proj_dim)``: over masks,
    ``E<Pg, Ph> = proj_dim <g, h>`` for every pair of gradients. Each ``model_id`` has its own,
    independent mask, which depends on the arguments given here alone.

    Source: coordinate dropout of arXiv 2509.15651; ``fold > 1`` adds a sparse sign sketch as
    GraSS (arXiv 2505.18976) does.

    Args:
        grad_dim: number of gradient coordinates (parameters).
        proj_dim: number of output columns, ``k``; at most ``grad_dim``.
        seed: seed of the masks.
        proj_type: the scheme. ``"dropout"``: a uniform random subset. ``"unit_dropout"``: of each
            weight matrix random output units times random input units, of vectors single
            coordinates. ``"weighted_dropout"``: with probability proportional to the
            root-mean-square gradient; see `calibrate`. TRAK's own ``ProjectionType`` members, with
            which TRAK builds a projector class that it is given, mean ``"dropout"``.
        device: where results lie.
        dtype: floating-point type of the results. Sums run in float32 or higher.
        fold: ``fold * proj_dim`` coordinates are drawn, and each column is the sum of ``fold`` of
            them with random signs; where there are fewer, all are kept and feed several columns
            each. ``1`` is the paper's pure dropout; the default fills columns that would be zero
            for every sample.
        layout: names and shapes of the parameters; `from_model` knows them. With it, gradient
            mappings are read by name and checked. Without it, gradients are a single vector to
            every scheme, which leaves unit dropout to draw single coordinates.
        **kwargs: TRAK's ``max_batch_size``, ``block_size`` and ``model_id``, which a mask has
            no use for.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: ``proj_dim`` or ``fold`` is out of range, or ``proj_type`` is unknown.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str = "dropout",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        fold: int = DEFAULT_FOLD,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(kwargs) - _TRAK_ARGUMENTS)
        if unknown:
            raise TypeError(f"DropoutProjector has no argument {', '.join(unknown)}")
        if isinstance(proj_type, ProjectionType):
            _LOG.info("proj_type=%s names a dense matrix; using 'dropout'", proj_type.value)
            proj_type = "dropout"
        check_scheme(proj_type)
        check_dimensions(grad_dim, proj_dim, fold)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        if layout is not None and layout.grad_dim != grad_dim:
            raise ValueError(
                f"grad_dim={grad_dim}, but the parameters of layout have {layout.grad_dim} "
                "coordinates; use DropoutProjector.from_model"
            )
        super().__init__(
            int(grad_dim), int(proj_dim), check_integer("seed", seed), proj_type, device
        )
        self.fold = int(fold)
        self.layout = layout
        self.dtype = dtype
        self._compute_dtype = torch.promote_types(dtype, torch.float32)
        self._statistics: dict[int | None, GradientStatistics] = {}
        self._projected: set[int] = set()
        self._plan: tuple[Any, Plan] | None = None
        # Set by a store in float16: results are then multiplied by a power of two that fits it.
        self.scales: StorageScales | None = None
        # Set by a store: called with a model_id and what calibrates, before the first projection
        # of a checkpoint, to have the statistics in common with other processes.
        self.settle: Callable[[int, Callable[[], None]], None] | None = None

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        proj_dim: int,
        seed: int = 0,
        proj_type: str = "dropout",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        grad_wrt: Iterable[str] | None = None,
        *,
        fold: int = DEFAULT_FOLD,
    ) -> DropoutProjector:
        """Build a projector that knows the names and shapes of a model's parameters.

        Args:
            model: the model whose gradients will be projected.
            proj_dim: number of output columns.
            seed: seed of the masks.
            proj_type: the scheme.
            device: where results lie.
            dtype: floating-point type of the results.
            grad_wrt: names of the parameters to which gradients are restricted, as given to
                ``TRAKer``; all when None.
            fold: coordinates summed into each column.

        Returns:
            The projector.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the model has no parameters, ``grad_wrt`` names an unknown one, or an
                argument is out of range.
        """
        layout = layout_of(model, grad_wrt)
        return cls(
            layout.grad_dim, proj_dim, seed, proj_type, device, dtype, fold=fold, layout=layout
        )

    def mask(self, model_id: int) -> Mask:
        """Return the mask of a checkpoint.

        Args:
            model_id: the checkpoint.

        Returns:
            The mask; drawn anew at each call, so it is the caller's to keep.

        Raises:
            ValueError: weighted dropout has not been calibrated.
        """
        return draw_mask(
            self.proj_type,
            self._known_layout,
            self.proj_dim,
            self.seed,
            model_id,
            self.fold,
            self._statistics.get(model_id, self._statistics.get(None)),
        )

    @property
    def _known_layout(self) -> Layout:
        return Layout.flat(self.grad_dim) if self.layout is None else self.layout

    @property
    def statistics(self) -> dict[int | None, GradientStatistics]:
        """What weighted dropout draws by: of single checkpoints by model_id, of all others None."""
        return dict(self._statistics)

    def calibrate(
        self,
        gradients: Iterable[Any],
        model_id: int | None = None,
        *,
        compute: Callable[[Any], Mapping[str, Tensor] | Tensor] | None = None,
        samples: int = 512,
    ) -> None:
        """Take the statistics by which weighted dropout draws; other schemes need none.

        Of each weight matrix the mean squares of rows and columns are kept, of a vector those of
        its entries. Without this call the first batch projected calibrates. The store of `plugin`
        and that of the callback keep the statistics; with TRAK's own saver another process needs
        them from `statistics`, to be given to `set_statistics`.

        Args:
            gradients: batches of per-sample gradients, as for `project`; or, with ``compute``,
                anything that it makes gradients of, such as a data loader.
            model_id: the checkpoint that the gradients belong to, to have statistics of its own;
                None for statistics that serve all checkpoints without their own.
            compute: makes gradients of a batch, such as the ``compute_per_sample_grad`` of a
                gradient computer.
            samples: stop after this many samples; a few hundred are enough.

        Raises:
            ValueError: there is no sample, the gradients are all zero or not finite, or do not
                match the model.
            RuntimeError: gradients have been projected with other statistics already; projections
                before and after would not be comparable.
        """
        check_integer("samples", samples, minimum=1)

        def batches() -> Iterator[list[Tensor | Iterable[Tensor]]]:
            seen = 0
            items: Iterable[Any] = (
                [gradients] if isinstance(gradients, Mapping | Tensor) else gradients
            )
            for item in items:
                found = item if compute is None else compute(item)
                yield self._by_parameter(found)
                seen += len(self._blocks(found)[0][1])
                if seen >= samples:
                    return

        self.set_statistics(GradientStatistics.of(batches()), model_id)

    def set_statistics(self, statistics: GradientStatistics, model_id: int | None = None) -> None:
        """Take over statistics, of a store for example.

        Args:
            statistics: what `calibrate` once took.
            model_id: the checkpoint, or None, as for `calibrate`.

        Raises:
            ValueError: they are of another model.
            RuntimeError: as for `calibrate`.
        """
        check_statistics(statistics, self._known_layout)
        known = self._statistics.get(model_id)
        same = known is not None and known.digest == statistics.digest
        used = self._projected if self.proj_type == "weighted_dropout" and not same else set()
        used = used - self._statistics.keys() if model_id is None else used & {model_id}
        if used:
            raise RuntimeError(
                f"calibrate: gradients of model_id {_some(sorted(used))} "
                "have been projected with other statistics; calibrate before projecting, or use "
                "another projector"
            )
        self._statistics[model_id] = statistics
        self._plan = None

    def _by_parameter(
        self, grads: Mapping[str, Tensor] | Tensor
    ) -> list[Tensor | Iterable[Tensor]]:
        """Gradients of each parameter of the known layout, in pieces of some samples each."""
        blocks = [block for _, block in self._blocks(grads)]
        if self.layout is None:
            formed = [block.form() if isinstance(block, FactoredGradient) else block
                      for block in blocks]  # fmt: skip
            return [torch.cat([block.reshape(len(block), -1) for block in formed], 1)]
        if isinstance(grads, Tensor):
            parts = torch.split(grads, list(self.layout.sizes), dim=1)
            return [
                part.reshape(len(grads), *shape)
                for part, shape in zip(parts, self.layout.shapes, strict=True)
            ]
        return [
            block.pieces() if isinstance(block, FactoredGradient) else block for block in blocks
        ]

    def project(self, grads: Mapping[str, Tensor] | Tensor, model_id: int) -> Tensor:
        """Compress a batch of per-sample gradients.

        Args:
            grads: a mapping from parameter name to per-sample gradients ``(B, *shape)``, a
                matrix ``(B, grad_dim)``, or `FactoredGradients`, of which only kept coordinates
                are computed; any floating-point type, device and strides.
            model_id: the checkpoint that the gradients belong to.

        Returns:
            A fresh tensor ``(B, proj_dim)`` of the projector's dtype on its device.

        Raises:
            TypeError: ``grads`` is neither a mapping of tensors nor a tensor.
            ValueError: names or sizes do not match what the projector was built for.
            NonFiniteGradientError: a kept coordinate is NaN or infinite, or a result leaves
                the range of the dtype; the samples are named. Only kept coordinates are read.
        """
        blocks = self._blocks(grads)
        model_id = check_integer("model_id", model_id)
        if self.proj_type == "weighted_dropout" and model_id not in self._projected:
            self._settle_statistics(grads, model_id)
        self._projected.add(model_id)
        names = tuple(name for name, _ in blocks)
        shapes = tuple(block.shape[1:] for _, block in blocks)
        plan = self._plan_for(model_id, names, shapes, blocks[0][1].device)
        with torch.no_grad():
            out = plan.of([block for _, block in blocks])
        return self.finish(out, model_id)

    def _settle_statistics(self, grads: Mapping[str, Tensor] | Tensor, model_id: int) -> None:
        """Fix what a checkpoint's mask is drawn by; where nothing is, a batch calibrates."""

        def calibrate() -> None:
            kept = self.settle is not None
            _LOG.log(
                logging.INFO if kept else logging.WARNING,
                "weighted_dropout was not calibrated: the %d samples of the first batch projected "
                "calibrate it for good; call calibrate with a few hundred samples for more%s",
                len(self._blocks(grads)[0][1]),
                "" if kept else _KEPT_NOWHERE,
            )
            self.calibrate([grads], samples=1)

        if self.settle is not None:
            self.settle(model_id, calibrate)
        elif not self.calibrated(model_id):
            calibrate()

    def finish(self, out: Tensor, model_id: int) -> Tensor:
        """Bring rows that were added up from `shares` into the form that `project` returns.

        Args:
            out: the rows, ``(B, proj_dim)``, on the mask's scale; may be changed.
            model_id: the checkpoint that the gradients belong to.

        Returns:
            As `project`.

        Raises:
            NonFiniteGradientError: as for `project`.
        """
        if self.scales is not None:
            self._check_finite(out, out, model_id)
            self.scales.apply(model_id, out)
        result = out.to(device=self.device, dtype=self.dtype).contiguous()
        self._check_finite(out, result, model_id)
        return result

    def calibrated(self, model_id: int) -> bool:
        """Whether everything is there by which a checkpoint's mask is drawn."""
        known = {model_id, None} & self._statistics.keys()
        return self.proj_type != "weighted_dropout" or bool(known)

    def shares(self, model_id: int, device: str | torch.device) -> Shares:
        """Return the mask cut by parameter, for gradients that come one parameter at a time.

        Args:
            model_id: the checkpoint that the gradients belong to.
            device: where they lie.

        Returns:
            What adds up to `project`.

        Raises:
            ValueError: the projector does not know the model's parameters, or weighted dropout has
                not been calibrated.
        """
        if self.layout is None:
            raise ValueError("layout is unknown; use DropoutProjector.from_model")
        self._projected.add(model_id)
        shapes = tuple(torch.Size(shape) for shape in self.layout.shapes)
        names = self.layout.names
        return Shares(names, self._plan_for(model_id, names, shapes, torch.device(device)))

    def __repr__(self) -> str:
        return (
            f"DropoutProjector(grad_dim={self.grad_dim}, proj_dim={self.proj_dim}, "
            f"seed={self.seed}, proj_type={self.proj_type!r}, fold={self.fold}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    def kept(self, model_id: int = 0) -> dict[str, int]:
        """Count how many coordinates of each parameter are kept.

        Args:
            model_id: the checkpoint; each has a mask of its own.

        Returns:
            Parameter name to number of different coordinates that the mask reads.

        Raises:
            ValueError: weighted dropout has not been calibrated.
        """
        layout = self._known_layout
        starts = np.cumsum([0, *layout.sizes])
        at = np.searchsorted(np.unique(self.mask(model_id).coordinates), starts)
        return dict(zip(layout.names, np.diff(at).tolist(), strict=True))

    def _repr_html_(self) -> str:
        layout = self._known_layout
        facts = {
            "scheme": f"{self.proj_type}, fold {self.fold}, seed {self.seed};",
            "keeps": f"{min(self.fold * self.proj_dim, self.grad_dim):,} of {self.grad_dim:,} "
            f"coordinates in {self.proj_dim:,} columns;",
            "a sample takes": as_bytes(self.proj_dim * self.dtype.itemsize),
            "instead of": as_bytes(self.grad_dim * self.dtype.itemsize),
        }
        try:
            kept = self.kept()
        except ValueError:  # weighted dropout before it has been calibrated
            return describe_html(type(self).__name__, facts | {"(not": "calibrated yet)"})
        rows = [
            (name, "x".join(map(str, shape)) or "scalar", f"{size:,}", f"{kept[name]:,}",
             f"{kept[name] / max(size, 1):.1%}")
            for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True)
        ]  # fmt: skip
        head = ("parameter", "shape", "coordinates", "kept (model_id 0)", "share")
        return describe_html(type(self).__name__, facts, head, rows)

    def free_memory(self) -> None:
        """Drop the cached mask; it is drawn again, the same, when needed."""
        self._plan = None

    def _blocks(self, grads: Mapping[str, Tensor] | Tensor) -> list[tuple[str, _Block]]:
        """The gradients as named blocks in coordinate order, their sizes checked."""
        if isinstance(grads, Tensor):
            if grads.ndim != 2 or grads.shape[1] != self.grad_dim:
                raise ValueError(
                    f"grads has shape {tuple(grads.shape)}, expected (B, grad_dim) with "
                    f"grad_dim={self.grad_dim}: the projector was built for another model or "
                    "another grad_wrt"
                )
            return [("grads", grads)]
        if not isinstance(grads, Mapping):
            raise TypeError(
                f"grads must be a mapping of tensors or a tensor, got {type(grads).__name__}"
            )
        named: Mapping[str, Any] = grads.factored if isinstance(grads, FactoredGradients) else grads
        if self.layout is not None:
            self._check_names(named, self.layout)
            blocks = [(name, named[name]) for name in self.layout.names]
        else:
            blocks = list(named.items())
        lengths = {block.shape[:1] for _, block in blocks}
        if len(lengths) > 1 or torch.Size() in lengths:
            raise ValueError(
                "grads must hold per-sample gradients of one batch size; the first dimensions "
                f"are {sorted(map(tuple, lengths))}"
            )
        total = sum(block.shape[1:].numel() for _, block in blocks)
        if total != self.grad_dim:
            raise ValueError(
                f"grads has {total} coordinates, but the projector was built with "
                f"grad_dim={self.grad_dim}: another model or another grad_wrt"
            )
        return blocks

    def _check_names(self, grads: Mapping[str, Tensor], layout: Layout) -> None:
        missing = [name for name in layout.names if name not in grads]
        known = set(layout.names)
        extra = [name for name in grads if name not in known]
        if missing or extra:
            raise ValueError(
                "grads does not match the model that the projector was built for: "
                + "; ".join(
                    f"{word} {_some(names)}"
                    for word, names in (("missing", missing), ("unexpected", extra))
                    if names
                )
                + ". Give the same grad_wrt to the projector and to TRAKer"
            )
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if grads[name].shape[1:] != shape:
                raise ValueError(
                    f"grads[{name!r}] has shape {tuple(grads[name].shape)}, expected "
                    f"(B, {', '.join(map(str, shape))}): the projector was built for another model"
                )

    def _plan_for(
        self,
        model_id: int,
        names: tuple[str, ...],
        shapes: tuple[torch.Size, ...],
        device: torch.device,
    ) -> Plan:
        key = (model_id, names, shapes, device)
        if self._plan is None or self._plan[0] != key:
            self._plan = key, Plan(self.mask(model_id), shapes, device, self._compute_dtype)
        return self._plan[1]

    def _check_finite(self, exact: Tensor, result: Tensor, model_id: int) -> None:
        if math.isfinite(float(result.sum())):  # a single pass; NaN and infinities spread
            return
        bad = ~torch.isfinite(result).all(dim=1)
        if not bool(bad.any()):
            return
        samples = torch.nonzero(bad).flatten().tolist()
        if bool(torch.isfinite(exact).all()):
            raise NonFiniteGradientError(
                f"projected gradients of samples {_some(samples)} of the batch (model_id="
                f"{model_id}) leave the range of dtype={self.dtype}; use dtype=torch.float32",
                samples,
            )
        raise NonFiniteGradientError(
            f"gradients of samples {_some(samples)} of the batch (model_id={model_id}) are NaN "
            "or infinite; look at these samples and at the checkpoint's weights",
            samples,
        )


def layout_of(model: nn.Module, grad_wrt: Iterable[str] | None = None) -> Layout:
    """Return the layout of a model's parameters, in ``named_parameters()`` order.

    Args:
        model: the model.
        grad_wrt: names of the parameters to restrict to; all when None.

    Returns:
        The layout.

    Raises:
        TypeError: ``model`` is no module, or ``grad_wrt`` a single string.
        ValueError: ``grad_wrt`` is empty or names a parameter that the model lacks, or the
            model has no parameters.
    """
    check_model(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if grad_wrt is not None:
        if isinstance(grad_wrt, str):
            raise TypeError(f"grad_wrt must be a list of parameter names, got {grad_wrt!r}")
        wanted = set(grad_wrt)
        unknown = sorted(wanted - set(shapes))
        if unknown:
            raise ValueError(
                f"grad_wrt names {_some(unknown)}, which the model does not have; "
                "see model.named_parameters()"
            )
        shapes = {name: shape for name, shape in shapes.items() if name in wanted}
    if not shapes:
        raise ValueError(
            "there is no parameter to take gradients of: "
            + ("grad_wrt is empty" if grad_wrt is not None else "the model has none")
        )
    return Layout(tuple(shapes), tuple(shapes.values()))


def _some(items: list[Any], limit: int = 10) -> str:
    """The first few items, and how many there are."""
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in all)"
