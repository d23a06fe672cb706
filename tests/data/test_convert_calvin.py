"""Conversion of a real recording: every value traced to its file, damage reported, interruptions without a trace."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lightning_robot import points
from lightning_robot.data import calvin_frames, convert_calvin
from lightning_robot.data.calvin_files import CalvinError, DamagedFrame, Stretch, cut, read_frame
from lightning_robot.data.calvin_frames import CAMERAS, CalvinSettings, convert_frame
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter, partial_folder
from lightning_robot.features import check_compatible
from lightning_robot.geometry import CALVIN_STATIC_POSE, calvin_gripper_pose
from lightning_robot.unpickling import ForbiddenPickle

SMALL = CalvinSettings(points=32, size=16, pixel_offset=(0, 1))
STATE_ONLY = CalvinSettings(points=0, rgb=False, depth=False)
FRAMES = {"training": [*range(3120, 3139), *range(3154, 3173)], "validation": list(range(3139, 3154))}
ORDER = [(split, frame) for split in FRAMES for frame in FRAMES[split]]


@pytest.fixture(scope="module")
def sample(shared):
    return shared / "data/calvin_sample"


@pytest.fixture
def root(sample, tmp_path):
    """A copy of the recording that a test may damage."""
    target = tmp_path / "calvin"
    shutil.copytree(sample, target, copy_function=lambda source, to: os.symlink(source, to))
    return target


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def convert(root, store, settings=STATE_ONLY, **options):
    return convert_calvin.convert_calvin(root, store, settings, processes=1, **options)


def source(sample, row):
    split, frame = ORDER[row]
    with np.load(sample / split / f"episode_{frame:07d}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="module")
def store(sample, tmp_path_factory):
    settings = CalvinSettings(pixel_offset=(0, 1))
    return convert(sample, tmp_path_factory.mktemp("store") / "calvin.zarr", settings).store


def test_layout_is_the_published_one(store):
    shapes = {
        "observation.images.static": ((53, 160, 160, 3), "uint8"),
        "observation.point_cloud": ((53, 2048, 6), "float32"),
        "observation.depth.static": ((53, 160, 160), "float32"),
        "action": ((53, 7), "float32"),
        "observation.state": ((53, 15), "float32"),
    }
    assert {key: (store.shape(key), str(store.dtype(key))) for key in store.keys} == shapes
    for name in ("img", "point_cloud", "depth", "action", "state"):
        assert (store.path / "data" / name).is_dir()
    assert store.episode_ends.tolist() == [19, 38, 53]
    assert store.episode_split.tolist() == [0, 0, 1]


def test_every_value_comes_from_its_frame(store, sample):
    for row in (0, 18, 19, 37, 38, 52):
        frame = source(sample, row)
        rows = slice(row, row + 1)
        np.testing.assert_array_equal(store.read("observation.state", rows)[0], frame["robot_obs"].astype(np.float32))
        np.testing.assert_array_equal(store.read("action", rows)[0], frame["rel_actions"].astype(np.float32))
        np.testing.assert_array_equal(store.read("observation.images.static", rows)[0], frame["rgb_static"][20:180, 20:180])
        np.testing.assert_array_equal(store.read("observation.depth.static", rows)[0], frame["depth_static"][20:180, 20:180])
    first = (0.00686494, 0.00084064, -0.51026841, -0.00371888, -0.00177302, -0.00094855, -1)
    np.testing.assert_allclose(store.read("action", slice(0, 1))[0], first, atol=1e-8)


def test_clouds_are_those_of_the_one_builder(store, sample):
    """Simulation calls `points.cloud_from_depth` too: a policy sees the same kind of cloud on both sides."""
    assert calvin_frames.cloud_from_depth is points.cloud_from_depth
    recipe = points.CloudRecipe.from_dict(store.features.cloud)
    for row in (0, 30, 52):
        frame = source(sample, row)
        cloud = points.cloud_from_depth(
            {name: frame[f"depth_{name}"] for name in CAMERAS},
            CAMERAS,
            {"static": CALVIN_STATIC_POSE, "gripper": calvin_gripper_pose(frame["robot_obs"])},
            {name: frame[f"rgb_{name}"] for name in CAMERAS},
            recipe,
        )
        stored = store.read("observation.point_cloud", slice(row, row + 1))[0]
        np.testing.assert_array_equal(stored, cloud)
        assert points.inside(stored, recipe.crop).all()
        assert 0 <= stored[:, 3:].min() < 0.5 < stored[:, 3:].max() <= 1


def test_language_stands_beside_the_frames(store):
    language = store.language
    described = [(int(a), int(b), language["tasks"][text], language["texts"][text]) for a, b, text in store.segments]
    assert described == [
        (0, 19, "open_drawer", "go open the drawer"),
        (19, 26, "turn_on_led", "push down the button to turn on the led light"),
        (25, 38, "push_red_block_right", "slide the red block to the right"),
        (38, 53, "move_slider_left", "push the sliding door to the left"),
    ]
    assert language["encoder"] == "paraphrase-MiniLM-L6-v2"
    assert language["embeddings"].shape == (len(language["texts"]), 384)
    np.testing.assert_allclose(np.linalg.norm(language["embeddings"], axis=1), 1, atol=1e-5)
    row = language["texts"].index("pull the handle to open the drawer")  # the sentence that rollouts use
    assert language["tasks"][row] == "open_drawer"
    assert len(set(zip(language["texts"], language["tasks"]))) == len(language["texts"])


def test_store_explains_itself(store):
    features = store.features
    assert features.action_semantics == "relative; achieved; world; gripper +1 open -1 closed"
    assert features.control_rate == 30
    assert features.observations["observation.images.static"].shape == (3, 160, 160)
    assert features.source["scene"] == "D"
    assert check_compatible(features, features) == []
    provenance = store.provenance
    assert provenance["settings"]["kept_rows_and_columns"] == [20, 179]
    assert provenance["settings"]["pixel_offset"] == [0, 1]
    assert provenance["source_frames"] == [["training", 3120, 3138], ["training", 3154, 3172], ["validation", 3139, 3153]]
    assert str(store.path.parent) not in json.dumps(store._group.attrs.asdict())


def test_modalities_by_option(sample, tmp_path):
    settings = CalvinSettings(
        points=16, colors=False, rgb=False, size=84, gripper_rgb=True, gripper_depth=True, scene_obs=True, absolute_actions=True
    )
    store = convert(sample, tmp_path / "s", settings, language="", splits=("validation",)).store
    frame = source(sample, 38)
    assert store.shape("observation.point_cloud") == (15, 16, 3)
    assert store.shape("observation.depth.static") == (15, 84, 84)
    assert "observation.images.static" not in store.keys
    np.testing.assert_array_equal(store.read("observation.images.gripper", slice(0, 1))[0], frame["rgb_gripper"])
    np.testing.assert_array_equal(store.read("observation.depth.gripper", slice(0, 1))[0], frame["depth_gripper"])
    np.testing.assert_array_equal(store.read("observation.environment_state", slice(0, 1))[0], np.float32(frame["scene_obs"]))
    np.testing.assert_array_equal(store.read("observation.action_absolute", slice(0, 1))[0], np.float32(frame["actions"]))
    assert store.language is None
    assert store.episode_split.tolist() == [1]
    assert store.features.observations["observation.environment_state"].names[6] == "red_block_x"
    absolute = convert(sample, tmp_path / "t", CalvinSettings(points=0, rgb=False, depth=False, actions="absolute")).store
    np.testing.assert_array_equal(absolute.read("action", slice(38, 39))[0], np.float32(frame["actions"]))
    assert absolute.features.action_semantics.startswith("absolute; achieved")


@pytest.mark.parametrize(("scene", "order"), [("A", "pink blue red"), ("B", "red blue pink"), ("C", "blue red pink")])
def test_blocks_are_stored_by_name(sample, scene, order):
    frame = source(sample, 0)
    poses = dict(zip(("red", "blue", "pink"), np.arange(18.0).reshape(3, 6)))
    frame["scene_obs"] = np.concatenate([np.zeros(6), *(poses[name] for name in order.split())])
    rows = convert_frame(frame, CalvinSettings(points=0, scene_obs=True), scene)
    np.testing.assert_array_equal(rows["observation.environment_state"][6:], np.arange(18.0))


def test_old_gripper_values_and_shares_per_camera(sample):
    frame = source(sample, 0)
    frame["rel_actions"][6] = frame["robot_obs"][14] = 0
    rows = convert_frame(frame, CalvinSettings(points=64, per_camera=True, pixel_offset=(0, 1)))
    assert rows["action"][6] == rows["observation.state"][14] == -1
    gripper = points.back_project(frame["depth_gripper"], CAMERAS["gripper"], calvin_gripper_pose(frame["robot_obs"]), (0, 1))
    assert sum((gripper == point).all(1).any() for point in rows["observation.point_cloud"][:, :3]) == 32


def test_damaged_items_are_left_out_and_counted(root, tmp_path, capsys):
    training = root / "training"
    (training / "episode_0003125.npz").unlink()
    replace(training / "episode_0003130.npz", b"")
    whole = (training / "episode_0003131.npz").read_bytes()
    replace(training / "episode_0003131.npz", whole[: len(whole) // 2])
    flipped = bytearray((training / "episode_0003160.npz").read_bytes())
    with zipfile.ZipFile(training / "episode_0003160.npz") as archive:
        member = archive.getinfo("robot_obs.npy")
    flipped[member.header_offset + 80 + member.compress_size // 2] ^= 0xFF
    replace(training / "episode_0003160.npz", bytes(flipped))
    with np.load(training / "episode_0003165.npz") as archive:
        broken = {**archive, "rel_actions": np.full(7, np.nan)}
    replace(training / "episode_0003165.npz", b"")
    np.savez_compressed(training / "episode_0003165.npz", **broken)
    with np.load(training / "episode_0003138.npz") as archive:
        broken = {key: archive[key] for key in archive.files if key != "rel_actions"}
    replace(training / "episode_0003138.npz", b"")
    np.savez_compressed(training / "episode_0003138.npz", **broken)

    done = convert(root, tmp_path / "s")
    frames = [(split, first, last) for split, first, last in done.store.provenance["source_frames"]]
    assert frames == [
        ("training", 3120, 3124),
        ("training", 3126, 3129),
        ("training", 3132, 3137),
        ("training", 3154, 3159),
        ("training", 3161, 3164),
        ("training", 3166, 3172),
        ("validation", 3139, 3153),
    ]
    lengths = np.diff(done.store.episode_ends, prepend=0).tolist()
    assert lengths == [last - first + 1 for _, first, last in frames]
    said = dict(done.damage)
    assert "gap in frame numbers: frame 3125 is missing inside the episode 3120 to 3138" in said["training/episode_0003125.npz"]
    assert "the file is empty" in said["training/episode_0003130.npz"]
    assert "cannot be read (BadZipFile" in said["training/episode_0003131.npz"]
    assert "cannot be read" in said["training/episode_0003160.npz"]
    assert "rel_actions holds values that are not finite" in said["training/episode_0003165.npz"]
    assert "rel_actions" in said["training/episode_0003138.npz"]
    assert "3 of 3 describe frames that are not, or not all, in one stored episode" in said["training: annotations"]
    assert "7 damaged item(s):" in capsys.readouterr().out
    assert done.store.segments.tolist() == [[32, 47, done.store.language["texts"].index("push the sliding door to the left")]]

    with pytest.raises(CalvinError, match=r"episode_0003125\.npz: gap in frame numbers.*strict"):
        convert(root, tmp_path / "t", strict=True)
    (training / "episode_0003125.npz").write_bytes(whole)
    with pytest.raises(CalvinError, match=r"episode_0003130\.npz: the file is empty"):
        convert(root, tmp_path / "t", strict=True)


def rewrite(path, **changes):
    with np.load(path) as archive:
        frame = {**archive, **changes}
    path.unlink()
    np.savez(path, **frame)


def test_impossible_values_are_damage_and_unknown_arrays_are_not(root, tmp_path):
    training = root / "training"
    rewrite(
        training / "episode_0003120.npz",
        depth_static=np.zeros((200, 200), np.float32),
        depth_gripper=np.zeros((84, 84), np.float32),
    )
    rewrite(training / "episode_0003172.npz", rel_actions=np.array([0, 0, 1.5, 0, 0, 0, 1.0]))
    rewrite(training / "episode_0003154.npz", rgb_static=np.zeros((100, 100, 3), np.uint8))
    rewrite(training / "episode_0003155.npz", rgb_tactile=np.zeros((160, 120, 6), np.uint8), extra=np.array([None]))
    replace(training / "scene_info.npy", b"?")
    said = convert(root, tmp_path / "s", SMALL).damage
    assert [file for file, _ in said if "episode" in file] == [f"training/episode_000{n}.npz" for n in (3120, 3154, 3172)]
    for number, words in enumerate(
        ["No point of static and gripper lies inside", "shape (100, 100, 3)", "rel_actions reach 1.5"]
    ):
        assert words in said[number][1]
    assert "training/scene_info.npy" in dict(said)


def test_strict_notices_lost_annotations_before_it_converts(root, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[3120, 3137], [3154, 3172]]))
    os.replace(tmp_path / "ids.npy", root / "training/ep_start_end_ids.npy")
    with pytest.raises(CalvinError, match="training: annotations: 1 of 3"):
        convert(root, tmp_path / "s", strict=True)
    assert not (partial_folder(tmp_path / "s") / "store").exists()


def test_mended_files_are_looked_at_again(root, tmp_path):
    file = root / "training/episode_0003130.npz"
    whole = file.read_bytes()
    replace(file, b"")
    with pytest.raises(CalvinError, match="empty"):
        convert(root, tmp_path / "s", strict=True)
    replace(file, whole)
    assert convert(root, tmp_path / "s", strict=True).store.num_frames == 53


def test_code_in_a_language_file_stops(root, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    array = np.empty((), dtype=object)
    array[()] = {"language": Attack()}
    path = root / "training/lang_annotations/auto_lang_ann.npy"
    path.unlink()
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ForbiddenPickle, match=r"auto_lang_ann\.npy asks for the global posix\.system"):
        convert(root, tmp_path / "s")
    assert not (tmp_path / "ran").exists()
    assert not partial_folder(tmp_path / "s").exists()


def test_other_defects_of_downloads(root, tmp_path):
    """Unsorted ids that name absent frames, annotations of a larger split, statistics of another shape, no language."""
    training = root / "training"
    (training / "ep_start_end_ids.npy").unlink()
    np.save(training / "ep_start_end_ids.npy", np.array([[3154, 3172], [9000, 9010], [3120, 3138]]))
    text = (training / "statistics.yaml").read_text()
    replace(training / "statistics.yaml", text.replace("act_max_bound: [0.181446, ", "act_max_bound: [").encode())
    language = training / "lang_annotations/auto_lang_ann.npy"
    content = np.load(language, allow_pickle=True).item()
    content["info"]["indx"][0] = (500_000, 500_064)
    language.unlink()
    np.save(language, np.array(content, dtype=object), allow_pickle=True)
    replace(root / "validation/lang_annotations/auto_lang_ann.npy", b"nonsense")
    done = convert(root, tmp_path / "s")
    assert done.store.episode_ends.tolist() == [19, 38, 53]
    said = dict(done.damage)
    assert "none of the frames 9000 to 9010" in said["training/ep_start_end_ids.npy"]
    assert "act_max_bound: statistics of size 6, data of size 7" in said["training/statistics.yaml"]
    assert "1 of 3 describe frames" in said["training: annotations"]
    assert "the first 500000 to 500064" in said["training: annotations"]
    assert "auto_lang_ann.npy is damaged" in said["validation/lang_annotations/auto_lang_ann.npy"]
    assert len(done.damage) == 4
    assert len(done.store.segments) == 2


def test_one_split_folder_without_language(root, tmp_path):
    shutil.rmtree(root / "validation/lang_annotations")
    np.save(tmp_path / "ids.npy", np.array([3139, 3153]))
    os.replace(tmp_path / "ids.npy", root / "validation/ep_start_end_ids.npy")  # one episode, as the debug set stores it
    done = convert(root / "validation", tmp_path / "s")
    assert done.store.episode_split.tolist() == [1]
    assert done.store.language is None
    assert done.store.segments is None
    assert not done.damage


def test_missing_and_wrong_folders_say_what_to_do(tmp_path, root):
    with pytest.raises(CalvinError, match=r"no split has a folder lang_none; there are: .*lang_annotations"):
        convert(root, tmp_path / "s", language="lang_none")
    with pytest.raises(CalvinError, match=r"no such folder.*download_data\.sh.*lightning_robot generate"):
        convert(tmp_path / "nowhere", tmp_path / "s")
    with pytest.raises(CalvinError, match=r"holds no CALVIN recordings"):
        convert(tmp_path, tmp_path / "s")
    (root / "training/ep_start_end_ids.npy").unlink()
    with pytest.raises(CalvinError, match=r"ep_start_end_ids\.npy is missing"):
        convert(root, tmp_path / "s")
    with pytest.raises(CalvinError, match="not enlarged"):
        CalvinSettings(size=224)


def test_depth_of_half_the_size_is_recognised(root, tmp_path):
    for path in sorted(root.glob("*/episode_*.npz")):
        with np.load(path) as archive:
            frame = {**archive, "depth_static": archive["depth_static"] / 2, "depth_gripper": archive["depth_gripper"] / 2}
        path.unlink()
        np.savez(path, **frame)
    with pytest.raises(CalvinError, match="Add --depth-scale 2"):
        convert(root, tmp_path / "s", SMALL)
    settings = CalvinSettings(points=32, size=16, pixel_offset=(0, 1), depth_scale=2)
    store = convert(root, tmp_path / "s", settings).store
    assert 3.5 < store.read("observation.depth.static", slice(0, 1)).mean() < 6.5


def test_the_other_pixel_offset_is_suggested(sample, tmp_path, capsys):
    convert(sample, tmp_path / "s", CalvinSettings(points=0, rgb=False, size=2), splits=("validation",))
    assert "consider --pixel-offset 0 1 (in fit --data.convert.pixel_offset '[0,1]')" in capsys.readouterr().out
    convert(sample, tmp_path / "t", SMALL, splits=("validation",))
    assert "pixel-offset" not in capsys.readouterr().out


def test_recordings_without_depth_are_refused_at_once(root, tmp_path):
    for path in root.glob("*/episode_*.npz"):
        with np.load(path) as archive:
            frame = {key: archive[key] for key in archive.files if not key.startswith("depth")}
        path.unlink()
        np.savez(path, **frame)
    with pytest.raises(CalvinError, match=r"holds no depth_static, depth_gripper, nor do others: leave it out"):
        convert(root, tmp_path / "s", SMALL)
    settings = CalvinSettings(points=0, depth=False, size=16)
    assert convert(root, tmp_path / "t", settings).store.num_frames == 53


def test_a_finished_store_serves_again_and_is_never_overwritten(sample, tmp_path, capsys):
    first = convert(sample, tmp_path / "s").store
    partial_folder(tmp_path / "s").mkdir()  # as after a kill between rename and tidying up
    again = convert(sample, tmp_path / "s").store
    assert again.fingerprint == first.fingerprint
    assert "is there already" in capsys.readouterr().out
    assert not partial_folder(tmp_path / "s").exists()
    with pytest.raises(StoreError, match="made with other settings"):
        convert(sample, tmp_path / "s", SMALL)


def test_a_finished_store_of_other_recordings_is_refused(root, tmp_path):
    convert(root, tmp_path / "training", SMALL, splits=("training",))
    with pytest.raises(StoreError, match="holds no validation"):
        convert(root, tmp_path / "training", SMALL)
    bounds = np.load(root / "training" / "ep_start_end_ids.npy")
    (root / "training" / "ep_start_end_ids.npy").unlink()
    np.save(root / "training" / "ep_start_end_ids.npy", bounds[1:])
    with pytest.raises(StoreError, match=r"was not made from .*: no training \d+ to \d+"):
        convert(root, tmp_path / "training", SMALL, splits=("training",))


def test_two_converters_do_not_meet(sample, tmp_path):
    with convert_calvin.claimed(partial_folder(tmp_path / "s")), pytest.raises(RuntimeError, match="Another process"):
        convert(sample, tmp_path / "s")


def test_too_little_disk_is_noticed_before_the_work(sample, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CalvinError, match=r"1\.0 kB free, 53 frames need about"):
        convert(sample, tmp_path / "s")


def test_verification_finds_what_changed_on_the_disk(sample, tmp_path, monkeypatch):
    finish = StoreWriter.finish

    def spoil(writer, *arguments, **more):
        import zarr

        zarr.open_array(str(writer.partial / "store/data/state"), mode="r+")[20, 3] += 1e-6
        return finish(writer, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", spoil)
        with pytest.raises(StoreError, match="not what was written: data/state, rows from 16"):
            convert(sample, tmp_path / "s", shard_frames=16)
    assert not (tmp_path / "s").exists()
    convert(sample, tmp_path / "s", shard_frames=16)  # what differs is converted anew, all else is kept
    assert files(tmp_path / "s") == files(convert(sample, tmp_path / "t", shard_frames=16).store.path)


def test_verification_converts_frames_again(sample, tmp_path, monkeypatch):
    frame = convert_calvin.convert_frame
    calls = []

    def fickle(*arguments):
        calls.append(1)
        values = frame(*arguments)
        values["action"] = values["action"] + 1e-3 * (len(calls) == 3)  # one frame is converted wrongly
        return values

    with monkeypatch.context() as patch:
        patch.setattr(convert_calvin, "convert_frame", fickle)
        patch.setattr(convert_calvin, "_check_disk", lambda *arguments: None)
        with pytest.raises(StoreError, match="gives other values, first action of row 2"):
            convert(sample, tmp_path / "s", shard_frames=16)
    done = convert(sample, tmp_path / "s", shard_frames=16)
    assert done.verification == (
        "Verified: 3 episodes and 53 frames in order; 6 checksums hold; 53 frames converted again and equal."
    )
    assert files(tmp_path / "s") == files(convert(sample, tmp_path / "t", shard_frames=16).store.path)


def test_cutting_at_damaged_frames():
    whole = [Stretch(0, 10, 20), Stretch(0, 30, 31), Stretch(1, 10, 12)]
    assert cut(whole, set()) == whole
    assert cut(whole, {(0, 10), (0, 15), (0, 16), (0, 20), (0, 30), (0, 31), (1, 11)}) == [
        Stretch(0, 11, 14),
        Stretch(0, 17, 19),
        Stretch(1, 10, 10),
        Stretch(1, 12, 12),
    ]


def test_frames_are_read_as_numpy_reads_them(sample, tmp_path):
    path = sample / "training/episode_0003120.npz"
    with np.load(path) as archive:
        for key, value in read_frame(path, archive.files).items():
            np.testing.assert_array_equal(value, archive[key])
            assert value.dtype == archive[key].dtype
    turned = np.asfortranarray(np.random.default_rng(0).random((200, 200), np.float32))
    np.savez(tmp_path / "turned.npz", depth_static=turned, robot_obs=np.array([None] * 15))
    np.testing.assert_array_equal(read_frame(tmp_path / "turned.npz", ("depth_static",))["depth_static"], turned)
    with pytest.raises(DamagedFrame, match="objects"):
        read_frame(tmp_path / "turned.npz", ("robot_obs",))


# Interruptions. A process that kills itself at its n-th sync or rename visits every stage of the work.

KILLED = """
import os, pathlib, signal, sys
from lightning_robot.data import convert_calvin, workers
from lightning_robot.data.calvin_frames import CalvinSettings

left, fsync, rename, replace = int(sys.argv[3]), os.fsync, os.rename, pathlib.Path.replace

def count(function):
    def counted(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted

os.fsync, os.rename, pathlib.Path.replace = count(fsync), count(rename), count(replace)
convert_calvin.CHECK_BLOCK = 8
settings = CalvinSettings(points=32, size=16, pixel_offset=(0, 1))
convert_calvin.convert_calvin(sys.argv[1], sys.argv[2], settings, processes=1, shard_frames=16)
print("left", left)
"""


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def run_until_killed(root, store, steps):
    command = [sys.executable, "-c", KILLED, str(root), str(store), str(steps)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_killed_again_and_again_the_bytes_are_the_same(sample, tmp_path):
    whole = run_until_killed(sample, tmp_path / "whole", 10**6)
    assert whole.returncode == 0, whole.stderr
    steps = 10**6 - int(whole.stdout.split("left")[1])
    assert steps > 60
    reached = []
    for step in (2, 9, 23, 30, 37, 44):
        child = run_until_killed(sample, tmp_path / "killed", step)
        assert (step > 2) == ("Continuing the conversion that was begun in" in child.stdout)
        if child.returncode == 0:
            break
        reached.append(step)
        assert not (tmp_path / "killed").exists()
        with pytest.raises(StoreError, match="interrupted"):
            EpisodeStore.open(tmp_path / "killed")
    assert len(reached) >= 4
    convert(sample, tmp_path / "killed", SMALL, shard_frames=16)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not partial_folder(tmp_path / "killed").exists()
    for last in (3, 1):  # in the middle of finishing, and at the very end
        target = tmp_path / f"late{last}"
        assert run_until_killed(sample, target, steps - last + 1).returncode == -signal.SIGKILL
        convert(sample, target, SMALL, shard_frames=16)
        assert files(target) == files(tmp_path / "whole")


PARALLEL = """
import sys
from lightning_robot.data.calvin_frames import CalvinSettings
from lightning_robot.data.convert_calvin import convert_calvin

if __name__ == "__main__":
    convert_calvin(sys.argv[1], sys.argv[2], CalvinSettings(points=32, size=16), processes=2, shard_frames=4, language="")
"""


def test_a_killed_parent_takes_its_workers_along_and_bytes_do_not_depend_on_processes(sample, tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    target, journal = tmp_path / "s", partial_folder(tmp_path / "s") / "journal.jsonl"
    child = subprocess.Popen([sys.executable, script, sample, target], stdout=subprocess.DEVNULL)
    try:
        wait_for(journal.exists, 100)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        pids = workers.read_text().split() if workers.exists() else []
    finally:
        child.kill()
        child.wait(timeout=60)
    wait_for(lambda: not any(alive(pid) for pid in pids))
    assert not target.exists()
    finished = subprocess.run([sys.executable, script, sample, target], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    settings = CalvinSettings(points=32, size=16)
    convert(sample, tmp_path / "one", settings, shard_frames=4, language="")
    assert files(target) == files(tmp_path / "one")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
