"""Simulation during training: with averaged weights, on every rank, never silently left out."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_robot.callbacks.ema import EMA
from lightning_robot.callbacks.evaluation import SimulationEvaluation
from lightning_robot.callbacks.metrics_file import MetricsFile, read_metrics
from lightning_robot.callbacks.progress import PlainProgress
from lightning_robot.evaluation.result import EvaluationResult
from lightning_robot.evaluation.rollout import fingerprint_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_reach import Reach, TinyPolicy

if "fake/Reach-v0" not in gymnasium.registry:
    gymnasium.register("fake/Reach-v0", entry_point="fake_reach:Reach")


class Module(TinyPolicy, LightningModule):
    """Trains towards nothing in particular; acts as a tiny policy."""

    rate = 0.1

    def configure_model(self):
        self.convolution.requires_grad_(False)  # the loss does without it

    def training_step(self, batch, batch_idx):
        return self.output(self.hidden(batch)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.output(self.hidden(batch)).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def train_dataloader(self):
        return DataLoader(torch.ones(8, 64), batch_size=2)

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 64), batch_size=2)


def evaluation(**more):
    return SimulationEvaluation(**({"env": "fake/Reach-v0", "episodes": 4} | more))


def trainer(folder, *callbacks, **more):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(folder)}
    return Trainer(callbacks=list(callbacks), **(settings | quiet | more))


class Watch(Callback):
    """What a callback after the evaluation sees."""

    def __init__(self, judge):
        self.judge = judge
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(
                (trainer.current_epoch, self.judge.evaluated_this_epoch, "val/success" in trainer.callback_metrics)
            )


def test_success_is_logged_and_written(tmp_path, capsys):
    judge = evaluation(tasks=["near", "far"])
    runner = trainer(tmp_path, judge)
    runner.fit(Module())
    metrics = runner.callback_metrics
    assert float(metrics["val/success"]) == judge.result.success_rate
    assert {"val/success/near", "val/success/far"} <= set(metrics)
    files = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    names = [f"epoch000{epoch}" for epoch in range(2)]
    assert files == [f"{name}{suffix}" for name in names for suffix in (".json", ".times.json")]
    table = EvaluationResult.from_json((tmp_path / "evaluations" / "epoch0001.json").read_text())
    assert [row.seed for row in table.records] == [1_000_000, 1_000_001, 1_000_002, 1_000_003]
    assert [row.task for row in table.records] == ["near", "near", "far", "far"]
    assert table.settings["environment"] == "fake/Reach-v0"
    assert "Simulation after epoch 1:" in capsys.readouterr().out


def test_sanity_check_does_not_simulate(tmp_path):
    class AfterSanity(Callback):
        calls = None

        def on_sanity_check_end(self, trainer, pl_module):
            self.calls = list(pl_module.calls)

    after = AfterSanity()
    module = Module()
    trainer(tmp_path, evaluation(), after, max_epochs=1).fit(module)
    assert after.calls == []
    assert module.calls


def test_due_epochs_and_the_flag_against_stale_metrics(tmp_path):
    judge = evaluation(every_n_epochs=2)
    watch = Watch(judge)
    trainer(tmp_path, judge, watch, max_epochs=5).fit(Module())
    assert watch.seen == [(0, False, False), (1, True, True), (2, False, True), (3, True, True), (4, True, True)]


def test_an_older_success_is_neither_printed_nor_written_again(tmp_path, capsys):
    judge, metrics = evaluation(every_n_epochs=2), MetricsFile(tmp_path)
    trainer(tmp_path, judge, PlainProgress(), max_epochs=4, logger=metrics, enable_progress_bar=True).fit(Module())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val/success" in line for line in lines] == [False, True, False, True]
    assert all("val/loss" in line for line in lines)
    written = read_metrics(metrics.path)
    assert [step for step, _ in written["val/success"]] == [step for step, _ in written["val/loss"]][1::2]


def test_a_validation_that_comes_too_late_is_used_at_once(tmp_path):
    judge = evaluation(every_n_epochs=3, at_end=False)
    watch = Watch(judge)
    trainer(tmp_path, judge, watch, max_epochs=8, check_val_every_n_epoch=2).fit(Module())
    assert [(epoch, judged) for epoch, judged, _ in watch.seen] == [(1, False), (3, True), (5, False), (7, True)]


@pytest.mark.parametrize("first", ["ema", "evaluation"])
def test_averaged_weights_are_judged_whatever_the_order(tmp_path, first):
    judge, averaging = evaluation(), EMA(power=0.5)
    module = Module()
    runner = trainer(tmp_path, *((averaging, judge) if first == "ema" else (judge, averaging)))
    runner.fit(module)
    raw = fingerprint_policy(module)
    with averaging.averaged(module):
        average = fingerprint_policy(module)
    assert judge.result.fingerprints["checkpoint"] == average != raw


def test_settings_are_in_the_checkpoint(tmp_path):
    judge = evaluation(env_kwargs={"max_steps": 7}, tasks=["far"], execution_horizon=2)
    runner = trainer(tmp_path, judge, max_epochs=1, enable_checkpointing=True)
    runner.fit(Module())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["evaluation"]
    assert saved == {
        "env": "fake/Reach-v0",
        "env_kwargs": {"max_steps": 7},
        "tasks": ["far"],
        "execution_horizon": 2,
        "ensembling": None,
        "max_steps": None,
        "inference_batch": 8,
    }


def test_ensembling_is_an_option_and_saved(tmp_path):
    setting = {"coefficient": 0.1, "direction": "newest"}
    judge = evaluation(ensembling=setting)
    runner = trainer(tmp_path, judge, max_epochs=1, enable_checkpointing=True)
    runner.fit(Module())
    assert judge.result.settings["ensembling"] == [0.1, "newest"]
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["evaluation"]["ensembling"] == setting
    with pytest.raises(ValueError, match="takes coefficient and direction, not weight"):
        evaluation(ensembling={"weight": 1})
    with pytest.raises(ValueError, match="execution_horizon must be 1 or null"):
        evaluation(ensembling=True, execution_horizon=4)


def test_trained_tasks_are_played_and_saved_where_none_are_named(tmp_path):
    judge, module = evaluation(env_kwargs={"tasks": ("near", "far")}), Module()
    module.trained_tasks = ("far", "fly")
    runner = trainer(tmp_path, judge, max_epochs=1, enable_checkpointing=True)
    runner.fit(module)
    assert {row.task for row in judge.result.records} == {"far"}
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["evaluation"]["tasks"] == ["far"]


def test_resumed_run_keeps_the_rhythm(tmp_path):
    judge = evaluation(every_n_epochs=2, at_end=False)
    runner = trainer(tmp_path, judge, max_epochs=3)
    runner.fit(Module())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    later = evaluation(every_n_epochs=2, at_end=False)
    watch = Watch(later)
    trainer(tmp_path, later, watch, max_epochs=6).fit(Module(), ckpt_path=tmp_path / "a.ckpt")
    assert [(epoch, judged) for epoch, judged, _ in watch.seen] == [(3, True), (4, False), (5, True)]


def test_simulation_that_would_never_happen_is_an_error(tmp_path):
    class NoValidation(Module):
        val_dataloader = LightningModule.val_dataloader

    class EmptyValidation(Module):
        def val_dataloader(self):
            return DataLoader(torch.ones(0, 64), batch_size=2)

    with pytest.raises(MisconfigurationException, match="limit_val_batches is 0"):
        trainer(tmp_path, evaluation(), limit_val_batches=0).fit(Module())
    with pytest.raises(MisconfigurationException, match="no validation part"):
        trainer(tmp_path, evaluation()).fit(NoValidation())
    with pytest.raises(MisconfigurationException, match="validation part of the data is empty"):
        trainer(tmp_path, evaluation()).fit(EmptyValidation())
    with pytest.raises(MisconfigurationException, match="training ends after 2 epochs"):
        trainer(tmp_path, evaluation(), check_val_every_n_epoch=3).fit(Module())
    for off in (evaluation(episodes=0), evaluation(env=None)):
        trainer(tmp_path, off, limit_val_batches=0).fit(Module())
        assert off.result is None
        assert not off.episodes


def test_end_without_validation_is_said(tmp_path, capsys):
    trainer(tmp_path, evaluation(), max_epochs=-1, max_steps=6).fit(Module())
    assert "Training ended at step 6 without a validation there" in capsys.readouterr().out


def test_unfit_environment_stops_before_the_first_step(tmp_path):
    module = Module()
    with pytest.raises(ValueError, match=r"observation\.state: trained on shape"):
        trainer(tmp_path, evaluation(env_kwargs={"shape": (9,)})).fit(module)
    with pytest.raises(RuntimeError, match="cannot begin the task 'fly'"):
        trainer(tmp_path, evaluation(tasks=["fly"])).fit(module)
    with pytest.raises(MisconfigurationException, match=r"evaluation: .*at least one per task"):
        trainer(tmp_path, evaluation(episodes=1)).fit(module)
    with pytest.raises(MisconfigurationException, match=r"evaluation: .*Reech"):
        trainer(tmp_path, evaluation(env="fake/Reech-v0")).fit(module)


def test_seeds_stay_in_their_block():
    with pytest.raises(ValueError, match="choose checkpoints"):
        evaluation(seed=2_000_000)
    with pytest.raises(ValueError, match="choose checkpoints"):
        evaluation(seed=1_999_998, episodes=3)
    evaluation(seed=1_999_997, episodes=3)


def test_validate_simulates_too(tmp_path):
    judge = evaluation()
    runner = trainer(tmp_path, judge)
    (metrics,) = runner.validate(Module(), verbose=False)
    assert metrics["val/success"] == judge.result.success_rate
    assert not (tmp_path / "evaluations").exists()


def test_videos_of_failures(tmp_path):
    judge = evaluation(videos=1, env_kwargs={"radius": 0.0, "max_steps": 4})
    trainer(tmp_path, judge, max_epochs=1).fit(Module())
    (video,) = (tmp_path / "evaluations" / "epoch0000").iterdir()
    assert video.name == "00_near_seed1000000_timeout.mp4"


SCRIPT = """
import json
import sys
from pathlib import Path
import lightning_robot
sys.path[:0] = sys.argv[1:3]
from lightning.pytorch import Callback
from test_evaluation import Module, evaluation, trainer
settings = {"raise_at": [int(seed) for seed in sys.argv[5].split(",") if seed.isdigit()]}
judge = evaluation(episodes=7, num_envs=2, env_kwargs=settings, tasks=["near", "far"])
processes = int(sys.argv[4])
runner = trainer(sys.argv[3], judge, max_epochs=1, devices=processes, strategy="ddp_fork" if processes > 1 else "auto")
module = Module()
module.rate = 0.0
if sys.argv[5] == "rank 1 fails":
    predict = module.predict_action_chunk
    module.predict_action_chunk = lambda *args, **more: 1 / 0 if module.global_rank == 1 else predict(*args, **more)
class Rank(Callback):
    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        name = Path(sys.argv[3]) / f"rank{trainer.global_rank}.json"
        name.write_text(json.dumps({key: float(value) for key, value in metrics.items() if "success" in key}))
runner.callbacks.append(Rank())
runner.fit(module)
print("logged", runner.callback_metrics["val/success"].item(), runner.callback_metrics["val/success/far"].item())
"""


def fit_in_processes(folder, processes, raise_at=""):
    here = Path(__file__).parent
    arguments = [str(here), str(here.parent / "evaluation"), str(folder), str(processes), raise_at]
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


def test_two_processes_share_the_episodes(tmp_path):
    """With weights that stand still the tables must be byte-equal."""
    runs = [fit_in_processes(tmp_path / str(processes), processes) for processes in (1, 2)]
    for run in runs:
        assert run.returncode == 0, run.stderr[-2000:]
    one, two = (tmp_path / name / "evaluations" / "epoch0000.json" for name in "12")
    assert one.read_text() == two.read_text()
    table = json.loads(two.read_text())
    assert table["summary"]["episodes"] == 7
    logged = [next(line for line in run.stdout.splitlines() if line.startswith("logged")) for run in runs]
    assert logged[0] == logged[1]
    ranks = [json.loads((tmp_path / "2" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] == json.loads((tmp_path / "1" / "rank0.json").read_text())  # what is monitored
    assert float(logged[0].split()[1]) == pytest.approx(table["summary"]["success_rate"])
    assert sum(run.stdout.count("Simulation after epoch 0") for run in runs) == 2


def test_a_rank_of_errors_only_is_no_reason_to_stop(tmp_path):
    odd = ",".join(str(1_000_000 + position) for position in (1, 3, 5))  # the second rank's share
    run = fit_in_processes(tmp_path, 2, odd)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((tmp_path / "evaluations" / "epoch0000.json").read_text())["summary"]["errors"] == 3


def test_failure_on_one_rank_stops_every_rank(tmp_path):
    run = fit_in_processes(tmp_path, 2, "rank 1 fails")  # a rank that waits for ever would run into the time limit
    assert run.returncode != 0
    assert "ZeroDivisionError" in run.stderr


def test_fake_is_the_one_that_is_registered():
    assert isinstance(gymnasium.make("fake/Reach-v0").unwrapped, Reach)
