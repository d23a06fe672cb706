"""A disk that fills while a checkpoint is written, for real: a small file system in memory, mounted for one process alone."""

import ctypes
import io
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

from lightning_robot.__main__ import main
from lightning_robot.callbacks.checkpoints import read_checkpoint
from lightning_robot.callbacks.metrics_file import read_metrics
from lightning_robot.console import disk_size

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from ranks import run_ranks

SIZE = 6_000_000  # bytes of the file system: some checkpoints
WIDTH = 8_000  # of the network: makes last.ckpt about 1 MB large
FILLED_AT = 6  # optimizer step: an epoch's first
CONFIG = {
    "model": {"class_path": "tiny_run.TinyPolicy", "init_args": {"width": WIDTH}},
    "data": {"class_path": "tiny_run.TinyData"},
    "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "enable_model_summary": False},
    "evaluation": {"episodes": 0},
    "run": {"tensorboard": False},
}
NEW_MOUNTS, NEW_USER, PRIVATE = 0x00020000, 0x10000000, (1 << 18) | (1 << 14)  # CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE | MS_REC


def _mount(folder: Path) -> str:
    """Mounts a small file system that this process alone sees, and that goes with it; says why where that is not allowed."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS):  # not the superuser: as the superuser of a namespace of our own
        if libc.unshare(NEW_MOUNTS | NEW_USER):
            return f"neither mounts nor user namespaces are allowed here ({os.strerror(ctypes.get_errno())})"
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError as error:
            return f"a user namespace is of no use here ({error})"
    folder.mkdir()
    if libc.mount(b"none", b"/", None, PRIVATE, None) or libc.mount(
        b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={SIZE}".encode()
    ):
        return f"nothing can be mounted here ({os.strerror(ctypes.get_errno())})"
    return ""


def _fit(*options: str) -> tuple[int, str]:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(["fit", *options])
    return code, said.getvalue()


def _losses(run: Path) -> list[list[tuple[int, float]]]:
    metrics = read_metrics(run / "metrics.csv")
    return [metrics["train/loss"], metrics["val/loss"]]


def _fill_free_and_resume(folder: Path, left: int, epochs: int) -> dict:
    """The whole story, in a process of its own."""
    if refused := _mount(folder / "disk"):
        return {"refused": refused}
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    fit = ["--config", str(folder / "config.yaml"), f"--trainer.max_epochs={epochs}", "--run.root"]
    assert _fit(*fit, str(folder / "whole"))[0] == 0
    fill = ["--trainer.callbacks+=tiny_run.Fill", f"--trainer.callbacks.step={FILLED_AT}", f"--trainer.callbacks.left={left}"]
    code, said = _fit(*fit, str(folder / "disk"), *fill)
    run = (folder / "disk" / "latest").resolve()
    told = {
        "code": code,
        "said": said,
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        "step": read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"],
        "best": read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"],
        "free": shutil.disk_usage(run).free,
    }
    (run / "filler").unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["trainer"]["callbacks"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    told["resumed"], told["then"] = _fit("--resume", str(run))
    whole = (folder / "whole" / "latest").resolve()
    told["losses"] = [_losses(run), _losses(whole)]
    ours, theirs = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["ema_state_dict"] for path in (run, whole)
    )
    told["equal"] = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system as Linux does")
@pytest.mark.parametrize(("left", "epochs"), [(400_000, 3), (0, 16)])
def test_a_disk_that_fills_in_the_middle_of_a_save_costs_no_checkpoint(left, epochs, tmp_path):
    """With something left, files are half written when the disk is full; with nothing left, metrics cannot be either."""
    (told,) = run_ranks(_fill_free_and_resume, 1, tmp_path, tmp_path, left, epochs, timeout=200)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    if "refused" in told:
        pytest.skip(told["refused"])
    assert told["code"] == 1
    told["said"] = told["said"].replace(str(tmp_path), "")
    where = f"It needs about 1.0 MB, {disk_size(told['free'])} are free at /disk/experiment/"
    assert f"WARNING: last.ckpt could not be written: No space left on device. {where}" in told["said"]
    assert f"last.ckpt is whole, of step {FILLED_AT}." in told["said"]
    last = told["said"].splitlines()[-1]
    assert last.startswith("error: ")
    assert ("It needs about 1.0 MB" if left else "metrics.csv") in last
    assert told["step"] == told["best"] == FILLED_AT
    assert not [name for name in told["files"] if "partial" in name]
    assert "Traceback" not in told["said"]
    assert told["resumed"] == 0
    assert told["losses"][0] == told["losses"][1]
    assert told["equal"]
