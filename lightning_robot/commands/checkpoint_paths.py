"""Which checkpoints the paths of a command line mean, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def find_checkpoint(name: str | Path) -> Path:
    """What a path means where one checkpoint is wanted: itself, or the best, else the last one of a run directory.

    Raises:
        FileNotFoundError: says what there is instead.
    """
    path = Path(name).expanduser()
    if path.is_file() or (path / "config.json").is_file():  # a folder of LeRobot's
        return path.resolve()
    if path.is_dir():
        for candidate in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt", "last.ckpt"):
            if (path / candidate).is_file():
                return (path / candidate).resolve()
        if len(found := checkpoints_in(path)) == 1:
            return found[0]
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    found = sorted(file for pattern in ("*.ckpt", "*/*.ckpt") for file in folder.glob(pattern))
    listed = ", ".join(str(file.relative_to(folder)) for file in found)
    there = f"In {folder} there is: {listed}." if found else f"{folder} holds no checkpoint."
    what = f"No best.ckpt or last.ckpt in {path}." if path.is_dir() else f"No checkpoint at {path}."
    raise FileNotFoundError(f"{what} {there}")


def checkpoints_in(path: Path) -> list[Path]:
    """Every checkpoint of a run directory, or directly in a folder: our files and LeRobot's folders, each once."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(folder.glob("*.ckpt"))
    for pattern in ("*/config.json", "*/pretrained_model/config.json"):
        found += sorted(file.parent for file in folder.glob(pattern) if (file.parent / "model.safetensors").is_file())
    return list(dict.fromkeys(file.resolve() for file in found))  # LeRobot's `last` is a link


def checkpoints_of(names: Sequence[str], everything: bool) -> list[Path]:
    """The checkpoints meant by the paths of the command line: one, or several for a sweep.

    Args:
        names: paths.
        everything: whether a run directory means all its checkpoints.

    Raises:
        FileNotFoundError: there is none at a path.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        folder = path.is_dir() and not (path / "config.json").is_file()
        inside = checkpoints_in(path) if folder else []
        # A run directory means its best; a folder means what it holds.
        a_run = any((path / "checkpoints" / file).is_file() for file in ("best.ckpt", "last.ckpt"))
        paths += inside if inside and (everything or (len(inside) > 1 and not a_run)) else [find_checkpoint(path)]
    return list(dict.fromkeys(paths))


def read_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, tensors not loaded; of a LeRobot folder the step, where a folder's name tells it."""
    if path.is_dir():
        numbers = [part for part in (path.name, path.parent.name) if part.isdigit()]
        return {"global_step": int(numbers[0])} if numbers else {}
    from lightning_robot.callbacks.checkpoints import read_checkpoint

    return read_checkpoint(path)
