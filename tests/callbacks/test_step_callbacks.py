"""What runs beside each step: seeds, throughput, progress, compilation."""

import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_robot.callbacks.checkpoints import Checkpoints, read_checkpoint
from lightning_robot.callbacks.compile import Compile
from lightning_robot.callbacks.ema import EMA
from lightning_robot.callbacks.metrics_file import MetricsFile, read_metrics
from lightning_robot.callbacks.progress import PlainProgress
from lightning_robot.callbacks.step_seeds import StepSeeds
from lightning_robot.callbacks.throughput import Throughput

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from tiny_run import TinyData, TinyPolicy, tiny_trainer


class _Draws(Callback):
    def __init__(self):
        self.drawn = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn.append(float(torch.rand(())))


def test_global_random_numbers_depend_on_the_step_alone(tmp_path):
    runs = []
    for disturbance in (0, 5):
        torch.manual_seed(disturbance)
        draws = _Draws()
        tiny_trainer(tmp_path, StepSeeds(3), draws).fit(TinyPolicy(), datamodule=TinyData())
        runs.append(draws.drawn)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 12


def test_throughput_tells_waiting_from_work(tmp_path):
    class SlowData(TinyData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            time.sleep(0.02)
            return batch

    class SlowPolicy(TinyPolicy):
        def compute_loss(self, batch):
            time.sleep(0.02)
            return super().compute_loss(batch)

    shares = {}
    for name, policy, data in (("data", TinyPolicy(), SlowData()), ("work", SlowPolicy(), TinyData())):
        log = MetricsFile(tmp_path / name)
        trainer = tiny_trainer(tmp_path / name, Throughput(), EMA(), logger=log, log_every_n_steps=3)
        trainer.fit(policy, datamodule=data)
        metrics = read_metrics(tmp_path / name / "metrics.csv")
        shares[name] = [value for _, value in metrics["throughput/data_wait_share"]]
        assert all(0 < rate < 4 / 0.02 for _, rate in metrics["throughput/samples_per_second"])
    assert min(shares["data"]) > 0.6
    assert max(shares["work"]) < 0.4


def test_progress_is_plain_lines(tmp_path, capsys):
    tiny_trainer(tmp_path, PlainProgress(interval=0.0), enable_progress_bar=True).fit(TinyPolicy(), datamodule=TinyData())
    out = capsys.readouterr().out
    assert "epoch 0, step 1/12, loss" in out
    assert "left" in out
    assert "epoch 1: val/loss" in out
    assert "\r" not in out


def test_compilation_changes_neither_keys_nor_numbers(tmp_path):
    files = {}
    for name, compile_ in (("eager", Compile()), ("compiled", Compile(enabled=True, backend="eager"))):
        torch._dynamo.reset()
        policy = TinyPolicy(dropout=0.0)
        tiny_trainer(tmp_path / name, StepSeeds(1), compile_, EMA(), Checkpoints(), max_epochs=1).fit(
            policy, datamodule=TinyData()
        )
        files[name] = read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
    assert list(files["eager"]["state_dict"]) == list(files["compiled"]["state_dict"])
    assert list(files["eager"]["ema_state_dict"]) == list(files["compiled"]["ema_state_dict"])
    for key, value in files["eager"]["ema_state_dict"].items():
        torch.testing.assert_close(value, files["compiled"]["ema_state_dict"][key])


def test_a_policy_without_networks_to_compile_is_told(tmp_path):
    class Plain(TinyPolicy):
        compilable = ()

    with pytest.raises(ValueError, match=r"compile\.enabled: false"):
        tiny_trainer(tmp_path, Compile(enabled=True, backend="eager")).fit(Plain(), datamodule=TinyData())
