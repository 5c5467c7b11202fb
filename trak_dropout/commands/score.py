"""Find the most influential training samples from a store.

With --experiment, the training samples that influence each of its targets most: what a TRAKer or
store.add_targets(NAME, loader, model) left in the store. Without, the training samples that
influence themselves most: those whose labels are most likely wrong come first.

Several processes share the work with --devices, or under torchrun, on one or several machines that
see the same store. A call that was interrupted goes on where it stopped when it is given again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dropout._files import replacing
from trak_dropout.curvature import CURVATURES

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    parser.add_argument("--experiment", metavar="NAME", help="name of the targets")
    parser.add_argument("-k", type=int, default=10, help="how many for each target (default: 10)")
    parser.add_argument(
        "--harmful", action="store_true", help="those that lower a target's output most instead"
    )
    parser.add_argument(
        "--method",
        choices=("influence", "dot", "cosine"),
        default="influence",
        help="influence, or a cheap baseline (default: influence)",
    )
    parser.add_argument(
        "--damping",
        type=_damping,
        help="'auto', or relative to the mean eigenvalue (default: auto)",
    )
    parser.add_argument(
        "--curvature",
        choices=CURVATURES,
        default="output",
        help="gradients of which the inverted matrix is made: of outputs, as TRAK has it, or of "
        "losses (default: output)",
    )
    parser.add_argument(
        "--model-ids", metavar="M", type=int, nargs="+", help="checkpoints (default: all complete)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, help="number of processes, a device each (default: 1)"
    )
    parser.add_argument("--num-nodes", type=int, default=1, help="machines, under torchrun")
    parser.add_argument(
        "--accelerator",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to compute (default: cpu)",
    )
    parser.add_argument(
        "--memory",
        metavar="MB",
        type=int,
        default=256,
        help="for blocks of rows, beside a Gram matrix and its decomposition (default: 256)",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="write arrays 'indices' and 'values' to FILE.npz"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.k < 1 or options.devices < 1 or options.memory < 1:
        raise ValueError("-k, --devices and --memory must be at least 1")
    if options.experiment is None and (options.harmful or options.method != "influence"):
        raise ValueError("--harmful and --method need targets: give their --experiment")
    result = _launched(options)
    if result is None:  # the first process speaks for all
        return 0
    indices, values = result
    if options.out is not None:
        name = options.out.name.removesuffix(".npz") + ".npz"
        with replacing(options.out.with_name(name)) as file:
            np.savez(file, indices=indices, values=values)
    if options.json:
        found = {"indices": indices.tolist(), "values": values.tolist()}
        print(json.dumps({"store": str(options.store), "experiment": options.experiment} | found))
    else:
        _show(options, indices, values)
    return 0


def _launched(options: argparse.Namespace) -> Any:
    """The result, in the first process of all."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if options.devices == 1 and options.accelerator == "cpu" and not by_torchrun:
        return _scores(None, options)
    from lightning_fabric import Fabric
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    from trak_dropout import RankError

    single = options.devices == 1 and not by_torchrun
    devices = options.devices if not by_torchrun else int(os.environ["LOCAL_WORLD_SIZE"])
    if options.accelerator == "cuda" and (found := _gpus()) < devices:
        raise ValueError(
            f"--accelerator cuda: PyTorch sees {found} CUDA devices here, fewer than {devices}; "
            "give --accelerator cpu" + (" or fewer --devices" if found else "")
        )
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=devices,
        num_nodes=options.num_nodes,
        strategy="auto" if single else "ddp" if by_torchrun else "ddp_spawn",
    )
    try:
        return fabric.launch(_together, options)  # type: ignore[arg-type]
    except (ProcessExitedException, ProcessRaisedException) as error:
        message = str(error).strip()
        if isinstance(error, ProcessExitedException):
            raise RankError(message) from error
        _, of_another, told = message.split("\n")[-1].partition("RankError: ")
        own = f"process {error.error_index} of {options.devices} failed: {message.splitlines()[-1]}"
        raise RankError(told if of_another else own) from error


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _together(fabric: Any, options: argparse.Namespace) -> Any:
    """The scores in one of several processes, which leave their group when they are done."""
    from torch import distributed

    found = _scores(fabric, options)
    if distributed.is_initialized():  # left open, it now and then aborts a process at exit
        distributed.destroy_process_group()
    return found


def _scores(
    fabric: Any, options: argparse.Namespace
) -> tuple[NDArray[np.int64], NDArray[np.floating]] | None:
    from trak_dropout import self_influence, top_influences
    from trak_dropout.store import FeatureFiles

    files = FeatureFiles(options.store)
    common: dict[str, Any] = {
        "model_ids": options.model_ids,
        "damping": options.damping,
        "curvature": options.curvature,
        "memory": options.memory * 2**20,
        "progress": not options.json,
        "fabric": fabric,
    }
    if options.experiment is None:
        suspicion = self_influence(_with_manifest(files), **common)
        indices = np.argsort(-suspicion, kind="stable")[None, : options.k]
        values: NDArray[np.floating] = suspicion[indices]
    else:
        indices, values = top_influences(
            _with_manifest(files),
            options.experiment,
            options.k,
            harmful=options.harmful,
            method=options.method,
            **common,
        )
    return (indices, values) if fabric is None or fabric.global_rank == 0 else None


def _with_manifest(files: Any) -> Any:
    """The store with its manifest, where there is one: it says what was abandoned."""
    from trak_dropout.store import MANIFEST, Store

    return Store(files.save_dir) if (files.save_dir / MANIFEST).is_file() else files


def _show(
    options: argparse.Namespace, indices: NDArray[np.int64], values: NDArray[np.floating]
) -> None:
    if options.experiment is None:
        print("training samples by self-influence, highest first:")
    for target in range(min(len(indices), _SHOWN)):
        pairs = zip(indices[target], values[target], strict=True)
        line = "  ".join(f"{index} ({value:.4g})" for index, value in pairs)
        print(line if options.experiment is None else f"target {target}: {line}")
    if len(indices) > _SHOWN:
        print(f"... and {len(indices) - _SHOWN} targets more; --out or --json gives them all")


def _damping(text: str) -> float | str:
    return text if text == "auto" else float(text)
