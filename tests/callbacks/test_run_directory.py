"""The run directory and its metrics file."""

import json
import os
import sys
from pathlib import Path

import pytest

from lightning_robot.callbacks.metrics_file import MetricsFile, read_metrics
from lightning_robot.callbacks.run_directory import HANDED_OVER, RunDirectory, find_run, git_commit, name_run

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from tiny_run import TinyData, TinyPolicy, tiny_trainer


@pytest.fixture(autouse=True)
def _no_hand_over(monkeypatch):
    monkeypatch.delenv(HANDED_OVER, raising=False)


def test_names_are_absolute_and_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = name_run("runs", "doors", 7), name_run("runs", "doors", 7)
    assert first != second
    assert first.is_absolute()
    assert first.parent == tmp_path / "runs" / "doors"
    assert first.name.endswith("_seed7")
    with pytest.raises(ValueError, match=r"run\.experiment"):
        name_run("runs", "../elsewhere", 7)


def test_other_processes_get_the_first_ones_name(tmp_path, monkeypatch):
    first = name_run(tmp_path, "doors", 7)
    assert os.environ[HANDED_OVER] == str(first)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert name_run(tmp_path, "doors", 7) == first


def test_the_run_explains_itself(tmp_path):
    run, path = RunDirectory(root=str(tmp_path)), name_run(tmp_path, "doors", 7)
    run.begin(path, "model: x\n", 7, resumed=False, init_from=None)
    tiny_trainer(path, run, accumulate_grad_batches=2).fit(TinyPolicy(), datamodule=TinyData())
    record = json.loads((path / "run.json").read_text())
    assert record["seed"] == 7
    assert record["data"]["fingerprint"] == "tiny"
    assert record["batch"]["effective"] == 8
    assert record["total_steps"] == 6
    assert record["versions"]["torch"]
    assert record["machine"]["cores"]
    assert (path / "config.yaml").read_text() == "model: x\n"
    for link in (tmp_path / "latest", tmp_path / "doors" / "latest"):
        assert link.resolve() == path
        assert not os.path.isabs(os.readlink(link))  # a moved folder of runs stays whole


def test_a_nested_experiment_is_found_from_every_folder_above_it(tmp_path):
    run, path = RunDirectory(root=str(tmp_path), experiment="doors/open"), name_run(tmp_path, "doors/open", 7)
    run.begin(path, "", 7, resumed=False, init_from=None)
    tiny_trainer(path, run).fit(TinyPolicy(), datamodule=TinyData())
    assert sorted(tmp_path.rglob("latest")) == [tmp_path / name for name in ("doors/latest", "doors/open/latest", "latest")]
    assert all(link.resolve() == path for link in tmp_path.rglob("latest"))


def test_other_data_than_the_runs_are_named(tmp_path, capsys):
    path = name_run(tmp_path, "doors", 7)
    for resumed, fingerprint in ((False, "tiny"), (True, "tiny"), (True, "other")):
        run, data = RunDirectory(root=str(tmp_path)), TinyData()
        run.begin(path, "", 7, resumed=resumed, init_from=None)
        data.fingerprint = fingerprint
        tiny_trainer(path, run).fit(TinyPolicy(), datamodule=data)
        assert ("fingerprints differ" in capsys.readouterr().out) == (fingerprint == "other")


def test_a_step_of_too_few_batches_is_told(tmp_path, capsys):
    tiny_trainer(tmp_path, RunDirectory(), accumulate_grad_batches=4).fit(TinyPolicy(), datamodule=TinyData())
    assert "last step has 2 batches instead of 4" in capsys.readouterr().out


def test_an_endless_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        tiny_trainer(tmp_path, RunDirectory(), max_epochs=-1).fit(TinyPolicy(), datamodule=TinyData())


def test_nothing_to_resume_says_where_and_how_to_start(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/latest is no run directory.*leave --resume out"):
        find_run("latest", tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no checkpoints/last\.ckpt.*fresh start"):
        find_run(str(tmp_path))


def test_the_commit_is_known_in_a_checkout_only(tmp_path):
    assert git_commit(tmp_path) is None


def test_metrics_are_on_disk_at_once_and_columns_may_come_later(tmp_path):
    log = MetricsFile(tmp_path)
    log.log_metrics({"train/loss": 1.0, "epoch": 0}, step=0)
    assert read_metrics(tmp_path / "metrics.csv") == {"epoch": [(0, 0.0)], "train/loss": [(0, 1.0)]}
    log.log_metrics({"val/loss": 2.0, "epoch": 0}, step=0)
    log.log_metrics({"train/loss": 0.1 + 0.2}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,epoch,train/loss,val/loss"
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["train/loss"] == [(0, 1.0), (1, 0.1 + 0.2)]
    assert metrics["val/loss"] == [(0, 2.0)]


def test_a_metrics_file_is_continued_at_the_restored_step(tmp_path):
    log = MetricsFile(tmp_path)
    for step in range(5):
        log.log_metrics({"train/loss": float(step)}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5")  # killed while writing
    resumed = MetricsFile(tmp_path, first_step=3)
    resumed.log_metrics({"train/loss": 30.0}, step=3)
    assert read_metrics(tmp_path / "metrics.csv")["train/loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
