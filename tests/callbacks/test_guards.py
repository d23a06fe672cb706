"""Guards: bad numbers are traced to their batch, a disk too small is noticed before the work."""

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lightning_robot.callbacks import guards as module
from lightning_robot.callbacks.checkpoints import Checkpoints, read_checkpoint
from lightning_robot.callbacks.ema import EMA
from lightning_robot.callbacks.guards import DiskFullError, Guards, NonFiniteError, checkpoint_bytes, require_space

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from tiny_run import TinyData, TinyPolicy, tiny_trainer


def test_a_loss_that_is_no_number_stops_with_the_batchs_identity_and_keeps_the_last_checkpoint(tmp_path):
    keeper = Checkpoints(every_n_steps=1)
    policy = TinyPolicy()
    with pytest.raises(NonFiniteError, match="clip gradients"):
        tiny_trainer(tmp_path, Guards(), EMA(), keeper).fit(policy, datamodule=TinyData(bad=(17,)))
    record = json.loads(next((tmp_path / "nonfinite").iterdir()).read_text())
    assert record["what"] == "loss"
    assert 17 in record["batch"]["episode_index"]
    assert 170 in record["batch"]["frame_index"]
    assert 17 not in record["batch_before"]["episode_index"] if record["batch_before"] else True
    assert all(torch.isfinite(p).all() for p in policy.parameters())  # stopped before the weights were touched
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert last["global_step"] == record["batch"]["step"]
    assert all(torch.isfinite(v).all() for v in last["state_dict"].values())


def test_losses_that_are_looked_at_later_are_traced_to_the_first_bad_batch(tmp_path, monkeypatch):
    """As on an accelerator, where the answer is fetched every few steps, and before a checkpoint."""
    guards = Guards(check_every_n_steps=100)
    monkeypatch.setattr(Guards, "on_before_backward", _record_only)
    with pytest.raises(NonFiniteError):
        tiny_trainer(tmp_path, guards, EMA(), Checkpoints()).fit(TinyPolicy(), datamodule=TinyData(bad=(17,)))
    record = json.loads(next((tmp_path / "nonfinite").iterdir()).read_text())
    assert 17 in record["batch"]["episode_index"]
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def _record_only(self, trainer, pl_module, loss):
    self._losses.append(loss.detach())
    self._identities.append(self._batch)


class _SteepPolicy(TinyPolicy):
    """A finite loss whose gradient is not."""

    def compute_loss(self, batch):
        loss, parts = super().compute_loss(batch)
        return loss + torch.sqrt((0.0 * self.network[0].weight).sum()), parts


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    with pytest.raises(NonFiniteError, match="The gradient is"):
        tiny_trainer(tmp_path, Guards(check_every_n_steps=1)).fit(_SteepPolicy(), datamodule=TinyData())


def test_updates_with_bad_gradients_can_be_skipped(tmp_path, capsys):
    policy = TinyPolicy()
    guards = Guards(nonfinite="skip")
    trainer = tiny_trainer(tmp_path, guards)
    trainer.fit(policy, datamodule=TinyData(bad=(17,)))
    assert guards.skipped == 2  # once an epoch
    assert trainer.global_step == 12
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    assert "Skipped the update" in capsys.readouterr().out
    with pytest.raises(NonFiniteError, match="20 updates in a row"):
        tiny_trainer(tmp_path / "all", Guards(nonfinite="skip"), max_epochs=9).fit(_SteepPolicy(), datamodule=TinyData())


def test_needed_bytes_cover_what_is_written(tmp_path):
    policy, keeper = TinyPolicy(width=4000), Checkpoints(top_k=1)
    tiny_trainer(tmp_path, EMA(), keeper, max_epochs=1).fit(policy, datamodule=TinyData())
    sizes = [file.stat().st_size for file in (tmp_path / "checkpoints").glob("*.ckpt")]
    needed = checkpoint_bytes(policy, keeper, averaging=True)
    full = (tmp_path / "checkpoints" / "last.ckpt").stat().st_size
    assert len(sizes) == 3
    assert needed == pytest.approx(sum(sizes) + full, rel=0.06)


def test_a_start_without_space_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 500))
    with pytest.raises(DiskFullError, match=r"run\.root"):
        tiny_trainer(tmp_path, Guards(), EMA(), Checkpoints()).fit(TinyPolicy(), datamodule=TinyData())
    assert not list(tmp_path.rglob("*.ckpt"))
    tiny_trainer(tmp_path, Guards(check_disk=False), EMA(), Checkpoints()).fit(TinyPolicy(), datamodule=TinyData())


def test_a_quota_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_can_reserve", lambda folder, size: False)
    with pytest.raises(DiskFullError, match="a quota forbids more"):
        require_space(tmp_path, 1000)


def test_reserving_space_leaves_nothing_behind(tmp_path):
    assert module._can_reserve(tmp_path, 10**6)
    assert not list(tmp_path.iterdir())


def test_unused_and_frozen_parameters_are_named(tmp_path, capsys):
    class Partial(TinyPolicy):
        def build(self):
            super().build()
            self.frozen, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
            self.frozen.requires_grad_(False)

    tiny_trainer(tmp_path, Guards()).fit(Partial(), datamodule=TinyData())
    out = capsys.readouterr().out
    assert "6 frozen (frozen)" in out
    assert "2 trainable parameters take no part in the loss: unused.weight, unused.bias" in out
    assert out.count("Optimizer group 0") == 1


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_parameters_that_are_not_float32_are_refused(tmp_path, precision):
    with pytest.raises(ValueError, match=r"trained in float32.* bf16-mixed"):
        tiny_trainer(tmp_path, Guards(), precision=precision).fit(TinyPolicy(), datamodule=TinyData())


def test_mixed_precision_keeps_parameters_and_optimizer_in_float32(tmp_path):
    policy = TinyPolicy()
    trainer = tiny_trainer(tmp_path, Guards(), EMA(), precision="bf16-mixed")
    trainer.fit(policy, datamodule=TinyData())
    moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    assert {value.dtype for value in [*policy.parameters(), *moments]} == {torch.float32}
    trainer.save_checkpoint(tmp_path / "mixed.ckpt")
    saved = torch.load(tmp_path / "mixed.ckpt", weights_only=True)
    weights = [saved[part][name] for part in ("state_dict", "ema_state_dict") for name, _ in policy.named_parameters()]
    assert {value.dtype for value in weights} == {torch.float32}
