"""Checkpoints: `last` is last, `best` is best, nothing piles up, and a failed save destroys nothing."""

import errno
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_robot.callbacks import checkpoints as module
from lightning_robot.callbacks.checkpoints import Checkpoints, foreign_object, read_checkpoint
from lightning_robot.callbacks.ema import EMA
from lightning_robot.callbacks.initial_weights import InitialWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from tiny_run import OtherPolicy, TinyData, TinyPolicy, tiny_trainer


class _Scores(Callback):
    """Logs given scores, as simulation does: None where no evaluation ran in that validation."""

    enabled = True

    def __init__(self, success, loss):
        self.success, self.loss = success, loss
        self.evaluated_this_epoch = False

    def on_validation_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch
        self.evaluated_this_epoch = self.success[epoch] is not None
        if self.evaluated_this_epoch:
            pl_module.log("val/success", self.success[epoch])
        pl_module.log("val/score", self.loss[epoch])


def _fit(folder, keeper, *callbacks, policy=None, data=None, **settings):
    trainer = tiny_trainer(folder, EMA(), *callbacks, keeper, **settings)
    trainer.fit(policy or TinyPolicy(), datamodule=data or TinyData())
    return folder / "checkpoints"


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_is_last_though_the_metric_worsens(tmp_path):
    keeper = Checkpoints(monitor="val/score")
    folder = _fit(tmp_path, keeper, _Scores([None] * 3, [1.0, 2.0, 3.0]), max_epochs=3)
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 18
    assert read_checkpoint(folder / "best.ckpt")["global_step"] == 6
    assert _files(folder) == ["best.ckpt", "checkpoint.json", "last.ckpt"]
    assert json.loads((folder / "checkpoint.json").read_text()) == {
        "file": "best.ckpt",
        "epoch": 0,
        "step": 6,
        "monitor": "val/score",
        "score": 1.0,
        "tie": pytest.approx(json.loads((folder / "checkpoint.json").read_text())["tie"]),
    }


def test_last_is_written_at_the_end_whatever_the_interval(tmp_path):
    folder = _fit(tmp_path, Checkpoints(every_n_epochs=2), max_epochs=3)
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 18
    folder = _fit(tmp_path / "steps", Checkpoints(every_n_epochs=5), max_epochs=-1, max_steps=8)
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 8


def test_success_decides_and_loss_breaks_ties(tmp_path):
    scores = _Scores([0.5, 0.9, 0.9, None, 0.9], [1.0, 2.0, 1.5, 0.1, 3.0])
    folder = _fit(tmp_path, Checkpoints(tie_break="val/score"), scores, max_epochs=5)
    best = json.loads((folder / "checkpoint.json").read_text())
    assert (best["monitor"], best["epoch"], best["score"], best["tie"]) == ("val/success", 2, pytest.approx(0.9), 1.5)


def test_an_epoch_without_simulation_is_not_judged_by_an_old_success(tmp_path):
    scores = _Scores([0.8, None, None], [3.0, 2.0, 1.0])
    folder = _fit(tmp_path, Checkpoints(tie_break="val/score", top_k=3), scores, max_epochs=3)
    assert _files(folder) == ["best.ckpt", "checkpoint.json", "epoch0000_success0.800.ckpt", "last.ckpt"]


def test_a_score_that_is_not_a_number_displaces_nothing(tmp_path):
    folder = _fit(tmp_path, Checkpoints(monitor="val/score"), _Scores([None] * 3, [2.0, math.nan, 3.0]), max_epochs=3)
    assert json.loads((folder / "checkpoint.json").read_text())["epoch"] == 0


def test_the_k_best_have_readable_names_and_the_rest_goes(tmp_path):
    scores = _Scores([None] * 4, [4.0, 1.0, 3.0, 2.0])
    folder = _fit(tmp_path, Checkpoints(monitor="val/score", top_k=2), scores, max_epochs=4)
    names = ["best.ckpt", "checkpoint.json", "epoch0001_score1.000.ckpt", "epoch0003_score2.000.ckpt", "last.ckpt"]
    assert _files(folder) == names


def test_checkpoints_for_a_sweep_are_kept_for_good(tmp_path):
    folder = _fit(
        tmp_path, Checkpoints(monitor="val/score", keep_every_n_epochs=2), _Scores([None] * 5, [1.0] * 5), max_epochs=5
    )
    assert _files(folder) == ["best.ckpt", "checkpoint.json", "epoch0001.ckpt", "epoch0003.ckpt", "last.ckpt"]
    kept = read_checkpoint(folder / "epoch0003.ckpt")
    assert kept["global_step"] == 24
    assert "optimizer_states" not in kept
    assert "ema_state_dict" in kept
    with pytest.raises(ValueError, match="keep_every_n_epochs"):
        Checkpoints(keep_every_n_epochs=-1)


def test_best_leaves_out_the_optimizer_and_says_its_class(tmp_path):
    folder = _fit(tmp_path, Checkpoints())
    best, last = read_checkpoint(folder / "best.ckpt"), read_checkpoint(folder / "last.ckpt")
    assert "optimizer_states" in last
    assert "optimizer_states" not in best
    assert {"state_dict", "ema_state_dict", "class_path", "format"} <= set(best)
    kept = _fit(tmp_path / "kept", Checkpoints(best_optimizer=True))
    assert "optimizer_states" in read_checkpoint(kept / "best.ckpt")


def test_untrained_weights_are_kept_where_asked(tmp_path):
    folder = _fit(tmp_path, Checkpoints(initial=True))
    assert _files(folder) == ["best.ckpt", "checkpoint.json", "initial.ckpt", "last.ckpt"]
    assert read_checkpoint(folder / "initial.ckpt")["global_step"] == 0


def test_an_unknown_metric_is_named_with_those_there_are(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"val/sucess.*Logged are: .*val/loss"):
        _fit(tmp_path, Checkpoints(monitor="val/sucess_rate"))
    before = TinyPolicy()
    with pytest.raises(MisconfigurationException, match=r"val/lss.*Logged are: .*val/loss"):
        _fit(tmp_path, Checkpoints(monitor="val/lss"), policy=before, num_sanity_val_steps=1)
    assert before.trainer.global_step == 0  # nothing was spent
    scores = _Scores([0.5] * 2, [1.0] * 2)
    scores.played_tasks = ["near"]
    with pytest.raises(ValueError, match="val/success/far, a task that simulation does not play; it plays near"):
        _fit(tmp_path / "task", Checkpoints(monitor="val/success/far"), scores)
    with pytest.raises(ValueError, match="no simulation runs"):
        _fit(tmp_path / "off", Checkpoints(monitor="val/success"))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float32(1), r"\['hyper_parameters'\]\['extra'\] is a numpy.float32"),
        ({"a": [Path("x")]}, r"\['extra'\]\['a'\]\[0\] is a pathlib"),
    ],
)
def test_a_value_that_would_not_load_again_fails_at_the_first_save_and_is_named(value, where, tmp_path):
    with pytest.raises(TypeError, match=where):
        _fit(tmp_path, Checkpoints(), policy=TinyPolicy(extra=value))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_plain_values_are_accepted():
    plain = {"a": [1, 2.0, None, "x", b"y", (torch.zeros(2), {3})], 4: torch.float32, "size": torch.Size([2])}
    assert foreign_object(plain) is None


def test_a_full_disk_destroys_nothing_and_training_goes_on(tmp_path, monkeypatch, capsys):
    real, calls = torch.save, []

    def failing(checkpoint, file, *args, **kwargs):
        calls.append(checkpoint["epoch"])
        if checkpoint["epoch"] == 1:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(checkpoint, file, *args, **kwargs)

    monkeypatch.setattr(module.torch, "save", failing)
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                seen.append(read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"])
                seen.append(_files(tmp_path / "checkpoints"))

    folder = _fit(tmp_path, Checkpoints(), Look(), max_epochs=3)
    assert seen == [6, ["best.ckpt", "checkpoint.json", "last.ckpt"]]
    assert "No space left" in capsys.readouterr().out
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 18


def test_a_last_save_that_fails_is_an_error(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(module.torch, "save", failing)
    with pytest.raises(OSError, match=r"Disk quota exceeded\. It needs about .* a quota forbids"):
        _fit(tmp_path, Checkpoints())


def test_ranks_agree_on_the_best_when_the_first_could_not_write(tmp_path, monkeypatch):
    """Only the first rank writes: the others must hear that it failed, or they would go on with another best."""
    keeper = Checkpoints()
    trainer = tiny_trainer(tmp_path, keeper, max_epochs=1)
    trainer.fit(TinyPolicy(), datamodule=TinyData())
    told = []

    def broadcast(value):
        told.append(value)
        return "No space left on rank 0"

    monkeypatch.setattr(type(trainer), "world_size", 2)
    monkeypatch.setattr(trainer.strategy, "broadcast", broadcast)
    assert keeper._save(trainer, "best.ckpt", optimizer=False) is False
    assert told == [None]


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.partial").write_bytes(b"half")
    folder = _fit(tmp_path, Checkpoints())
    assert _files(folder) == ["best.ckpt", "checkpoint.json", "last.ckpt"]


def test_another_policys_checkpoint_is_refused(tmp_path):
    folder = _fit(tmp_path, Checkpoints())
    trainer = tiny_trainer(tmp_path / "other", EMA(), max_epochs=3)
    with pytest.raises(ValueError, match=r"TinyPolicy.*OtherPolicy"):
        trainer.fit(OtherPolicy(), datamodule=TinyData(), ckpt_path=folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"TinyPolicy; the model here is .*OtherPolicy"):
        _fit(tmp_path / "initial", Checkpoints(), InitialWeights(str(folder / "best.ckpt")), policy=OtherPolicy())


def test_initial_weights_are_the_averaged_ones(tmp_path):
    folder = _fit(tmp_path, Checkpoints())
    average = read_checkpoint(folder / "last.ckpt")["ema_state_dict"]["network.0.weight"]
    policy = TinyPolicy(learning_rate=0.0)
    trainer = tiny_trainer(tmp_path / "new", InitialWeights(str(folder / "best.ckpt")), EMA(), max_epochs=1)
    trainer.fit(policy, datamodule=TinyData())
    assert torch.equal(policy.network[0].weight, average)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"bad\.ckpt is no checkpoint"):
        read_checkpoint(tmp_path / "bad.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is: bad\.ckpt"):
        read_checkpoint(tmp_path / "best.ckpt")


def test_resuming_goes_on_with_the_ranking(tmp_path):
    keeper = Checkpoints(monitor="val/score")
    folder = _fit(tmp_path, keeper, _Scores([None] * 2, [1.0, 2.0]), max_epochs=2)
    scores = _Scores([None] * 4, [9.0, 9.0, 1.5, 3.0])
    trainer = tiny_trainer(tmp_path, EMA(), scores, Checkpoints(monitor="val/score"), max_epochs=4)
    trainer.fit(TinyPolicy(), datamodule=TinyData(), ckpt_path=folder / "last.ckpt")
    assert json.loads((folder / "checkpoint.json").read_text())["epoch"] == 0
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 24
