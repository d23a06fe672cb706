"""Diffusion Policy's behaviour as a policy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.features import Feature, Features
from lightning_robot.policies.action_diffusion import CLOUD, STATE
from lightning_robot.policies.base import load_policy
from lightning_robot.policies.diffusion_policy import ENVIRONMENT_STATE, DiffusionPolicy
from lightning_robot.transforms.statistics import StatisticsAccumulator

TOP, WRIST = "observation.images.top", "observation.images.wrist"
ALL = {
    STATE: Feature((5,)),
    WRIST: Feature((3, 24, 20), "uint8"),
    TOP: Feature((3, 24, 20), "uint8"),
    CLOUD: Feature((20, 3)),
    ENVIRONMENT_STATE: Feature((4,)),
}
SMALL = {"down_dims": [8, 16], "time_embedding": 8, "keypoints": 4, "backbone_stages": 1, "denoising_steps": 10}
TINY = {"network": "transformer", "layers": 2, "width": 16, "heads": 2} | {
    key: value for key, value in SMALL.items() if key not in ("down_dims", "time_embedding")
}
NETWORKS = [SMALL | {"action_horizon": 10}, TINY]
LANGUAGE = {"encoder": "none", "texts": ["open", "close"], "tasks": ["a", "b"], "embeddings": torch.eye(2, 384)}


class Data:
    """What a policy asks of a data module."""

    def __init__(self, keys=(STATE, WRIST, TOP), language=None):
        self.features, self.language = Features({key: ALL[key] for key in keys}, Feature((3,))), language
        self.asked = []

    def statistics(self, keys):
        self.asked += keys
        found = {}
        for key in keys:
            feature = (self.features.observations | {"action": self.features.action})[key]
            accumulator = StatisticsAccumulator()
            size = 3 if "images" in key else feature.shape[-1]
            values = np.random.default_rng(0).normal(size=(100, size)).astype(np.float32)
            accumulator.update(0.4 + 0.1 * values if "images" in key else values)
            found[key] = accumulator.result()
        return found


def small_policy(data=None, **arguments):
    torch.manual_seed(0)
    options = SMALL | {"action_horizon": 10} if arguments.get("network", "unet") == "unet" else TINY
    policy = DiffusionPolicy(**options | arguments)
    policy._trainer = SimpleNamespace(datamodule=data or Data(), current_epoch=0, strategy=None)
    policy.configure_model()
    return policy


def observation(rows=3, keys=(STATE, WRIST, TOP), seed=0, steps=2):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key in keys:
        shape = (rows, steps, *ALL[key].shape)
        picture = ALL[key].dtype == "uint8"
        made[key] = (
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            if picture
            else (torch.rand(shape, generator=generator))
        )
    return made


def batch(rows=3, keys=(STATE, WRIST, TOP), seed=0, first=0):
    return observation(rows, keys, seed) | {
        "action": torch.rand(rows, 10, 3, generator=torch.Generator().manual_seed(seed)),
        "action_is_pad": torch.arange(10).expand(rows, 10) > 6,
        "episode_index": torch.arange(first, first + rows),
        "segment_index": torch.full((rows,), -1),
        "frame_index": torch.arange(rows) * 3,
    }


SEEDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(("cameras", "count"), [(1, 262_952_742), (2, 277_819_846)])
def test_sizes_at_default(cameras, count):
    """LeRobot 0.6.1's at its defaults, which differ in norms of as many parameters."""
    pictures = {f"observation.images.{number}": Feature((3, 96, 96), "uint8") for number in range(cameras)}
    policy = DiffusionPolicy(features=Features({STATE: Feature((6,))} | pictures, Feature((6,))).to_dict())
    with torch.device("meta"):
        policy.configure_model()
    assert sum(parameter.numel() for parameter in policy.parameters()) == count


def test_published_values_of_each_network():
    unet, transformer = DiffusionPolicy(), DiffusionPolicy(network="transformer")
    assert (unet.action_horizon, transformer.action_horizon) == (16, 10)
    assert (unet.hparams["betas"], transformer.hparams["betas"]) == ([0.95, 0.999], [0.9, 0.95])
    assert (unet.hparams["warmup_steps"], transformer.hparams["warmup_steps"]) == (500, 1000)
    assert unet.hparams["denoising_steps"] == 100
    window = unet.window
    assert (window.observation_steps, window.action_offset, window.pad_before, window.pad_after) == (2, -1, 1, 7)


@pytest.mark.parametrize(
    ("offered", "chosen", "expected"),
    [
        ((TOP, STATE, WRIST, CLOUD, ENVIRONMENT_STATE), None, (STATE, TOP, WRIST)),
        ((CLOUD, STATE, ENVIRONMENT_STATE), None, (STATE, CLOUD)),
        ((ENVIRONMENT_STATE, STATE), None, (STATE, ENVIRONMENT_STATE)),
        ((STATE,), None, (STATE,)),
        ((TOP,), None, (TOP,)),
        ((TOP, STATE, WRIST), [WRIST, TOP], (WRIST, TOP)),
        (
            (TOP, STATE, CLOUD, ENVIRONMENT_STATE),
            [CLOUD, ENVIRONMENT_STATE, TOP, STATE],
            (STATE, TOP, ENVIRONMENT_STATE, CLOUD),
        ),
    ],
)
@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_what_is_observed(offered, chosen, expected, network):
    policy = small_policy(Data(offered), network=network, observations=chosen).eval()
    assert policy.observation_keys == expected
    assert set(policy.window.keys) == set(expected)
    chunk = policy.predict_action_chunk(observation(keys=expected), noise_seeds=SEEDS)
    assert chunk.shape == (3, 1, 9, 3)
    policy.train()
    loss, parts = policy.compute_loss(batch(keys=expected))
    assert parts == {}
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_what_cannot_be_observed():
    with pytest.raises(ValueError, match=r"no encoder for observation\.sound"):
        small_policy(observations=[STATE, "observation.sound"])
    with pytest.raises(KeyError, match=r"reads observation\.images\.side, which the data does not offer"):
        small_policy(observations=[STATE, "observation.images.side"])
    with pytest.raises(ValueError, match=r"observation\.state has 3 observation steps, the policy reads 2"):
        small_policy().encode(observation(steps=3))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("options", NETWORKS, ids=["unet", "transformer"])
def test_a_row_is_its_own(options, sampler):
    """The same seed and observation give the same row, whatever is beside it."""
    policy = small_policy(**options, sampler=sampler).eval()
    seen = observation()
    together = policy.predict_action_chunk(seen, noise_seeds=SEEDS, num_samples=2)
    assert together.shape == (3, 2, 9, 3)
    assert together.dtype == torch.float32
    one = {key: value[1:2] for key, value in seen.items()}
    alone = policy.predict_action_chunk(one, noise_seeds=SEEDS[1:2], num_samples=2)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.predict_action_chunk(seen, noise_seeds=SEEDS), together[:, :1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[:, 0], together[:, 1])
    state = torch.get_rng_state()
    policy.predict_action_chunk(seen, noise_seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_crops_come_from_window_and_epoch():
    policy = small_policy().train()
    drawn = policy.on_before_batch_transfer(batch(4), 0)
    offsets = drawn["crop_offsets"]
    assert offsets.shape == (4, 2, 2, 2)  # rows, steps, cameras, (top, left)
    assert offsets[..., 0].max() <= 24 - 21
    assert offsets[..., 1].max() <= 20 - 17
    assert len(offsets.flatten(0, 2).unique(dim=0)) > 4
    alone = policy.on_before_batch_transfer({key: value[2:3] for key, value in batch(4).items()}, 0)
    assert torch.equal(alone["crop_offsets"], offsets[2:3])
    policy._trainer.current_epoch = 1
    assert not torch.equal(policy.on_before_batch_transfer(batch(4), 0)["crop_offsets"], offsets)
    assert not torch.equal(policy.encode(drawn), policy.encode(batch(4)))
    policy.eval()
    assert "crop_offsets" not in policy.on_before_batch_transfer(batch(4), 0)
    assert "crop_offsets" not in policy.on_before_batch_transfer(observation(), 0)
    for arguments in ({"random_crop": False}, {"crop": None}, {"crop": 1.0}):
        assert "crop_offsets" not in small_policy(**arguments).train().on_before_batch_transfer(batch(4), 0)


def test_a_shared_encoder():
    policy = small_policy(separate_encoders=False).train()
    assert len(policy.image_encoders) == 1
    assert policy.image_encoders[0].image_mean.shape == (2, 3)
    drawn = policy.on_before_batch_transfer(batch(), 0)
    assert policy._loss(drawn, drawn["noise"], drawn["timesteps"]).isfinite()
    swapped = observation()
    swapped[TOP], swapped[WRIST] = swapped[WRIST], swapped[TOP]
    policy.eval()
    there, back = policy.encode(observation()).view(3, 2, -1), policy.encode(swapped).view(3, 2, -1)
    torch.testing.assert_close(there[..., 5:13], back[..., 13:21])


def test_statistics_of_pictures():
    data = Data()
    policy = small_policy(data, image_normalization="data")
    assert set(data.asked) == {STATE, "action", TOP, WRIST}
    for encoder in policy.image_encoders:
        torch.testing.assert_close(encoder.image_mean, torch.full((1, 3), 0.4), rtol=0, atol=0.1)
        torch.testing.assert_close(encoder.image_std, torch.full((1, 3), 0.1), rtol=0, atol=0.05)
    assert small_policy(image_normalization="imagenet").image_encoders[0].image_mean[0].tolist() == pytest.approx(
        [0.485, 0.456, 0.406]
    )
    assert small_policy().image_encoders[1].image_std.unique().tolist() == [0.5]


def test_padding_can_be_left_out():
    policy = small_policy(mask_padding=True).eval()
    drawn = policy.on_before_batch_transfer(batch(), 0)
    noise, timesteps = drawn["noise"], drawn["timesteps"]
    loss = policy._loss(drawn, noise, timesteps)
    policy.mask_padding = False
    whole = policy._loss(drawn, noise, timesteps)
    nothing = policy._loss(drawn | {"action_is_pad": torch.zeros(3, 10, dtype=torch.bool)}, noise, timesteps)
    assert whole == nothing
    assert loss != whole
    policy.mask_padding = True
    none_valid = policy._loss(drawn | {"action_is_pad": torch.ones(3, 10, dtype=torch.bool)}, noise, timesteps)
    assert none_valid == 0


def test_clouds_in_colour():
    coloured = Data((STATE, CLOUD))
    coloured.features = Features({STATE: ALL[STATE], CLOUD: Feature((20, 6))}, Feature((3,)))
    seen = observation(keys=(STATE, CLOUD))
    seen[CLOUD] = torch.rand(3, 2, 20, 6)
    plain = small_policy(coloured).eval()
    assert plain.features.observations[CLOUD].shape == (20, 3)
    assert torch.equal(plain.encode(seen), plain.encode(seen | {CLOUD: seen[CLOUD][..., :3]}))
    assert small_policy(coloured, use_colors=True).encode(seen).shape == (3, 2 * (5 + 64))
    with pytest.raises(ValueError, match="use_colors=True needs clouds of 6 channels"):
        small_policy(Data((STATE, CLOUD)), use_colors=True)


@pytest.mark.parametrize("options", NETWORKS, ids=["unet", "transformer"])
def test_saved_and_loaded(tmp_path, options):
    policy = small_policy(Data(language=LANGUAGE), **options, task_conditioning=True, image_normalization="data").eval()
    content = {"state_dict": policy.state_dict(), "hyper_parameters": dict(policy.hparams)}
    policy.on_save_checkpoint(content)
    torch.save(content, tmp_path / "policy.ckpt")
    loaded, seen = load_policy(tmp_path / "policy.ckpt"), observation() | {"task": ["open", "close", "open"]}
    expected = policy.predict_action_chunk(seen, noise_seeds=SEEDS)
    assert torch.equal(loaded.predict_action_chunk(seen, noise_seeds=SEEDS), expected)
    other = policy.predict_action_chunk(seen | {"task": ["close"] * 3}, noise_seeds=SEEDS)
    assert [bool(row.abs().max() > 1e-6) for row in other - expected] == [True, False, True]


def test_cameras_renamed_by_a_transform():
    rename = [{"class_path": "lightning_robot.transforms.named.RenameCameras", "init_args": {"names": {"top": "overhead"}}}]
    policy = small_policy(transforms=rename, image_normalization="data").eval()
    assert policy.cameras == [WRIST, "observation.images.overhead"]
    assert policy.window.keys == (STATE, WRIST, TOP)
    plain = small_policy(image_normalization="data").eval()
    found = policy.predict_action_chunk(observation(), noise_seeds=SEEDS)
    assert torch.equal(found, plain.predict_action_chunk(observation(), noise_seeds=SEEDS))


@pytest.mark.parametrize("options", NETWORKS, ids=["unet", "transformer"])
def test_compiled_networks_keep_keys_and_values(options):
    policy = small_policy(**options).eval()
    keys, expected = list(policy.state_dict()), policy.predict_action_chunk(observation(), noise_seeds=SEEDS)
    for network in policy.compilable:
        network.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(policy.predict_action_chunk(observation(), noise_seeds=SEEDS), expected)
    assert list(policy.state_dict()) == keys


def test_bfloat16_stays_close():
    policy = small_policy().eval()
    drawn = policy.on_before_batch_transfer(batch(), 0)
    expected = policy._loss(drawn, drawn["noise"], drawn["timesteps"])
    with torch.autocast("cpu", torch.bfloat16):
        found = policy._loss(drawn, drawn["noise"], drawn["timesteps"])
    assert found.dtype == torch.float32
    assert abs(found - expected) < 0.03 * expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action_horizon": 15}, "multiple of 2: each of the U-Net's 2 levels"),
        ({"execution_horizon": 10}, "between 1 and action_horizon - observation_steps . 1 = 9"),
        ({"denoising_steps": 101}, "denoising_steps=101 must not exceed diffusion_steps=100"),
        ({"denoising_steps": 0}, "denoising_steps=0 must be at least 1"),
        ({"network": "mlp"}, "network='mlp'; use unet or transformer"),
        ({"sampler": "euler"}, "sampler='euler'; use ddpm or ddim"),
        ({"prediction": "velocity"}, "prediction='velocity'; use epsilon or sample"),
        ({"crop": 1.5}, "crop=1.5: a share of the picture"),
        ({"crop": 0.0}, "crop=0.0: a share of the picture"),
        ({"crop": (0, 8)}, "a share of the picture above 0"),
        ({"resize": (0, 8)}, "resize=.*at least 1 pixel"),
        ({"keypoints": 0}, "keypoints=0 must be at least 1"),
        ({"action_horizon": 0}, "action_horizon=0 must be at least 1"),
        ({"groups": 0}, "groups=0 must be at least 1"),
        ({"time_embedding": 15}, "time_embedding=15 must be even"),
        ({"beta_schedule": "flat"}, "beta_schedule='flat'; use linear"),
        ({"beta_end": 2.0}, "beta_end=2.0: shares of noise"),
        ({"network": "transformer", "heads": 0}, "heads=0 must be at least 1"),
        ({"network": "transformer", "width": 6, "heads": 4}, "width=6 must be even, at least 4 and a multiple of heads=4"),
        ({"network": "transformer", "attention_dropout": 1.0}, "attention_dropout=1.0 must be"),
        ({"crop": (24, 24)}, "A crop of 24 x 24 does not fit into pictures of 24 x 20"),
        ({"pretrained": True}, "set backbone_norm: batch"),
        ({"clip_range": 0.0}, "clip_range=0.0 must be positive"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must not be negative"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_policy(**arguments)


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", use_distributed_sampler=False, num_sanity_val_steps=0, **quiet | arguments)


def test_optimizer_groups_of_the_transformer():
    policy = small_policy(network="transformer")
    policy._trainer = SimpleNamespace(precision_plugin=None, estimated_stepping_batches=100)
    groups = policy.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [1e-3, 0.0, 1e-6]
    assert sum(len(group["params"]) for group in groups) == len(list(policy.parameters()))
    adam = small_policy(optimizer="adam")
    adam._trainer = SimpleNamespace(precision_plugin=None, estimated_stepping_batches=100)
    made = adam.configure_optimizers()["optimizer"]
    assert type(made) is torch.optim.Adam
    assert made.defaults["betas"] == (0.95, 0.999)


@pytest.mark.parametrize(
    ("observations", "network"),
    [(None, "unet"), ([STATE, CLOUD], "unet"), ([STATE], "transformer")],
    ids=["pictures", "clouds", "state"],
)
def test_learns_from_a_store_of_the_diffusion_policy_family(shared, observations, network):
    """A file of the published format, from data module to trained policy."""
    policy = DiffusionPolicy(
        **SMALL | {"down_dims": [64, 128]} if network == "unet" else TINY | {"action_horizon": 16},
        observations=observations,
        prediction="sample",
        learning_rate=3e-3,
        warmup_steps=2,
    )
    data = EpisodeDataModule(store=str(shared / "golden" / "dp_replay_buffer.zarr"), batch_size=16, num_workers=0)
    losses, run, step = [], trainer(max_epochs=80), policy.training_step
    policy.training_step = lambda *arguments: losses.append(step(*arguments)) or losses[-1]
    run.fit(policy, data)
    assert torch.stack(losses[-4:]).mean() < 0.8 * torch.stack(losses[:4]).mean()
    assert set(policy.features.observations) == set(policy.observation_keys)
