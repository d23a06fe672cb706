"""The data module: split, segments, statistics, exact resume with any number of ranks and workers, and bad input."""

import itertools
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter
from lightning_robot.features import Feature

ENDS = np.array([20, 35, 50, 54, 80, 100])
WINDOW = SimpleNamespace(
    keys=("observation.state",), observation_steps=2, action_horizon=8, action_offset=-1, pad_before=1, pad_after=3
)


def make_store(path, split=None, segments=None, language=None, ends=ENDS, cloud=0) -> EpisodeStore:
    """State and action of frame i are i, so that a batch tells where it came from."""
    arrays = {"observation.state": ((3,), "float32"), "action": ((2,), "float32")}
    if cloud:
        arrays["observation.point_cloud"] = ((cloud, 6), "float32")
    writer = StoreWriter(path, arrays, int(ends[-1]), shard_frames=64)
    rows = np.arange(ends[-1], dtype=np.float32)
    rng = np.random.default_rng(0)
    writer.append(
        {key: rows[:, None] + np.zeros(shape, np.float32) for key, (shape, _) in arrays.items() if len(shape) == 1}
        | ({"observation.point_cloud": rng.normal(size=(len(rows), cloud, 6))} if cloud else {})
    )
    return writer.finish(ends, split, segments, language)


@pytest.fixture
def store(tmp_path):
    return str(make_store(tmp_path / "a.zarr").path)


def ready(store, window=WINDOW, **arguments) -> EpisodeDataModule:
    data = EpisodeDataModule(store, num_workers=0, **{"batch_size": 8} | arguments)
    data.window = window
    data.prepare_data()
    data.setup()
    return data


# Split, segments, statistics.


def test_split_by_ratio_list_store_and_limit(tmp_path, store):
    assert ready(store).validation_episodes.tolist() == [0]  # round(6 · 0.02), at least one; as published for seed 42
    data = ready(store, validation_episodes=[1, 4])
    assert data.train_episodes.tolist() == [0, 2, 3, 5]
    data = ready(store, train_episodes=[0, 5], validation_ratio=0)
    assert (data.train_episodes.tolist(), data.validation_episodes.tolist()) == ([0, 5], [])
    assert data.val_dataloader() == []
    assert len(ready(store, max_train_episodes=2).train_episodes) == 2
    own = str(make_store(tmp_path / "own.zarr", split=[0, 0, 1, 0, 0, 1]).path)
    assert ready(own).validation_episodes.tolist() == [2, 5]
    assert len(ready(own, validation_ratio=0.5).validation_episodes) == 3
    with pytest.raises(ValueError, match=r"Episodes \[1\] are in both"):
        ready(store, train_episodes=[0, 1], validation_episodes=[1])
    with pytest.raises(ValueError, match=r"train_episodes: .* numbered 0 to 5"):
        ready(store, train_episodes=[6])


def test_windows_never_leave_their_episode(store):
    data = ready(store, validation_episodes=[1])
    seen = []
    for batch in data.train_dataloader():
        state, action = batch["observation.state"][..., 0], batch["action"][..., 0]
        for name in (state, action):
            episode = np.searchsorted(ENDS, name.numpy(), side="right")
            assert (episode == batch["episode_index"].numpy()[:, None]).all()
        start = np.concatenate([[0], ENDS])[batch["episode_index"]]
        inside = ~batch["action_is_pad"].numpy()
        steps = (batch["frame_index"].numpy() + start)[:, None] + np.arange(8)
        np.testing.assert_array_equal(action.numpy()[inside], steps[inside])
        seen += zip(batch["episode_index"].tolist(), batch["frame_index"].tolist())
    assert len(seen) == len(set(seen)) == len(data.train_windows)
    assert {episode for episode, _ in seen} == {0, 2, 3, 4, 5}


def test_short_episodes_are_counted_or_refused(store, capsys):
    window = SimpleNamespace(**{**vars(WINDOW), "pad_after": 0})
    data = ready(store, window, validation_episodes=[0])
    assert "1 of 5 training episodes are too short for a window of 8 steps" in capsys.readouterr().out
    assert 3 not in data.train_windows.spans[data.train_windows.span][:, 2]
    with pytest.raises(StoreError, match=r"no training window.*8 steps.*episodes: 3 \(4 frames\)\. Shorten"):
        ready(store, window, train_episodes=[3])
    assert len(ready(store, window, train_episodes=[3], pad_after=5).train_windows) == 3


def test_segments_follow_their_episode_and_carry_their_task(tmp_path, capsys):
    language = {"texts": ["open it", "close it", "turn it"], "tasks": ["open", "close", "turn"], "encoder": None}
    segments = [[0, 12, 0], [8, 20, 1], [36, 50, 0], [60, 80, 1]]
    path = str(make_store(tmp_path / "s.zarr", segments=segments, language=language).path)
    data = ready(path, segments=True, validation_episodes=[2])
    out = capsys.readouterr().out
    assert "3 training segments; 10% of their frames lie in more than one segment" in out
    assert data.validation_windows.spans[:, 3].tolist() == [2]
    batch = data.train_windows.__getitems__(list(range(len(data.train_windows))))
    assert set(batch["segment_index"].tolist()) == {0, 1, 3}
    for row in range(len(data.train_windows)):
        start, end, text = segments[batch["segment_index"][row]]
        action = batch["action"][row, :, 0]
        assert start <= action.min()
        assert action.max() < end
        assert batch["task"][row] == language["texts"][text]
        assert torch.equal(batch["task_embedding"][row], data.language["embeddings"][text])
    assert data.language["encoder"] == "hashed_ngrams_384"  # the store had texts without vectors
    assert data.language["embeddings"].shape == (3, 384)
    assert data.language["trained_tasks"] == ["close", "open"]  # of "turn" there is a sentence, but no segment
    whole = ready(path)
    assert whole.language is None
    assert "task" not in whole.train_windows[0]
    whole._trainer = None
    with pytest.raises(StoreError, match="no language segments"):
        ready(str(make_store(tmp_path / "none.zarr").path), segments=True)


def test_statistics_are_of_training_frames_alone_each_once(tmp_path, store):
    data = ready(store, validation_episodes=[0, 5])
    found = data.statistics(("observation.state", "action"))
    rows = np.arange(20, 80, dtype=np.float64)
    assert found["action"].count == 60
    assert (found["action"].min.tolist(), found["action"].max.tolist()) == ([20, 20], [79, 79])
    np.testing.assert_allclose(found["observation.state"].mean, rows.mean())
    np.testing.assert_allclose(found["observation.state"].std, rows.std(ddof=1))
    assert data.statistics(("action",))["action"] is found["action"]
    language = {"texts": ["a"], "tasks": ["a"]}
    path = str(make_store(tmp_path / "s.zarr", segments=[[0, 12, 0], [8, 16, 0]], language=language).path)
    segmented = ready(path, segments=True, validation_ratio=0).statistics(("action",))["action"]
    assert (segmented.count, segmented.max[0]) == (16, 15)


def test_not_finite_values_are_named(tmp_path):
    writer = StoreWriter(tmp_path / "n.zarr", {"observation.state": ((3,), "float32"), "action": ((2,), "float32")}, 40)
    values = {"observation.state": np.zeros((40, 3)), "action": np.zeros((40, 2))}
    values["action"][33, 1] = np.nan
    writer.append(values)
    writer.finish(np.array([40]))
    with pytest.raises(StoreError, match=r"action, frames 0 to 40: values of element\(s\) \[1\] are not finite"):
        ready(str(tmp_path / "n.zarr")).statistics(("action",))


class Reads(LightningModule):
    """A module that says what it reads, as policies do."""

    def __init__(self, window=WINDOW, channels=None, uses_task=False):
        super().__init__()
        self.window, self.channels, self.uses_task = window, channels, uses_task
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.seen = []

    def select_features(self, offered):
        observations = {key: offered.observations[key] for key in self.window.keys}
        if self.channels:
            observations["observation.point_cloud"] = Feature(
                (*observations["observation.point_cloud"].shape[:1], self.channels)
            )
        return SimpleNamespace(observations=observations)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["episode_index"].tolist(), batch["frame_index"].tolist()))
        return ((self.weight - batch["action"].mean((0, 1))) ** 2).sum() * 1e-4

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        _ = self.trainer.estimated_stepping_batches  # loads the training data before the loops are restored, as policies do
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("decode", [True, False])
def test_only_the_channels_that_the_policy_reads(tmp_path, monkeypatch, decode):
    monkeypatch.setattr("lightning_robot.data.store.IN_MEMORY_BYTES", 0)
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    path = make_store(tmp_path / "c.zarr", cloud=400).path
    window = SimpleNamespace(**{**vars(WINDOW), "keys": ("observation.point_cloud",)})
    data = EpisodeDataModule(str(path), num_workers=0, batch_size=8, decode=decode)
    data.trainer = SimpleNamespace(lightning_module=Reads(window, channels=3))
    data.prepare_data()
    data.setup()
    whole = EpisodeStore.open(path).read("observation.point_cloud", slice(None))
    batch = data.train_windows.__getitems__([5, 40])
    assert batch["observation.point_cloud"].shape == (2, 2, 400, 3)
    rows = np.concatenate([[0], ENDS])[batch["episode_index"]] + batch["frame_index"].numpy()
    np.testing.assert_array_equal(batch["observation.point_cloud"][:, 1], whole[rows + 1][..., :3])
    assert data.statistics(("observation.point_cloud",))["observation.point_cloud"].size == 3
    assert (tmp_path / "c.zarr.decoded").exists() == decode


# Bad input.


def test_bad_input_is_refused_with_a_remedy(tmp_path, store):
    window = SimpleNamespace(**{**vars(WINDOW), "keys": ("observation.state", "observation.images.static")})
    with pytest.raises(StoreError, match=r"holds no observation\.images\.static.*it holds action, observation\.state"):
        ready(store, window)
    with pytest.raises(StoreError, match=r"There is no store at .*missing\.zarr"):
        ready(str(tmp_path / "missing.zarr"))
    with pytest.raises(StoreError, match=r"set data\.init_args\.store"):
        ready(None)
    with pytest.raises(RuntimeError, match="does not know what windows to cut"):
        ready(store, None)
    with pytest.raises(RuntimeError, match=r"Call setup\(\) first"):
        EpisodeDataModule(store).statistics(("action",))


# Exact resume.


def fit(store, folder, *, resume=None, epochs=3, workers=0, save_every=None, accumulate=1, max_steps=-1, **arguments):
    model = Reads()
    data = EpisodeDataModule(store, batch_size=8, num_workers=workers, validation_episodes=[1], **arguments)
    callbacks = []
    if save_every:
        callbacks.append(
            ModelCheckpoint(folder, "{step}", every_n_train_steps=save_every, save_top_k=-1, auto_insert_metric_name=False)
        )
        callbacks.append(ModelCheckpoint(folder, "end{epoch}", save_top_k=-1, auto_insert_metric_name=False))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(save_every),
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, data, ckpt_path=resume)
    return model, len(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_anywhere_continues_exactly(store, tmp_path, workers):
    whole, per_epoch = fit(store, tmp_path, save_every=1)
    assert per_epoch >= 4
    assert len({json.dumps(sorted(zip(*step[2:]))) for step in whole.seen}) == 3 * per_epoch  # epochs differ
    first, last, second = 2, per_epoch, per_epoch + 3  # mid-epoch, on an epoch's last batch, in epoch 2
    for step in (first, last, second):
        again, _ = fit(store, tmp_path, resume=tmp_path / f"{step}.ckpt", workers=workers)
        assert again.seen == whole.seen[step:]
        assert torch.equal(again.weight, whole.weight)
    if workers == 0:
        for epoch in (0, 1):
            again, _ = fit(store, tmp_path, resume=tmp_path / f"end{epoch}.ckpt")
            assert again.seen == whole.seen[(epoch + 1) * per_epoch :]
        again, _ = fit(store, tmp_path, resume=tmp_path / "5.ckpt", epochs=-1, max_steps=3 * per_epoch)
        assert again.seen == whole.seen[5:]


def test_a_missing_store_leaves_nothing_behind(tmp_path):
    with pytest.raises(StoreError, match="There is no store"):
        ready(tmp_path / "typo" / "a.zarr")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"validation_ratio": 20}, {"validation_ratio": -0.1}, {"max_train_episodes": 0}, {"batch_size": 0}, {"num_workers": -1}],
)
def test_shares_and_limits_are_checked_at_once(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EpisodeDataModule("a.zarr", **wrong)


def test_resume_inside_an_accumulated_step_repeats_that_step(store, tmp_path):
    whole, per_epoch = fit(store, tmp_path, accumulate=3, save_every=1)
    assert per_epoch % 3 == 0
    again, _ = fit(store, tmp_path, accumulate=3, resume=tmp_path / "2.ckpt")
    assert again.seen == whole.seen[6:]
    assert torch.equal(again.weight, whole.weight)


def test_resume_refuses_another_split_in_the_middle_of_an_epoch(store, tmp_path):
    fit(store, tmp_path, save_every=1, epochs=1)
    with pytest.raises(ValueError, match=r"in the middle of an epoch of \d+ windows, but the data now give \d+"):
        fit(store, tmp_path, resume=tmp_path / "2.ckpt", max_train_episodes=3)


def test_without_validation_episodes_and_predicting(store, tmp_path):
    class Predicts(Reads):
        def predict_step(self, batch, batch_idx):
            return batch["frame_index"]

    fit(store, tmp_path, epochs=1)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **options)
    model = Predicts()
    trainer.fit(model, EpisodeDataModule(store, batch_size=8, num_workers=0, validation_ratio=0))
    assert len(model.seen) > 4
    data = EpisodeDataModule(store, batch_size=8, num_workers=0, validation_episodes=[1])
    predicted = torch.cat(trainer.predict(Predicts(), data))
    assert predicted.tolist() == list(range(-1, len(predicted) - 1))


# Several ranks.

SCRIPT = """
import json, os, sys
import lightning_robot
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
sys.path.insert(0, {tests!r})
from test_episodes import Reads
from lightning_robot.data.episodes import EpisodeDataModule

class Shared(Reads):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with open({folder!r} + f"/seen-{{self.global_rank}}.jsonl", "a") as file:
            file.write(json.dumps([self.current_epoch, sorted(zip(*self.seen[-1][2:]))]) + "\\n")
        return loss

def main():
    torch.set_num_threads(1)
    data = EpisodeDataModule({store!r}, batch_size=8, num_workers=0, validation_episodes=[1])
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", use_distributed_sampler=False, max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir={folder!r},
        callbacks=[
            ModelCheckpoint({folder!r}, "{{step}}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
        ],
    )
    trainer.fit(Shared(), data, ckpt_path={resume!r})

if __name__ == "__main__":
    main()
"""


def two_ranks(store, folder, resume=None):
    folder.mkdir(exist_ok=True)
    script = folder / "two_ranks.py"
    tests = str(__import__("pathlib").Path(__file__).parent)
    values = {"tests": tests, "store": store, "folder": str(folder), "resume": resume and str(resume)}
    script.write_text(textwrap.dedent(SCRIPT.format(**values)))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return [[json.loads(line) for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]


def windows_of(steps, epoch):
    return sorted(tuple(window) for at, windows in steps if at == epoch for window in windows)


@pytest.mark.slow
def test_two_ranks_and_another_number_of_ranks(store, tmp_path):
    one, _ = fit(store, tmp_path / "one", save_every=1, epochs=2)
    everything = sorted(itertools.chain(*(zip(*step[2:]) for step in one.seen if step[0] == 0)))
    ranks = two_ranks(store, tmp_path / "two")
    assert len(ranks[0]) == len(ranks[1])
    for epoch in (0, 1):
        shares = [set(windows_of(steps, epoch)) for steps in ranks]
        assert not shares[0] & shares[1]
        assert sorted(shares[0] | shares[1]) == everything
    # one rank, three batches; then two ranks for the rest of the epoch and the next
    rest = two_ranks(store, tmp_path / "more", resume=tmp_path / "one" / "3.ckpt")
    used = list(itertools.chain(*(zip(*step[2:]) for step in one.seen[:3])))
    assert sorted(used + windows_of(rest[0], 0) + windows_of(rest[1], 0)) == everything
    assert sorted(windows_of(rest[0], 1) + windows_of(rest[1], 1)) == everything
    # two ranks, two batches each; then one
    again, _ = fit(store, tmp_path / "fewer", resume=tmp_path / "two" / "2.ckpt", epochs=2)
    used = [tuple(window) for steps in ranks for _, windows in steps[:2] for window in windows]
    for epoch, before in ((0, used), (1, [])):
        found = list(itertools.chain(*(zip(*step[2:]) for step in again.seen if step[0] == epoch)))
        assert sorted(before + found) == everything


def test_trainer_that_would_wrap_the_sampler_is_refused(store):
    data = EpisodeDataModule(store, num_workers=0)
    data.window = WINDOW
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork", "logger": False, "enable_checkpointing": False}
    data.trainer = Trainer(**options)
    with pytest.raises(ValueError, match=r"set trainer\.use_distributed_sampler: false"):
        data.setup()
    data.trainer = Trainer(**options, use_distributed_sampler=False)
    data.setup()
