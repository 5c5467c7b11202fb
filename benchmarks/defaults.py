"""TRAK's defaults beside the four plugs with theirs, by linear datamodeling score, in one run.

A user's own script: the same checkpoints, the same loop over a TRAKer, once as TRAK comes (its
Gaussian projector, float16 storage, no damping) and once with ``**td.plugin(model, k)`` and nothing
else changed; and TRAK with its projector and our score computer, which shows what damping alone
does. One thing is in TRAK's favor: its projector multiplies in float32 here, more exactly than in
the float16 that TRAKer would have it use, which takes a CPU very long.

    python benchmarks/defaults.py            # n = 2000, k = 2048; a quarter of an hour on 2 cores
    python benchmarks/defaults.py --quick    # n = 300, k = 512

Fashion-MNIST: Debian's dataset-fashion-mnist, or --fashion-mnist DIR with its four .gz files.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from functools import partial
from typing import Any

import _settings
import _study
import numpy as np
import torch
from _training import halves, trained
from torch import nn
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

from trak_dropout import DampedScoreComputer, plugin
from trak_dropout.metrics import linear_datamodeling_score

_BATCH = 500
WAYS = ("TRAK's defaults", "TRAK with our score computer", "four plugs")


def scores(
    setting: _settings.Setting, models: list[nn.Module], k: int, seed: int, way: str
) -> tuple[np.ndarray, float]:
    """TRAK's quickstart; scores ``(n, m)`` and seconds."""
    p = sum(parameter.numel() for parameter in models[0].parameters())
    options: dict[str, Any] = plugin(models[0], k, seed)
    if way != WAYS[2]:
        kind = ProjectionType.normal
        options = {"projector": BasicProjector(p, k, seed, kind, "cpu", dtype=torch.float32)}
    if way == WAYS[1]:
        options["score_computer"] = DampedScoreComputer
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=setting.model().eval(),
            task=setting.task,
            train_set_size=setting.n,
            save_dir=folder,
            device="cpu",
            logging_level=logging.ERROR,
            **options,
        )
        batches = partial(zip, strict=True)
        for model_id, model in enumerate(models):
            traker.load_checkpoint(model.state_dict(), model_id)
            for batch in batches(*(part.split(_BATCH) for part in setting.train)):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for model_id, model in enumerate(models):
            traker.start_scoring_checkpoint(
                "test", model.state_dict(), model_id, len(setting.targets[0])
            )
            for batch in batches(*(part.split(_BATCH) for part in setting.targets)):
                traker.score(batch, num_samples=len(batch[0]))
        found = np.array(traker.finalize_scores("test"), dtype=np.float64)
    return found, time.perf_counter() - started


def main() -> None:
    """Run the study."""
    parser = _study.parser(__doc__, "defaults")
    parser.add_argument("-k", type=int, default=2048, help="columns (default: 2048)")
    parser.add_argument("--halves", type=int, default=60, help="models on halves (default: 60)")
    options: argparse.Namespace = parser.parse_args()
    names, n, k = ("mlp", "cnn"), 2000, options.k
    if options.quick:
        names, n, k, options.halves, options.seeds = ("mlp",), 300, 512, 20, 1
    cells, rows = _study.Cells(options, "defaults"), []
    for name in names:
        setting = _settings.SETTINGS[name](n=n, folder=options.fashion_mnist)
        masks, outputs = halves(setting, options.halves, options.cache)
        models = [trained(setting, seed, options.cache) for seed in range(3)]
        row: dict[str, Any] = {"setting": name, "n": n, "k": k}
        for way in options.methods or WAYS:
            for seed in range(options.seeds):
                cell = cells.get(setting=name, way=way, seed=seed)
                if cell is None:
                    found, seconds = scores(setting, models, k, seed, way)
                    lds = linear_datamodeling_score(found, masks, outputs)
                    cell = {"setting": name, "way": way, "seed": seed, "lds": float(np.mean(lds))}
                    cells.add(cell | {"seconds": seconds})
                print(f"{name}, {way}, seed {seed}: {cell['lds']:.3f}", flush=True)
            found_cells = [c for c in cells.rows if (c["setting"], c["way"]) == (name, way)]
            row[way] = _study.interval(c["lds"] for c in found_cells)
            row[f"{way}, seconds"] = float(np.median([c["seconds"] for c in found_cells]))
        if set(WAYS) <= row.keys():
            row["ratio"] = row[WAYS[2]]["mean"] / row[WAYS[0]]["mean"]
        rows.append(row)
    print()
    print(_study.table(names, WAYS, lambda s, w: _study.shown(rows[names.index(s)].get(w))))
    for row in rows:
        if "ratio" in row:
            print(f"{row['setting']}: four plugs {row['ratio']:.1f} times TRAK's defaults")
    _study.write(options.out, options, rows=rows)
    cells.close()


if __name__ == "__main__":
    main()
