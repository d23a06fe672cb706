"""Window index, split and batches equal the published ones."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_robot.data.store import EpisodeStore
from lightning_robot.data.windows import WindowDataset, split_episodes, window_index


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "dp3_schedules_and_sampler.json").read_text())


def window(keys=("observation.state",), observation_steps=2, action_horizon=8, action_offset=-1):
    return SimpleNamespace(
        keys=keys, observation_steps=observation_steps, action_horizon=action_horizon, action_offset=action_offset
    )


def spans_of(ends):
    ends = np.asarray(ends)
    starts = np.concatenate([[0], ends[:-1]])
    return np.stack([starts, ends, np.arange(len(ends)), -np.ones_like(ends), -np.ones_like(ends)], axis=1)


def test_index_equals_the_published_one(golden):
    for case in golden["create_indices"]:
        rows = window_index(
            np.array(case["episode_ends"]),
            case["sequence_length"],
            case["pad_before"],
            case["pad_after"],
            np.array(case["episode_mask"]),
        )
        np.testing.assert_array_equal(rows, np.array(case["rows"]).reshape(-1, 4))
    assert len(golden["create_indices"]) >= 4


def test_split_equals_the_published_one(golden):
    for case in golden["val_mask"]:
        training, validation = split_episodes(case["n_episodes"], case["val_ratio"], case["seed"])
        assert validation.tolist() == case["val"]
        assert sorted([*training, *validation]) == list(range(case["n_episodes"]))
    for case in golden["train_mask"]:
        training, validation = split_episodes(case["n_episodes"], case["val_ratio"], case["seed"], case["max_train_episodes"])
        assert training.tolist() == case["train"]
        assert not set(training) & set(validation)


@pytest.mark.parametrize("name", ["dp3_demo.zarr", "dp_replay_buffer.zarr"])
def test_windows_equal_the_published_sampler(shared, name):
    expected = torch.load(shared / "golden" / "dp3_zarr_expected.pt", weights_only=True)
    store = EpisodeStore.open(shared / "golden" / name)
    training, validation = split_episodes(store.num_episodes, expected["val_ratio"], expected["val_seed"])
    assert np.isin(np.arange(5), validation).tolist() == expected["val"].tolist()
    mask = np.isin(np.arange(5), training)
    index = window_index(store.episode_ends, expected["horizon"], expected["pad_before"], expected["pad_after"], mask)
    np.testing.assert_array_equal(index, expected["indices"].numpy())
    keys = ("observation.state", "observation.point_cloud")
    arrays = {key: store.whole(key) for key in (*keys, "action")}
    data = WindowDataset(
        arrays,
        spans_of(store.episode_ends)[mask],
        store.episode_starts,
        window(keys, observation_steps=8, action_offset=-7),  # the published sampler delivers all 8 steps of everything
        (expected["pad_before"], expected["pad_after"]),
    )
    assert len(data) == expected["n"]
    batch = data.__getitems__(list(range(len(data))))
    assert torch.equal(batch["observation.state"], expected["windows"]["state"])
    assert torch.equal(batch["action"], expected["windows"]["action"])
    sums = batch["observation.point_cloud"].double().sum((-1, -2))
    torch.testing.assert_close(sums, expected["point_cloud_sum"], rtol=1e-12, atol=1e-9)
    filled = (np.arange(8) >= index[:, 2:3]) & (np.arange(8) < index[:, 3:4])
    assert torch.equal(batch["action_is_pad"], torch.from_numpy(~filled))


def numbered(count, size=1):
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], size, axis=1)


def test_only_what_is_read_is_gathered_and_padding_repeats():
    arrays = {"observation.state": numbered(20, 3), "action": numbered(20)}
    data = WindowDataset(arrays, spans_of([5, 20]), np.array([0, 5]), window(action_horizon=4), (1, 2))
    batch = data.__getitems__([0, len(data) - 1])
    assert batch["observation.state"].shape == (2, 2, 3)
    assert batch["action"].shape == (2, 4, 1)
    assert batch["observation.state"][0, :, 0].tolist() == [0, 0]
    assert batch["action"][0, :, 0].tolist() == [0, 0, 1, 2]
    assert batch["action_is_pad"].tolist() == [[True, False, False, False], [False, False, True, True]]
    assert batch["action"][1, :, 0].tolist() == [18, 19, 19, 19]
    assert batch["episode_index"].tolist() == [0, 1]
    assert batch["frame_index"].tolist() == [-1, 13]
    assert batch["segment_index"].tolist() == [-1, -1]
    assert "task" not in batch


def test_chunk_that_begins_at_the_newest_observation():
    arrays = {"observation.state": numbered(20), "action": numbered(20)}
    data = WindowDataset(arrays, spans_of([20]), np.array([0]), window(action_horizon=5, action_offset=0), (0, 0))
    batch = data.__getitems__([3])
    assert batch["observation.state"][0, :, 0].tolist() == [3, 4]
    assert batch["action"][0, :, 0].tolist() == [4, 5, 6, 7, 8]
    assert len(data) == 15
    with pytest.raises(ValueError, match="cannot begin before the window's first observation"):
        WindowDataset(arrays, spans_of([20]), np.array([0]), window(action_offset=-2), (0, 0))


@pytest.mark.parametrize(("offset", "pads"), [(-1, (1, 2)), (0, (0, 5)), (2, (0, 0)), (-1, (6, 6))])
def test_steps_within_the_episode_are_known_from_the_index(offset, pads):
    arrays = {"observation.state": np.zeros((20, 1), np.float32), "action": np.zeros((20, 1), np.float32)}
    data = WindowDataset(arrays, spans_of([5, 20]), np.array([0, 5]), window(action_horizon=6, action_offset=offset), pads)
    inside = (~data.__getitems__(list(range(len(data))))["action_is_pad"]).sum(1)
    assert data.valid_steps().tolist() == inside.tolist()


def test_images_and_depth_take_the_batch_layout():
    arrays = {
        "observation.images.static": np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3),
        "observation.depth.static": numbered(6)[:, :, None] * np.ones((1, 4, 5), np.float32),
        "action": numbered(6),
    }
    keys = ("observation.images.static", "observation.depth.static")
    batch = WindowDataset(arrays, spans_of([6]), np.array([0]), window(keys, action_horizon=2), (0, 0)).__getitems__([0, 1])
    assert batch["observation.images.static"].shape == (2, 2, 3, 4, 5)
    assert batch["observation.images.static"].dtype == torch.uint8
    image = torch.from_numpy(arrays["observation.images.static"][2])
    assert torch.equal(batch["observation.images.static"][1, 1].movedim(0, -1), image)
    assert batch["observation.depth.static"].shape == (2, 2, 1, 4, 5)


def test_memory_maps_travel_by_name(tmp_path):
    np.save(tmp_path / "a.npy", numbered(4000, 50))
    arrays = {"observation.state": np.load(tmp_path / "a.npy", mmap_mode="r"), "action": numbered(4000)}
    data = WindowDataset(arrays, spans_of([4000]), np.array([0]), window(), (1, 1))
    data.begins = data.begins[:10]
    message = pickle.dumps(data)
    assert len(message) < 100_000
    again = pickle.loads(message)
    assert isinstance(again.arrays["observation.state"], np.memmap)
    assert torch.equal(again.__getitems__([3])["observation.state"], data.__getitems__([3])["observation.state"])
