"""fit, validate, test and predict: a wrong word costs nothing, a run has all its parts, a checkpoint changes no setting."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_robot import cli
from lightning_robot.__main__ import main
from lightning_robot.callbacks.metrics_file import read_metrics

sys.path.insert(0, str(Path(__file__).parent / "standins"))

CONFIG = {
    "model": {"class_path": "tiny_run.TinyPolicy", "init_args": {"width": 6}},
    "data": {"class_path": "tiny_run.TinyData"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    "evaluation": {"episodes": 0},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["fit", "--config", str(folder / "config.yaml"), "--run.root", str(folder / "runs")]) == 0
    return (folder / "runs" / "latest").resolve()


def _edited(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("width: 6", "widht: 6", "error: no setting 'widht'; did you mean width?"),
        ("max_epochs: 2", "max_epoch: 2", "error: no setting 'trainer.max_epoch'; did you mean trainer.max_epochs?"),
        ("episodes: 0", "episode: 0", "error: no setting 'evaluation.episode'; did you mean evaluation.episodes?"),
        ("evaluation:", "evalution:", "error: no setting 'evalution.episodes'; did you mean evaluation.episodes?"),
        (
            "TinyPolicy",
            "TinyPolice",
            "error: class_path 'tiny_run.TinyPolice': module 'tiny_run' has no attribute 'TinyPolice'",
        ),
        ("width: 6", "width: six", "error: Parser key \"width\": Expected a <class 'int'>. Got value: six"),
    ],
)
def test_a_wrong_key_in_a_file_is_one_line_with_the_nearest(old, new, line, config, capsys):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", _edited(config, old, new)])
    assert error.value.code == 2
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--trainer.max_epoch", "3"], "error: no option --trainer.max_epoch; did you mean --trainer.max_epochs?"),
        (["--trainer.max_ep=3"], "error: no option --trainer.max_ep; did you mean --trainer.max_epochs?"),  # abbreviated
        (["--model.widht", "3"], "error: no setting 'widht'; did you mean width?"),
        (["--data.batchsize", "3"], "error: no setting 'batchsize'; did you mean batch_size?"),
        (["--ema.powr", "3"], "error: no option --ema.powr; did you mean --ema.power?"),
        (["--checkpoint.top_k", "3"], "error: no option --checkpoint.top_k; did you mean --checkpoints.top_k?"),
        (["--ckpt_path", "last"], "error: no option --ckpt_path"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest(options, line, config, capsys):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(config), *options])
    assert error.value.code == 2
    assert capsys.readouterr().err.strip().startswith(line)


def test_abbreviated_config_is_refused(config, capsys):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--conf", str(config)])
    assert error.value.code == 2
    assert "did you mean --config?" in capsys.readouterr().err


def test_print_config_shows_the_merged_configuration(config, tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {learning_rate: 0.5}}")
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(config), "--config", str(overlay), "--model.dropout=0.1", "--print_config"])
    assert error.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"] | {"width": 6, "learning_rate": 0.5, "dropout": 0.1} == shown["model"]["init_args"]
    assert shown["trainer"]["inference_mode"] is False
    assert shown["trainer"]["use_distributed_sampler"] is False


def test_the_distributed_sampler_is_refused(config, capsys):
    assert main(["fit", "--config", str(config), "--trainer.use_distributed_sampler=true"]) == 2
    assert "must stay false" in capsys.readouterr().err


def _parts(config, *options) -> list[str]:
    """Names of a fit's callbacks, without running it."""
    made = []

    class Stop(Exception):
        pass

    class Instead(cli.CommandLine):
        def _run_subcommand(self, subcommand):
            made.extend(type(callback).__name__ for callback in self.trainer.callbacks)
            raise Stop

    with pytest.raises(Stop):
        Instead(["fit", "--config", str(config), "--run.root", str(config.parent / "runs"), *options])
    return made


def test_no_overlay_can_drop_a_required_part(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]}")
    for options in (["--config", str(overlay)], ["--trainer.callbacks=null"]):
        parts = _parts(config, *options)
        for name in ("RunDirectory", "Guards", "Compile", "EMA", "SimulationEvaluation", "Throughput", "Checkpoints"):
            assert parts.count(name) == 1
        assert parts.index("RunDirectory") < parts.index("InitialWeights") < parts.index("EMA")
        assert parts.index("EMA") < parts.index("SimulationEvaluation") < parts.index("Checkpoints") == len(parts) - 1
        assert ("LearningRateMonitor" in parts) == ("--config" in options)


def test_a_required_part_is_not_listed_twice(config, capsys):
    listed = "--trainer.callbacks+=lightning_robot.callbacks.ema.EMA"
    assert main(["fit", "--config", str(config), listed]) == 2
    assert "set ema.* instead" in capsys.readouterr().err


def test_the_saved_configuration_reproduces_the_run(run, tmp_path):
    assert main(["fit", "--config", str(run / "config.yaml"), "--run.root", str(tmp_path / "runs")]) == 0
    again = tmp_path / "runs" / "latest"
    ours, theirs = read_metrics(run / "metrics.csv"), read_metrics(again / "metrics.csv")
    assert ours["train/loss"] == theirs["train/loss"]
    assert ours["val/loss"] == theirs["val/loss"]
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, again))
    old["run"]["root"] = new["run"]["root"]
    assert old == new


def test_everything_is_in_the_run_directory(run):
    inside = {path.name for path in run.iterdir()}
    assert inside == {"checkpoints", "config.yaml", "metrics.csv", "run.json", "tensorboard"}
    assert {path.name for path in run.parents[1].iterdir()} == {"experiment", "latest"}


def test_resume_finds_nothing(tmp_path, capsys):
    assert main(["fit", "--resume", "latest", "--run.root", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "latest") in message
    assert "leave --resume out" in message


def test_a_configuration_that_asks_to_resume_does_not_start_afresh(config, tmp_path, capsys):
    config.write_text(config.read_text() + "resume: latest\n")
    assert main(["fit", "--config", str(config), "--run.root", str(tmp_path / "runs")]) == 2
    assert "fit --resume alone" in capsys.readouterr().err


def test_resume_takes_no_new_settings(run, capsys):
    assert main(["fit", "--resume", str(run), "--model.learning_rate", "0.5", "--trainer.devices", "1"]) == 2
    message = capsys.readouterr().err
    assert "--model.learning_rate would change them" in message
    assert "--init_from" in message
    assert main(["fit", "--resume", str(run), "stray"]) == 2
    assert "stray would change them" in capsys.readouterr().err


def test_a_finished_run_resumes_to_its_end(run):
    before = (run / "metrics.csv").read_text()
    assert main(["fit", "--resume", "latest", "--run.root", str(run.parents[1])]) == 0
    assert (run / "metrics.csv").read_text() == before


def test_a_new_run_starts_from_a_checkpoint_and_keeps_its_own_settings(run, config, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "last.ckpt"
    options = ["--run.root", str(tmp_path / "runs"), "--init_from", str(checkpoint), "--model.learning_rate", "0.5"]
    assert main(["fit", "--config", str(config), *options, "--trainer.max_epochs=1"]) == 0
    assert "Starting from the averaged weights" in capsys.readouterr().out
    saved = torch.load(tmp_path / "runs" / "latest" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["learning_rate"] == 0.5
    assert saved["global_step"] == 6
    assert json.loads((tmp_path / "runs" / "latest" / "run.json").read_text())["init_from"] == str(checkpoint)
    assert main(["fit", "--config", _edited(config, "TinyPolicy", "OtherPolicy"), *options]) == 2
    assert "is a checkpoint of tiny_run.TinyPolicy; the model here is tiny_run.OtherPolicy" in capsys.readouterr().err


def test_the_latest_run_can_be_started_from(run, config, capsys):
    """The link moves to the new run before the weights are read."""
    root = config.parent / "runs"
    assert main(["fit", "--config", str(config), "--run.root", str(root), "--trainer.max_epochs=1"]) == 0
    first = (root / "latest").resolve()
    for name in (root / "latest", root / "latest" / "checkpoints" / "last.ckpt", "best"):
        options = ["--run.root", str(root), "--init_from", str(name), "--trainer.max_epochs=1"]
        assert main(["fit", "--config", str(config), *options]) == 0
        record = json.loads((root / "latest" / "run.json").read_text())
        if name != "best":
            assert record["init_from"].startswith(str(first))
        first = (root / "latest").resolve()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run.experiment", "../x"], "it names a folder"),
        (["--run.root", "/proc/nowhere"], "No run directory can be made in /proc/nowhere"),
        (["--init_from", "config.yaml"], "no checkpoint that can be read safely"),
        (["--evaluation.every_n_epochs=0"], "evaluation.every_n_epochs must be at least 1"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs is 0: nothing would be trained"),
        (["--checkpoints.top_k=-1"], "top_k at least 0"),
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_no_run(options, message, config, monkeypatch, capsys):
    monkeypatch.chdir(config.parent)
    assert main(["fit", "--config", str(config), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not list(config.parent.glob("runs/*/*"))


def test_a_trial_of_one_batch_is_not_the_latest_run(run, config):
    root = run.parents[1]
    before = {path.name for path in run.parent.iterdir()}
    assert main(["fit", "--config", str(config), "--run.root", str(root), "--trainer.fast_dev_run=true"]) == 0
    assert (root / "latest").resolve() == run
    for path in run.parent.iterdir():
        if path.name not in before:
            shutil.rmtree(path)


def test_a_run_that_fails_before_it_trains_is_not_the_latest(run, config, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(run, root / "experiment" / run.name)
    (root / "latest").symlink_to(Path("experiment") / run.name)
    fails = {"class_path": "tiny_run.At", "init_args": {"step": 0, "what": "fail"}}
    config.write_text(yaml.safe_dump(CONFIG | {"trainer": CONFIG["trainer"] | {"callbacks": [fails]}}))
    with pytest.raises(RuntimeError, match="as asked"):
        main(["fit", "--config", str(config), "--run.root", str(root)])
    assert len(list((root / "experiment").glob("*_seed42"))) == 2
    assert (root / "latest").resolve().name == run.name


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_untrained_weights_are_not_judged(subcommand, config, capsys):
    assert main([subcommand, "--config", str(config)]) == 2
    assert f"{subcommand} needs weights: --ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
@pytest.mark.parametrize("name", ["best", "run", "file"])
def test_checkpoints_are_judged_with_the_command_lines_settings(subcommand, name, run, config, monkeypatch):
    path = run / "checkpoints" / "best.ckpt"
    meant = {"best": "best", "run": str(run), "file": str(path)}[name]
    seen = {}

    class Look(cli.CommandLine):
        def _run_subcommand(self, subcommand):
            seen["learning_rate"] = self.model.hparams["learning_rate"]
            super()._run_subcommand(subcommand)
            seen["weight"] = self.model.network[0].weight

    monkeypatch.setattr(cli, "CommandLine", Look)
    options = ["--run.root", str(run.parents[1]), "--ckpt_path", meant, "--model.learning_rate", "0.125"]
    assert main([subcommand, "--config", str(config), *options]) == 0
    assert seen["learning_rate"] == 0.125  # not the file's
    assert torch.equal(seen["weight"], torch.load(path, weights_only=True)["state_dict"]["network.0.weight"])
    if subcommand == "predict":
        with np.load(run / "predict" / "predictions.npz") as written:
            assert written["action"].shape == (8, 1, 2, 2)
            assert written["episode_index"].tolist() == list(range(1000, 1008))


def test_a_checkpoint_alone_brings_its_runs_settings(run, capsys):
    assert main(["validate", "--ckpt_path", str(run)]) == 0
    assert "val/loss" in capsys.readouterr().out
    for root in (["--run.root", str(run.parents[1])], [f"--run.root={run.parents[1]}"]):
        assert main(["validate", "--ckpt_path=best", *root]) == 0


def test_a_missing_or_foreign_checkpoint_is_an_error(run, config, tmp_path, capsys):
    assert main(["validate", "--config", str(config), "--ckpt_path", "last", "--run.root", str(tmp_path)]) == 2
    assert "No checkpoint at" in capsys.readouterr().err
    other = _edited(config, "TinyPolicy", "OtherPolicy")
    assert main(["validate", "--config", other, "--ckpt_path", str(run)]) == 2
    assert "is a checkpoint of tiny_run.TinyPolicy; the model here is tiny_run.OtherPolicy" in capsys.readouterr().err


def test_a_policys_optimizer_cannot_be_replaced_by_a_flag(config, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--optimizer", "SGD"])
    assert "no option --optimizer" in capsys.readouterr().err


def test_a_file_that_is_no_yaml_says_where(config, capsys):
    config.write_text("model: [\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config)])
    assert f'in "{config}", line 2, column 1' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--seed_everything=-1"], 2, "error: seed_everything: -1 is not in bounds"),
        (["--evaluation.every_n_epochs", "0"], 2, "error: evaluation.every_n_epochs must be at least 1"),
        (["--trainer.max_epochs", "-3"], 1, "error: `max_epochs` must be a non-negative integer"),
        (["--trainer.devices=-1"], 1, "error: trainer.devices is -1: "),
        (["--evaluation.episodes", "2", "--evaluation.env", "no/Such-v0"], 1, "error: evaluation: No environment 'no/Such-v0'"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(options, code, line, config, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--run.root", str(tmp_path / "runs"), *options]) == code
    assert line in capsys.readouterr().err


def test_a_setting_inside_a_setting_can_be_set_back_to_null(config, capsys):
    data = {"class_path": "lightning_robot.data.calvin.CalvinDataModule", "init_args": {"generate": {"tasks": ["push"]}}}
    config.write_text(yaml.safe_dump(CONFIG | {"data": data}))
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(config), "--data.generate.tasks", "null", "--print_config"])
    assert error.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["generate"]["tasks"] is None


def test_only_the_words_of_the_constructor_that_refuses_are_shown(tmp_path, capsys):
    model = {"class_path": "lightning_robot.policies.dp3.SimpleDP3", "init_args": {"action_horizon": 15}}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    assert main(["fit", "--config", str(tmp_path / "odd.yaml"), "--run.root", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: action_horizon=15 must be a multiple of 4")


def test_what_building_the_policy_refuses_is_one_line_but_a_fault_keeps_its_traceback(config, tmp_path, monkeypatch, capsys):
    """A setting that only the data can judge is refused with a sentence; what torch raises is for who mends it."""
    no_step = {"class_path": "lightning_robot.transforms.postprocess.Clip", "init_args": {"low": 1.0, "high": 0.0}}
    model = CONFIG["model"] | {"init_args": {"postprocess": [no_step]}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(CONFIG | {"model": model}))
    assert main(["fit", "--config", str(tmp_path / "bad.yaml"), "--run.root", str(tmp_path / "runs")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Clip" in last
    with pytest.raises(ValueError, match="dropout probability"):
        main(["fit", "--config", str(config), "--run.root", str(tmp_path / "runs"), "--model.dropout=2"])
