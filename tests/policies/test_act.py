"""ACT's behaviour as a policy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_robot.features import Feature, Features
from lightning_robot.policies.act import ACT, ENVIRONMENT, STATE
from lightning_robot.policies.base import load_policy
from lightning_robot.transforms.statistics import StatisticsAccumulator

WRIST, TOP = "observation.images.wrist", "observation.images.top"
WRIST_DEPTH, TOP_DEPTH = "observation.depth.wrist", "observation.depth.top"
ALL = {
    TOP: Feature((3, 24, 32), "uint8"),
    STATE: Feature((5,), names=tuple("abcde")),
    WRIST: Feature((3, 24, 32), "uint8"),
    TOP_DEPTH: Feature((1, 24, 32)),
    WRIST_DEPTH: Feature((1, 24, 32)),
    ENVIRONMENT: Feature((4,)),
}
SMALL = {
    **{"action_horizon": 8, "hidden_size": 16, "heads": 2, "feedforward_size": 32, "encoder_layers": 2, "posterior_layers": 1},
    **{"latent_size": 4, "backbone": "resnet10t", "backbone_norm": "group", "backbone_width": 0.25, "pretrained": False},
}
SEEDS = torch.tensor([1, 2, 3])


class Data:
    """What a policy asks of a data module."""

    def __init__(self, keys=tuple(ALL), language=None):
        self.features, self.language = Features({key: ALL[key] for key in keys}, Feature((3,))), language
        self.asked = []

    def statistics(self, keys):
        self.asked += keys
        found = {}
        for key in keys:
            feature = (self.features.observations | {"action": self.features.action})[key]
            accumulator = StatisticsAccumulator()
            values = np.random.default_rng(len(key)).random((100, 3 if "images" in key else feature.shape[-1]))
            accumulator.update((0.004 * values + 0.25 if key == TOP else values).astype(np.float32))
            found[key] = accumulator.result()
        return found


def small_policy(data=None, **arguments):
    torch.manual_seed(0)
    policy = ACT(**SMALL | arguments)
    policy._trainer = SimpleNamespace(datamodule=data or Data(), current_epoch=0, strategy=None)
    policy.configure_model()
    return policy


def observation(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randint(0, 256, (rows, 1, *feature.shape), generator=generator, dtype=torch.uint8)
        if feature.dtype == "uint8"
        else torch.rand(rows, 1, *feature.shape, generator=generator)
        for key, feature in ALL.items()
    }


def batch(rows=3, seed=0, first=0):
    return observation(rows, seed) | {
        "action": torch.rand(rows, 8, 3, generator=torch.Generator().manual_seed(seed)),
        "action_is_pad": torch.arange(8).expand(rows, 8) > 5,
        "episode_index": torch.arange(first, first + rows),
        "segment_index": torch.full((rows,), -1),
        "frame_index": torch.arange(rows) * 3,
    }


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {key: value[0] for key, value in batch(1, seed=index, first=index).items()}


def test_published_defaults():
    policy = ACT()
    options = policy.hparams
    assert (policy.action_horizon, policy.execution_horizon, policy.observation_steps) == (100, 100, 1)
    assert (options["hidden_size"], options["heads"], options["feedforward_size"]) == (512, 8, 3200)
    assert (options["encoder_layers"], options["decoder_layers"], options["posterior_layers"]) == (4, 1, 4)
    assert (options["latent_size"], options["kl_weight"], options["dropout"]) == (32, 10.0, 0.1)
    assert (options["learning_rate"], options["weight_decay"], options["reduction"]) == (1e-5, 1e-4, "valid")
    assert (options["backbone"], options["backbone_norm"], options["pretrained"]) == ("resnet18", "frozen_batch", True)
    assert policy.ensembling is None
    assert ACT(ensembling={"coefficient": 0.01}).ensembling == {"coefficient": 0.01}
    window = policy.window
    assert (window.observation_steps, window.action_offset, window.pad_before, window.pad_after) == (1, 0, 0, 99)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (STATE, TOP, WRIST)),
        ({"cameras": ["wrist", "top"]}, (STATE, WRIST, TOP)),
        ({"cameras": ["wrist"], "use_depth": True, "use_state": False}, (WRIST, WRIST_DEPTH)),
        ({"use_depth": True}, (STATE, TOP, WRIST, TOP_DEPTH, WRIST_DEPTH)),
        ({"cameras": []}, (STATE,)),
        ({"cameras": [], "use_environment_state": True}, (STATE, ENVIRONMENT)),
        ({"cameras": [], "use_environment_state": True, "use_state": False, "use_vae": False}, (ENVIRONMENT,)),
        ({"pre_norm": True, "decoder_layers": 2, "activation": "gelu", "backbone_stages": 3}, (STATE, TOP, WRIST)),
    ],
)
def test_what_is_observed(arguments, expected):
    policy = small_policy(**arguments)
    assert policy.observation_keys == policy.window.keys == expected
    chunk = policy.eval().predict_action_chunk({key: observation()[key] for key in expected})
    assert chunk.shape == (3, 1, 8, 3)
    assert chunk.dtype == torch.float32
    loss, parts = policy.train().compute_loss(batch())
    assert set(parts) == ({"l1"} if arguments.get("use_vae") is False else {"l1", "kl"})
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())  # for training in several processes


def test_what_cannot_be_observed():
    with pytest.raises(KeyError, match=r"observation\.images\.side, which the data does not offer"):
        small_policy(cameras=["side"])
    with pytest.raises(KeyError, match="ACT would read nothing"):
        small_policy(cameras=[], use_state=False)
    data = Data((STATE, TOP, TOP_DEPTH))
    data.features.observations[TOP_DEPTH] = Feature((1, 12, 16))
    with pytest.raises(ValueError, match="depth as a fourth channel"):
        small_policy(data, use_depth=True)


def test_arguments_are_checked():
    for arguments, message in (
        ({"execution_horizon": 9}, "execution_horizon=9 must lie between 1 and action_horizon=8"),
        ({"reduction": "sum"}, "Unknown reduction 'sum'; use valid, all"),
        ({"image_normalization": "none"}, "Unknown image_normalization"),
        ({"pretrained": True}, "ImageNet weights belong to batch norm"),
        ({"depth_range": (2.0, 1.0)}, "depth_range"),
        ({"ensembling": {"coefficient": 0.01, "direction": "new"}}, "direction oldest or newest"),
        ({"ensembling": {"weight": 0.01}}, "give a coefficient"),
        ({"ensembling": {"coefficient": "small"}}, "give a coefficient"),
        ({"action_horizon": 0, "execution_horizon": None}, "action_horizon=0 must be at least 1"),
        ({"decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
        ({"posterior_layers": -1}, "posterior_layers=-1 must be at least 1"),
        ({"hidden_size": 33, "heads": 4}, "hidden_size=33 must be a multiple of heads=4"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"latent_size": -1}, "latent_size=-1 must be at least 1"),
        ({"dropout": 1.5}, "dropout=1.5 must be at least 0 and below 1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must not be negative"),
        ({"backbone_learning_rate": -1.0}, "backbone_learning_rate=-1.0 must not be negative"),
        ({"betas": (0.9, 1.5)}, r"betas=\(0.9, 1.5\) must each be"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"cameras": ["top", "top"]}, "each is named once"),
    ):
        with pytest.raises(ValueError, match=message):
            ACT(**SMALL | arguments)


def test_cameras_are_known_by_name():
    """Whatever the order in which an observation holds its pictures."""
    policy = small_policy(cameras=["wrist", "top"], image_normalization="data").eval()
    seen = observation()
    chunk = policy.predict_action_chunk(seen)
    assert torch.equal(policy.predict_action_chunk(dict(reversed(seen.items()))), chunk)
    swapped = seen | {WRIST: seen[TOP], TOP: seen[WRIST]}
    assert not torch.allclose(policy.predict_action_chunk(swapped), chunk, atol=1e-4)


def test_a_row_is_its_own():
    policy = small_policy().eval()
    seen = observation()
    together = policy.predict_action_chunk(seen, noise_seeds=SEEDS, num_samples=3)
    one = {key: value[1:2] for key, value in seen.items()}
    torch.testing.assert_close(policy.predict_action_chunk(one, noise_seeds=SEEDS[1:2], num_samples=3), together[1:2])
    torch.testing.assert_close(policy.predict_action_chunk(seen), together[:, :1])  # the latent at zero
    assert not torch.allclose(together[:, 0], together[:, 1])
    assert not torch.allclose(together[:, 2], together[:, 1])
    with pytest.raises(ValueError, match="guidance"):
        policy.predict_action_chunk(seen, guidance=torch.sum)


def test_latent_noise_comes_from_window_and_epoch():
    policy = small_policy().train()
    noise = policy.on_before_batch_transfer(batch(4), 0)["latent_noise"]
    assert noise.shape == (4, 4)
    alone = policy.on_before_batch_transfer({key: value[2:3] for key, value in batch(4).items()}, 0)
    assert torch.equal(alone["latent_noise"], noise[2:3])
    policy._trainer.current_epoch = 1
    assert not torch.equal(policy.on_before_batch_transfer(batch(4), 0)["latent_noise"], noise)
    assert "latent_noise" not in policy.eval().on_before_batch_transfer(batch(4), 0)
    assert "latent_noise" not in small_policy(use_vae=False).train().on_before_batch_transfer(batch(4), 0)


def test_padding_does_not_count():
    policy = small_policy(dropout=0.0).train()
    whole, other = batch(), batch()
    other["action"][:, 6:] += 100.0
    (loss, parts), (other_loss, _) = policy.compute_loss(whole), policy.compute_loss(other)
    torch.testing.assert_close(loss, other_loss)
    policy.hparams["reduction"] = "all"
    torch.testing.assert_close(policy.compute_loss(whole)[1]["l1"], parts["l1"] * 6 / 8)
    none = whole | {"action_is_pad": torch.ones(3, 8, dtype=torch.bool)}
    policy.hparams["reduction"] = "valid"
    assert policy.compute_loss(none)[0].isfinite()


def test_normalisation_of_pictures():
    imagenet = small_policy().network.cameras
    torch.testing.assert_close(imagenet.image_mean, torch.tensor([[0.485, 0.456, 0.406]] * 2))
    ranged = small_policy(image_normalization="range").network.cameras
    torch.testing.assert_close(ranged.image_std, torch.full((2, 3), 0.5))
    data = Data()
    rename = {"class_path": "lightning_robot.transforms.named.RenameCameras", "init_args": {"names": {"top": "overhead"}}}
    policy = small_policy(data, image_normalization="data", transforms=[rename])
    assert policy.image_keys == ["observation.images.overhead", WRIST]
    assert {TOP, WRIST} <= set(data.asked)
    found = Data().statistics((TOP, WRIST))
    cameras = policy.network.cameras
    torch.testing.assert_close(cameras.image_mean, torch.from_numpy(np.stack([found[TOP].mean, found[WRIST].mean])).float())
    torch.testing.assert_close(cameras.image_std[0], torch.full((3,), 0.01))  # a camera that hardly shows anything
    torch.testing.assert_close(cameras.image_std[1], torch.from_numpy(found[WRIST].std).float())


def test_missing_imagenet_weights_are_said_and_recorded(capsys, monkeypatch):
    from lightning_robot.networks import image_backbone

    monkeypatch.setattr(image_backbone, "_imagenet_file", lambda name: (_ for _ in ()).throw(OSError("no network")))
    policy = small_policy(pretrained=True, backbone_norm="frozen_batch", backbone_width=1.0, backbone_stages=1)
    assert "RANDOM weights" in capsys.readouterr().out
    assert policy.hparams["pretrained"] is False


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs in bf16-mixed."""
    path = tmp_path_factory.mktemp("run")
    policy = ACT(**SMALL, learning_rate=1e-3, backbone_learning_rate=1e-4, warmup_steps=2, decay="cosine")

    class Loaders(LightningDataModule):
        def __init__(self):
            super().__init__()
            self.features, self.language = Data().features, None
            self.statistics = Data().statistics

        def train_dataloader(self):
            return torch.utils.data.DataLoader(Batches(), batch_size=2)

        val_dataloader = train_dataloader

    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=10.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
    )
    trainer.fit(policy, datamodule=Loaders())
    trainer.save_checkpoint(path / "act.ckpt")
    return policy, trainer, path / "act.ckpt"


def test_training_and_loading(trained):
    policy, trainer, path = trained
    assert isinstance(policy, LightningModule)
    assert {"train/l1", "train/kl", "val/loss"} <= set(trainer.logged_metrics) | set(trainer.callback_metrics)
    rest, backbone = trainer.optimizers[0].param_groups
    assert (rest["initial_lr"], backbone["initial_lr"]) == (1e-3, 1e-4)
    in_backbone = [parameter for name, parameter in policy.named_parameters() if ".backbone." in name]
    assert len(backbone["params"]) == len(in_backbone)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    loaded = load_policy(path)
    assert loaded.observation_keys == (STATE, TOP, WRIST)
    torch.testing.assert_close(loaded.predict_action_chunk(observation()), policy.eval().predict_action_chunk(observation()))
    torch.testing.assert_close(loaded.network.cameras.image_mean, policy.network.cameras.image_mean)


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a device: values of tensors as numbers."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert "local_scalar" not in str(function)
        assert "nonzero" not in str(function)
        return function(*arguments, **(keywords or {}))


def test_a_step_waits_for_no_device():
    policy = small_policy(use_depth=True).train()
    whole = policy.on_before_batch_transfer(batch(), 0)
    with NoWaiting():
        loss, parts = policy.compute_loss(whole)
        loss.backward()
    assert all(isinstance(part, torch.Tensor) for part in parts.values())


def test_networks_compile():
    policy = small_policy(cameras=["top"], dropout=0.0).train()
    whole = batch() | {"latent_noise": torch.randn(3, 4)}
    expected, _ = policy.compute_loss(whole)
    for network in policy.compilable:
        network.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(policy.compute_loss(whole)[0], expected)
