"""The data module of LeRobot datasets: LeRobot's own items, statistics, tasks, workers, download, and a run of `fit`."""

import json
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))
from lerobot_folders import CAMERAS, change_episodes, codes_of, picture_of, write_folder
from tiny_run import TinyPolicy, tiny_trainer

from lightning_robot.data import lerobot, pictures
from lightning_robot.data.lerobot import LeRobotDataModule
from lightning_robot.data.store import StoreError
from lightning_robot.features import IncompatibleFeatures, check_compatible

KEYS = ("observation.state", *CAMERAS)


def window(keys=KEYS, steps=2, horizon=12, offset=0, pad_after=None):
    """Windows as policies ask for them; every frame is a newest observation unless `pad_after` says less."""
    pad_after = offset + horizon - 1 if pad_after is None else pad_after
    return SimpleNamespace(
        keys=keys,
        observation_steps=steps,
        action_horizon=horizon,
        action_offset=offset,
        pad_before=steps - 1,
        pad_after=pad_after,
    )


def ready(path, cut=None, **arguments) -> LeRobotDataModule:
    data = LeRobotDataModule(str(path), **{"num_workers": 0, "validation_ratio": 0} | arguments)
    data.window = cut or window()
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "a")


# Windows.


def test_batches_are_lerobots_items(shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "data/lerobot_v3_sample_expected.safetensors")
    data = ready(shared / "data/lerobot_v3_sample")
    items = [0, 1, 38, 39, 40, 76, 77, 119]
    assert len(data.train_windows) == 120
    batch = data.train_windows.__getitems__(items)
    for row, item in enumerate(items):
        for key in (*KEYS, "action", "action_is_pad"):
            assert torch.equal(batch[key][row], golden[f"{item}.{key}"]), (item, key)
        assert batch["episode_index"][row] == golden[f"{item}.episode_index"]
        assert batch["frame_index"][row] + 1 == golden[f"{item}.frame_index"]  # ours is the window's first step
        assert batch["task"][row] == ("pick up the block", "place the block")[golden[f"{item}.task_index"].item()]


@pytest.mark.parametrize("storage", ["image", "video"])
def test_some_episodes_in_any_order(tmp_path, storage):
    data = ready(write_folder(tmp_path / "a", (20, 17, 23, 12), storage), train_episodes=[0, 3, 2], batch_size=16)
    seen = []
    starts = np.array([0, 20, 37, 60])
    for batch in data.train_dataloader():
        episode, newest = batch["episode_index"].numpy(), batch["frame_index"].numpy() + 1
        low, high = starts[episode], np.array([20, 37, 60, 72])[episode]
        rows = np.clip((low + newest)[:, None] + [-1, 0], low[:, None], high[:, None] - 1)
        for number, camera in enumerate(CAMERAS):
            assert batch[camera].dtype == torch.uint8
            found, view = codes_of(batch[camera].movedim(-3, -1).numpy())
            np.testing.assert_array_equal(found, rows)
            assert (view == number).all()
        np.testing.assert_array_equal(batch["action_is_pad"], newest[:, None] + np.arange(12) >= (high - low)[:, None])
        assert batch["task"] == [("pick up the block", "place the block")[number % 2] for number in episode]
        seen += (low + newest).tolist()
    assert sorted(seen) == [*range(20), *range(37, 72)]


def test_last_frames_are_dropped_by_the_horizons(folder):
    def dropped(cut, **arguments):
        data = ready(folder, cut, train_episodes=[1], **arguments)
        newest = data.train_windows.begins - 20 + cut.observation_steps - 1
        assert newest[0] == 0
        return 17 - 1 - newest[-1]

    diffusion = window(horizon=16, offset=-1, pad_after=7)  # 8 of 16 actions are executed: 16 - 8 - 2 + 1
    assert dropped(diffusion) == 7
    assert dropped(diffusion, drop_n_last_frames=3) == 3
    assert dropped(diffusion, drop_n_last_frames=0) == 0
    act = window(steps=1, horizon=100, pad_after=99)
    assert dropped(act) == 0
    assert dropped(act, drop_n_last_frames=10) == 10
    with pytest.raises(ValueError, match=r"drop_n_last_frames: 15; .* at most 14 frames"):
        dropped(diffusion, drop_n_last_frames=15)
    with pytest.raises(ValueError, match="drop_n_last_frames: -1"):
        LeRobotDataModule(str(folder), drop_n_last_frames=-1)


def test_each_picture_is_decoded_once_per_batch(folder, monkeypatch):
    decoded = []
    decode = pictures.Pictures._decode_into
    monkeypatch.setattr(
        pictures.Pictures,
        "_decode_into",
        lambda self, target, row: decoded.append((self.where, row)) or decode(self, target, row),
    )
    data = ready(folder)
    data.train_windows.__getitems__([5, 6, 7, 5])
    needed = {(f"{folder}: {camera}", row) for camera in CAMERAS for row in (4, 5, 6, 7)}
    assert sorted(decoded) == sorted(needed)


@pytest.mark.parametrize("storage", ["image", "video"])
def test_the_decoded_cache_holds_the_same(tmp_path, storage, monkeypatch, capsys):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    path = write_folder(tmp_path / "a", storage=storage)
    plain = ready(path).train_windows.__getitems__([5, 30, 59])
    data = ready(path, decode=True)
    batch = data.train_windows.__getitems__([5, 30, 59])
    for camera in CAMERAS:
        assert torch.equal(batch[camera], plain[camera])
        assert isinstance(data.train_windows.arrays[camera], np.memmap)
        assert (tmp_path / "a.decoded").joinpath(
            f"{camera}-{data.fingerprint[:16]}.npy"
        ).stat().st_size == 60 * 64 * 64 * 3 + 128
    out = capsys.readouterr().out
    assert "Decoding observation.images.front once into a memory-mapped file of 737 kB" in out


@pytest.mark.parametrize("storage", ["image", "video"])
def test_workers_give_the_same_batches(tmp_path, storage):
    path = write_folder(tmp_path / "a", storage=storage)
    alone, two = (list(ready(path, num_workers=workers, batch_size=16).train_dataloader()) for workers in (0, 2))
    assert len(alone) == len(two) == 4
    for one, other in zip(alone, two):
        for key, value in one.items():
            assert torch.equal(other[key], value) if isinstance(value, torch.Tensor) else other[key] == value


# Statistics.


def test_statistics_are_of_training_episodes(shared):
    data = ready(shared / "data/lerobot_v3_sample", validation_episodes=[1])
    found = data.statistics(("action", *CAMERAS))
    mean = [17.294856, 1.796649, 0.841362, 3.937103, 13.0, 48.996643]
    np.testing.assert_allclose(found["action"].mean, mean, atol=2e-6)
    std = np.array([12.370093, 21.214908, 21.579561, 20.966622, 0.0, 34.833633])
    np.testing.assert_allclose(found["action"].std * np.sqrt(82 / 83), std, atol=2e-6)
    everything = ready(shared / "data/lerobot_v3_sample").statistics(("action",))["action"]
    np.testing.assert_allclose(everything.q01, [-12.150165, -30.370839, -29.471726, -29.384939, 13.0, 0.551226], atol=1e-5)


@pytest.mark.parametrize(
    # Those of videos were noted before encoding, which loses a little.
    ("name", "exact", "extremes"),
    [("lerobot_v3_image_sample", 2e-3, 1e-6), ("lerobot_v3_sample", 0.01, 0.1)],
)
def test_noted_picture_statistics_equal_computed_ones(shared, capsys, name, exact, extremes):
    data = ready(shared / "data" / name, validation_episodes=[1])
    merged = data.statistics(CAMERAS)
    assert "Computing statistics" not in capsys.readouterr().out
    noted, data.store._table.statistics = data.store._table.statistics, []
    data._statistics.clear()
    computed = data.statistics(CAMERAS)
    out = capsys.readouterr().out
    assert (
        "Computing statistics of observation.images.front from the pictures of training episodes: the dataset does not" in out
    )
    for camera in CAMERAS:
        assert merged[camera].size == computed[camera].size == 3
        for name, allowed in {"mean": exact, "std": exact, "min": extremes, "max": extremes}.items():
            np.testing.assert_allclose(getattr(computed[camera], name), getattr(merged[camera], name), atol=allowed)
    for broken in ({"std": [[[0.006]]] * 3}, {"mean": [[[94.0]]] * 3}):
        table = data.store._table
        table.statistics = [{camera: {**values, **broken} for camera, values in episode.items()} for episode in noted]
        data._statistics.clear()
        again = data.statistics((CAMERAS[0],))[CAMERAS[0]]
        np.testing.assert_array_equal(again.mean, computed[CAMERAS[0]].mean)
        assert "those noted are wrong (mean [" in capsys.readouterr().out


def test_picture_statistics_are_exact(folder):
    data = ready(folder, validation_episodes=[1])
    data.store._table.statistics = []
    found = data.statistics((CAMERAS[1],))[CAMERAS[1]]
    values = np.stack([picture_of(index, 1) for index in (*range(20), *range(37, 60))]).reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.std, values.std(0, ddof=1), atol=1e-12)
    np.testing.assert_array_equal(found.min, values.min(0))
    np.testing.assert_array_equal(found.max, values.max(0))
    np.testing.assert_allclose(found.q01, np.quantile(values, 0.01, axis=0), atol=1 / 255)
    np.testing.assert_allclose(found.q99, np.quantile(values, 0.99, axis=0), atol=1 / 255)


def test_depth_statistics_are_in_metres(shared):
    keys = ("observation.depth.depth",)
    found = ready(shared / "data/lerobot_v3_depth_sample", window(keys)).statistics(keys)[keys[0]]
    assert found.size == 1
    assert 0.35 < found.min[0] < found.mean[0] < found.max[0] < 1.0
    batch = ready(shared / "data/lerobot_v3_depth_sample", window(keys)).train_windows[3]
    assert batch[keys[0]].shape == (1, 2, 1, 64, 64)


# Refusals.


def test_what_does_not_fit_is_named(tmp_path, folder):
    with pytest.raises(
        StoreError, match=r"holds no observation\.images\.top, which the policy reads; it holds .*images\.front"
    ):
        ready(folder, window(("observation.state", "observation.images.top")))
    offered = ready(folder).features
    other = ready(write_folder(tmp_path / "b", cameras=("observation.images.top",), action_size=4), window(KEYS[:1])).features
    with pytest.raises(IncompatibleFeatures) as raised:
        check_compatible(offered, other)
    text = str(raised.value)
    assert "observation.images.front: the policy needs it; offered are observation.state, observation.images.top" in text
    assert "action: trained on shape (6,), offered (4,)" in text
    with pytest.raises(StoreError, match=r"set data\.init_args\.root to a LeRobot folder, or data\.init_args\.repo_id"):
        LeRobotDataModule().prepare_data()
    with pytest.raises(StoreError, match=r"There is no dataset at"):
        ready(tmp_path / "none")


def test_a_missing_video_matters_where_it_is_used(tmp_path):
    path = write_folder(tmp_path / "a", storage="video", version="v2.1")
    file = path / f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4"
    file.unlink()
    with pytest.raises(StoreError, match=r"episode_000001\.mp4 is missing: it holds observation\.images\.wrist of episode 1"):
        ready(path)
    assert len(ready(path, train_episodes=[0, 2]).train_windows) == 43
    assert len(ready(path, window(("observation.state", CAMERAS[0]))).train_windows) == 60


def test_a_decoded_copy_needs_all_videos(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    path = write_folder(tmp_path / "a", storage="video", version="v2.1")
    (path / f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4").unlink()
    with pytest.raises(StoreError, match=r"episode_000001\.mp4 is missing: .* of episode 1\. .*train_episodes.*decode: false"):
        ready(path, train_episodes=[0, 2], decode=True)
    assert len(ready(path, train_episodes=[0, 2]).train_windows) == 43


@pytest.mark.parametrize("decode", [False, True])
def test_a_video_that_is_too_short(tmp_path, decode, monkeypatch):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    path = write_folder(tmp_path / "a", storage="video")
    change_episodes(path, **{f"videos__{CAMERAS[0]}__from_timestamp": [0.0, 21 / 30, 38 / 30]})
    with pytest.raises(StoreError, match=r"holds 60 frames, but observation\.images\.front of episode 2 needs 61"):
        ready(path, decode=decode)


def test_a_tolerance_is_no_negative_time():
    with pytest.raises(ValueError, match="tolerance: -1"):
        LeRobotDataModule(tolerance=-1)


def test_a_window_does_not_begin_late():
    with pytest.raises(ValueError, match="pad_before: -1; it is a number of steps, 0 or more"):
        LeRobotDataModule(pad_before=-1)


# Download.


def test_download_says_its_commit_and_happens_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path / "cache"))
    asked = []

    class HfApi:
        def dataset_info(self, repo_id, revision):
            if "lost" in repo_id:
                raise ConnectionError("no route")
            return SimpleNamespace(sha="0123abc")

    def snapshot_download(repo_id, repo_type, revision, local_dir):
        asked.append((repo_id, repo_type, revision))
        write_folder(Path(local_dir))

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi, hub.snapshot_download = HfApi, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for _ in range(2):
        data = LeRobotDataModule(repo_id="someone/blocks", num_workers=0, validation_ratio=0)
        data.window = window()
        data.prepare_data()
        data.setup()
        assert len(data.train_windows) == 60
        assert "someone/blocks at main, commit 0123abc, in " in capsys.readouterr().out
    assert asked == [("someone/blocks", "dataset", "0123abc")]
    assert data.find_store() == tmp_path / "cache/lerobot/someone--blocks"
    lost = LeRobotDataModule(repo_id="someone/lost", revision="v3.0")
    assert lost.find_store().name == "someone--lost@v3.0"
    with pytest.raises(
        StoreError, match=r"someone/lost at v3\.0 cannot be downloaded \(ConnectionError: no route\).*init_args\.root"
    ):
        lost.prepare_data()
    elsewhere = LeRobotDataModule(str(tmp_path / "here"), "someone/blocks")
    elsewhere.prepare_data()
    assert (tmp_path / "here" / lerobot.COMMIT).read_text() == "0123abc\n"


# What a dataset says of itself.


def test_a_file_of_statistics_that_does_not_describe_the_data_is_named(shared, tmp_path, capsys):
    shutil.copytree(shared / "data/lerobot_v3_sample", tmp_path / "a", copy_function=shutil.copyfile)
    file = tmp_path / "a/meta/stats.json"
    ready(tmp_path / "a")
    assert "stats.json" not in capsys.readouterr().out  # LeRobot's own are right
    noted = json.loads(file.read_text())
    noted["action"]["mean"][2] += 5
    noted[CAMERAS[0]]["std"] = [[[0.9]]] * 3
    del noted["observation.state"]
    file.chmod(0o644)
    file.write_text(json.dumps(noted))
    data = ready(tmp_path / "a", validation_episodes=[1])
    expected = "(observation.state is missing; observation.images.front: std; action: mean): nothing is taken from it"
    assert expected in capsys.readouterr().out
    right = ready(shared / "data/lerobot_v3_sample", validation_episodes=[1])
    for key in (*KEYS, "action"):
        np.testing.assert_array_equal(data.statistics((key,))[key].mean, right.statistics((key,))[key].mean)
    for content, said in (
        ("{", "the file is damaged"),
        ('{"action": 3}', "the file is damaged"),
        (None, "the file is missing"),
    ):
        file.unlink() if content is None else file.write_text(content)
        ready(tmp_path / "a")
        assert f"stats.json does not describe the data ({said}" in capsys.readouterr().out


def test_a_value_that_is_no_number_is_named_in_validation_too(tmp_path):
    state = np.zeros((60, 6), np.float32)
    state[25, 3] = np.nan
    path = write_folder(tmp_path / "a", change={"observation.state": state})
    with pytest.raises(
        StoreError, match=r"observation.state of episode 1, frame 5 holds a value that is no number.*train_epis"
    ):
        ready(path, validation_episodes=[1])
    assert len(ready(path, train_episodes=[0], validation_episodes=[2]).train_windows) == 20


def test_units_of_joints_are_said_read_off_or_set(tmp_path, shared, capsys):
    """Within -100 to 100 degrees and normalised values look alike."""
    sample = shared / "data/lerobot_v3_sample"
    assert ready(sample).features.action.unit == ""
    assert "do not tell whether joints are in degrees or normalised" in capsys.readouterr().out
    for units, unit in (("degrees", "degrees, %"), ("normalized", "%")):
        features = ready(sample, joint_units=units).features
        assert features.action.unit == features.observations["observation.state"].unit == unit
        assert "do not tell" not in capsys.readouterr().out
    wide = write_folder(tmp_path / "wide", action_names=["main_shoulder_pan", *"abcd", "main_gripper"], action_scale=4.0)
    assert ready(wide).features.action.unit == "degrees, %"
    assert "a joint reaches 1" in (out := capsys.readouterr().out)
    assert "so its joints are in degrees" in out
    with pytest.raises(StoreError, match=r"joint_units: normalized, but a joint reaches 1.*: set degrees"):
        ready(wide, joint_units="normalized")
    with pytest.raises(StoreError, match=r"joint_units: degrees, but .* no joints of an SO-100 or SO-101"):
        ready(write_folder(tmp_path / "other"), joint_units="degrees")
    with pytest.raises(ValueError, match="joint_units: 'radians'; it is degrees, normalized or null"):
        LeRobotDataModule(joint_units="radians")


# A run.


class Looks(TinyPolicy):
    """Reads two cameras and the state, as ACT and Diffusion Policy do."""

    normalization = {"observation.state": "mean_std", "action": "mean_std"}  # noqa: RUF012

    def __init__(self, steps=1, horizon=10, offset=0, features=None, language=None, **more):
        super().__init__(features=features, language=language)
        self.save_hyperparameters(logger=False)
        self.observation_steps, self.action_horizon, self.execution_horizon = steps, horizon, horizon // 2
        self.action_offset = offset

    @property
    def observation_keys(self):
        return KEYS

    def build(self):
        torch.manual_seed(0)
        self.network = torch.nn.Linear(6 + 6, self.action_horizon * 6)

    def compute_loss(self, batch):
        pictures = torch.cat([batch[camera].float().mean((1, 3, 4)) / 255 for camera in CAMERAS], 1)
        state = self.normalizer.normalize("observation.state", batch["observation.state"])[:, -1]
        assert batch["observation.state"].shape[1] == self.observation_steps
        assert len(batch["task"]) == len(state)
        action = self.normalizer.normalize("action", batch["action"])
        error = (self.network(torch.cat([state, pictures], 1)).reshape(action.shape) - action).abs()
        return (error * ~batch["action_is_pad"][..., None]).mean(), {}


@pytest.mark.parametrize(("steps", "offset", "workers"), [(1, 0, 2), (2, -1, 0)])
def test_fit(tmp_path, capsys, steps, offset, workers):
    path = write_folder(tmp_path / "a", (20, 17, 23), "video")
    data = LeRobotDataModule(str(path), batch_size=8, num_workers=workers, validation_episodes=[1])
    policy = Looks(steps=steps, offset=offset)
    trainer = tiny_trainer(tmp_path, max_epochs=2)
    trainer.fit(policy, data)
    assert data.train_episodes.tolist() == [0, 2]
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert set(policy.features.observations) == set(KEYS)
    assert data.language["trained_tasks"] == ["pick up the block"]


def test_a_joint_that_does_not_move_is_named(shared, tmp_path, capsys):
    data = LeRobotDataModule(str(shared / "data/lerobot_v3_sample"), num_workers=0, validation_episodes=[1])
    tiny_trainer(tmp_path, max_steps=1).fit(Looks(), data)
    assert "Nearly constant" in (out := capsys.readouterr().out)
    assert "observation.state: wrist_roll.pos; action: wrist_roll.pos" in out
