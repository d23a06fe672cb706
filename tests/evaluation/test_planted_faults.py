"""Faults that cost others weeks, planted one by one through public entry points: what the user is told, word for word.

Nine are refused, six are named in the result. Each has a clean twin, which goes the same way without the fault: it raises
nothing and names nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zarr

sys.path.insert(0, str(Path(__file__).parent))  # worker processes and checkpoints find the fakes by their names
from fake_arm import Arm, Continues

from lightning_robot.__main__ import main
from lightning_robot.evaluation.controller import Controller
from lightning_robot.generation.generate import generate
from lightning_robot.policies.base import load_policy
from lightning_robot.transforms.normalizer import Normalizer
from lightning_robot.transforms.statistics import StatisticsAccumulator

ARM = "fake_arm:fault/Arm-v0"
FAST = ["--episodes", "4", "--videos", "0", "--processes", "0", "--num-envs", "2"]


def fit(folder, store, *more):
    """Trains for an epoch with averaged weights and returns the checkpoint, as anybody would."""
    config = {
        "model": {"class_path": "fake_turner.Turner"},
        "data": {
            "class_path": "lightning_robot.data.episodes.EpisodeDataModule",
            "init_args": {"store": str(store), "batch_size": 16, "num_workers": 0, "validation_ratio": 0.25},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1},
        "evaluation": {"env": ARM, "episodes": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv, sys.argv = sys.argv, ["lightning_robot"]
    try:
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run.root", str(folder / "runs"), *more]) == 0
    finally:
        sys.argv = argv
    return folder / "runs" / "latest" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight demonstrations by the expert."""
    return generate(tmp_path_factory.mktemp("data") / "arm.zarr", env=ARM, episodes_per_task=8, hold=3, processes=1)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("trained"), store)


@pytest.fixture
def judge(tmp_path, capsys):
    """Runs `evaluate` on a checkpoint; returns its exit code, what it printed, its errors and the table it wrote."""

    def run(checkpoint, *arguments):
        capsys.readouterr()
        code = main(["evaluate", str(checkpoint), *FAST, "--output", str(tmp_path / "out"), *arguments])
        streams = capsys.readouterr()
        written = tmp_path / "out" / "evaluation.json"
        return code, streams.out, streams.err, json.loads(written.read_text()) if written.is_file() else None

    return run


def edited(checkpoint, folder, change):
    """A copy of a checkpoint, changed by hand."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, folder / "edited.ckpt")
    return folder / "edited.ckpt"


def wider(content):
    for part in ("state_dict", "ema_state_dict"):
        for name in ("scale", "offset"):
            key = f"normalizer.observation_state_{name}"
            content[part][key] = torch.cat([content[part][key], torch.ones(1)])


def of_other_data(content):
    accumulator = StatisticsAccumulator()
    accumulator.update(np.random.default_rng(0).normal(size=(50, 3)))
    other = {key: accumulator.result() for key in ("observation.state", "action")}
    for part in ("state_dict", "ema_state_dict"):
        for name, value in Normalizer(other, dict.fromkeys(other, "limits")).state_dict().items():
            content[part][f"normalizer.{name}"] = value


def of_class(name):
    return lambda content: content.update(class_path=f"fake_turner.{name}")


def wrapped(name):
    return ["--env", f"fake_arm:fault/{name}-v0"]


REFUSED = {
    "one state dimension too many": (
        wrapped("OneMore"),
        wrapped("Unchanged"),
        "The policy does not fit:\n  observation.state: trained on shape (3,), the environment gives (4,); look at its "
        "wrappers.",
    ),
    "statistics of another width": (
        wider,
        lambda content: None,
        "observation.state: statistics of size 4, data of size 3. The policy (or its statistics) belongs to other data: use "
        "the data and the robot that it was trained on, or train anew.",
    ),
    "statistics of another dataset": (
        of_other_data,
        lambda content: None,
        "…edited.ckpt: its statistics are not those of the demonstrations that it was trained on (fingerprint …, recorded …): "
        "they were taken from another dataset or changed by hand, and its actions would come out in a wrong scale. Use the "
        "checkpoint as training wrote it, or train anew.",
    ),
    "another control rate": (
        ["--env-kwargs", '{"control_rate": 10}'],
        ["--env-kwargs", '{"control_rate": 30}'],
        "The policy does not fit:\n  control rate: trained at 30 Hz, offered 10 Hz: every action would last 3 times as long. "
        "Let the environment step at the data's rate, or train on data of its rate.",
    ),
    "another control rate, told by a wrapper's features": (
        wrapped("Announces"),
        wrapped("Unchanged"),
        "The policy does not fit:\n  control rate: trained at 30 Hz, offered 10 Hz: every action would last 3 times as long. "
        "Let the environment step at the data's rate, or train on data of its rate.",
    ),
    "another control rate, told by a wrapper": (
        wrapped("Slower"),
        wrapped("Unchanged"),
        "The policy does not fit:\n  control rate: trained at 30 Hz, offered 10 Hz: every action would last 3 times as long. "
        "Let the environment step at the data's rate, or train on data of its rate.",
    ),
    "a wrapper that repeats each action": (
        wrapped("Repeats"),
        wrapped("Unchanged"),
        "The policy does not fit:\n  control rate: trained at 30 Hz, offered 10 Hz: every action would last 3 times as long. "
        "Let the environment step at the data's rate, or train on data of its rate. A wrapper takes 3 steps of "
        "the environment for each action.",
    ),
    "depth where colour is expected": (
        wrapped("Depth"),
        wrapped("Unchanged"),
        "The policy does not fit:\n  observation.images.overhead: trained on uint8, the environment gives float32: another "
        "scale of values (depth where colour is expected?).",
    ),
    "depth painted grey where colour is expected": (
        wrapped("Painted"),
        wrapped("Unchanged"),
        "The policy does not fit:\n  observation.images.overhead: the picture is grey (its three channels are equal), the "
        "demonstrations' are coloured: depth offered where colour is expected? Offer the camera's colours.",
    ),
    "training seeds used for reporting": (
        ["--seed", "0"],
        ["--seed", "2000100"],
        "--seed 0 is in the block of seeds that made the demonstrations: a success rate on them says nothing about new scenes. "
        "Use 2000000 or above.",
    ),
    "no reset between episodes": (
        wrapped("Continues"),
        wrapped("Unchanged"),
        "The environment does not begin an episode anew: after 3 steps reset(seed=999999) gave another start state than before "
        "them (observation.state differs by up to …; …). Episodes would begin where others ended, or at random, and no result "
        "would repeat: its reset must restore the whole state, and draw from the seed alone.",
    ),
    "what only a whole episode moves is not reset": (
        wrapped("StaysBehind"),
        wrapped("Unchanged"),
        "The environment does not begin an episode anew: after the episodes reset(seed=999999) gave another start state than "
        "before them (observation.state differs by up to 10; …). Episodes would begin where others ended, or at random, and no "
        "result would repeat: its reset must restore the whole state, and draw from the seed alone.",
    ),
    "a stale action queue in a wrapper": (
        wrapped("OldActions"),
        wrapped("Unchanged"),
        "The environment does not begin an episode anew: after reset(seed=999999) the same 3 actions led elsewhere the second "
        "time (observation.state differs by up to …; …), though both began alike. Something outlives the reset, such as a "
        "queue of actions or a filter in a wrapper, or draws at random: reset must empty it, and draw from the seed alone.",
    ),
    "a stale action queue": (
        of_class("Queueing"),
        of_class("Turner"),
        "Queueing answered the same observation with the same noise seed by another chunk the second time: it keeps something "
        "between calls, such as a queue of actions, and an episode would begin with what is left of the one before. History "
        "and queue belong to the controller (execution_horizon); a policy keeps nothing.",
    ),
    "actions left normalised": (
        of_class("Forgetful"),
        of_class("Turner"),
        "Every action that Forgetful predicts lies within -1.5 to 1.5 in lift, where demonstrations lie between … and …, and "
        "so in all elements that move far: the actions look as if they had been left normalised. `_predict` must return them "
        "un-normalised: self.normalizer.unnormalize('action', chunk).",
    ),
}

NAMED = {
    "the same start state in every episode": (
        wrapped("OneStart"),
        wrapped("Unchanged"),
        "Only 1 distinct start state in 4 episodes, told apart by state_fingerprint: repetitions are no further evidence, the "
        "interval is too narrow.",
    ),
    "a step limit shorter than the demonstrations": (
        ["--max-steps", "5"],
        ["--max-steps", "20"],
        "step limit: 5 steps, but 6 of 6 demonstrations took longer (median …, longest …): what they show may not be finished "
        "in time.",
    ),
    "a step limit that a wrapper sets": (
        wrapped("CutShort"),
        wrapped("Unchanged"),
        "step limit: the environment ended episodes after 3 of 20 steps, but 6 of 6 demonstrations took longer (median …, "
        "longest …): what they show may not be finished in time.",
    ),
    "success true at a reset that does not say so": (
        wrapped("SolvedAtOnce"),
        wrapped("Unchanged"),
        "Success was true after a single step in 4 of 4 episodes (seeds 2000000, 2000001, 2000002, 2000003): look whether it "
        "was so already at the reset, where the environment may not say it.",
    ),
    "success true at reset": (
        ["--env-kwargs", '{"solved_at_reset": [2000001]}'],
        ["--env-kwargs", '{"solved_at_reset": []}'],
        "Success was true already at reset in 1 of 4 episodes (seeds 2000001): the policy did nothing for it, and these "
        "episodes are not counted.",
    ),
    "cameras swapped, by their poses": (
        ["--env-kwargs", '{"exchanged": true}'],
        ["--env-kwargs", '{"exchanged": false}'],
        "cameras are swapped under their names: overhead stands where wrist stood, wrist stands where overhead stood in the "
        "demonstrations (by their poses).",
    ),
    "cameras swapped, by their pictures": (
        wrapped("Swapped"),
        wrapped("Unchanged"),
        "cameras are swapped under their names: overhead shows what wrist showed, wrist shows what overhead showed in the "
        "demonstrations (by their pictures).",
    ),
    "raw weights judged": (
        ["--weights", "raw"],
        ["--weights", "ema"],
        "weights: the raw ones are judged; the checkpoint also holds averaged ones, by which training judged it.",
    ),
    "raw weights, averaged ones taken out": (
        lambda content: content.pop("ema_state_dict"),
        lambda content: None,
        "weights: the raw ones are judged; training judged averaged ones, which the checkpoint no longer holds.",
    ),
    "a chunk made longer in the checkpoint": (
        lambda content: content["hyper_parameters"].update(execution_horizon=4),
        lambda content: content["hyper_parameters"].update(execution_horizon=2),
        "execution horizon: 4 actions of each chunk are executed, 2 in training: the later ones were predicted from "
        "observations older than it ever had to rely on.",
    ),
    "a chunk executed longer than in training": (
        ["--execution-horizon", "4"],
        ["--execution-horizon", "2"],
        "execution horizon: 4 actions of each chunk are executed, 2 in training: the later ones were predicted from "
        "observations older than it ever had to rely on.",
    ),
}


def planted(recipe, trained, folder):
    """Checkpoint and arguments of a recipe: a change of the checkpoint, or arguments of the command line."""
    return [edited(trained, folder, recipe)] if callable(recipe) else [trained, *recipe]


def says(text, sentence):
    """Whether the text holds the sentence; ``…`` stands for numbers and names of files."""
    return re.search(r"[^\n]+?".join(map(re.escape, sentence.split("…"))), text) is not None


@pytest.mark.parametrize("fault", REFUSED)
def test_fault_is_refused(fault, trained, judge, tmp_path):
    code, _, error, table = judge(*planted(REFUSED[fault][0], trained, tmp_path))
    assert code == 1
    assert error.startswith("evaluate: ")
    assert says(error, REFUSED[fault][2]), error
    assert error.count("\n") == 1 + REFUSED[fault][2].count("\n")  # that sentence and no other
    assert table is None


@pytest.mark.parametrize("fault", NAMED)
def test_fault_is_named_in_the_result(fault, trained, judge, tmp_path):
    code, out, error, table = judge(*planted(NAMED[fault][0], trained, tmp_path))
    assert (code, error) == (0, "")
    (said,) = [*table["notes"], *table["warnings"]]
    assert says(said, NAMED[fault][2]), said
    assert out.count(said) == 1  # and told once on the screen


@pytest.mark.parametrize("fault", [*REFUSED, *NAMED])
def test_clean_twin_raises_and_names_nothing(fault, trained, judge, tmp_path):
    code, out, error, table = judge(*planted((REFUSED | NAMED)[fault][1], trained, tmp_path))
    assert (code, error) == (0, "")
    assert table["notes"] == table["warnings"] == table["unchecked"] == []
    assert "Not checked" not in out
    assert table["summary"]["success_rate"] == 1


# Faults whose way leads through data or through a loop of one's own.


def test_training_seeds_are_known_whatever_their_block(store, trained, judge, tmp_path):
    """A changed dataset: its demonstrations were made with seeds of the reporting block."""
    for name, first in (("reporting", 2_000_000), ("own", 0)):
        folder = tmp_path / name
        shutil.copytree(store, folder / "arm.zarr")
        group = zarr.open_group(str(folder / "arm.zarr"), mode="r+")
        provenance = dict(group.attrs["provenance"])
        provenance["seeds"] = [first + number for number in range(len(provenance["seeds"]))]
        group.attrs["provenance"] = provenance
        code, _, error, table = judge(fit(folder, folder / "arm.zarr"))
        if name == "own":
            assert (code, error, table["notes"]) == (0, "", [])
        else:
            assert code == 1
            assert error == (
                "evaluate: 4 of the 4 seeds made demonstrations that this policy learnt from or was selected by (2000000, "
                "2000001, 2000002, 2000003): success on their scenes says nothing about new ones. The demonstrations have "
                "seeds from 2000000 to 2000007; choose others.\n"
            )


def test_a_loop_of_ones_own_that_forgets_the_reset_is_refused(trained):
    policy, env = load_policy(trained), Arm()
    controller = Controller(policy)

    def play(seed, reset):
        observation, _ = env.reset(seed=seed)
        if reset:
            controller.reset([0], [seed])
        for _ in range(3):
            (action,) = controller.act([observation], [env.count], [0])
            observation = env.step(action)[0]

    play(0, True)
    play(1, True)  # the clean twin
    with pytest.raises(RuntimeError) as refusal:
        play(2, False)
    assert str(refusal.value) == (
        "Environment 0 is at step 0, the controller at step 3: a new episode began without controller.reset([0], [seed]), and "
        "actions of the one before would be executed in it."
    )


def test_older_checkpoints_are_judged_and_what_is_unknown_is_said_once(trained, judge, tmp_path):
    def older(content):
        del content["demonstrations"]
        del content["hyper_parameters"]["features"]["cameras"]

    code, out, error, table = judge(edited(trained, tmp_path, older))
    assert (code, error) == (0, "")
    assert table["notes"] == table["warnings"] == []
    sentence = (
        "Not checked, because the checkpoint does not record it: how long demonstrations were, seeds of their scenes, range of "
        "their actions, fingerprint of the statistics, how their pictures looked."
    )
    assert out.count(sentence) == 1


# The account itself.


def test_checkpoint_records_its_demonstrations(trained):
    content = torch.load(trained, weights_only=True)
    facts, features = content["demonstrations"], content["hyper_parameters"]["features"]
    assert facts["seeds"].tolist() == list(range(8))
    assert len(facts["lengths"]) == 6  # two are held out
    assert facts["lengths"].min() > 5
    low, high = facts["action_range"]
    assert (np.array(low) >= [-80, 30, 0]).all()
    assert (np.array(high) <= [50, 130, 100]).all()
    assert set(facts["pictures"]) == {"observation.images.overhead", "observation.images.wrist"}
    assert facts["statistics"] == load_policy(trained).normalizer.fingerprint
    assert features["control_rate"] == 30
    assert set(features["cameras"]) == {"overhead", "wrist"}


def test_weights_that_begin_a_new_run_bring_their_statistics_along(trained, judge, tmp_path):
    other = generate(tmp_path / "other.zarr", env=ARM, episodes_per_task=8, seed=100, processes=1)
    checkpoint = fit(tmp_path, other, "--init_from", str(trained))
    facts = torch.load(checkpoint, weights_only=True)["demonstrations"]
    assert facts["seeds"].tolist() == list(range(100, 108))
    assert facts["statistics"] == load_policy(checkpoint).normalizer.fingerprint == load_policy(trained).normalizer.fingerprint
    assert judge(checkpoint)[3]["notes"] == []


def test_result_accounts_for_itself(trained, judge):
    _, _, _, table = judge(trained)
    summary, settings = table["summary"], table["settings"]
    assert (summary["episodes"], summary["played"], summary["distinct_start_states"]) == (4, 4, 4)
    assert (summary["successes_true_at_reset"], summary["interval_method"]) == (0, "Wilson score")
    assert settings["seeds"] == {"first": 2_000_000, "last": 2_000_003, "role": "reporting"}
    assert (settings["start_states_told_by"], settings["weights"]) == ("state_fingerprint", "ema")
    assert (settings["inference_batch"], settings["threads"], settings["execution_horizon"]) == (8, 1, 2)
    wanted = {"checkpoint", "statistics", "configuration", "simulator", "scene", "renderer"}
    assert wanted == set(table["fingerprints"])
    selection = json.loads((trained.parents[1] / "evaluations" / "epoch0000.json").read_text())
    assert selection["settings"]["seeds"]["role"] == "selection"


def test_table_is_byte_equal_however_the_work_is_spread(trained, tmp_path):
    texts = []
    for number, spread in enumerate((["1", "4"], ["1", "4"], ["2", "3"], ["4", "4"], ["0", "1"])):
        processes, environments = spread
        folder = tmp_path / str(number)
        more = ["--output", str(folder), "--processes", processes, "--num-envs", environments]
        assert main(["evaluate", str(trained), *FAST, *more]) == 0
        texts.append((folder / "evaluation.json").read_bytes())
    assert len(set(texts)) == 1
    alone = ["--seed", "2000002", "--episodes", "1", "--videos", "0", "--processes", "0", "--output", str(tmp_path / "alone")]
    command = [sys.executable, "-m", "lightning_robot", "evaluate", str(trained), *alone]
    path = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}"}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | path)
    (row,) = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["episodes"]
    assert row == json.loads(texts[0])["episodes"][2]


def test_wrappers_do_what_they_should(trained):
    """Were the arm to start anew all the same, the test above would prove nothing."""
    env = Continues(Arm())
    first = env.reset(seed=0)[0]["observation.state"]
    env.step(np.zeros(3))
    assert (env.reset(seed=0)[0]["observation.state"] != first).any()
