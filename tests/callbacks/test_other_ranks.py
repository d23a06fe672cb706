"""A run that is killed goes on with another number of processes: no window of its epoch is trained on twice, none is lost."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback

from lightning_robot.callbacks.checkpoints import Checkpoints, read_checkpoint
from lightning_robot.callbacks.ema import EMA
from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.store import StoreWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from ranks import run_ranks
from tiny_run import FEATURES, TinyPolicy, tiny_trainer


class Record(Callback):
    """Notes of every batch the epoch, the optimizer step that it goes into, and its rows; kills its process at a batch."""

    def __init__(self, folder: Path, killed_at: int | None) -> None:
        self.folder, self.killed_at = folder, killed_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        rows = list(zip(batch["episode_index"].tolist(), batch["frame_index"].tolist()))
        with (self.folder / f"rows{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.current_epoch, trainer.global_step, rows]) + "\n")
        if batch_idx == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _data(store: Path) -> EpisodeDataModule:
    return EpisodeDataModule(str(store), batch_size=4, num_workers=0, validation_ratio=0.0)


def _train(folder: Path, store: Path, ranks: int, accumulation: int, killed_at: int | None, resume: Path | None) -> None:
    trainer = tiny_trainer(
        folder,
        EMA(),
        Record(folder, killed_at),
        Checkpoints(every_n_steps=1),
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        accumulate_grad_batches=accumulation,
        log_every_n_steps=1,
    )
    trainer.fit(TinyPolicy(), datamodule=_data(store), ckpt_path=resume)


def _rows(folder: Path) -> list[tuple[int, int, tuple[int, int]]]:
    """(epoch, optimizer step, (episode, frame)) of all ranks."""
    notes = [json.loads(line) for path in folder.glob("rows*.jsonl") for line in path.read_text().splitlines()]
    return [(epoch, step, tuple(row)) for epoch, step, rows in notes for row in rows]


@pytest.mark.parametrize(
    ("before", "after", "lengths", "accumulation", "killed_at"),
    [
        (2, 1, (17, 30, 9, 40), 2, 5),  # killed in the middle of an accumulated step: its rows come again
        (1, 2, (17, 31, 9, 40), 1, 7),  # an epoch that does not divide by batches and ranks
    ],
)
def test_every_window_of_the_epoch_is_trained_on_once(before, after, lengths, accumulation, killed_at, tmp_path):
    ends = np.cumsum(lengths)
    arrays = {"observation.state": ((3,), "float32"), "action": ((2,), "float32")}
    writer = StoreWriter(tmp_path / "a.zarr", arrays, int(ends[-1]), {"features": FEATURES.to_dict()})
    random = np.random.default_rng(0)
    writer.append({key: random.uniform(-1, 1, (ends[-1], *shape)).astype(kind) for key, (shape, kind) in arrays.items()})
    store = writer.finish(ends).path
    data = _data(store)
    data.window = TinyPolicy().window
    data.prepare_data()
    data.setup()
    windows = data.train_windows.__getitems__(list(range(len(data.train_windows))))
    everything = sorted(zip(windows["episode_index"].tolist(), windows["frame_index"].tolist()))
    assert len(set(everything)) == len(everything) == sum(lengths)

    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(AssertionError, match="ended with status 9"):
        run_ranks(_train, before, first, first, store, before, accumulation, killed_at, None)
    last = first / "checkpoints" / "last.ckpt"
    step = read_checkpoint(last)["global_step"]
    assert 0 < step == killed_at // accumulation
    run_ranks(_train, after, second, second, store, after, accumulation, None, last)

    kept = [row for epoch, at, row in _rows(first) if at < step]
    assert len(kept) == 4 * before * accumulation * step
    epochs = [[row for epoch, _, row in _rows(second) if epoch == number] for number in (0, 1)]
    assert sorted(kept + epochs[0]) == everything
    assert sorted(epochs[1]) == everything
