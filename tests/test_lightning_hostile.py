"""GradientCollector where the disk, the directory or another run stands in the way."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from cases import Classifier, loader, mlp, train_set, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from test_lightning import fit

from trak_dropout import StoreMismatchError, open_store
from trak_dropout._files import allocate_matrix, remove_leftovers
from trak_dropout.lightning import GradientCollector
from trak_dropout.lightning.lock import StoreInUseError, StoreLock
from trak_dropout.lightning.rows import RowWriter, _Matrix


def contents(store: Path) -> dict[str, bytes]:
    return {str(f.relative_to(store)): f.read_bytes() for f in store.rglob("*") if f.is_file()}


@contextmanager
def file_limit(size: int | None = None) -> Iterator[Callable[[int], None]]:
    """Limit the size of files, which is how the disk fills up here, at once or when called.

    The limit ends with the block: it holds for what pytest writes, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        if size is not None:
            limit(size)
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_keeps_earlier_collections(tmp_path: Path) -> None:
    class Fills(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            if trainer.current_epoch == 1:
                limit(20_000)  # less than 300 x 48 x 4 bytes, more than the manifest

    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    room = pytest.raises(OSError, match="no room to collect checkpoint 1")
    with room as caught, file_limit() as limit:
        fit(
            tmp_path / "s",
            Classifier(mlp()),
            max_epochs=3,
            callbacks=[saver, Fills()],
            enable_checkpointing=True,
        )
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    store = open_store(tmp_path / "s")
    assert store.model_ids == [0]
    assert set(store.manifest["model_ids"]) == {"0"}
    assert not (tmp_path / "s" / "1").exists()
    collector = GradientCollector(tmp_path / "s", proj_dim=48)  # with room, the run goes on
    trainer(max_epochs=3, callbacks=[collector]).fit(
        Classifier(mlp()), loader(train_set()), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt"
    )
    assert collector.model_ids == [0, 1, 2]


def test_mode_training_tells_of_a_full_disk(tmp_path: Path) -> None:
    rows = GradientCollector(tmp_path / "s", proj_dim=48, mode="training")
    told = pytest.raises(OSError, match=r"no room for the rows of an epoch.*make room")
    with told, file_limit(20_000):  # less than 300 x 48 x 4 bytes
        trainer(max_epochs=1, callbacks=[rows]).fit(Classifier(mlp()), loader(train_set()))


def test_a_disk_without_room_is_told_of_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)

    class Untrained(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            pytest.fail("trained before the collector complained")

    with pytest.raises(
        OSError, match=r"has 0.0 MB of free space, a single collection takes 0.1 MB"
    ):
        fit(tmp_path / "s", Untrained(mlp()))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_allocated_files_are_zero_and_take_their_room(tmp_path: Path) -> None:
    for root in (tmp_path, Path("/dev/shm")):
        path = root / f"allocated{os.getpid()}.mmap"
        try:
            allocate_matrix(path, (1000, 7), np.float16)
            assert 512 * path.stat().st_blocks >= 14_000
            assert np.load(path).shape == (1000, 7)
            assert not np.load(path).any()
        finally:
            path.unlink()


def test_no_file_is_left_that_could_not_be_allocated(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large"), file_limit(1000):
        allocate_matrix(tmp_path / "a.mmap", (1000, 7), np.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_permission(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from test_lightning import fit
from cases import Classifier, digits, mlp
digits()
if os.getuid() == 0:  # who may write anywhere
    os.setgid(65534); os.setuid(65534)
class Untrained(Classifier):
    def training_step(self, batch, batch_idx):
        os._exit(3)
try:
    fit({str(tmp_path / "closed" / "store")!r}, Untrained(mlp()))
except PermissionError as error:
    print("refused:", error)
"""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    for parent in [tmp_path, *tmp_path.parents]:  # nobody must be able to get there
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o055)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=200
    )
    assert "refused:" in result.stdout, result.stderr[-2000:]
    assert "cannot be written to" in result.stdout


def test_two_runs_at_once(tmp_path: Path) -> None:
    other = StoreLock(tmp_path / "s")
    with pytest.raises(
        StoreInUseError, match="being collected into by a collector of this process"
    ):
        fit(tmp_path / "s")
    other.release()
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from trak_dropout.lightning.lock import StoreLock
lock = StoreLock(Path({str(tmp_path / "s")!r}))
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreInUseError, match=f"by process {holder.pid} on "):
        fit(tmp_path / "s")
    holder.kill()  # a crash lets go of it
    holder.wait()
    collector, _, _ = fit(tmp_path / "s", Classifier(mlp()), max_epochs=1)
    assert collector.model_ids == [0]
    with StoreLockOf(tmp_path / "s"):
        pass  # and so does the end of a fit


class StoreLockOf:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> None:
        self.lock = StoreLock(self.directory)

    def __exit__(self, *rest: Any) -> None:
        self.lock.release()


def test_a_failed_fit_lets_go_of_the_store(tmp_path: Path) -> None:
    class Fails(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path / "s", Fails(mlp()))
    with StoreLockOf(tmp_path / "s"):
        pass


@pytest.mark.parametrize("change", ["data", "parameters", "indices", "model"])
def test_what_changed_between_runs_is_refused(tmp_path: Path, change: str) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    fit(
        tmp_path / "s",
        Classifier(mlp()),
        max_epochs=1,
        callbacks=[saver],
        enable_checkpointing=True,
    )
    before = contents(tmp_path / "s")
    path = tmp_path / "ckpt" / "epoch=0.ckpt"
    options: dict[str, Any] = {"proj_dim": 48}
    module, data = Classifier(mlp()), train_set()
    if change == "data":
        data, words = train_set(299), "train_set_size is 300 in the store, 299 given"
    elif change == "parameters":
        options |= {"adopt": True}
        module, path, words = Classifier(mlp(40)), None, r"parameter 0 is net.1.weight \(32, 64\)"
    elif change == "indices":
        options |= {"indices": list(range(300))}
        words = "indices is None in the store"
    else:
        options |= {"model": "net", "grad_wrt": None}
        words = "parameter 0 is net.1.weight"
    with pytest.raises(StoreMismatchError, match=words):
        trainer(callbacks=[GradientCollector(tmp_path / "s", **options)]).fit(
            module, loader(data), ckpt_path=path
        )
    after = contents(tmp_path / "s")
    before.pop("collecting.lock"), after.pop("collecting.lock")
    assert after == before


def test_another_runs_store_is_adopted_when_asked(tmp_path: Path) -> None:
    def run(root: Path, seed: int, **options: Any) -> GradientCollector:
        pl.seed_everything(seed, verbose=False)
        collector = GradientCollector(root, proj_dim=48, **options)
        trainer(max_epochs=2, callbacks=[collector]).fit(Classifier(mlp()), loader(train_set()))
        return collector

    first = run(tmp_path / "s", 0)
    rows = first.store.grads(1).copy()
    run_id = first.store.manifest["run"]["id"]
    same = run(tmp_path / "s", 0, adopt=True)
    assert same.model_ids == [0, 1]
    assert same.store.manifest["run"]["id"] == run_id
    assert same.state_dict() == {"run": run_id}
    np.testing.assert_array_equal(same.store.grads(1), rows)
    other = run(tmp_path / "s", 1, adopt=True)  # another trajectory sets the first aside
    assert other.model_ids == [2, 3]
    np.testing.assert_array_equal(np.load(tmp_path / "s/1/grads.mmap"), rows)


def test_an_interrupted_collection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    seen: list[int] = []

    class Breaks(Classifier):
        broken = False

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.training and self.trainer.global_step > 6:
                seen.append(len(batch[0]))
                if not type(self).broken and len(seen) == 4:
                    type(self).broken = True
                    raise RuntimeError("stopped")
            return batch

    def run(root: Path, module: Any, path: Any = None, **options: Any) -> GradientCollector:
        pl.seed_everything(0, verbose=False)
        collector = GradientCollector(root, proj_dim=48, **options)
        saver = ModelCheckpoint(
            root.with_name(f"{root.name}_ckpt"), filename="{epoch}", save_top_k=-1
        )
        trainer(max_epochs=2, callbacks=[collector, saver], enable_checkpointing=True).fit(
            module(mlp()), loader(train_set()), ckpt_path=path
        )
        return collector

    whole = run(tmp_path / "whole", Classifier)
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "s", Breaks)
    assert np.load(tmp_path / "s/1/_is_featurized.mmap").sum() == 150
    assert open_store(tmp_path / "s").model_ids == [0]
    seen.clear()
    path = next((tmp_path / "s_ckpt").glob("epoch=0.ckpt"))
    resumed = run(tmp_path / "s", Breaks, path)
    # The batch that is tried when training starts lies before the seventh step.
    assert sum(seen) == 150
    for model_id in (0, 1):
        np.testing.assert_array_equal(resumed.store.grads(model_id), whole.store.grads(model_id))


def test_a_run_killed_in_its_last_collection_is_finished(tmp_path: Path) -> None:
    # The checkpoint is there, so the resumed run has nothing to train.
    class Breaks(Classifier):
        broken = False

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.training and self.trainer.global_step == 12 and not type(self).broken:
                type(self).broken = True
                raise RuntimeError("stopped")
            return batch

    def run(root: Path, module: Any, path: Any = None, **options: Any) -> GradientCollector:
        pl.seed_everything(0, verbose=False)
        collector = GradientCollector(root, proj_dim=48, **options)
        saver = ModelCheckpoint(root.with_name(f"{root.name}_ckpt"), filename="last")
        trainer(max_epochs=2, callbacks=[collector, saver], enable_checkpointing=True).fit(
            module(mlp()), loader(train_set()), ckpt_path=path
        )
        return collector

    for when in ("checkpoint", "train_end"):
        whole = run(tmp_path / f"whole_{when}", Classifier, when=when)
        Breaks.broken = False
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path / when, Breaks, when=when)
        path = max((tmp_path / f"{when}_ckpt").iterdir(), key=lambda f: f.stat().st_mtime)
        resumed = run(tmp_path / when, Breaks, path, when=when)
        assert resumed.model_ids == whole.model_ids
        last = whole.model_ids[-1]
        np.testing.assert_array_equal(resumed.store.grads(last), whole.store.grads(last))


def test_rows_at_other_weights_do_not_count(tmp_path: Path) -> None:
    fit(tmp_path / "s", Classifier(mlp()), max_epochs=1)
    # As if it had been interrupted, and the resumed run passed other weights.
    (tmp_path / "s" / "id_0.json").write_text('{"0": {"is_featurized": 0, "is_finalized": 0}}')
    before = np.load(tmp_path / "s/0/grads.mmap")
    collector = GradientCollector(tmp_path / "s", proj_dim=48, adopt=True)
    pl.seed_everything(1, verbose=False)
    trainer(max_epochs=1, callbacks=[collector]).fit(Classifier(mlp()), loader(train_set()))
    assert collector.model_ids == [0]
    assert not np.allclose(collector.store.grads(0), before)


def test_row_writer_notes_what_is_written(tmp_path: Path) -> None:
    import torch

    for name, shape, dtype in (
        ("grads", (9, 3), np.float16),
        ("out_to_loss", (9, 1), np.float16),
        ("_is_featurized", (9,), np.int32),
    ):
        allocate_matrix(tmp_path / f"{name}.mmap", shape, dtype)
    writer = RowWriter(tmp_path)
    values = torch.rand(2, 3)
    writer.write(4, values, torch.ones(2, 1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        writer.write(6, values / 0, torch.ones(2, 1))
    writer.commit()
    writer.close()
    grads, flags = np.load(tmp_path / "grads.mmap"), np.load(tmp_path / "_is_featurized.mmap")
    np.testing.assert_array_equal(grads[4:6], values.numpy().astype(np.float16))
    assert not grads[:4].any()
    assert not grads[6:].any()
    assert flags.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("last", [False, True])
def test_row_writer_tells_of_a_full_disk_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    import torch

    for name, shape in (("grads", (9, 3)), ("out_to_loss", (9, 1)), ("_is_featurized", (9,))):
        allocate_matrix(tmp_path / f"{name}.mmap", shape, np.float32)
    whole, rows = _Matrix.write, (torch.rand(2, 3), torch.ones(2, 1))

    def failing(self: _Matrix, start: int, values: Any) -> None:
        if start == 4:
            raise OSError(28, "No space left on device")
        whole(self, start, values)

    monkeypatch.setattr(_Matrix, "write", failing)
    writer = RowWriter(tmp_path)
    writer.write(2, *rows)
    writer.write(4, *rows)
    with pytest.raises(OSError, match="No space left"):  # by the next rows, or by the commit
        writer.commit() if last else writer.write(6, *rows)
    writer.commit()
    writer.close()
    assert np.load(tmp_path / "_is_featurized.mmap").tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"manifest.json.{dead.pid}.tmp", f"manifest.json.{os.getppid()}.tmp", "mine.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == set(names[1:])
