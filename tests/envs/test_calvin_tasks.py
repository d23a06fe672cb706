"""The success tests against the original oracle, and the sentences."""

import copy
import json

import numpy as np
import pytest

from lightning_robot.envs.calvin_tasks import BLOCK_FREE_TASKS, BLOCKS, PARAPHRASES, SENTENCES, TASKS, copy_info, solved


@pytest.fixture(scope="module")
def oracle(shared):
    return json.loads((shared / "golden" / "calvin_oracle.json").read_text())


def _info(**changes):
    """Three blocks at rest on the table, everything closed and dark."""
    block = {"quat": [0, 0, 0, 1], "lin_vel": [0, 0, 0], "ang_vel": [0, 0, 0], "contacts": [["table", -1]]}
    info = {
        "blocks": {name: {"pos": [0.1 * i, -0.1, 0.46], **copy.deepcopy(block)} for i, name in enumerate(BLOCKS)},
        "robot_contacts": [],
        "doors": {"base__slide": 0.0, "base__drawer": 0.0},
        "lights": {"lightbulb": 0, "led": 0},
    }
    info.update(changes)
    return info


def test_every_pair_of_the_original_oracle(oracle):
    pairs = 0
    for start_name, start in oracle["snapshots"].items():
        for now_name, now in oracle["snapshots"].items():
            if start_name == now_name:
                continue
            pairs += 1
            expected = set(oracle["solved"].get(f"{start_name}|{now_name}", []))
            assert solved(start, now) == expected, (start_name, now_name)
    assert pairs == 2070


def test_names_and_order_are_the_published_ones(shared):
    chains = json.loads((shared / "golden" / "calvin_chains.json").read_text())
    assert list(TASKS) == chains["tasks"]


def test_only_the_named_tasks_are_tested():
    start, now = _info(), _info(doors={"base__slide": 0.2, "base__drawer": 0.2})
    assert solved(start, now) == {"move_slider_left", "open_drawer"}
    assert solved(start, now, {"open_drawer", "turn_on_led"}) == {"open_drawer"}
    assert solved(now, start) == {"move_slider_right", "close_drawer"}
    with pytest.raises(KeyError, match="fly"):
        solved(start, now, ["fly"])


def test_numpy_values_serve_as_well_as_lists():
    start, now = _info(), _info()
    for info in (start, now):
        for block in info["blocks"].values():
            block.update({key: np.asarray(block[key], np.float64) for key in ("pos", "quat", "lin_vel", "ang_vel")})
    now["blocks"]["block_red"]["pos"][0] += 0.11
    assert solved(start, now) == {"push_red_block_right"}


def test_a_copied_info_shares_nothing():
    live = _info()
    live["blocks"]["block_red"]["pos"] = np.array([0.0, -0.1, 0.46])
    start = copy_info(live)
    live["blocks"]["block_red"]["pos"] += 1
    live["blocks"]["block_red"]["contacts"].append(["robot", 10])
    live["doors"]["base__drawer"] = 0.2
    assert start["blocks"]["block_red"]["pos"][0] == 0
    assert start["blocks"]["block_red"]["contacts"] == [["table", -1]]
    assert solved(start, live, ["open_drawer"]) == {"open_drawer"}


def test_every_task_has_sentences():
    assert set(SENTENCES) == set(PARAPHRASES) == set(TASKS)
    assert len(set(SENTENCES.values())) == len(TASKS)
    training = [text for texts in PARAPHRASES.values() for text in texts]
    assert len(set(training)) == len(training), "one sentence must not stand for two tasks"
    assert not set(training) & set(SENTENCES.values())
    assert all(len(PARAPHRASES[task]) >= (4 if task in BLOCK_FREE_TASKS else 2) for task in TASKS)


def test_an_evaluation_sentence_is_nearest_to_training_sentences_of_its_own_task():
    from lightning_robot.transforms.text import HashedTextEncoder

    encoder = HashedTextEncoder()
    training = [(task, text) for task, texts in PARAPHRASES.items() for text in texts]
    similarity = encoder.encode(list(SENTENCES.values())) @ encoder.encode([text for _, text in training]).T
    nearest = [training[index][0] for index in similarity.argmax(axis=1)]
    assert nearest == list(SENTENCES)
