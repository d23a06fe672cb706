"""Two processes make one run: one directory, one set of checkpoints, one stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_robot.callbacks.metrics_file import read_metrics

STANDINS = Path(__file__).parents[1] / "standins"
CONFIG = {
    "model": {"class_path": "tiny_run.TinyPolicy"},
    "data": {"class_path": "tiny_run.TinyData"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1, "devices": 2, "strategy": "ddp"},
    "evaluation": {"episodes": 0},
    "checkpoints": {"top_k": 1},
}


def _fit(*options: str) -> int:
    paths = os.pathsep.join([str(STANDINS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_robot", "fit", *options]
    return subprocess.run(command, env=environment, timeout=120, capture_output=True).returncode


@pytest.mark.slow
def test_a_stop_before_training_leaves_no_process(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    root = ["--config", str(tmp_path / "config.yaml"), "--run.root", str(tmp_path / "runs")]
    at = ["--trainer.callbacks+=tiny_run.At", "--trainer.callbacks.step=0", "--trainer.callbacks.what=starting"]
    assert _fit(*root, *at) == 143
    (name,) = (tmp_path / "runs").glob("*/*/other_process")
    with pytest.raises(ProcessLookupError):
        os.kill(int(name.read_text()), 0)


@pytest.mark.slow
def test_two_processes_stop_together_and_continue_as_one_run(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    root = ["--config", str(tmp_path / "config.yaml"), "--run.root", str(tmp_path / "runs")]
    at = ["--trainer.callbacks+=tiny_run.At", "--trainer.callbacks.step=4", "--trainer.callbacks.what=term"]
    assert _fit(*root, *at) == 143
    runs = list((tmp_path / "runs" / "experiment").glob("*_seed42"))
    assert len(runs) == 1
    stopped = torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert stopped["global_step"] in (4, 5)
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    config["trainer"]["callbacks"] = None
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert _fit("--resume", str(runs[0])) == 0
    files = {path.name for path in (runs[0] / "checkpoints").iterdir()}
    assert {"best.ckpt", "last.ckpt", "checkpoint.json"} < files
    assert len(files) == 4
    assert torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert [step for step, _ in read_metrics(runs[0] / "metrics.csv")["train/loss"]] == [0, 1, 2, 3, 4, 5]
