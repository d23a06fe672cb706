"""Demonstrations from an expert: what is recorded, and that the store depends on the settings alone."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_robot.data.store import EpisodeStore, partial_folder
from lightning_robot.data.workers import WorkError, claimed
from lightning_robot.generation.attempts import Attempt, read_arrays, read_attempt, run_episode, write_attempt
from lightning_robot.generation.generate import GenerationError, generate

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _fake_environment(monkeypatch):
    """Gymnasium imports the module in front of the colon, here and in worker processes."""
    monkeypatch.syspath_prepend(str(HERE))


SETTINGS = {"env": "fake_expert_env:Reach-v0", "episodes_per_task": 5, "processes": 1}


def _hashes(folder: Path) -> dict[str, str]:
    """Of every file's bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_demonstrations_become_a_store(tmp_path, capsys):
    store = EpisodeStore.open(generate(tmp_path / "reach.zarr", **SETTINGS))
    assert store.num_episodes == 10
    assert set(store.keys) == {"observation.state", "observation.point_cloud", "observation.images.static", "action"}
    assert store.shape("observation.images.static")[1:] == (4, 4, 3)
    assert store.features.action_semantics.startswith("relative; commanded")
    assert not (tmp_path / "reach.zarr.partial").exists()

    segments, language = store.segments, store.language
    np.testing.assert_array_equal(segments[:, 1], store.episode_ends)
    assert language["encoder"] == "hashed_ngrams_384"
    assert language["embeddings"].shape == (len(language["texts"]), 384)
    assert {"go left", "go right"} <= set(language["texts"])
    counts = dict.fromkeys(("left", "right"), 0)
    for start, end, text in segments:
        task = language["tasks"][text]
        counts[task] += 1
        state = store.read("observation.state", slice(start, end))
        assert np.linalg.norm(state[-1] - [-1 if task == "left" else 1, 0]) < 0.2
        assert task in language["texts"][text]
    assert counts == {"left": 5, "right": 5}

    provenance = store.provenance
    assert provenance["simulator"] == {"simulator": "reach 1"}
    # left attempts have the seeds 0, 2, 4, ...: 0 and 8 are blocked
    assert provenance["expert"] == {"left": {"attempted": 7, "solved": 5}, "right": {"attempted": 5, "solved": 5}}
    assert provenance["seeds"] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 12]
    assert "left: expert solved 5 of 7" in capsys.readouterr().out


def test_the_command_is_recorded_for_the_observation_it_was_made_for():
    import fake_expert_env
    import gymnasium

    env = gymnasium.make("Reach-v0", disable_env_checker=True)
    attempt, arrays = run_episode(env, "right", 3, hold=2)
    speed = np.random.default_rng((3, 1)).uniform(0.5, 1.0)
    expected = np.clip(np.array([1.0, 0.0]) - arrays["observation.state"], -speed, speed)
    np.testing.assert_allclose(arrays["action"][:, :2], expected, atol=1e-6)
    assert attempt.success
    assert attempt.length == len(arrays["action"])
    distance = np.linalg.norm(arrays["observation.state"] - [1, 0], axis=1)
    assert (distance < 0.2).tolist() == [False] * (attempt.length - 2) + [True, True], "two steps are held after success"
    assert issubclass(fake_expert_env.ReachEnv, gymnasium.Env)


def test_noise_is_executed_and_not_recorded():
    import fake_expert_env  # noqa: F401
    import gymnasium

    env = gymnasium.make("Reach-v0", disable_env_checker=True)
    _, clean = run_episode(env, "right", 3)
    _, noisy = run_episode(env, "right", 3, noise=0.2)
    np.testing.assert_array_equal(clean["observation.state"][0], noisy["observation.state"][0])
    np.testing.assert_array_equal(clean["action"][0], noisy["action"][0])
    assert np.abs(clean["observation.state"][1] - noisy["observation.state"][1]).max() > 1e-3
    speed = np.random.default_rng((3, 1)).uniform(0.5, 1.0)
    toward = np.array([1.0, 0.0]) - noisy["observation.state"]
    np.testing.assert_allclose(noisy["action"][:, :2], np.clip(toward, -speed, speed), atol=1e-6)
    assert (noisy["action"][:, 2] == 1).all()


def test_processes_and_repetition_do_not_change_a_byte(tmp_path):
    one = generate(tmp_path / "one" / "reach.zarr", **SETTINGS)
    two = generate(tmp_path / "two" / "reach.zarr", **{**SETTINGS, "processes": 2})
    assert _hashes(one) == _hashes(two)
    assert EpisodeStore.open(one).fingerprint == EpisodeStore.open(two).fingerprint
    other = generate(tmp_path / "other" / "reach.zarr", **{**SETTINGS, "seed": 100})
    assert EpisodeStore.open(one).fingerprint != EpisodeStore.open(other).fingerprint


def test_two_generations_do_not_meet(tmp_path):
    store = tmp_path / "reach.zarr"
    with claimed(partial_folder(store)), pytest.raises(WorkError, match="Another process is at work"):
        generate(store, **SETTINGS)
    assert EpisodeStore.open(generate(store, **SETTINGS)).num_episodes == 10


def test_kill_9_at_several_moments_then_the_same_bytes(tmp_path):
    expected = generate(tmp_path / "whole" / "reach.zarr", **{**SETTINGS, "episodes_per_task": 40})
    store = tmp_path / "killed" / "reach.zarr"
    partial = store.with_name("reach.zarr.partial")
    program = (
        f"from lightning_robot.generation.generate import generate; generate({str(store)!r}, env={SETTINGS['env']!r}, "
        "episodes_per_task=40, processes=2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    kills = 0
    for staged in (3, 30, 75):
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((partial / "episodes").glob("*.npz"))) >= staged:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.kill()
        process.wait(timeout=60)
    assert kills >= 2
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert _hashes(store) == _hashes(expected)
    assert not partial.exists()


def test_a_lerobot_dataset_is_written_and_verified(tmp_path, capsys):
    from lightning_robot.data.lerobot_folder import LeRobotFolder

    settings = {**SETTINGS, "format": "lerobot", "pictures": "png"}
    path = generate(tmp_path / "reach", **settings)
    assert "Verified: 10 episodes" in capsys.readouterr().out
    folder, store = LeRobotFolder.open(path), EpisodeStore.open(generate(tmp_path / "reach.zarr", **SETTINGS))
    np.testing.assert_array_equal(folder.episode_ends, store.episode_ends)
    for key in store.keys:
        np.testing.assert_array_equal(folder.gather(key, np.arange(store.num_frames)), store.read(key, slice(None)))
    texts = [store.language["texts"][row] for row in store.segments[:, 2]]
    assert [folder.language["texts"][folder.frame_texts[start]] for start in folder.episode_starts] == texts
    assert set(folder.language["tasks"]) == {"left", "right"}
    generate(path, **settings)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(GenerationError, match="output 'lerobot png' there, 'lerobot av1' asked for"):
        generate(path, **settings | {"pictures": "av1"})
    generate(tmp_path / "two" / "reach", **settings | {"processes": 2})
    assert _hashes(tmp_path / "two" / "reach") == _hashes(path)


def test_video_of_play_table_survives_a_kill_while_encoding(tmp_path, monkeypatch, capsys):
    from lightning_robot.data import write_lerobot

    settings = {
        "tasks": ("open_drawer",),
        "episodes_per_task": 2,
        "format": "lerobot",
        "processes": 1,
        "env_kwargs": {"observations": ("state", "images"), "camera_sizes": {"static": 64, "gripper": 64}},
    }
    whole = generate(tmp_path / "whole", **settings)
    assert "pictures within" in capsys.readouterr().out
    original, clips = write_lerobot.write_clip, []

    def interrupted(path, *rest):
        original(path, *rest)
        clips.append(path)
        if len(clips) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(write_lerobot, "write_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "cut", **settings)
    generate(tmp_path / "cut", **settings)
    assert len(clips) == 4, "three of four clips were there"
    assert _hashes(tmp_path / "cut") == _hashes(whole)


def test_what_is_not_read_back_is_said(tmp_path, monkeypatch):
    from lightning_robot.data.store import StoreWriter

    original = StoreWriter.append

    def damaged(self, blocks):
        original(self, {**blocks, "action": blocks["action"] + np.float32(1e-3)})

    monkeypatch.setattr(StoreWriter, "append", damaged)
    with pytest.raises(GenerationError, match="action of frame 0 is not what was written"):
        generate(tmp_path / "reach.zarr", **SETTINGS)


def test_correlated_noise_keeps_its_deviation():
    from lightning_robot.features import Feature, Features
    from lightning_robot.generation.attempts import Disturbance

    action = Feature((2,), kinds=("direction", "gripper"))
    features = Features({}, action, control_rate=30.0)
    noise = Disturbance(features, 0.5, 0.25, np.random.default_rng(0))
    values = np.array([noise.next() for _ in range(20000)])
    assert (values[:, 1] == 0).all(), "grippers are left alone"
    assert values[:, 0].std() == pytest.approx(0.5, rel=0.1)
    centred = values[:, 0] - values[:, 0].mean()
    lag = round(0.25 * 30)
    correlation = (centred[lag:] * centred[:-lag]).mean() / centred.var()
    assert correlation == pytest.approx(np.exp(-lag / 7.5), abs=0.1)


def test_an_interrupted_packing_continues(tmp_path, monkeypatch):
    expected = generate(tmp_path / "whole" / "reach.zarr", **SETTINGS)
    store = tmp_path / "cut" / "reach.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(
            "lightning_robot.data.store.StoreWriter.finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            generate(store, **SETTINGS)
    assert not store.exists()
    generate(store, **SETTINGS)
    assert _hashes(store) == _hashes(expected)


def test_a_damaged_attempt_is_recorded_again(tmp_path):
    path = tmp_path / "000000007.npz"
    write_attempt(path, Attempt(7, "left", "walk left", 1, True, ""), {"action": np.ones((1, 3), np.float32)})
    assert read_attempt(path).text == "walk left"
    np.testing.assert_array_equal(read_arrays(path)["action"], np.ones((1, 3), np.float32))
    path.write_bytes(path.read_bytes()[:100])
    assert read_attempt(path) is None


def test_a_worker_that_dies_once_is_replaced(tmp_path, capfd):
    marker = tmp_path / "crashed"
    arguments = {"crash_seed": 4, "crash_file": str(marker)}
    store = generate(tmp_path / "reach.zarr", **{**SETTINGS, "processes": 2}, env_kwargs=arguments)
    assert marker.exists()
    assert EpisodeStore.open(store).num_episodes == 10
    assert "1 worker process died" in capfd.readouterr().out


def test_an_episode_that_always_kills_its_worker_is_named(tmp_path):
    with pytest.raises(GenerationError, match=r"left, seed 4: its worker process died 3 times \(exit status 17"):
        generate(tmp_path / "reach.zarr", **{**SETTINGS, "processes": 2}, env_kwargs={"crash_seed": 4})


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_cannot_be_written_ends_the_work_in_one_line(tmp_path, processes, capfd):
    settings = {**SETTINGS, "processes": processes, "env_kwargs": {"full_disk": True}}
    with pytest.raises(GenerationError, match=r"Nothing more can be written in .*episodes \(.*the same call continues"):
        generate(tmp_path / "reach.zarr", **settings)
    assert "Traceback" not in capfd.readouterr().err


def test_an_expert_that_fails_is_reported_with_reasons(tmp_path, monkeypatch):
    import fake_expert_env

    monkeypatch.setattr(fake_expert_env.Expert, "act", lambda self: np.array([0.0, 0.0, 1.0]))
    with pytest.raises(
        GenerationError, match=r"(left|right): the expert solved 0 of \d+ attempts, 5 are wanted\. Failures: blocked"
    ):
        generate(tmp_path / "reach.zarr", **SETTINGS)
    monkeypatch.setattr(fake_expert_env.Expert, "act", lambda self: 1 / 0)
    with pytest.raises(GenerationError, match="ZeroDivisionError: division by zero"):
        generate(tmp_path / "other.zarr", **SETTINGS)


def test_other_settings_are_refused(tmp_path):
    store = tmp_path / "reach.zarr"
    generate(store, **SETTINGS)
    before = _hashes(store)
    generate(store, **SETTINGS)
    with pytest.raises(GenerationError, match=r"other settings: episodes_per_task 5 there, 6 asked for; noise 0.0 there, 0.1"):
        generate(store, **{**SETTINGS, "episodes_per_task": 6, "noise": 0.1})
    assert _hashes(store) == before
    (tmp_path / "other").mkdir()
    with pytest.raises(GenerationError, match="does not hold generated demonstrations"):
        generate(tmp_path / "other", **SETTINGS)

    folder = tmp_path / "unfinished.zarr.partial" / "episodes"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"seed": 9}))
    with pytest.raises(GenerationError, match=r"unfinished generation with other settings.*seed 9 there, 0 asked for"):
        generate(tmp_path / "unfinished.zarr", **SETTINGS)


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(GenerationError, match="episodes_per_task is 0"):
        generate(tmp_path / "reach.zarr", **{**SETTINGS, "episodes_per_task": 0})
    with pytest.raises(GenerationError, match="Seeds from 1,000,000 on belong to evaluation"):
        generate(tmp_path / "reach.zarr", **{**SETTINGS, "seed": 999_990})
    with pytest.raises(GenerationError, match="each once"):
        generate(tmp_path / "reach.zarr", **SETTINGS, tasks=("left", "left"))
    with pytest.raises(GenerationError, match=r"'up' cannot be demonstrated: KeyError.*the environment chooses left, right"):
        generate(tmp_path / "reach.zarr", **SETTINGS, tasks=("left", "up"))
    assert not list(tmp_path.iterdir())


def test_pictures_that_no_video_holds_are_refused_before_the_work(tmp_path):
    arm = {"env": "lightning_robot/SO101PickPlace-v0", "env_kwargs": {"camera_sizes": 65}, "format": "lerobot", "processes": 1}
    for pictures in ("av1", "h264"):
        with pytest.raises(GenerationError, match=r"observation.images.overhead: .*65 x 65.*--pictures png.*--camera-size"):
            generate(tmp_path / "arm", **arm, pictures=pictures)
    assert not list(tmp_path.iterdir())


def test_play_table_demonstrations_replay_to_the_last_bit(tmp_path):
    from lightning_robot.envs import make_environment
    from lightning_robot.envs.calvin_tasks import PARAPHRASES, SENTENCES

    tasks = ("open_drawer", "turn_on_led")
    arguments = {"cloud": {"points": 64}, "camera_sizes": {"static": 32, "gripper": 32}}
    path = generate(tmp_path / "table.zarr", tasks=tasks, episodes_per_task=2, hold=3, processes=2, env_kwargs=arguments)
    store = EpisodeStore.open(path)
    env = make_environment("lightning_robot/PlayTable-v0", **arguments)
    assert store.features == env.unwrapped.features
    assert store.provenance["simulator"] == env.unwrapped.fingerprint
    language = store.language
    assert {(task, text) for task, text in zip(language["tasks"], language["texts"])} == {
        (task, text) for task in tasks for text in (*PARAPHRASES[task], SENTENCES[task])
    }
    for seed, (start, end, text) in zip(store.provenance["seeds"], store.segments):
        observation, _ = env.reset(seed=seed, options={"task": language["tasks"][text]})
        solved = []
        for row in range(start, end):
            for key in ("observation.state", "observation.point_cloud"):
                np.testing.assert_array_equal(observation[key], store.read(key, slice(row, row + 1))[0])
            observation, _, _, _, info = env.step(store.read("action", slice(row, row + 1))[0])
            solved.append(info["success"])
        assert solved[-4], "three steps are held after success"
        assert not any(solved[:-4])


def test_sentences_by_a_sentence_model(tmp_path, monkeypatch):
    class Model:
        def __init__(self, name):
            self.name = name

        def encode(self, texts, normalize_embeddings):
            return np.array([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    generate(tmp_path / "a.zarr", **SETTINGS | {"encoder": "some/model"})
    language = EpisodeStore.open(tmp_path / "a.zarr").language
    assert language["encoder"] == "some/model"
    assert language["embeddings"][:, 0].tolist() == [len(text) for text in language["texts"]]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"lightning_robot\[calvin\]"):
        generate(tmp_path / "b.zarr", **SETTINGS | {"encoder": "some/model"})
    assert not list(tmp_path.glob("b.zarr*"))
