"""Ranks: two give the gradient of one at the same effective batch, and agree on every monitored number."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from ranks import run_ranks

from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.store import StoreWriter
from lightning_robot.policies.act import ACT
from lightning_robot.policies.diffusion_policy import DiffusionPolicy
from lightning_robot.policies.dp3 import SimpleDP3

LENGTHS = [19, 12, 12, 11]


def small_act():
    sizes = {
        "hidden_size": 16,
        "heads": 2,
        "feedforward_size": 16,
        "encoder_layers": 1,
        "posterior_layers": 1,
        "latent_size": 4,
    }
    return ACT(action_horizon=8, cameras=[], dropout=0.0, learning_rate=0.0, pretrained=False, **sizes), [0, 1]


def small_diffusion():
    picture = {
        "backbone_stages": 1,
        "keypoints": 4,
        "crop": 0.75,
        "random_crop": True,
        "backbone": "resnet10t",
        "backbone_width": 0.25,
    }
    transformer = {"network": "transformer", "layers": 1, "width": 16, "heads": 2}
    dropouts = {"attention_dropout": 0.0, "embedding_dropout": 0.0}
    policy = DiffusionPolicy(
        action_horizon=8,
        execution_horizon=7,
        mask_padding=True,
        learning_rate=0.0,
        denoising_steps=10,
        **picture,
        **transformer,
        **dropouts,
    )
    return policy, [0, 2]


def small_dp3():
    return SimpleDP3(
        action_horizon=8, execution_horizon=7, down_dims=[16, 32], time_embedding=8, encoder_size=8, learning_rate=0.0
    ), [0, 2]


POLICIES = {"ACT": small_act, "Diffusion Policy": small_diffusion, "DP3": small_dp3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Windows of the training episodes: 31, so that the last batch of an epoch is smaller, and many are padded."""
    frames, random = sum(LENGTHS), np.random.default_rng(0)
    arrays = {
        "observation.state": ((5,), "float32"),
        "observation.point_cloud": ((32, 3), "float32"),
        "observation.images.top": ((16, 16, 3), "uint8"),
        "action": ((3,), "float32"),
    }
    writer = StoreWriter(tmp_path_factory.mktemp("ranks") / "a.zarr", arrays, frames, shard_frames=64)
    writer.append(
        {
            key: (
                random.normal(size=(frames, *shape)) if kind == "float32" else random.integers(0, 256, (frames, *shape))
            ).astype(kind)
            for key, (shape, kind) in arrays.items()
        }
    )
    return writer.finish(np.cumsum(LENGTHS)).path


class Record(Callback):
    """Gradients of every optimizer step, and the numbers that a checkpoint could be chosen by."""

    def __init__(self):
        self.gradients, self.losses, self.metrics = [], [], {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer, pl_module):
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def train(store, name, ranks, batch_size, accumulate, double):
    seed_everything(7, verbose=False)
    policy, episodes = POLICIES[name]()
    record, make = Record(), policy.configure_model

    def in_double():
        if hasattr(policy, "normalizer"):
            return
        make()
        policy.double()  # all but the normaliser, whose rows do not see each other
        exact = policy.normalizer.normalize
        policy.normalizer.normalize = lambda key, value: exact(key, value).double()

    if double:
        policy.configure_model = in_double
    data = EpisodeDataModule(
        store, batch_size=batch_size, num_workers=0, train_episodes=episodes, validation_episodes=[3],
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        accumulate_grad_batches=accumulate, num_sanity_val_steps=0, callbacks=[record],
    )  # fmt: skip
    trainer.fit(policy, data)
    padded = int((~data.train_windows.__getitems__(list(range(31)))["action_is_pad"]).sum())
    assert len(data.train_windows) == 31
    assert padded < 31 * 8
    return {"gradients": record.gradients, "losses": record.losses, "metrics": record.metrics}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-5), (True, 1e-10)], ids=["float32", "float64"])
def test_two_ranks_give_the_gradient_of_one(store, tmp_path, name, double, tolerance):
    (one,) = run_ranks(train, 1, tmp_path / "one", store, name, 1, 8, 2, double)
    (small,) = run_ranks(train, 1, tmp_path / "small", store, name, 1, 4, 4, double)
    two = run_ranks(train, 2, tmp_path / "two", store, name, 2, 4, 2, double)
    assert len(one["gradients"]) == 2  # of 16 windows, and of the 15 that are left
    for other in (small, *two):
        for found, expected in zip(other["gradients"], one["gradients"], strict=True):
            assert found.keys() == expected.keys()
            # What only shifts a softmax has no gradient: the entries are rounding.
            nothing = 1e-9 * max(float(gradient.abs().max()) for gradient in expected.values())
            for key, gradient in expected.items():
                assert gradient.dtype == (torch.float64 if double else torch.float32)
                gap = float((found[key] - gradient).abs().max()) / max(float(gradient.abs().max()), nothing)
                assert gap < tolerance, f"{key}: {gap:.2e} of its largest entry {float(gradient.abs().max()):.2e}"
    assert {"train/loss", "val/loss"} <= two[0]["metrics"].keys()
    assert two[0]["metrics"] == two[1]["metrics"]
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for other in (small, *two):
        assert other["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], rel=1e-5)
