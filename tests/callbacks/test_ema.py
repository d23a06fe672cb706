"""The averaged weights: published schedule, in use whatever the order of callbacks, exact on resuming."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_robot.callbacks.checkpoints import Checkpoints
from lightning_robot.callbacks.ema import EMA
from lightning_robot.policies.base import load_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from tiny_run import TinyData, TinyPolicy, tiny_trainer

# Decay before update n as the DP3 repository computes it (power 0.75, inv_gamma 1, 0 to 0.9999).
PUBLISHED = {
    0: 0.0,
    1: 0.0,
    2: 0.4053964425,
    3: 0.5613086623,
    4: 0.6464466094,
    5: 0.7009302438,
    9: 0.8075499103,
    10: 0.8221720590,
    100: 0.9683772234,
    1000: 0.9943765867,
    10000: 0.9990000000,
    100000: 0.9998221721,
    215443: 0.9998999998,
    215444: 0.9999,
    1000000: 0.9999,
}


@pytest.mark.parametrize(("update", "decay"), PUBLISHED.items())
def test_decay_is_the_published_schedule(update, decay):
    assert EMA().decay(update) == pytest.approx(decay, abs=6e-11)


class _Record(Callback):
    """What the module's first weight is in each hook, and the raw weights after each optimizer step."""

    def __init__(self):
        self.seen, self.raw = {}, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw.append(pl_module.network[0].weight.detach().clone())

    def _note(self, hook, pl_module):
        self.seen.setdefault(hook, []).append(pl_module.network[0].weight.detach().clone())

    def on_validation_start(self, trainer, pl_module):
        self._note("start", pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self._note("batch", pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self._note("epoch_end", pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._note("after", pl_module)


def _average(raw, ema):
    """The average that the definition gives, step by step."""
    average = torch.zeros_like(raw[0])
    for number, weight in enumerate(raw):
        decay = ema.decay(number)
        average = decay * average + (1 - decay) * weight
    return average


@pytest.mark.parametrize("ema_first", [True, False])
def test_validation_and_its_end_see_the_average_whatever_the_order(ema_first, tmp_path):
    ema, record = EMA(), _Record()
    trainer = tiny_trainer(tmp_path, *((ema, record) if ema_first else (record, ema)))
    trainer.fit(TinyPolicy(), datamodule=TinyData())
    expected = [_average(record.raw[:6], ema), _average(record.raw[:12], ema)]
    for hook in ("batch", "epoch_end"):
        for epoch, seen in enumerate(record.seen[hook][:: 2 if hook == "batch" else 1]):
            torch.testing.assert_close(seen, expected[epoch], rtol=0, atol=1e-6)
    for epoch, seen in enumerate(record.seen["after"]):
        assert torch.equal(seen, record.raw[6 * epoch + 5])  # training goes on with the raw weights


def test_averages_optimizer_steps_not_micro_steps(tmp_path):
    ema, record = EMA(), _Record()
    tiny_trainer(tmp_path, ema, record, accumulate_grad_batches=3, max_epochs=2).fit(TinyPolicy(), datamodule=TinyData())
    assert ema.updates == 4
    torch.testing.assert_close(ema._shadow[0], _average(record.raw[2::3], ema), rtol=0, atol=1e-6)


def test_a_failure_in_validation_leaves_the_raw_weights(tmp_path):
    class Failing(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise RuntimeError("simulator broke")

    ema, record, policy = EMA(), _Record(), TinyPolicy()
    with pytest.raises(RuntimeError, match="simulator broke"):
        tiny_trainer(tmp_path, ema, record, Failing()).fit(policy, datamodule=TinyData())
    assert torch.equal(policy.network[0].weight, record.raw[-1])


def test_averaged_is_reentrant_and_survives_exceptions(tmp_path):
    ema, policy = EMA(), TinyPolicy()
    tiny_trainer(tmp_path, ema).fit(policy, datamodule=TinyData())
    raw, address = policy.network[0].weight.detach().clone(), policy.network[0].weight.data_ptr()
    with pytest.raises(ZeroDivisionError), ema.averaged(policy), ema.averaged(policy):  # noqa: PT012
        assert not torch.equal(policy.network[0].weight, raw)
        assert policy.network[0].weight.data_ptr() != address  # exchanged, not copied
        raise ZeroDivisionError
    assert torch.equal(policy.network[0].weight, raw)
    assert policy.network[0].weight.data_ptr() == address


def test_both_sets_are_in_the_checkpoint_even_when_it_is_written_while_exchanged(tmp_path):
    ema, policy, keeper = EMA(), TinyPolicy(), Checkpoints()
    trainer = tiny_trainer(tmp_path, ema, keeper)
    trainer.fit(policy, datamodule=TinyData())
    raw = policy.network[0].weight.detach().clone()
    with ema.averaged(policy):
        average = policy.network[0].weight.detach().clone()
        trainer.save_checkpoint(tmp_path / "exchanged.ckpt")
    for path in (tmp_path / "exchanged.ckpt", tmp_path / "checkpoints" / "last.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert torch.equal(checkpoint["state_dict"]["network.0.weight"], raw)
        assert torch.equal(checkpoint["ema_state_dict"]["network.0.weight"], average)
        assert checkpoint["ema_updates"] == 12
        assert torch.equal(load_policy(path).network[0].weight, average)
        assert torch.equal(load_policy(path, weights="raw").network[0].weight, raw)


def test_buffers_are_the_live_ones(tmp_path):
    class Counting(TinyPolicy):
        def build(self):
            super().build()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

    ema, policy = EMA(), Counting()
    tiny_trainer(tmp_path, ema).fit(policy, datamodule=TinyData())
    assert policy.count == 12
    with ema.averaged(policy):
        assert policy.count == 12


def test_validate_with_a_checkpoint_uses_its_average(tmp_path):
    tiny_trainer(tmp_path, EMA(), Checkpoints()).fit(TinyPolicy(), datamodule=TinyData())
    path = tmp_path / "checkpoints" / "last.ckpt"
    average = torch.load(path, weights_only=True)["ema_state_dict"]["network.0.weight"]
    record = _Record()
    tiny_trainer(tmp_path, EMA(), record).validate(TinyPolicy(), datamodule=TinyData(), ckpt_path=path, verbose=False)
    assert torch.equal(record.seen["epoch_end"][0], average)


def test_a_checkpoint_with_average_does_not_continue_without(tmp_path):
    tiny_trainer(tmp_path, EMA(), Checkpoints()).fit(TinyPolicy(), datamodule=TinyData())
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="averaging is switched off"):
        tiny_trainer(tmp_path, EMA(enabled=False), max_epochs=3).fit(TinyPolicy(), datamodule=TinyData(), ckpt_path=path)


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="bf16-mixed"):
        tiny_trainer(tmp_path, EMA(), precision="bf16-true").fit(TinyPolicy(), datamodule=TinyData())
