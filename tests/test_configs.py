"""Every shipped configuration is parsed, instantiated and run; overlays compose with every base in any order."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lightning_robot import cli
from lightning_robot.__main__ import main
from lightning_robot.callbacks.metrics_file import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
RUNNABLE = ("profile", "bf16", "slurm")  # on one CPU; ddp starts processes, wandb is an extra

# What makes a few steps of any base quick. The sizes are the base's own to set, the code path is the same.
SMALL = {
    "data": {"init_args": {"batch_size": 8, "num_workers": 0}},
    "trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "check_val_every_n_epoch": 1},
    "evaluation": {"max_steps": 4, "num_envs": 2, "inference_batch": 2},
}
SMALL_MODEL = {
    "SimpleDP3": {"down_dims": [16, 32, 64]},
    "DP3": {"down_dims": [16, 32, 64]},
    "DiffusionPolicy": {"down_dims": [16, 32, 64], "backbone": "resnet10t", "denoising_steps": 2, "crop": 0.8},
    "ACT": {"hidden_size": 32, "heads": 2, "feedforward_size": 32, "encoder_layers": 1, "posterior_layers": 1}
    | {"backbone": "resnet10t", "backbone_norm": "group", "pretrained": False},
}
PACKAGES = {"metaworld": "metaworld", "aloha": "gym_aloha", "pusht": "gym_pusht"}  # simulator that a configuration needs


class _Stopped(Exception):
    pass


class _Instantiated(cli.CommandLine):
    """Everything but the run itself."""

    def _run_subcommand(self, subcommand):
        _Instantiated.last = self
        raise _Stopped


def _instantiate(tmp_path, *files: Path) -> cli.CommandLine:
    options = [option for file in files for option in ("--config", str(file))]
    with pytest.raises(_Stopped):
        _Instantiated(["fit", *options, "--trainer.accelerator=cpu", "--run.root", str(tmp_path / "runs")])
    return _Instantiated.last


@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda file: file.stem if file else "alone")
@pytest.mark.parametrize("base", BASES, ids=lambda file: file.stem)
def test_overlays_compose_with_every_base_in_any_order(base, overlay, tmp_path, monkeypatch):
    if overlay is not None and overlay.stem == "wandb" and find_spec("wandb") is None:
        monkeypatch.setattr(cli, "find_spec", lambda name: True)
        monkeypatch.setattr(cli.CommandLine, "instantiate_classes", _only_parse)
    alone = _instantiate(tmp_path, base)
    if overlay is None:
        return
    texts = []
    for files in ((base, overlay), (overlay, base)):
        line = _instantiate(tmp_path, *files)
        texts.append(line.config["fit"].as_dict())
        texts[-1].pop("config", None)
        if hasattr(line, "trainer") and hasattr(alone, "trainer"):
            names = [type(callback).__name__ for callback in line.trainer.callbacks]
            assert names == [type(callback).__name__ for callback in alone.trainer.callbacks]
    if overlay.stem not in ("profile",):  # both may set evaluation.episodes; the later file wins
        assert texts[0] == texts[1]
    content = yaml.safe_load(overlay.read_text())
    assert set(content) <= {"trainer", "evaluation", "checkpoints", "compile"}  # an overlay says how, not what


def _only_parse(self):
    self.datamodule = self.model = None


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Three short demonstrations of each of two tasks, in a store."""
    from lightning_robot.generation.generate import generate

    path = tmp_path_factory.mktemp("data") / "demonstrations.zarr"
    kwargs = {"cloud": {"points": 64}}
    return generate(path, env_kwargs=kwargs, tasks=("open_drawer", "close_drawer"), episodes_per_task=2, processes=1)


@pytest.fixture(scope="module")
def lerobot_folder(tmp_path_factory) -> Path:
    """Two demonstrations on the arm as a LeRobot dataset."""
    from lightning_robot.generation.generate import generate

    kwargs = {"camera_sizes": {"overhead": 48, "wrist": 48}}
    path = tmp_path_factory.mktemp("lerobot") / "so101"
    return generate(
        path, env="lightning_robot/SO101PickPlace-v0", env_kwargs=kwargs, episodes_per_task=2, processes=1, format="lerobot"
    )


def _data_options(base: Path, request) -> list[str]:
    """Small data of the kind that the configuration reads."""
    kind = yaml.safe_load(base.read_text())["data"]["class_path"].rpartition(".")[2]
    if kind == "CalvinDataModule":
        return [f"--data.root={request.getfixturevalue('demonstrations')}", "--data.generate=null"]
    if kind == "LeRobotDataModule":
        return [f"--data.root={request.getfixturevalue('lerobot_folder')}", "--data.repo_id=null"]
    assert kind == "DemonstrationsDataModule"
    return ["--data.episodes_per_task=2", "--data.processes=1"]


def _run(tmp_path, request, base, *overlays) -> Path:
    small, content = tmp_path / "small.yaml", yaml.safe_load(base.read_text())
    model = {"init_args": SMALL_MODEL[content["model"]["class_path"].rpartition(".")[2]]}
    evaluation = content.get("evaluation", {})
    if "PlayTable" in evaluation.get("env", "PlayTable"):
        tasks = evaluation.get("tasks")
        evaluation = SMALL["evaluation"] | {"tasks": tasks[:2] if tasks else ["open_drawer"], "episodes": 2}
    else:
        evaluation = SMALL["evaluation"] | {"episodes": min(2, evaluation.get("episodes", 2))}
    if "LeRobot" in content["data"]["class_path"]:
        evaluation = {"episodes": 0}  # the folder is of another robot than the configuration's simulator
    if any(overlay.stem == "profile" for overlay in overlays):
        evaluation = {}
    trainer = dict(SMALL["trainer"])
    if "val_check_interval" in content["trainer"]:  # counts in steps, not in epochs
        trainer = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2}
    small.write_text(yaml.safe_dump(SMALL | {"model": model, "trainer": trainer, "evaluation": evaluation}))
    options = [*_data_options(base, request), "--data.validation_ratio=0.25"]
    configs = [option for file in (base, small, *overlays) for option in ("--config", str(file))]
    if any(overlay.stem == "profile" for overlay in overlays):
        options += ["--trainer.limit_train_batches=30", "--data.batch_size=2", "--trainer.max_epochs=9"]
    assert main(["fit", *configs, *options, "--trainer.accelerator=cpu", "--run.root", str(tmp_path / "runs")]) == 0
    return tmp_path / "runs" / "latest"


@pytest.mark.parametrize("base", BASES, ids=lambda file: file.stem)
def test_every_base_trains_validates_simulates_and_saves(base, request, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path / "cache"))
    package = next((package for name, package in PACKAGES.items() if name in base.stem), None)
    if package == "metaworld" and find_spec(package) is None:
        pytest.skip(f"{package} is not installed, which makes the demonstrations of this configuration")
    run = _run(tmp_path, request, base)
    metrics = read_metrics(run / "metrics.csv")
    simulates = "LeRobot" not in base.read_text()
    assert {"val/loss", *(["val/success"] if simulates else [])} <= set(metrics)
    assert {path.name for path in (run / "checkpoints").glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize("name", RUNNABLE)
def test_overlays_run_where_the_machine_permits(name, request, tmp_path):
    run = _run(tmp_path, request, CONFIGS / "dp3_calvin_debug.yaml", CONFIGS / "overlays" / f"{name}.yaml")
    if name == "profile":
        assert list(run.glob("*.pt.trace.json"))
    assert (run / "checkpoints" / "last.ckpt").exists()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_extra_is_named(tmp_path, capsys):
    options = ["--config", str(BASES[0]), "--config", str(CONFIGS / "overlays" / "wandb.yaml"), "--run.root", str(tmp_path)]
    assert main(["fit", *options]) == 2
    assert 'pip install "lightning_robot[wandb]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_list_is_complete():
    assert {file.stem for file in OVERLAYS} == {"ddp", "slurm", "bf16", "wandb", "profile"}
    assert {"dp3_calvin", "dp3_calvin_debug"} <= {file.stem for file in BASES}
