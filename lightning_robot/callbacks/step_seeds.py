"""Reseeds what draws global random numbers, for every micro-step: resuming needs no saved generator state."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeeds(Callback):
    """Seeds torch, numpy and random from (seed, epoch, batch, rank) before each training batch.

    Dropout and whatever else draws global random numbers is then the same after a resume, in any process, and different on
    every rank. Diffusion noise and augmentation have seeds of their own, from the window.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        key = struct.pack("<4q", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        value = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        torch.manual_seed(value)
        np.random.seed(value % 2**32)  # noqa: NPY002 (libraries below draw from the global generator)
        random.seed(value)
