"""Fixtures for every test: the package first (its torchvision guard), one thread, no network."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

import lightning_robot  # noqa: F401  (before lightning: see its docstring)


@pytest.fixture(autouse=True)
def _bare_command_line(monkeypatch):
    """Lightning's CLI reads sys.argv; pytest's own arguments are none of its business."""
    monkeypatch.setattr(sys, "argv", ["lightning_robot"])


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference values of the published implementations and small real recordings."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference values are not at {folder}")
    return folder
