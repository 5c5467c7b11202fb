"""`write`: from a store to the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm
from trak import TRAKer

from trak_dropout import metrics
from trak_dropout._checks import check_integer
from trak_dropout._files import replacing
from trak_dropout.ranking import top_influences
from trak_dropout.report import plots
from trak_dropout.report.analysis import Checkpoint, checkpoints, experiments, scores_across
from trak_dropout.report.examples import MAX_FIELDS, MAX_LABEL, Example, Examples, clipped
from trak_dropout.report.page import Page, Plot, Table, render
from trak_dropout.report.pictures import Sheets
from trak_dropout.rowfile import IncompleteStoreError
from trak_dropout.store import MANIFEST, FeatureFiles, Store
from trak_dropout.streaming import files_and_computer, self_influence

OWN_CURVE = "self-influence"
_SHARES = (0.05, 0.10, 0.20)
_CHOSEN_BY_DEFAULT = 8


@dataclass(frozen=True)
class _Targets:
    """Targets with the samples that help and harm them, and scores at each checkpoint.

    ``helpful`` and ``harmful`` are ``(T, s)``, best and worst first, as are ``values``; ``across``
    are ``(C, T, 2 s)``.
    """

    numbers: Sequence[int]
    helpful: NDArray[np.int64]
    harmful: NDArray[np.int64]
    helpful_values: NDArray[np.float32]
    harmful_values: NDArray[np.float32]
    across: NDArray[np.float64]


def write(
    store: FeatureFiles | TRAKer,
    out: str | Path,
    data: Any = None,
    *,
    exp_name: str | None = None,
    targets: Any = None,
    chosen: Sequence[int] | None = None,
    per_target: int = 5,
    gallery: int = 10_000,
    title: str | None = None,
    summary: str = "",
    compare: Mapping[str, ArrayLike] | None = None,
    table: Table | None = None,
    model_ids: Iterable[int] | None = None,
    damping: float | str | None = None,
    curvature: str = "output",
    progress: bool = False,
) -> dict[str, Any]:
    """Write a store's report: one HTML page that fetches nothing from outside.

    It shows the training samples most suspect of a wrong label, what explains chosen targets, how
    influence moves across checkpoints, and the health of the store.

    Args:
        store: a store, or a TRAKer that has featurized its training set.
        out: the file to write; an earlier one is replaced.
        data: the training set, in the order in which gradients were collected: an `Examples`, or
            a data set that one can be made of. Samples are numbers only when None.
        exp_name: name of the experiment whose targets are explained, written by
            ``AttributionStore.add_targets`` or ``TRAKer.score``; the only one when None, and none
            if there are several.
        targets: the targets' data set, as for ``data``; they are numbers only when None.
        chosen: numbers of the targets to explain; the first eight when None.
        per_target: how many helpful and how many harmful samples for each.
        gallery: how many of the most suspect samples the page holds, at most.
        title: the heading.
        summary: a paragraph below it.
        compare: other measures of suspicion, ``(n_train,)`` each and high where suspect, by name;
            drawn beside self-influence where true labels are known.
        table: a comparison to show above the gallery.
        model_ids: the checkpoints to average; all complete ones when None.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``.
        curvature: ``"output"`` or ``"loss"``, as for `self_influence`.
        progress: whether to show progress bars.

    Returns:
        What a script may want to read, as JSON values: ``page``, ``bytes``, ``samples``,
        ``checkpoints``, ``warnings``, ``suspects`` (the numbers of the hundred most suspect, most
        suspect first), ``targets`` (the number explained) and, where true labels are known,
        ``wrong``, ``auc`` and ``recall`` by share inspected.

    Raises:
        TypeError: ``store`` is neither a store nor a TRAKer, or ``data`` or ``targets`` is no data
            set.
        ValueError: sizes do not match, or a number is out of range.
        IncompleteStoreError: a checkpoint or the targets are missing, incomplete or damaged.
        GramError: gradients are NaN or infinite, or all zero.
    """
    files, computer = files_and_computer(store, damping)
    if not isinstance(files, Store) and (files.save_dir / MANIFEST).is_file():
        files = Store(files.save_dir)  # of a TRAKer: the manifest says more
    ids = files.choose(model_ids)
    check_integer("per_target", per_target, minimum=1)
    check_integer("gallery", gallery, minimum=1)
    n = len(files.file(ids[0], "grads"))
    train = None if data is None else data if isinstance(data, Examples) else Examples(data)
    if train is not None and len(train) != n:
        raise ValueError(
            f"data has {len(train)} samples, the store {n}; give the training set that was "
            "collected, whole and in its order"
        )
    others = {name: _fitting(name, values, n) for name, values in (compare or {}).items()}

    bar = tqdm(total=4, desc="Reading the store", disable=not progress)
    value = self_influence(store, ids, damping, curvature=curvature)
    each = (
        np.stack([self_influence(store, [m], damping, curvature=curvature) for m in ids])
        if len(ids) > 1
        else value[None]
    )
    bar.update()
    states = checkpoints(files, computer, ids, curvature)
    bar.update()
    explained = _explain(
        store, ids, exp_name, targets, chosen, min(per_target, n), damping, curvature
    )
    bar.update()

    order = np.argsort(-value, kind="stable")
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    kept = dict.fromkeys(order[:gallery].tolist())  # in this order, without repetition
    if explained is not None:
        kept |= dict.fromkeys(
            [*explained.helpful.ravel().tolist(), *explained.harmful.ravel().tolist()]
        )
    gathered = _Gathered()
    samples = [
        {
            **gathered.take(train, i),
            "value": _short(value[i]),
            "rank": int(rank[i]),
            "across": [_short(v) for v in each[:, i]],
        }
        for i in tqdm(kept, desc="Rendering samples", disable=not progress)
    ]
    chosen_targets = [] if explained is None else _target_content(explained, targets, gathered)
    sheets = gathered.sheets()
    bar.update()
    bar.close()

    used = [state for state in states if state.model_id in ids]
    names = _names(used)
    wrong = None if train is None else train.wrong
    if wrong is not None and (wrong.all() or not wrong.any()):
        wrong = None
    warnings = _warnings(states, ids)
    found = _found(value, wrong)
    page = Page(
        title=title or "Which training samples matter, and which labels are wrong?",
        summary=summary,
        facts=_facts(n, files, ids, states, wrong, found),
        warnings=warnings,
        content={
            "total": n,
            "checkpoints": names,
            "columns": sheets.columns,
            "samples": samples,
            "targets": chosen_targets,
        },
        labeled=any("label" in sample for sample in samples),
        tile=sheets.tile,
        sheets=sheets.sheets,
        pixelated=sheets.pixelated,
        table=table,
        quality=_quality(value, wrong, others),
        across=_across(names, each, order, train),
        health=_health(used, names, n),
        checkpoints=[_row(state, files, state.model_id in ids) for state in states],
        settings=_settings(
            files, computer.damping if not computer.lambda_reg else "absolute", curvature
        ),
    )
    text = render(page).encode(errors="replace")  # a title may hold what no text can
    with replacing(Path(out)) as file:
        file.write(text)
    return {
        "page": str(out),
        "bytes": len(text),
        "samples": n,
        "checkpoints": list(ids),
        "warnings": warnings,
        "suspects": order[:100].tolist(),
        "targets": len(chosen_targets),
        **found,
    }


class _Gathered:
    """Samples as JSON values, and the pictures that they refer to by number."""

    def __init__(self) -> None:
        self._pictures: list[NDArray[np.uint8]] = []

    def take(self, examples: Examples | None, index: int) -> dict[str, Any]:
        """Return a sample without its scores, and keep its picture."""
        if examples is None:
            return {"index": index}
        example, label = examples.look(index)
        true = examples.true_label(index)
        content: dict[str, Any] = {"index": index}
        if label is not None:
            content["label"] = clipped(label, MAX_LABEL)
        if true is not None:
            content["truth"] = clipped(true, MAX_LABEL)
        return content | self._shown(example)

    def _shown(self, example: Example) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if example.picture is not None:
            content["sprite"] = len(self._pictures)
            self._pictures.append(example.picture)
        if example.text is not None:
            content["text"] = clipped(str(example.text))
        if example.fields:
            pairs = [
                [clipped(str(a), MAX_LABEL), clipped(str(b), 200)]
                for a, b in example.fields.items()
            ]
            more = len(pairs) - MAX_FIELDS
            content["fields"] = pairs[:MAX_FIELDS] + ([["…", f"{more} more"]] if more > 0 else [])
        if example.problem is not None:
            content["problem"] = clipped(str(example.problem), 300)
        return content

    def sheets(self) -> Sheets:
        """Return the pictures, put together."""
        return Sheets.of(self._pictures)


def _explain(
    store: FeatureFiles | TRAKer,
    ids: Sequence[int],
    exp_name: str | None,
    targets: Any,
    chosen: Sequence[int] | None,
    count: int,
    damping: float | str | None,
    curvature: str,
) -> _Targets | None:
    """Find what explains the chosen targets; None where the store has none."""
    files, computer = files_and_computer(store, damping)
    known = experiments(files)
    if exp_name is None:
        if len(known) != 1:
            if targets is None and chosen is None:
                return None
            raise ValueError(
                f"exp_name is needed: the store holds {len(known)} experiments"
                + (f", {', '.join(sorted(known))}" if known else "; add one with add_targets")
            )
        (exp_name,) = known
    if exp_name not in known:
        raise IncompleteStoreError(
            f"exp_name={exp_name!r} is no experiment of {files.save_dir}; known are: "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    size = known[exp_name]
    if targets is not None and len(targets) != size:
        raise ValueError(
            f"targets has {len(targets)} samples, experiment {exp_name!r} has {size}; give the "
            "data set whose gradients were added, whole and in its order"
        )
    numbers = list(range(min(_CHOSEN_BY_DEFAULT, size))) if chosen is None else list(chosen)
    for number in numbers:
        if check_integer("chosen", number, minimum=0) >= size:
            raise ValueError(f"chosen: target {number} of {size} (they count from 0)")
    if not numbers:
        return None
    (helpful, helpful_values), (harmful, harmful_values) = (
        top_influences(
            store, exp_name, count,
            harmful=sign, model_ids=ids, damping=damping, curvature=curvature,
        )
        for sign in (False, True)
    )  # fmt: skip
    both = np.concatenate([helpful[numbers], harmful[numbers]], axis=1)
    return _Targets(
        numbers,
        helpful[numbers],
        harmful[numbers],
        helpful_values[numbers],
        harmful_values[numbers],
        scores_across(files, computer, exp_name, numbers, both, ids, curvature),
    )


def _target_content(explained: _Targets, targets: Any, gathered: _Gathered) -> list[dict[str, Any]]:
    examples = targets if targets is None or isinstance(targets, Examples) else Examples(targets)
    content = []
    for t, number in enumerate(explained.numbers):
        across = explained.across[:, t].T
        count = explained.helpful.shape[1]

        def side(
            samples: NDArray[Any], values: NDArray[Any], across: NDArray[Any]
        ) -> list[dict[str, Any]]:
            return [
                {"index": int(i), "value": _short(v), "across": [_short(a) for a in row]}
                for i, v, row in zip(samples, values, across, strict=True)
            ]

        content.append(
            {
                **gathered.take(examples, number),
                "helpful": side(explained.helpful[t], explained.helpful_values[t], across[:count]),
                "harmful": side(explained.harmful[t], explained.harmful_values[t], across[count:]),
            }
        )
    return content


def _fitting(name: str, values: ArrayLike, n: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n,) or not np.isfinite(array).all():
        raise ValueError(
            f"compare[{name!r}] must be {n} finite numbers, one for each training sample, got "
            f"shape {array.shape}"
        )
    return array


def _found(value: NDArray[np.float64], wrong: NDArray[np.bool_] | None) -> dict[str, Any]:
    if wrong is None:
        return {}
    recall = {f"{s:.0%}": metrics.mislabel_recall(value, wrong, s) for s in _SHARES}
    return {
        "wrong": int(wrong.sum()),
        "auc": metrics.mislabel_auc(value, wrong),
        "recall": recall,
    }


def _facts(
    n: int,
    files: FeatureFiles,
    ids: Sequence[int],
    states: Sequence[Checkpoint],
    wrong: NDArray[np.bool_] | None,
    found: Mapping[str, Any],
) -> dict[str, str]:
    facts = {
        "training samples": f"{n:,}",
        "checkpoints scored": f"{len(ids)} of {len(states)}",
        "columns of a gradient": f"{files.file(ids[0], 'grads').shape[1]:,}",
    }
    if isinstance(files, Store):
        facts["gradient coordinates"] = f"{files.settings.grad_dim:,}"
        facts["task"] = files.settings.task or "not recorded"
    if wrong is not None:
        facts["known wrong labels"] = f"{found['wrong']:,}"
        facts["found in the first 10 %"] = f"{found['recall']['10%']:.0%}"
    return facts


def _warnings(states: Sequence[Checkpoint], ids: Sequence[int]) -> list[str]:
    warnings = []
    for state in states:
        name = f"Checkpoint {state.model_id} ({state.name})"
        if not state.complete and not state.facts.get("abandoned"):
            warnings.append(f"{name} is not complete, {state.state}, and left out of all scores.")
        if state.zero_rows:
            warnings.append(
                f"{name}: the compressed gradients of {state.zero_rows} samples are all zero, so "
                "they have no influence at all."
            )
    return warnings


def _quality(
    value: NDArray[np.float64],
    wrong: NDArray[np.bool_] | None,
    others: Mapping[str, NDArray[np.float64]],
) -> list[Plot]:
    found = []
    if wrong is not None:
        measures = {OWN_CURVE: value, **others}
        curves = {name: metrics.recall_curve(v, wrong) for name, v in measures.items()}
        at = {name: metrics.mislabel_recall(v, wrong, 0.1) for name, v in measures.items()}
        parts = ", ".join(f"{share:.0%} by {name}" for name, share in at.items())
        found.append(
            Plot(
                plots.recall_curves(curves),
                "How fast the wrong labels are found",
                f"Of the labels known to be wrong, among the first 10 % inspected: {parts}.",
            )
        )
    quantiles = np.quantile(value, (0.5, 0.9, 0.99))
    text = (
        f"Half of the samples lie below {quantiles[0]:.3g}, 90 % below {quantiles[1]:.3g}, 99 % "
        f"below {quantiles[2]:.3g}; the highest is {value.max():.3g}."
    )
    found.append(Plot(plots.distribution(value, wrong), "How self-influence is spread", text))
    return found


def _across(
    names: Sequence[str],
    each: NDArray[np.float64],
    order: NDArray[np.int64],
    train: Examples | None,
) -> list[Plot]:
    if len(names) < 2:
        return []
    top = order[:6].tolist()
    labels = [train.label(i) if train is not None else None for i in top]
    called = [
        f"{i}" if label is None else f"{i}: {label}" for i, label in zip(top, labels, strict=True)
    ]
    text = "Lines are the most suspect samples."
    if len(order) > 1:
        agreements = ", ".join(f"{_rank_correlation(a, b):.2f}" for a, b in pairwise(each))
        text += f" Rank correlation of neighbouring checkpoints: {agreements}."
    text += (
        " A line that rises late is a sample that the model bends for only at the end; cards of "
        "explained predictions have such lines, too."
    )
    return [Plot(plots.across(names, each, top, called), "Self-influence at each checkpoint", text)]


def _names(states: Sequence[Checkpoint]) -> list[str]:
    """What to call checkpoints: by their numbers where their steps do not tell them apart."""
    count = Counter(state.name for state in states)
    return [s.name if count[s.name] == 1 else f"checkpoint {s.model_id}" for s in states]


def _health(states: Sequence[Checkpoint], names: Sequence[str], n: int) -> list[Plot]:
    spectra = zip(names, (state.spectrum for state in states), strict=True)
    known = {name: spectrum for name, spectrum in spectra if spectrum is not None}
    if not known:
        return []
    counts = ", ".join(f"{s.directions:.0f} at {name}" for name, s in known.items())
    svg = plots.spectra(
        {name: s.eigenvalues for name, s in known.items()}, [s.ridge for s in known.values()], n
    )
    text = (
        "Eigenvalues of the compressed gradients' second moments, and the damping added to them: "
        f"directions far below it count for nothing. Directions that count: {counts}."
    )
    return [Plot(svg, "Spectrum and damping", text)]


def _row(state: Checkpoint, files: FeatureFiles, used: bool) -> dict[str, str]:
    facts = state.facts
    seconds = facts.get("seconds")
    folder = files.save_dir / str(state.model_id)
    size = sum(f.stat().st_size for f in folder.glob("*") if f.is_file()) if folder.is_dir() else 0
    return {
        "checkpoint": str(state.model_id),
        "epoch": str(facts.get("epoch", "-")),
        "step": str(facts.get("global_step", "-")),
        "state": state.state,
        "scored": "yes" if used else "no",
        "collected in": f"{seconds:.1f} s" if isinstance(seconds, int | float) else "-",
        "on disk": f"{size / 1e6:.1f} MB",
        "damping": f"{state.spectrum.ridge:.3g}" if state.spectrum else "-",
        "directions that count": f"{state.spectrum.directions:.0f}" if state.spectrum else "-",
    }


def _settings(files: FeatureFiles, damping: float | str, curvature: str) -> dict[str, str]:
    found = {"damping": str(damping), "curvature": curvature}
    if isinstance(files, Store):
        s = files.settings
        found |= {
            "scheme": s.scheme,
            "fold": str(s.fold),
            "columns": f"{s.proj_dim:,}",
            "seed": str(s.seed),
            "stored as": s.dtype,
        }
    return found


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (a, b)]
    both: NDArray[np.float64] = np.atleast_2d(np.corrcoef(ranks))
    return float(both[0, 1])


def _short(value: float) -> float:
    """Four digits are enough to look at, and half the page's size."""
    return float(f"{float(value):.4g}")
