"""A run that was killed, stopped or failed goes on as if nothing had happened: the same losses, step for step."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_robot.__main__ import main
from lightning_robot.callbacks.metrics_file import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

CONFIG = {
    "model": {"class_path": "tiny_run.TinyPolicy"},
    "data": {"class_path": "tiny_run.TinyData"},
    "trainer": {"max_epochs": 4, "accelerator": "cpu", "log_every_n_steps": 1, "enable_model_summary": False},
    "evaluation": {"episodes": 0},
}


def _fit(folder: Path, *options: str, config=CONFIG) -> int:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(path), "--run.root", str(folder / "runs"), *options])


def _in_a_process(function, *arguments) -> int:
    """Runs the function in a forked process and returns its exit code: it may kill itself."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(function(*arguments)))
    process.start()
    process.join(100)
    if process.exitcode is None:  # or the interpreter would wait for it at its own end
        process.kill()
        process.join(10)
        raise AssertionError("the run did not end")
    return process.exitcode


def _at(step: int, what: str) -> list[str]:
    return ["--trainer.callbacks+=tiny_run.At", f"--trainer.callbacks.step={step}", f"--trainer.callbacks.what={what}"]


def _losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    metrics = read_metrics(run / "metrics.csv")
    return {key: metrics[key] for key in ("train/loss", "val/loss")}


def _without_callback(run: Path) -> None:
    """The cause of the interruption is gone."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["callbacks"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[int, Path]:
    """Runs of 24 micro-steps that nothing disturbs, by accumulation."""
    runs = {}
    for accumulation in (1, 2):
        folder = tmp_path_factory.mktemp("whole")
        assert _fit(folder, f"--trainer.accumulate_grad_batches={accumulation}") == 0
        runs[accumulation] = (folder / "runs" / "latest").resolve()
    return runs


@pytest.mark.parametrize(
    ("step", "what", "accumulation", "every_n_steps"),
    [
        (9, "kill", 1, 2),  # the middle of the second epoch, from a checkpoint one step before
        (13, "kill", 1, 0),  # from the end of an epoch
        (2, "kill", 1, 1),  # in the first epoch
        (12, "kill", 1, 5),  # on an epoch's first batch
        (8, "kill", 2, 1),  # while gradients are accumulated
        (10, "term", 1, 0),
        (11, "term", 1, 0),  # the signal comes in an epoch's last step
        (5, "term", 2, 0),
        (9, "fail", 1, 0),
        (12, "validating", 1, 0),  # the whole validation is done again
        (6, "validating", 2, 0),
        (9, "unlogged", 1, 1),  # the checkpoint is written, the step's row of metrics is not
        (1, "unlogged", 1, 1),  # there is no file of metrics yet
    ],
)
def test_losses_continue_step_for_step(step, what, accumulation, every_n_steps, uninterrupted, tmp_path):
    options = [f"--trainer.accumulate_grad_batches={accumulation}", f"--checkpoints.every_n_steps={every_n_steps}"]
    code = _in_a_process(_fit, tmp_path, *options, *_at(step, what))
    assert code == {"kill": -9, "unlogged": -9, "term": 143, "fail": 1, "validating": 143}[what]
    run = (tmp_path / "runs" / "latest").resolve()
    _without_callback(run)
    assert main(["fit", "--resume", str(run)]) == 0
    assert _losses(run) == _losses(uninterrupted[accumulation])
    ours, theirs = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, uninterrupted[accumulation])
    )
    assert ours["global_step"] == theirs["global_step"]
    assert ours["ema_updates"] == theirs["ema_updates"]
    for key in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in theirs[key]), key
    assert ours["optimizer_states"][0]["state"][0]["step"] == theirs["optimizer_states"][0]["state"][0]["step"]
    assert ours["callbacks"]["Checkpoints"] == theirs["callbacks"]["Checkpoints"]
    assert len(json.loads((run / "run.json").read_text())["taken_up"]) == 1


@pytest.mark.parametrize(
    ("step", "what"),
    [(9, "kill_validating"), (9, "validating"), (9, "kill"), (10, "kill"), (12, "kill_validating"), (12, "validating")],
)
def test_validations_within_epochs_are_neither_lost_nor_repeated(step, what, tmp_path):
    """Every three of an epoch's six steps, with a checkpoint after every step."""
    options = ["--trainer.val_check_interval=3", "--checkpoints.every_n_steps=1"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    assert _fit(tmp_path / "whole", *options) == 0
    assert _in_a_process(_fit, tmp_path / "stopped", *options, *_at(step, what)) in (-9, 143)
    whole, run = ((tmp_path / name / "runs" / "latest").resolve() for name in ("whole", "stopped"))
    _without_callback(run)
    assert main(["fit", "--resume", str(run)]) == 0
    assert len(_losses(whole)["val/loss"]) == 8
    assert _losses(run) == _losses(whole)
    ours, theirs = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, whole))
    assert ours["callbacks"] == theirs["callbacks"]
    assert all(torch.equal(ours["ema_state_dict"][name], value) for name, value in theirs["ema_state_dict"].items())
