"""Ranks: two give the gradient of one at the same effective batch, agree on monitored numbers, and draw their own noise."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from ranks import run_ranks

from lightning_robot.callbacks.checkpoints import AtomicCheckpointIO
from lightning_robot.callbacks.step_seeds import StepSeeds
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


# Random numbers

WINDOWS, EPOCHS, STOP = 10_000, 3, 5  # an epoch has ten steps of 500 windows on each rank; a checkpoint is written after STOP
OF_WINDOWS = ("noise", "timesteps", "crop_offsets", "latent_noise")
OF_STEPS = ("dropout", "sample")


@pytest.fixture(scope="module")
def large_store(tmp_path_factory):
    random, frames = np.random.default_rng(0), WINDOWS + 4
    state, action = (random.normal(size=(frames, 2)).astype(np.float32) for _ in range(2))
    pictures = random.integers(0, 256, (frames, 8, 8, 3)).astype(np.uint8)
    arrays = {"observation.state": state, "observation.images.top": pictures, "action": action}
    shapes = {key: (value.shape[1:], str(value.dtype)) for key, value in arrays.items()}
    writer = StoreWriter(tmp_path_factory.mktemp("draws") / "a.zarr", shapes, frames, shard_frames=4096)
    writer.append(arrays)
    return writer.finish(np.array([WINDOWS // 2, WINDOWS, frames])).path


def drawing_diffusion():
    picture = {"backbone_stages": 1, "keypoints": 2, "crop": 0.5, "backbone": "resnet10t", "backbone_width": 0.125}
    transformer = {"network": "transformer", "layers": 1, "width": 8, "heads": 1, "denoising_steps": 2, "warmup_steps": 1}
    return DiffusionPolicy(observation_steps=1, action_horizon=4, execution_horizon=4, **picture, **transformer)


def drawing_act():
    sizes = {"hidden_size": 8, "heads": 1, "feedforward_size": 8, "encoder_layers": 1, "posterior_layers": 1, "latent_size": 4}
    return ACT(action_horizon=4, cameras=[], pretrained=False, **sizes)


DRAWING = {"Diffusion Policy": drawing_diffusion, "ACT": drawing_act}


class Draws(Callback):
    """What a rank draws in every step: with the batch, for a layer's dropout, and for actions sampled without given seeds."""

    def __init__(self):
        self.steps = []

    def on_fit_start(self, trainer, pl_module):
        layer = next(module for module in pl_module.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0)
        layer.register_forward_hook(self._dropped)

    def _dropped(self, layer, inputs, output):
        if layer.training:
            self.steps[-1].setdefault("dropout", (output == 0).flatten()[:1100].double())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        observation = {key: batch[key][:1].expand(130, *batch[key].shape[1:]) for key in pl_module.observation_keys}
        with torch.random.fork_rng():
            sample = pl_module.eval().predict_action_chunk(observation, num_samples=2)[:, 1].flatten(1)
            pl_module.train()
        window = batch["episode_index"] * (WINDOWS // 2) + batch["frame_index"]
        drawn = {key: batch[key].flatten(1) if batch[key].ndim > 1 else batch[key] for key in OF_WINDOWS if key in batch}
        self.steps.append({"window": window, "sample": (sample - sample.mean(0)).flatten(), **drawn})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == STOP:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


def draw(store, name, ranks, seed, epochs, folder, checkpoint=None):
    """Every step's draws of one rank, in its order."""
    seed_everything(seed, verbose=False)
    draws = Draws()
    data = EpisodeDataModule(
        store, batch_size=WINDOWS // 10 // ranks, num_workers=0, train_episodes=[0, 1], validation_episodes=[2],
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        limit_val_batches=0, default_root_dir=folder, plugins=[AtomicCheckpointIO()], callbacks=[StepSeeds(seed), draws],
    )  # fmt: skip
    trainer.fit(DRAWING[name](), data, ckpt_path=checkpoint)
    return draws.steps


def in_order(steps, key):
    """The draws of these steps one after another."""
    return torch.cat([step[key] for step in steps]).double()


def by_window(ranks, key, epoch=0):
    """An epoch's draws of all ranks in the order of its windows."""
    steps = [step for steps in ranks for step in steps[10 * epoch : 10 * epoch + 10]]
    return in_order(steps, key)[in_order(steps, "window").argsort()]


def correlation(first, second):
    assert min(first.numel(), second.numel()) >= 10_000
    return abs(np.corrcoef(first.flatten()[:10_000], second.flatten()[:10_000])[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_ranks_epochs_and_seeds_draw_their_own_random_numbers(large_store, tmp_path, name):
    """All that is drawn in training, from the start and after a resume within an epoch."""
    two = run_ranks(draw, 2, tmp_path / "two", large_store, name, 2, 7, EPOCHS, tmp_path)
    kinds = [key for key in OF_WINDOWS if key in two[0][0]]
    assert kinds == {"Diffusion Policy": ["noise", "timesteps", "crop_offsets"], "ACT": ["latent_noise"]}[name]
    resumed = run_ranks(
        draw, 2, tmp_path / "resumed", large_store, name, 2, 7, EPOCHS, tmp_path / "unused", tmp_path / "middle.ckpt"
    )
    for steps, rest in zip(two, resumed, strict=True):
        assert len(rest) == len(steps) - STOP == 25
        for step, again in zip(steps[STOP:], rest):
            assert step.keys() == again.keys()
            assert all(torch.equal(step[key], again[key]) for key in step)
    for first, second in (two, resumed):
        for key in (*kinds, *OF_STEPS, "window"):
            assert correlation(in_order(first, key), in_order(second, key)) < 0.05, key
    for epoch in range(EPOCHS):  # every window goes to one rank
        assert torch.equal(by_window(two, "window", epoch), torch.arange(WINDOWS).double())
    (same,) = run_ranks(draw, 1, tmp_path / "same", large_store, name, 1, 7, 1, tmp_path / "same")
    (other,) = run_ranks(draw, 1, tmp_path / "other", large_store, name, 1, 8, 1, tmp_path / "other")
    for key in kinds:
        assert torch.equal(by_window(two, key), by_window([same], key)), key  # a window's draws, on whichever rank
        assert correlation(by_window(two, key), by_window(two, key, epoch=1)) < 0.05, key
        assert correlation(by_window(two, key), by_window([other], key)) < 0.05, key
    both = [[step for steps in two for step in steps[10 * epoch : 10 * epoch + 10]] for epoch in (0, 1)]
    for key in (*OF_STEPS, "window"):
        assert correlation(in_order(both[0], key), in_order(both[1], key)) < 0.05, key
        assert correlation(in_order(same, key), in_order(other, key)) < 0.05, key
