"""DP3's and Simple DP3's behaviour as policies."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_robot.features import Feature, Features
from lightning_robot.policies.action_diffusion import warmup_cosine
from lightning_robot.policies.base import load_policy
from lightning_robot.policies.dp3 import CLOUD, DP3, STATE, SimpleDP3
from lightning_robot.transforms.statistics import StatisticsAccumulator

LANGUAGE = {"encoder": "none", "texts": ["open", "close"], "tasks": ["a", "b"], "embeddings": torch.eye(2, 384)}
SMALL = {"down_dims": [8, 16], "time_embedding": 8, "encoder_size": 16}


def features(channels=3, points=20):
    return Features({STATE: Feature((5,)), CLOUD: Feature((points, channels))}, Feature((3,)))


class Data:
    """What a policy asks of a data module."""

    def __init__(self, channels=3, language=None):
        self.features, self.language = features(channels), language
        self.asked = None

    def statistics(self, keys):
        self.asked = keys
        found = {}
        for key in keys:
            size = (self.features.observations | {"action": self.features.action})[key].shape[-1]
            accumulator = StatisticsAccumulator()
            accumulator.update(np.random.default_rng(0).normal(size=(100, size)).astype(np.float32))
            found[key] = accumulator.result()
        return found


def small_policy(data=None, policy_class=SimpleDP3, **arguments):
    torch.manual_seed(0)
    policy = policy_class(**SMALL | arguments)
    policy._trainer = SimpleNamespace(datamodule=data or Data(), current_epoch=0, strategy=None)
    policy.configure_model()
    return policy


def observation(rows=3, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        STATE: torch.rand(rows, 2, 5, generator=generator),
        CLOUD: torch.rand(rows, 2, 20, channels, generator=generator),
    }


def batch(rows=3, seed=0, first=0):
    return observation(rows, seed=seed) | {
        "action": torch.rand(rows, 16, 3, generator=torch.Generator().manual_seed(seed)),
        "episode_index": torch.arange(first, first + rows),
        "segment_index": torch.full((rows,), -1),
        "frame_index": torch.arange(rows) * 3,
    }


@pytest.mark.parametrize(
    ("policy_class", "colors", "count", "with_normaliser"),
    [
        (DP3, False, 255_149_447, 255_149_585),
        (SimpleDP3, False, 7_442_183, 7_442_321),
        (DP3, True, 255_297_607, None),
        (SimpleDP3, True, 7_590_343, None),
    ],
)
def test_published_sizes(policy_class, colors, count, with_normaliser):
    """The published-style count holds six vectors per key of the original's normaliser, one element for an identity cloud."""
    sizes = Features({STATE: Feature((15,)), CLOUD: Feature((1024, 6 if colors else 3))}, Feature((7,)))
    policy = policy_class(features=sizes.to_dict(), use_colors=colors)
    with torch.device("meta"):
        policy.configure_model()
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    assert parameters == count
    if with_normaliser:
        assert parameters + 6 * (15 + 7 + 1) == with_normaliser


def test_window():
    window = small_policy().window
    assert (window.observation_steps, window.action_horizon, window.action_offset) == (2, 16, -1)
    assert (window.pad_before, window.pad_after) == (1, 7)
    assert window.keys == (STATE, CLOUD)


def test_chunks_are_physical_and_begin_at_the_newest_observation():
    policy, data = small_policy().eval(), Data()
    chunks = policy.predict_action_chunk(observation(), noise_seeds=torch.tensor([1, 2, 3]), num_samples=4)
    assert chunks.shape == (3, 4, 15, 3)
    assert chunks.dtype == torch.float32
    limits = data.statistics(("action",))["action"]
    assert (chunks >= torch.from_numpy(limits.min).float() - 1e-5).all()
    assert (chunks <= torch.from_numpy(limits.max).float() + 1e-5).all()
    whole = policy._sample(policy.encode(observation()), lambda _: torch.zeros(3, 16, 3))
    assert whole.shape == (3, 16, 3)


def test_a_row_is_its_own():
    """The same seed and observation give the same row, whatever is beside it."""
    policy = small_policy().eval()
    seen, seeds = observation(3), torch.tensor([5, 6, 7])
    together = policy.predict_action_chunk(seen, noise_seeds=seeds, num_samples=2)
    one = {key: value[1:2] for key, value in seen.items()}
    torch.testing.assert_close(policy.predict_action_chunk(one, noise_seeds=seeds[1:2], num_samples=2), together[1:2])
    torch.testing.assert_close(policy.predict_action_chunk(seen, noise_seeds=seeds), together[:, :1])
    assert not torch.allclose(together[:, 0], together[:, 1])
    state = torch.get_rng_state()
    policy.predict_action_chunk(seen, noise_seeds=seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.predict_action_chunk(seen).shape == (3, 1, 15, 3)


def test_training_noise_comes_from_window_and_epoch():
    policy = small_policy().train()
    drawn = policy.on_before_batch_transfer(batch(4), 0)
    assert drawn["noise"].shape == (4, 16, 3)
    assert drawn["timesteps"].max() < 100
    alone = policy.on_before_batch_transfer({key: value[2:3] for key, value in batch(4).items()}, 0)
    assert torch.equal(alone["noise"], drawn["noise"][2:3])
    assert torch.equal(alone["timesteps"], drawn["timesteps"][2:3])
    policy._trainer.current_epoch = 1
    assert not torch.equal(policy.on_before_batch_transfer(batch(4), 0)["noise"], drawn["noise"])
    policy.eval()
    validation = policy.on_before_batch_transfer(batch(4), 0)["noise"]
    policy._trainer.current_epoch = 2
    assert torch.equal(policy.on_before_batch_transfer(batch(4), 0)["noise"], validation)


def test_every_parameter_gets_a_gradient():
    policy = small_policy(Data(language=LANGUAGE), task_conditioning=True).train()
    loss, parts = policy.compute_loss(batch() | {"task_embedding": torch.rand(3, 384)})
    assert parts == {}
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_the_task_matters_where_asked_for():
    policy = small_policy(Data(language=LANGUAGE), task_conditioning=True).eval()
    seeds = torch.tensor([1, 1, 1])
    opened = policy.predict_action_chunk(observation() | {"task": ["open"] * 3}, noise_seeds=seeds)
    closed = policy.predict_action_chunk(observation() | {"task": ["close"] * 3}, noise_seeds=seeds)
    given = policy.predict_action_chunk(observation() | {"task_embedding": LANGUAGE["embeddings"][[0] * 3]}, noise_seeds=seeds)
    assert not torch.allclose(opened, closed)
    assert torch.equal(opened, given)
    with pytest.raises(KeyError, match="jump"):
        policy.predict_action_chunk(observation() | {"task": ["jump"] * 3}, noise_seeds=seeds)


def test_an_xyz_policy_reads_coloured_clouds():
    """Features, statistics and clouds are cut to the first three channels."""
    policy = small_policy(Data(channels=6), cloud_normalization="limits").eval()
    assert policy.features.observations[CLOUD].shape == (20, 3)
    coloured = observation(channels=6)
    plain = coloured | {CLOUD: coloured[CLOUD][..., :3]}
    assert torch.equal(policy.encode(coloured), policy.encode(plain))
    with pytest.raises(ValueError, match="use_colors=True needs clouds of 6 channels"):
        small_policy(Data(channels=3), use_colors=True)
    assert small_policy(Data(channels=6), use_colors=True).encode(coloured).shape == (3, 2 * (16 + 64))


def test_statistics_are_asked_for_where_needed():
    data = Data()
    small_policy(data)
    assert set(data.asked) == {STATE, "action"}


def test_saved_and_loaded(tmp_path):
    policy = small_policy(Data(language=LANGUAGE), task_conditioning=True).eval()
    content = {"state_dict": policy.state_dict(), "hyper_parameters": dict(policy.hparams)}
    policy.on_save_checkpoint(content)
    torch.save(content, tmp_path / "policy.ckpt")
    loaded, seen = load_policy(tmp_path / "policy.ckpt"), observation() | {"task": ["open"] * 3}
    assert isinstance(loaded, SimpleDP3)
    seeds = torch.tensor([1, 2, 3])
    expected = policy.predict_action_chunk(seen, noise_seeds=seeds)
    assert torch.equal(loaded.predict_action_chunk(seen, noise_seeds=seeds), expected)


def test_formula_matters():
    current = small_policy().eval()
    historical = small_policy(sampler_formula="historical").eval()
    seeds = torch.tensor([1, 2, 3])
    a = current.predict_action_chunk(observation(), noise_seeds=seeds)
    assert not torch.allclose(a, historical.predict_action_chunk(observation(), noise_seeds=seeds), atol=1e-3)


def test_compiled_networks_keep_keys_and_values():
    policy = small_policy().eval()
    seeds, keys = torch.tensor([1, 2, 3]), list(policy.state_dict())
    expected = policy.predict_action_chunk(observation(), noise_seeds=seeds)
    for network in policy.compilable:
        network.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(policy.predict_action_chunk(observation(), noise_seeds=seeds), expected)
    assert list(policy.state_dict()) == keys


def test_bfloat16_stays_close():
    policy = small_policy().eval()
    drawn = policy.on_before_batch_transfer(batch(), 0)
    expected = policy._loss(drawn, drawn["noise"], drawn["timesteps"])
    with torch.autocast("cpu", torch.bfloat16):
        found = policy._loss(drawn, drawn["noise"], drawn["timesteps"])
        chunks = policy.predict_action_chunk(observation(), noise_seeds=torch.tensor([1, 2, 3]))
    assert found.dtype == chunks.dtype == torch.float32
    assert abs(found - expected) < 0.03 * expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action_horizon": 15}, "multiple of 2: each of the U-Net's 2 levels"),
        ({"execution_horizon": 16}, "between 1 and action_horizon - observation_steps . 1 = 15"),
        ({"denoising_steps": 7}, "denoising_steps=7 must divide diffusion_steps=100"),
        ({"sampler_formula": "old"}, "'current' or 'historical'"),
        ({"down_dims": [12, 16]}, "multiples of groups=8"),
        ({"down_dims": [0]}, r"down_dims=\[0\] must be multiples"),
        ({"groups": -8}, "groups=-8 must be at least 1"),
        ({"time_embedding": 2}, "time_embedding=2 must be even and at least 4"),
        ({"encoder_size": 0}, "encoder_size=0 must be at least 1"),
        ({"down_dims": []}, r"down_dims=\[\] names no level"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"observation_steps": 0}, "observation_steps=0 must be at least 1"),
        ({"denoising_steps": 0}, "denoising_steps=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must not be negative"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_policy(**arguments)


def test_wrong_history_and_guidance():
    policy = small_policy().eval()
    with pytest.raises(ValueError, match=r"observation.state has 3 observation steps, the policy reads 2"):
        policy.encode({STATE: torch.rand(1, 3, 5), CLOUD: torch.rand(1, 3, 20, 3)})
    with pytest.raises(ValueError, match="guidance"):
        policy.predict_action_chunk(observation(), guidance=torch.sum)


def test_schedule_has_the_published_values():
    published = {0: 0, 1: 2e-7, 250: 5e-5, 499: 9.98e-5, 500: 1e-4, 1000: 9.992913478e-5, 15250: 5e-5, 25000: 6.922295930e-6}
    for step, rate in published.items():
        assert math.isclose(1e-4 * warmup_cosine(step, 500, 30000), rate, rel_tol=1e-9)
    assert warmup_cosine(30000, 500, 30000) == warmup_cosine(31000, 500, 30000) == 0


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return batch(2, seed=index, first=2 * index)


class WithRates(LightningModule):
    """Mixed in front of the policy: records the rate of every step."""

    def on_train_batch_start(self, batch, batch_idx):
        self.__dict__.setdefault("rates", []).append(self.optimizers().param_groups[0]["lr"])


class RecordingDP3(WithRates, SimpleDP3):
    pass


def fit(policy, **arguments):
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **{"max_epochs": 2} | arguments,
    )
    trainer.fit(policy, loader, loader)
    return trainer


def recording_policy(**arguments):
    torch.manual_seed(0)
    statistics = Data().statistics((STATE, "action"))
    policy = RecordingDP3(features=features().to_dict(), **SMALL | arguments)
    policy.configure_model()
    policy.normalizer.set_statistics(statistics)
    return policy


def test_fit_steps_the_rate_per_update(capsys):
    policy = recording_policy(warmup_steps=4, learning_rate=1e-3)
    trainer = fit(policy)
    assert policy.rates == pytest.approx([1e-3 * warmup_cosine(step, 4, 12) for step in range(12)])
    assert trainer.callback_metrics["val/loss"].isfinite()
    assert "Warm-up" not in capsys.readouterr().out


def test_a_warm_up_longer_than_half_the_run_is_shortened(capsys):
    policy = recording_policy()
    fit(policy)
    assert policy.rates == pytest.approx([1e-4 * warmup_cosine(step, 1, 12) for step in range(12)])
    assert "Warm-up shortened from 500 to 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-3), ("value", 1e-5)])
def test_gradients_can_be_clipped_in_every_precision(precision, algorithm, limit):
    seen = []

    class Watching(RecordingDP3):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
            seen.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))

    torch.manual_seed(0)
    policy = Watching(features=features().to_dict(), **SMALL)
    policy.configure_model()
    policy.normalizer.set_statistics(Data().statistics((STATE, "action")))
    fit(policy, max_epochs=1, precision=precision, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    assert seen == pytest.approx([limit] * 6, rel=0.01)


def test_an_endless_run_is_refused():
    with pytest.raises(ValueError, match=r"trainer.max_epochs or trainer.max_steps"):
        fit(recording_policy(), max_epochs=-1)
