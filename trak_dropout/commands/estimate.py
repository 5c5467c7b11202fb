"""Predict the hours and gigabytes of an attribution.

Runs a few layers of the model's width for a quarter of a minute to learn how fast this machine is,
then counts. The model is one of the Pythia shapes by name, a GPT-NeoX shape
(WIDTHxLAYERSxVOCABULARY), or a number of parameters. Constants are measured by default on the
processor; --device and --dtype choose others.

    trak-dropout estimate --model pythia-1.4b --tokens 512 --samples 100000 --proj-dim 4096
    trak-dropout estimate --model 320x8x512 --tokens 64 --samples 10000 --proj-dim 2048
    trak-dropout estimate --parameters 2.3e6 --multiply-adds 2e8 --samples 50000 --proj-dim 4096
"""

from __future__ import annotations

import argparse
import json
import math

# Width, layers, vocabulary.
SHAPES = {
    "pythia-70m": (512, 6, 50304),
    "pythia-160m": (768, 12, 50304),
    "pythia-410m": (1024, 24, 50304),
    "pythia-1b": (2048, 16, 50304),
    "pythia-1.4b": (2048, 24, 50304),
    "pythia-2.8b": (2560, 32, 50304),
    "pythia-6.9b": (4096, 32, 50432),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"{', '.join(SHAPES)}, or WIDTHxLAYERSxVOCABULARY")
    model.add_argument("--parameters", type=float, help="number of parameters, such as 2.3e6")
    parser.add_argument("--multiply-adds", type=float, help="of one forward pass of a sample")
    parser.add_argument("--tokens", type=int, default=1, help="positions in a sample (default: 1)")
    parser.add_argument("--samples", type=int, required=True, help="size of the training set")
    parser.add_argument("--targets", type=int, default=100, help="number of targets (default: 100)")
    parser.add_argument("--proj-dim", type=int, default=2048, help="columns k (default: 2048)")
    parser.add_argument("--fold", type=int, default=16, help="coordinates in each (default: 16)")
    parser.add_argument("--proj-type", default="dropout", help="the scheme (default: dropout)")
    parser.add_argument("--checkpoints", type=int, default=1, help="number of them (default: 1)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples in one (default: 16)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    import torch

    from trak_dropout.estimate import Work, calibrate, estimate

    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {options.tokens}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usable = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if options.device not in usable:
        raise ValueError(
            f"--device {options.device!r} cannot be used here; give {' or '.join(usable)}"
        )
    if options.model:
        width, layers, vocabulary = shape(options.model)
        work = Work.transformer(width, layers, vocabulary, options.tokens)
    else:
        if not 1 <= options.parameters < math.inf:
            raise ValueError(
                f"--parameters must be a number of at least 1, got {options.parameters}"
            )
        if options.multiply_adds is not None and not 0 < options.multiply_adds < math.inf:
            raise ValueError(
                f"--multiply-adds must be a number above 0, got {options.multiply_adds}"
            )
        work = Work.dense(options.parameters, options.tokens, options.multiply_adds)
        # Square layers of the width that this many parameters have in four of them.
        width, vocabulary = round((options.parameters / 4) ** 0.5), 512
    if options.proj_dim > work.parameters:
        raise ValueError(
            f"--proj-dim {options.proj_dim} is above the model's {work.parameters:.9g} "
            "parameters, so a run would be refused; give at most as many"
        )
    dtype = getattr(torch, options.dtype)
    tokens = max(8, min(options.tokens, 512))
    speed = calibrate(
        tokens,
        device=options.device,
        dtype=dtype,
        proj_type=options.proj_type,
        width=width,
        vocabulary=min(vocabulary, 8192),
        batch_size=max(2, min(options.batch_size, 4096 // tokens)),
        density=options.proj_dim * options.fold / work.parameters,
    )
    found = estimate(
        work,
        speed,
        options.samples,
        options.proj_dim,
        fold=options.fold,
        checkpoints=options.checkpoints,
        targets=options.targets,
        batch_size=options.batch_size,
        bytes_of_weight=dtype.itemsize,
        device=options.device,
    )
    if options.json:
        print(json.dumps({**vars(found), "parameters": work.parameters}))
        return 0
    print(f"{work.parameters:.3g} parameters, {work.multiply_adds:.3g} multiply-adds a sample")
    print(f"collecting  {_time(found.collecting)}")
    print(f"scoring     {_time(found.scoring)} for {options.targets} targets")
    print(f"store       {found.store / 1e9:.3g} GB on disk, weights of checkpoints included")
    print(f"memory      {found.memory / 1e9:.3g} GB beside {found.weights / 1e9:.3g} GB of weights")
    return 0


def shape(model: str) -> tuple[int, int, int]:
    """Width, layers and vocabulary of a model by name or shape."""
    if model in SHAPES:
        return SHAPES[model]
    parts = model.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(
            f"--model {model!r} is neither one of {', '.join(SHAPES)} nor WIDTHxLAYERSxVOCABULARY"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 360 else f"{seconds:.3g} seconds"
