"""Nothing that a data file names is run."""

import collections
import io
import os
import pickle

import numpy as np
import pytest

from lightning_robot.unpickling import ForbiddenPickle, Inert, load_object_array, restricted_load


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def save_objects(path, value):
    array = np.empty((), dtype=object)
    array[()] = value
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_is_refused_and_named(tmp_path, protocol):
    payload = pickle.dumps({"harmless": [1, 2], "evil": Attack(tmp_path / "ran")}, protocol=protocol)
    with pytest.raises(ForbiddenPickle, match=r"language\.npy asks for the global posix\.system"):
        restricted_load(payload, {}, "language.npy")
    assert not (tmp_path / "ran").exists()


def test_code_in_an_object_array_is_refused(tmp_path):
    path = save_objects(tmp_path / "auto_lang_ann.npy", {"language": Attack(tmp_path / "ran")})
    with pytest.raises(ForbiddenPickle, match=r"posix\.system"):
        load_object_array(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dangerous", [eval, getattr, collections.Counter, np.load, io.open])
def test_only_listed_globals_resolve(tmp_path, dangerous):
    with pytest.raises(ForbiddenPickle):
        load_object_array(save_objects(tmp_path / "x.npy", [dangerous]))


def test_objects_outside_the_stream_are_refused():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return "elsewhere" if value == "x" else None

    file = io.BytesIO()
    Pickler(file).dump(["x"])
    with pytest.raises(ForbiddenPickle, match="elsewhere"):
        restricted_load(file.getvalue(), {})


def test_damaged_files_are_named(tmp_path):
    path = save_objects(tmp_path / "x.npy", {"a": np.arange(50)})
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) - 20):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.npy is damaged"):
            load_object_array(path)


def test_plain_contents_come_back(tmp_path):
    value = {"info": {"indx": [(np.int64(3), np.int64(9))]}, "emb": np.random.default_rng(0).random((2, 1, 4), np.float32)}
    loaded = load_object_array(save_objects(tmp_path / "x.npy", value))
    assert loaded["info"] == value["info"]
    np.testing.assert_array_equal(loaded["emb"], value["emb"])
    np.save(tmp_path / "plain.npy", np.arange(3))
    np.testing.assert_array_equal(load_object_array(tmp_path / "plain.npy"), np.arange(3))


def test_a_stub_keeps_state_and_does_nothing():
    payload = pickle.dumps(collections.Counter("aab"), protocol=2)
    assert restricted_load(payload, {("collections", "Counter"): Inert}).arguments == ({"a": 2, "b": 1},)


def test_real_recordings(shared):
    folder = shared / "data/calvin_sample"
    annotations = load_object_array(folder / "training/lang_annotations/auto_lang_ann.npy")
    assert annotations["language"]["task"] == ["open_drawer", "turn_on_led", "push_red_block_right"]
    assert [tuple(map(int, pair)) for pair in annotations["info"]["indx"]] == [(3120, 3138), (3154, 3160), (3160, 3172)]
    sentences = load_object_array(folder / "validation/lang_annotations/embeddings.npy")
    assert sentences["open_drawer"]["ann"] == ["pull the handle to open the drawer"]
    assert sentences["open_drawer"]["emb"].shape == (1, 1, 384)
    assert load_object_array(folder / "training/scene_info.npy").keys() == {"calvin_scene_D"}
