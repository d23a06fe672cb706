"""`evaluate` over many checkpoints: which are meant, paired seeds, selection apart from the report."""

import json
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

from lightning_robot.commands.checkpoint_paths import checkpoints_of
from lightning_robot.commands.evaluate import main

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_saved_policy import save

if "fake/Reach-v0" not in gymnasium.registry:
    gymnasium.register("fake/Reach-v0", entry_point="fake_reach:Reach")

SAVED = {"env": "fake/Reach-v0", "env_kwargs": {"max_steps": 9}, "tasks": ["near"], "execution_horizon": 2, "max_steps": None}
FAST = ["--selection-episodes", "6", "--episodes", "8", "--videos", "0", "--processes", "0"]


def weaken(path, factor):
    """Other weights than those that `save` wrote."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {name: factor * value for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)


@pytest.fixture
def run(tmp_path):
    """A run directory with kept checkpoints, the last of which is `last` and the second `best`."""
    folder = tmp_path / "run" / "checkpoints"
    for name, step in (("epoch0001", 10), ("epoch0003", 20), ("best", 20), ("epoch0005", 30), ("last", 30)):
        weaken(save(folder / f"{name}.ckpt", evaluation=SAVED, global_step=step), step)
    return tmp_path / "run"


def test_which_checkpoints_are_meant(run, tmp_path):
    def names(*paths, everything=False):
        return [path.name for path in checkpoints_of([str(path) for path in paths], everything)]

    folder = run / "checkpoints"
    assert names(run) == ["best.ckpt"]
    everything = ["best.ckpt", "epoch0001.ckpt", "epoch0003.ckpt", "epoch0005.ckpt", "last.ckpt"]
    assert names(run, everything=True) == everything == names(folder)
    assert names(folder / "epoch0001.ckpt", run) == ["epoch0001.ckpt", "best.ckpt"]
    assert names(run, run) == ["best.ckpt"]
    save(tmp_path / "alone" / "epoch0007.ckpt")
    assert names(tmp_path / "alone") == ["epoch0007.ckpt"]
    for step in ("010000", "020000"):
        model = tmp_path / "lerobot" / "checkpoints" / step / "pretrained_model"
        model.mkdir(parents=True)
        (model / "config.json").touch()
        (model / "model.safetensors").touch()
    (tmp_path / "lerobot" / "checkpoints" / "last").symlink_to("020000")
    assert names(tmp_path / "lerobot") == ["pretrained_model"] * 2  # the link is none of its own
    assert names(model) == ["pretrained_model"]
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        names(tmp_path / "nowhere")


def test_a_run_is_swept_selected_and_reported(run, capsys):
    assert main([str(run), "--all", *FAST]) == 0
    out = capsys.readouterr().out
    assert (
        "Sweeping 5 checkpoints: 6 episodes each, seeds 1500000 to 1500005; then the best on 8 fresh ones from 2000000" in out
    )
    assert "epoch0003.ckpt holds the same weights as best.ckpt." in out
    assert "last.ckpt holds the same weights as epoch0005.ckpt." in out
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name.startswith("sweep5x6_from1500000_seed2000000_episodes8")
    files = {path.name for path in folder.iterdir()}
    assert files == {"sweep.json", "sweep.csv", "sweep.png", "selection", "evaluation.json", "evaluation.times.json"}
    found = json.loads((folder / "sweep.json").read_text())
    assert [one["name"] for one in found["candidates"]] == [
        "epoch0001.ckpt",
        "best.ckpt = epoch0003.ckpt",
        "epoch0005.ckpt = last.ckpt",
    ]
    assert [one["step"] for one in found["candidates"]] == [10, 20, 30]
    tables = [json.loads((folder / "selection" / f"{name}.json").read_text()) for name in ("epoch0001.ckpt", "best.ckpt")]
    seeds = [[row["seed"] for row in table["episodes"]] for table in tables]
    assert seeds[0] == seeds[1] == list(range(1_500_000, 1_500_006))  # the same scenes for all
    starts = [[row["start_state"] for row in table["episodes"]] for table in tables]
    assert starts[0] == starts[1]
    reported = json.loads((folder / "evaluation.json").read_text())
    assert [row["seed"] for row in reported["episodes"]] == list(range(2_000_000, 2_000_008))
    assert reported["summary"] == found["report"]
    best = max(found["candidates"], key=lambda one: (one["successes"], one["step"]))
    assert found["selected"] == best["name"]
    assert reported["fingerprints"]["checkpoint"] == best["checkpoint"]
    for part in ("published conventions", "Selected: ", "To report: ", "* "):
        assert part in out


def test_a_sweep_repeats(run, tmp_path):
    for number in range(2):
        assert (
            main([str(run / "checkpoints"), *FAST, "--output", str(tmp_path / f"{number}"), "--num-envs", str(1 + number)]) == 0
        )
    assert (tmp_path / "0" / "sweep.json").read_text() == (tmp_path / "1" / "sweep.json").read_text()


def test_what_cannot_be_swept_is_refused_before_the_work(run, tmp_path, capsys):
    def refused(*arguments):
        assert main([*map(str, arguments), *FAST]) == 1
        streams = capsys.readouterr()
        assert "Sweeping" not in streams.out
        return streams.err

    assert "leaves the seeds 1000000 to 1999999" in refused(run, "--all", "--selection-seed", 2_000_000)
    assert "leaves the seeds" in refused(run, "--all", "--selection-seed", 1_999_999)
    assert "seeds that chose the checkpoint" in refused(run, "--all", "--seed", 1_500_000)
    other = save(run / "checkpoints" / "other.ckpt", evaluation=SAVED | {"env_kwargs": {"max_steps": 7}})
    assert "not be judged alike: env_kwargs is {'max_steps': 9}" in refused(run, "--all")
    other.write_text("broken")
    assert "other.ckpt is no checkpoint" in refused(run, "--all")
    assert "one after the other" in refused(run, "--all", "--compare")
